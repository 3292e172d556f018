"""How BEiT v2's tokenizer is learned (VQ-KD, arXiv 2208.06366): a teacher's features are regressed from codes alone."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError, option
from mapet.tokenizers.kmeans import kmeans
from mapet.tokenizers.vqkd import (
    HEAD_WIDTH,
    VQKD,
    nearest_code,
    num_heads_for,
    prefixed,
    task_layer,
    to_beit2_state_dict,
)

WINDOW, PATIENCE = 10, 32
"""Usage is averaged over as many steps as bring `PATIENCE` patches for each code, at least over `WINDOW`."""


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
        """What timm's optimisers leave as it is, beside biases and norms."""
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
        per_image = len(images), -1
        rows = flat.unflatten(0, per_image), codes.unflatten(0, per_image)
        return VQKDOutput(loss, reconstruction, commitment, each, *rows)

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
        found = kmeans(features.float(), len(self.usage), max_iter=10, seed=seed)
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
        drawn = torch.randperm(len(features), device=features.device)[
            torch.arange(size, device=features.device) % len(features)
        ]
        codebook.copy_(torch.where(dead[:, None], features[drawn], codebook))
        self.usage.masked_fill_(dead, 1 / size)
        return dead.sum()

    def weights(self) -> dict[str, Tensor]:
        """All of it under the released code's names, so that its own loading takes it too."""
        codebook, usage = self.tokenizer.codebook, self.usage
        return {
            **self.tokenizer.weights(),
            **prefixed("decoder", to_beit2_state_dict(self.decoder)),
            **prefixed("decode_task_layer", self.decode_task_layer.state_dict()),
            "quantize.cluster_size": usage,
            "quantize.embedding.cluster_size": usage.clone(),
            "quantize.embedding.embed_avg": codebook.clone(),
            "quantize.embedding.initted": torch.ones(1, device=codebook.device),
        }


def _check_layout(tokenizer: VQKD) -> None:
    """What is saved must load, and compute the same."""
    vit = tokenizer.encoder
    kind = f"the encoder must be a plain ViT with class token, learned positions and {HEAD_WIDTH} numbers a head"
    if {block.attn.num_heads for block in vit.blocks} != {num_heads_for(vit.embed_dim)}:
        raise MapetError(
            f"{kind}: give {option('model_args')} num_heads={num_heads_for(vit.embed_dim)} for embed_dim={vit.embed_dim}"
        )
    if len(set(tokenizer.image_size)) > 1 or len(set(vit.patch_embed.patch_size)) > 1:
        raise MapetError(f"a VQ-KD tokenizer is for square images: give {option('image_size')} one number")
    try:
        loaded = VQKD.from_weights(tokenizer.weights(), "the encoder")
    except MapetError as error:
        raise MapetError(f"{kind}, as vit_tiny_patch16_224 is ({error})") from None
    image = torch.rand(1, vit.in_chans, *tokenizer.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.allclose(loaded.eval()(image), tokenizer.eval()(image), atol=1e-5):
            raise MapetError(f"{kind}, GELU and norms of eps 1e-6, as vit_tiny_patch16_224 is")
