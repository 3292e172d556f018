"""The tokenizer of BEiT v2 (VQ-KD, arXiv 2208.06366): a ViT whose patch features are unit vectors with a codebook of their own.

It is learned by regressing a teacher's features from its codes alone. Published files
(`vqkd_encoder_base_decoder_3x768x12_clip` and its kin) and those that `train-tokenizer` makes are of one layout, which is the
released code's:

    encoder.*                    a ViT: class token, learned positions; its last norm is called fc_norm, and its attention has
                                 q_bias and v_bias but none for keys, which would change no softmax
    encode_task_layer.{0,2}.*    linear, tanh, linear: to the codebook's few dimensions
    quantize.embedding.weight    the codes, unit vectors
    quantize.*, decoder.*, decode_task_layer.*    of training alone
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError, format_size, option
from mapet.files import check_format, read_json
from mapet.tokenizers.kmeans import KMeans
from mapet.weights import describe_mismatch, first_names, read_weights

FORMAT = 1
DESCRIPTION = "vqkd.json"
"""Beside the file, where `train-tokenizer` made it."""
HEAD_WIDTH = 64
"""Numbers an attention head has, in every ViT that the layout is for: the weights themselves don't tell."""
CODES = "quantize.embedding.weight"
TRAINING_ONLY = ("quantize.", "decoder.", "decode_task_layer.", "teacher", "scaling", "loss")
"""Beginnings of names that looking up codes has no use for."""
ROWS = 2048
"""Vectors at a time: their table of cosines with 8192 codes takes 64 MB."""
WINDOW, PATIENCE = 10, 32
"""Usage is averaged over as many steps as bring `PATIENCE` patches for each code, at least over `WINDOW`."""
NO_VQKD = "not a VQ-KD tokenizer as BEiT v2 publishes them"


class VQKD(nn.Module):
    """Images -> one unit vector a patch, to be named by the code with the largest cosine.

    Attributes:
        encoder: timm's ViT.
        codebook: (K, d) unit vectors.
        image_size: (h, w) of the images, pixels.
        metadata: how it takes images, and what it was learned from if that is known (see `Teacher.metadata`).
    """

    codebook: Tensor

    def __init__(self, encoder: VisionTransformer, codebook: Float[Tensor, "K d"]) -> None:
        super().__init__()
        self.encoder = encoder
        self.encode_task_layer = task_layer(encoder.embed_dim, codebook.shape[1])
        self.register_buffer("codebook", F.normalize(codebook, dim=1))
        self.image_size: tuple[int, int] = tuple(encoder.patch_embed.img_size)
        half = [0.5] * encoder.in_chans
        self.metadata: dict[str, Any] = {"mean": half, "std": half, "prefix_tokens_dropped": encoder.num_prefix_tokens}

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B d rows columns"]:
        """Unit vectors of images in [0, 1]. The task layer computes in its own precision, also within autocast.

        Raises:
            MapetError: images of another size.
        """
        if images.shape[2:] != self.image_size:
            raise MapetError(
                f"this VQ-KD tokenizer is for {format_size(self.image_size)} px, got {format_size(images.shape[2:])}"
            )
        tokens = self.encoder.forward_features(2 * images - 1)[:, self.encoder.num_prefix_tokens :]
        with torch.autocast(images.device.type, enabled=False):
            features = self.encode_task_layer(tokens.to(self.encode_task_layer[0].weight.dtype))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(features, dim=2).transpose(1, 2).unflatten(2, self.encoder.patch_embed.grid_size)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], source: object = "these weights") -> "VQKD":
        """Sizes are those of the weights; images are square.

        Args:
            source: what errors name.

        Raises:
            MapetError: something is missing, too much, or of another shape.
        """
        with torch.device("meta"):  # every number comes from the file
            model = cls(_empty_encoder(weights, source), torch.empty_like(weights[CODES], device="meta"))
        unused = {name for name in weights if name.startswith(TRAINING_ONLY) and name != CODES}
        given = {name: tensor.float() for name, tensor in weights.items() if name not in unused}
        if mismatch := describe_mismatch(given, to_published(model.state_dict())):
            raise MapetError(f"{source}: {NO_VQKD}: {mismatch}")
        given[CODES] = F.normalize(given[CODES], dim=1)
        model.load_state_dict(from_published(given), assign=True)
        return model


def vqkd_encoder(checkpoint: str | Path | None) -> VQKD:
    """The tokenizer of a file: a published one, or one that `train-tokenizer` made.

    Raises:
        MapetError: no such file, damaged, with code in it, or not a VQ-KD tokenizer.
    """
    if checkpoint is None:
        raise MapetError(f"a VQ-KD tokenizer comes from a file: give {option('teacher_checkpoint')} FILE")
    description, learned_from = Path(checkpoint).with_name(DESCRIPTION), None
    if description.exists():
        try:
            content = read_json(description, "VQ-KD tokenizer")
            check_format(content["format_version"], FORMAT, "VQ-KD tokenizer", description)
            learned_from = {name: content.get(name) for name in ("teacher", "teacher_weights_hash", "teacher_metadata")}
            learned_from |= {name: content["training"][name] for name in ("images_hash", "num_images")}
        except (ValueError, KeyError, TypeError) as error:
            raise MapetError(f"{description}: not of a VQ-KD tokenizer ({error})") from None
    model = VQKD.from_weights(read_weights(checkpoint), checkpoint).eval()
    model.metadata["learned_from"] = learned_from
    return model


def nearest_code(features: Float[Tensor, "n d"], codebook: Float[Tensor, "K d"]) -> Int[Tensor, " n"]:
    """The code with the largest cosine of each unit vector, in the vectors' own precision, also within autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return torch.cat([(block @ codebook.T).argmax(1) for block in features.split(ROWS)])


def task_layer(width: int, out: int) -> nn.Sequential:
    """Linear, tanh, linear: between a transformer and what it is to give."""
    first, last = nn.Linear(width, width), nn.Linear(width, out)
    for linear in (first, last):
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.Tanh(), last)


def num_heads_for(width: int) -> int:
    """Attention heads of a ViT of this width."""
    return max(1, width // HEAD_WIDTH)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a state dict the released code's names. A bias of the keys is left out: it changes no output."""
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            weights |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            weights[CODES if name == "codebook" else re.sub(r"(?<=coder\.)norm\.", "fc_norm.", name)] = tensor
    return weights


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `to_published`."""
    state = {}
    for name, tensor in weights.items():
        if name.endswith("attn.q_bias"):
            v = weights[name.replace("q_bias", "v_bias")]
            state[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(v), v])
        elif not name.endswith("attn.v_bias"):
            state["codebook" if name == CODES else re.sub(r"(?<=coder\.)fc_norm\.", "norm.", name)] = tensor
    return state


def _empty_encoder(weights: Mapping[str, Tensor], source: object) -> VisionTransformer:
    """The ViT that the weights are of, on the device of the context."""
    try:
        width, channels, patch, _ = weights["encoder.patch_embed.proj.weight"].shape
        side = math.isqrt(weights["encoder.pos_embed"].shape[1] - 1)
        depth = 1 + max(int(found[1]) for name in weights if (found := re.match(r"encoder\.blocks\.(\d+)\.", name)))
        hidden, _ = weights["encoder.blocks.0.mlp.fc1.weight"].shape
        codes, _ = weights[CODES].shape
        ratio = (hidden + 0.5) / width  # timm rounds down
        heads = num_heads_for(width)
        return VisionTransformer(
            side * patch, patch, channels, 0, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=ratio
        )
    except KeyError as error:
        raise MapetError(
            f"{source}: {NO_VQKD}: it has no {error.args[0]!r}, but {first_names(sorted(weights)) or 'nothing'}"
        ) from None
    except (ValueError, IndexError, ZeroDivisionError, AssertionError):
        raise MapetError(f"{source}: {NO_VQKD}: its sizes don't fit together") from None


class VQKDOutput(NamedTuple):
    """What a batch gives.

    Attributes:
        loss: the reconstruction's and the commitment's, weighted.
        reconstruction: 1 - cosine of the decoder's output and the teacher's features, mean over patches.
        commitment: mean squared difference of an encoder output's numbers from its code's.
        loss_per_image: without a gradient.
        features: unit vectors of the patches, without a gradient.
        codes: their codes.
    """

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    commitment: Float[Tensor, ""]
    loss_per_image: Float[Tensor, " B"]
    features: Float[Tensor, "B N d"]
    codes: Int[Tensor, "B N"]


class VQKDForTraining(nn.Module):
    """Encoder -> codes -> decoder -> the teacher's features.

    Gradients pass from the decoder to the encoder as if there were no codes between (straight through); codes follow the
    encoder by an exponential moving average, and one that hardly any patch has moves to where a patch is.

    Args:
        encoder: a ViT of the published kind (class token, learned positions, 64 numbers a head).
        vocab_size: K, codes.
        code_dim: d, numbers of a code (the paper: 32).
        feature_size: F, of the teacher.
        decoder_depth: blocks of the decoder, as wide as the encoder's (the paper: 1 or 3).
        decay: of the codes' moving average, a step (the paper: 0.99).
        dead_code_threshold: a code whose moving share of the patches falls under this part of an even share is dead; 0: none is.
        commitment_weight: of its loss (the paper: 1).

    Raises:
        MapetError: the encoder is another kind of ViT, which the published layout has no names for.
    """

    usage: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        vocab_size: int,
        code_dim: int,
        feature_size: int,
        decoder_depth: int = 3,
        decay: float = 0.99,
        dead_code_threshold: float = 0.05,
        commitment_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.tokenizer = VQKD(encoder, torch.randn(vocab_size, code_dim))
        _check_layout(self.tokenizer)
        width, grid = encoder.embed_dim, encoder.patch_embed.grid_size
        self.decoder = VisionTransformer(
            grid, 1, code_dim, 0, embed_dim=width, depth=decoder_depth, num_heads=num_heads_for(width)
        )
        self.decode_task_layer = task_layer(width, feature_size)
        self.register_buffer("usage", torch.full((vocab_size,), 1 / vocab_size))
        self.decay, self.dead_code_threshold, self.commitment_weight = decay, dead_code_threshold, commitment_weight

    def no_weight_decay(self) -> set[str]:
        """What timm's optimizers leave as it is, beside biases and norms."""
        return {f"{vit}.{name}" for vit in ("tokenizer.encoder", "decoder") for name in ("cls_token", "pos_embed")}

    def forward(self, images: Float[Tensor, "B C H W"], targets: Float[Tensor, "B F rows columns"]) -> VQKDOutput:
        """
        Args:
            images: in [0, 1].
            targets: the teacher's features of the same views. One of length 0 (a black patch's pixels) counts 1 whatever
                is predicted.
        """
        dtype = self.decoder.pos_embed.dtype
        features = self.tokenizer(images.to(dtype))
        flat = features.detach().movedim(1, -1).flatten(0, 2)
        codes = nearest_code(flat, self.tokenizer.codebook)
        quantized = self.tokenizer.codebook[codes].view_as(features.movedim(1, -1)).movedim(-1, 1)
        commitment = F.mse_loss(features, quantized)
        prediction = self.decode((features + (quantized - features).detach()).to(dtype))
        cosine = F.cosine_similarity(prediction.to(targets.dtype), targets, dim=1)
        reconstruction = 1 - cosine.mean()
        loss = reconstruction + self.commitment_weight * commitment
        each = 1 - cosine.detach().flatten(1).mean(1) + self.commitment_weight * commitment.detach()
        flat, codes = (rows.unflatten(0, (len(images), -1)) for rows in (flat, codes))
        return VQKDOutput(loss, reconstruction, commitment, each, flat, codes)

    def decode(self, quantized: Float[Tensor, "B d rows columns"]) -> Float[Tensor, "B F rows columns"]:
        """The teacher's features, up to their length."""
        tokens = self.decoder.forward_features(quantized)[:, self.decoder.num_prefix_tokens :]
        return self.decode_task_layer(tokens).transpose(1, 2).unflatten(2, quantized.shape[2:])

    @torch.no_grad()
    def init_codebook_kmeans(self, features: Float[Tensor, "n d"], seed: int = 0) -> None:
        """Codes become the directions of k-means' centroids.

        Raises:
            MapetError: fewer vectors than codes.
        """
        found = KMeans(len(self.usage), max_iter=10, seed=seed).fit(features.float())
        self.tokenizer.codebook.copy_(F.normalize(found.centroids, dim=1))
        self.usage.copy_(found.counts / len(features))

    @torch.no_grad()
    def ema_update_codebook(self, features: Float[Tensor, "n d"], codes: Int[Tensor, " n"]) -> Int[Tensor, ""]:
        """One step of the moving averages, for each batch that is trained on.

            code_k  <- unit(decay * code_k + (1 - decay) * unit(mean of k's features)), if there are any
            usage_k <- usage_k + (share of the patches that have code k - usage_k) / steps it is averaged over

        A dead code then becomes the feature of a random patch and has an even share to begin with.

        Returns:
            how many were dead.
        """
        codebook, size = self.tokenizer.codebook, len(self.usage)
        counts = torch.bincount(codes, minlength=size)
        self.usage.lerp_(counts.to(self.usage) / len(codes), 1 / max(WINDOW, PATIENCE * size / len(codes)))
        sums = torch.zeros_like(codebook).index_add_(0, codes, features)
        moved = F.normalize(codebook.lerp(F.normalize(sums, dim=1), 1 - self.decay), dim=1)
        codebook.copy_(torch.where(counts[:, None] > 0, moved, codebook))
        # Dead or not, every code has a patch drawn for it: nothing waits for the device to say how many there are.
        dead = self.usage < self.dead_code_threshold / size
        order = torch.randperm(len(features), device=features.device)
        drawn = features[order[torch.arange(size, device=features.device) % len(features)]]
        codebook.copy_(torch.where(dead[:, None], drawn, codebook))
        self.usage.masked_fill_(dead, 1 / size)
        return dead.sum()

    def weights(self) -> dict[str, Tensor]:
        """All of it under the released code's names, so that its own loading takes it too."""
        state = {name.removeprefix("tokenizer."): tensor for name, tensor in self.state_dict().items()}
        usage = state.pop("usage")
        return to_published(state) | {
            "quantize.cluster_size": usage, "quantize.embedding.cluster_size": usage.clone(),
            "quantize.embedding.embed_avg": state["codebook"].clone(), "quantize.embedding.initted": torch.ones(1, device=usage.device),
        }  # fmt: skip


def _check_layout(tokenizer: VQKD) -> None:
    """What is saved must load, and compute the same."""
    vit = tokenizer.encoder
    kind = f"the encoder must be a plain ViT with class token, learned positions and {HEAD_WIDTH} numbers a head"
    heads = num_heads_for(vit.embed_dim)
    if any(block.attn.num_heads != heads for block in vit.blocks):
        raise MapetError(f"{kind}: give {option('model_args')} num_heads={heads} for embed_dim={vit.embed_dim}")
    if len(set(tokenizer.image_size)) > 1 or len(set(vit.patch_embed.patch_size)) > 1:
        raise MapetError(f"a VQ-KD tokenizer is for square images: give {option('image_size')} one number")
    try:
        loaded = VQKD.from_weights(to_published(tokenizer.state_dict()), "the encoder")
    except MapetError as error:
        raise MapetError(f"{kind}, as vit_tiny_patch16_224 is ({error})") from None
    image = torch.rand(1, vit.in_chans, *tokenizer.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.allclose(loaded.eval()(image), tokenizer.eval()(image), atol=1e-5):
            raise MapetError(f"{kind}, GELU and norms of eps 1e-6, as vit_tiny_patch16_224 is")
