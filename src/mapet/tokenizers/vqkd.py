"""The tokenizer of BEiT v2 (VQ-KD, arXiv 2208.06366): a ViT whose patch features are unit vectors, with a codebook of unit vectors.

It is trained by regressing a teacher's features from the codes alone. Published files
(`vqkd_encoder_base_decoder_3x768x12_clip` and the like) and those that `train-tokenizer` writes have one layout, that of BEiT v2's code:

    encoder.*                    a ViT with class token and learned positions; its last norm is called fc_norm, and its attention has
                                 q_bias and v_bias but no bias of keys, which would not change the softmax
    encode_task_layer.{0,2}.*    linear, tanh, linear: to the codebook's few dimensions
    quantize.embedding.weight    the codes, unit vectors
    quantize.*, decoder.*, decode_task_layer.*    used in training alone
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

from mapet.config.tokenizers import TrainTokenizerConfig
from mapet.errors import MapetError, describe_key_error, format_size, option
from mapet.files import check_format, read_json
from mapet.tokenizers.kmeans import KMeans
from mapet.weights import describe_mismatch, first_names, read_weights

FORMAT = 1
DESCRIPTION = "vqkd.json"
"""File beside the weights that `train-tokenizer` writes."""
HEAD_DIM = 64
"""Width of an attention head of every ViT in this layout: the weights do not tell it."""
CODES = "quantize.embedding.weight"
TRAINING_ONLY = re.compile(r"quantize\.(?!embedding\.weight$)|decoder\.|decode_task_layer\.|teacher|scaling|loss")
"""Matches names of weights that are not needed to find codes."""
BLOCK_SIZE = 2048
"""Vectors whose cosines with all codes are computed at a time: with 8192 codes they take 64 MB."""
USAGE_MIN_STEPS, USAGE_PATCHES_PER_CODE = 10, 32
"""The usage of codes is averaged over about as many steps as bring 32 patches per code, but at least over 10."""
INIT_STD, LAYOUT_TOLERANCE = 0.02, 1e-5
"""Standard deviation of the task layers' initial weights, BEiT v2's; largest difference of outputs once saved and loaded."""
COMMITMENT_WEIGHT = 1.0
"""Weight of the commitment loss: the paper's."""
KMEANS_ROUNDS = 10
"""Rounds of k-means for the first codes."""
LEARNED_FROM = ("teacher", "teacher_weights_hash", "teacher_metadata", "label_free")
"""What the file says of the teacher."""
NOT_VQKD = "not a VQ-KD tokenizer as BEiT v2 publishes them"


class VQKD(nn.Module):
    """Maps images to a unit vector per patch; a patch's token is the code with the largest cosine.

    Attributes:
        encoder: timm's ViT.
        encode_task_layer: maps the ViT's tokens to the d dimensions of the codebook.
        codebook: (K, d) unit vectors.
        image_size: (h, w) of the images, pixels.
        metadata: mean and std of the input, number of prefix tokens dropped and, if it is known, 'learned_from' (see `load_vqkd`).
    """

    codebook: Tensor

    def __init__(self, encoder: VisionTransformer, codebook: Float[Tensor, "K d"]) -> None:
        """Add a task layer, with random weights, and a codebook, scaled to unit vectors, to an encoder."""
        super().__init__()
        self.encoder = encoder
        self.encode_task_layer = _make_task_layer(encoder.embed_dim, codebook.shape[1])
        self.register_buffer("codebook", F.normalize(codebook, dim=1))
        self.image_size: tuple[int, int] = tuple(encoder.patch_embed.img_size)
        half = [0.5] * encoder.in_chans
        self.metadata: dict[str, Any] = {"mean": half, "std": half, "prefix_tokens_dropped": encoder.num_prefix_tokens}

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B d rows columns"]:
        """Return a unit vector for each patch of images in [0, 1], at least in float32.

        The task layer computes in the dtype of its weights, also within autocast.

        Raises:
            MapetError: the images have another size than the encoder was made for.
        """
        if images.shape[2:] != self.image_size:
            sizes = f"for {format_size(self.image_size)} px, got {format_size(images.shape[2:])}"
            raise MapetError(f"this VQ-KD tokenizer is {sizes}: give {option('image_size', *self.image_size)}")
        tokens = self.encoder.forward_features(2 * images - 1)[:, self.encoder.num_prefix_tokens :]
        with torch.autocast(images.device.type, enabled=False):
            features = self.encode_task_layer(tokens.to(self.encode_task_layer[0].weight.dtype))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(features, dim=2).transpose(1, 2).unflatten(2, self.encoder.patch_embed.grid_size)

    @classmethod
    def from_beit2(cls, weights: Mapping[str, Tensor], source: object = "these weights") -> "VQKD":
        """Make a model of square images from weights in the published layout, with the sizes that the weights have.

        Args:
            weights: those of `TRAINING_ONLY` are ignored.
            source: file name or the like, for errors.

        Raises:
            MapetError: a weight is missing, unexpected, or of another shape.
        """
        with torch.device("meta"):  # no memory: every value comes from `weights`
            model = cls(_make_encoder(weights, source), torch.empty_like(weights[CODES], device="meta"))
        tensors = {name: tensor.float() for name, tensor in weights.items() if not TRAINING_ONLY.match(name)}
        if mismatch := describe_mismatch(tensors, to_beit2_state_dict(model.state_dict())):
            raise MapetError(f"{source}: {NOT_VQKD}: {mismatch}")
        tensors[CODES] = F.normalize(tensors[CODES], dim=1)
        model.load_state_dict(from_beit2_state_dict(tensors), assign=True)
        return model


def load_vqkd(checkpoint: str | Path | None) -> VQKD:
    """Read a VQ-KD tokenizer from a published file, or from one that `train-tokenizer` made.

    `metadata["learned_from"]` of the model is a dict with the keys of `LEARNED_FROM`, images_hash and num_images
    if there is a `vqkd.json` beside the file; else None.

    Args:
        checkpoint: None: the option was not given, which is an error.

    Returns:
        The tokenizer, in eval mode.

    Raises:
        MapetError: there is no such file, it is damaged, carries code, or is not a VQ-KD tokenizer.
    """
    if checkpoint is None:
        raise MapetError(f"teacher 'vqkd' needs a VQ-KD tokenizer's weights: give {option('teacher_checkpoint')} FILE")
    description, learned_from = Path(checkpoint).with_name(DESCRIPTION), None
    if description.exists():
        try:
            content = read_json(description, "VQ-KD tokenizer")
            check_format(content["format_version"], FORMAT, "VQ-KD tokenizer", description)
            learned_from = {name: content.get(name) for name in LEARNED_FROM}
            learned_from |= {name: content["training"][name] for name in ("images_hash", "num_images")}
        except (ValueError, KeyError, TypeError) as error:
            raise MapetError(
                f"{description}: not the description of a VQ-KD tokenizer ({describe_key_error(error)}): restore it or move it away"
            ) from None
    model = VQKD.from_beit2(read_weights(checkpoint), checkpoint).eval()
    model.metadata["learned_from"] = learned_from
    return model


def nearest_code(features: Float[Tensor, "n d"], codebook: Float[Tensor, "K d"]) -> Int[Tensor, " n"]:
    """Return the index of the code with the largest cosine to each vector, computed in the vectors' dtype, also within autocast.

    Args:
        features: unit vectors, of the same dtype and device as the codebook.
        codebook: unit vectors, so that a dot product is a cosine.
    """
    with torch.autocast(features.device.type, enabled=False):
        return torch.cat([(block @ codebook.T).argmax(1) for block in features.split(BLOCK_SIZE)])


def _make_task_layer(width: int, out_features: int) -> nn.Sequential:
    """Return linear, tanh, linear, initialized as in BEiT v2; the inner layer has `width` units, too."""
    first, last = nn.Linear(width, width), nn.Linear(width, out_features)
    for linear in (first, last):
        nn.init.trunc_normal_(linear.weight, std=INIT_STD)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.Tanh(), last)


def num_heads_for(width: int) -> int:
    """Return the number of attention heads of a ViT of this width in the published layout."""
    return max(1, width // HEAD_DIM)


def to_beit2_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of a state dict of `VQKD` and of the decoder as BEiT v2's code does.

    The last norm of encoder and decoder is renamed, and the bias of q, k and v split; that of the keys is omitted, as it does not
    change the output.
    """
    weights = {re.sub(r"(?<=coder\.)norm\.", "fc_norm.", name): tensor for name, tensor in state.items()}
    weights[CODES] = weights.pop("codebook")
    for name in [name for name in weights if name.endswith("attn.qkv.bias")]:
        prefix = name.removesuffix("qkv.bias")
        weights[prefix + "q_bias"], _, weights[prefix + "v_bias"] = weights.pop(name).chunk(3)
    return weights


def from_beit2_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights in BEiT v2's layout to the names of `VQKD` and of the decoder: the inverse of `to_beit2_state_dict`.

    Args:
        weights: with 'quantize.embedding.weight', and with a `v_bias` for each `q_bias`; not changed.

    Returns:
        A new dict. The bias of the keys, which the layout lacks, is zero.
    """
    state = {re.sub(r"(?<=coder\.)fc_norm\.", "norm.", name): tensor for name, tensor in weights.items()}
    state["codebook"] = state.pop(CODES)
    for name in [name for name in state if name.endswith("attn.q_bias")]:
        prefix = name.removesuffix("q_bias")
        q, v = state.pop(name), state.pop(prefix + "v_bias")
        state[prefix + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return state


def _make_encoder(weights: Mapping[str, Tensor], source: object) -> VisionTransformer:
    """Return a ViT of the sizes that weights in the published layout have, for square images, without these weights.

    Args:
        weights: in the published layout.
        source: file name or the like, for errors.

    Raises:
        MapetError: a weight that tells a size, or the codebook, is missing; or the sizes contradict each other.
    """
    try:
        width, channels, patch_size, _ = weights["encoder.patch_embed.proj.weight"].shape
        grid_side = math.isqrt(weights["encoder.pos_embed"].shape[1] - 1)  # without the class token
        blocks = [match for name in weights if (match := re.match(r"encoder\.blocks\.(\d+)\.", name))]
        depth = 1 + max(int(block[1]) for block in blocks)
        mlp_width, _ = weights["encoder.blocks.0.mlp.fc1.weight"].shape
        _num_codes, _codebook_dim = weights[CODES].shape  # ValueError unless it is a matrix
        return VisionTransformer(
            grid_side * patch_size, patch_size, channels, num_classes=0, embed_dim=width, depth=depth,
            num_heads=num_heads_for(width), mlp_ratio=(mlp_width + 0.5) / width,  # timm rounds down
        )  # fmt: skip
    except KeyError as error:
        names = first_names(sorted(weights)) or "nothing"
        raise MapetError(f"{source}: {NOT_VQKD}: expected a weight {error.args[0]!r}, found {names}") from None
    except (ValueError, IndexError, ZeroDivisionError, AssertionError):
        raise MapetError(
            f"{source}: {NOT_VQKD}: the shapes of its weights contradict each other: restore the file"
        ) from None


class VQKDOutput(NamedTuple):
    """Losses and codes of a batch.

    Attributes:
        loss: reconstruction + `COMMITMENT_WEIGHT` * commitment.
        reconstruction: 1 - cosine of the decoder's output and the teacher's features, mean over patches.
        commitment: mean squared difference between the encoder's outputs and their codes.
        loss_per_image: without a gradient; each with the batch's commitment.
        features: the encoder's outputs, unit vectors, without a gradient.
        codes: index of each patch's code.
    """

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    commitment: Float[Tensor, ""]
    loss_per_image: Float[Tensor, " B"]
    features: Float[Tensor, "B N d"]
    codes: Int[Tensor, "B N"]


class VQKDForTraining(nn.Module):
    """Encoder -> codes -> decoder -> the teacher's features.

    Gradients pass from the decoder to the encoder as if there were no codes between (straight-through estimator). Codes follow the
    encoder by an exponential moving average; one that hardly any patch has becomes the feature of a random patch.

    Attributes:
        tokenizer: encoder and codebook.
        decoder: a ViT as wide as the encoder, whose input is the grid of codes.
        usage: (K,) moving average of the fraction of patches that have each code.
    """

    usage: Tensor

    def __init__(self, encoder: VisionTransformer, feature_size: int, config: TrainTokenizerConfig) -> None:
        """Build decoder and codebook, with random weights, around an encoder.

        Args:
            encoder: a ViT of the published kind: class token, learned positions, `HEAD_DIM` dimensions per attention head.
            feature_size: F, width of the teacher's features.
            config: vocab_size (not None), codebook_dim, decoder_depth, ema_decay and dead_code_threshold are used.

        Raises:
            MapetError: the encoder is another kind of ViT, which the published layout cannot hold.
        """
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.tokenizer = VQKD(encoder, torch.randn(config.vocab_size, config.codebook_dim))
        _check_layout(self.tokenizer)
        self.decoder = VisionTransformer(
            encoder.patch_embed.grid_size, 1, config.codebook_dim, num_classes=0, embed_dim=encoder.embed_dim,
            depth=config.decoder_depth, num_heads=num_heads_for(encoder.embed_dim),
        )  # fmt: skip
        self.decode_task_layer = _make_task_layer(encoder.embed_dim, feature_size)
        self.register_buffer("usage", torch.full((config.vocab_size,), 1 / config.vocab_size))

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that timm's optimizers do not decay, beside biases and norms: positions and single tokens."""
        vits = {"tokenizer.encoder": self.tokenizer.encoder, "decoder": self.decoder}
        return {f"{prefix}.{name}" for prefix, vit in vits.items() for name in vit.no_weight_decay()}

    def forward(self, images: Float[Tensor, "B C H W"], targets: Float[Tensor, "B F rows columns"]) -> VQKDOutput:
        """Encode images, quantize, decode, and compare with the teacher's features.

        Args:
            images: in [0, 1].
            targets: the teacher's features of the same views. A feature of length 0 (a black patch's pixels) has a reconstruction loss of
                1, whatever is predicted.
        """
        dtype = self.decoder.pos_embed.dtype
        features = self.tokenizer(images.to(dtype))
        vectors = features.detach().movedim(1, -1).flatten(0, 2)
        codes = nearest_code(vectors, self.tokenizer.codebook)
        quantized = self.tokenizer.codebook[codes].view_as(features.movedim(1, -1)).movedim(-1, 1)
        commitment = F.mse_loss(features, quantized)
        prediction = self.decode((features + (quantized - features).detach()).to(dtype))  # straight-through
        cosine = F.cosine_similarity(prediction.to(targets.dtype), targets, dim=1)
        reconstruction = 1 - cosine.mean()
        loss = reconstruction + COMMITMENT_WEIGHT * commitment
        loss_per_image = 1 - cosine.detach().flatten(1).mean(1) + COMMITMENT_WEIGHT * commitment.detach()
        vectors, codes = (rows.unflatten(0, (len(images), -1)) for rows in (vectors, codes))
        return VQKDOutput(loss, reconstruction, commitment, loss_per_image, vectors, codes)

    def decode(self, quantized: Float[Tensor, "B d rows columns"]) -> Float[Tensor, "B F rows columns"]:
        """Predict the teacher's features from the codes of patches.

        Args:
            quantized: the code, a unit vector, of each patch, in the decoder's dtype.

        Returns:
            A feature of any length for each patch: the loss compares only directions, by cosine.
        """
        tokens = self.decoder.forward_features(quantized)[:, self.decoder.num_prefix_tokens :]
        return self.decode_task_layer(tokens).transpose(1, 2).unflatten(2, quantized.shape[2:])

    @torch.no_grad()
    def init_codebook_kmeans(self, features: Float[Tensor, "n d"], seed: int = 0) -> None:
        """Set the codes to the directions of k-means centroids of the encoder's outputs, and `usage` to the fraction of each cluster.

        Args:
            features: unit vectors.
            seed: of the draw of the first centroids.

        Raises:
            MapetError: there are fewer features than codes.
        """
        clusters = KMeans(len(self.usage), KMEANS_ROUNDS, seed=seed).fit(features.float())
        self.tokenizer.codebook.copy_(F.normalize(clusters.centroids, dim=1))
        self.usage.copy_(clusters.counts / len(features))

    @torch.no_grad()
    def ema_update_codebook(self, features: Float[Tensor, "n d"], codes: Int[Tensor, " n"]) -> Int[Tensor, ""]:
        """Update codebook and usage by the features of a training batch, then replace the dead codes; return how many were dead.

            code_k  <- unit(ema_decay * code_k + (1 - ema_decay) * unit(sum of the features that have code k)), if there are any
            usage_k <- usage_k + (fraction of the patches that have code k - usage_k) / number of steps it is averaged over

        A code is dead if its usage is below `dead_code_threshold` / K. It becomes the feature of a random patch, with a usage of 1 / K.

        Args:
            features: the encoder's outputs, unit vectors.
            codes: index of each feature's code.
        """
        codebook, num_codes = self.tokenizer.codebook, len(self.usage)
        counts = torch.bincount(codes, minlength=num_codes)
        steps = max(USAGE_MIN_STEPS, USAGE_PATCHES_PER_CODE * num_codes / len(codes))
        self.usage.lerp_(counts.to(self.usage) / len(codes), 1 / steps)
        sums = torch.zeros_like(codebook).index_add_(0, codes, features)
        moved = F.normalize(codebook.lerp(F.normalize(sums, dim=1), 1 - self.config.ema_decay), dim=1)
        codebook.copy_(torch.where(counts[:, None] > 0, moved, codebook))
        # A patch is drawn for every code, dead or not: so the CPU need not wait for the device to count the dead ones.
        dead = self.usage < self.config.dead_code_threshold / num_codes
        order = torch.randperm(len(features), device=features.device)
        random_features = features[order[torch.arange(num_codes, device=features.device) % len(features)]]
        codebook.copy_(torch.where(dead[:, None], random_features, codebook))
        self.usage.masked_fill_(dead, 1 / num_codes)
        return dead.sum()

    def beit2_state_dict(self) -> dict[str, Tensor]:
        """Return all weights in the published layout, with the entries of training that BEiT v2's strict loading expects."""
        state = {name.removeprefix("tokenizer."): tensor for name, tensor in self.state_dict().items()}
        usage = state.pop("usage")
        return to_beit2_state_dict(state) | {
            "quantize.cluster_size": usage, "quantize.embedding.cluster_size": usage.clone(),
            "quantize.embedding.embed_avg": state["codebook"].clone(), "quantize.embedding.initted": torch.ones(1, device=usage.device),
        }  # fmt: skip


def _check_layout(tokenizer: VQKD) -> None:
    """Check that the tokenizer can be saved in BEiT v2's published layout and, loaded again, computes the same.

    The layout has no entry for the number of heads, the activation or the eps of norms: loading assumes heads of `HEAD_DIM` dimensions,
    GELU and 1e-6. Whether activation and norms are these is tested on a random image.

    Args:
        tokenizer: is set to eval mode.

    Raises:
        MapetError: its encoder has weights that the layout does not have, lacks some, or differs from what loading assumes.
    """
    vit, num_heads = tokenizer.encoder, tokenizer.encoder.blocks[0].attn.num_heads
    if num_heads != (expected := num_heads_for(vit.embed_dim)):
        problem = f"the encoder has {num_heads} heads of {vit.embed_dim // num_heads} dimensions, expected {expected} of {HEAD_DIM}"
        hint = f"give {option('model_args')} num_heads={expected} for embed_dim={vit.embed_dim}"
        raise MapetError(f"{problem}: {hint}", field="model_args")
    problem = ""
    image = torch.rand(1, vit.in_chans, *tokenizer.image_size, generator=torch.Generator().manual_seed(0))
    try:
        loaded = VQKD.from_beit2(to_beit2_state_dict(tokenizer.state_dict()), "saved").eval()
        with torch.no_grad():
            if not torch.allclose(loaded(image), tokenizer.eval()(image), atol=LAYOUT_TOLERANCE):
                problem = "loaded again it computes other values: expected GELU and norms of eps 1e-6"
    except MapetError as error:
        problem = str(error).removeprefix(f"saved: {NOT_VQKD}: ")
    if problem:
        hint = f"choose another {option('model')}, a plain ViT with class token and learned positions, e.g. vit_tiny_patch16_224"
        raise MapetError(f"the encoder does not fit BEiT v2's layout ({problem}): {hint}", field="model")
