"""CAE: the encoder runs on visible patches alone; a regressor predicts the latents of hidden ones, a decoder their tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block, VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from mapet.data.dataset import Batch
from mapet.errors import MapetError, option
from mapet.models.losses import TargetKind, at_least_float32
from mapet.models.objectives import CAE
from mapet.models.packing import QueryBlock, gather_patches, two_stream_attention
from mapet.models.pretraining import (
    DropPathScale,
    PreTrainingOutput,
    ViTForPreTraining,
    drop_path_scales,
    residual_update,
    run_block,
)

REGRESSOR_DEPTH = 4
"""Blocks of the regressor, and of the decoder (the paper's for ViT-B)."""
ALIGNMENT_WEIGHT = 2.0
"""Weight of the alignment loss."""


class ContextAutoencoder(ViTForPreTraining):
    """Context autoencoder (arXiv 2202.03026, section 3) over an unmodified timm ViT.

    Mask queries (mask token + position) pass through the latent regressor: blocks whose keys and values are the encoder's
    latents of the visible patches and the queries themselves. The alignment loss is the mean squared difference of what
    comes out from the encoder's latents of the hidden patches, without gradient; the decoder, blocks among those rows
    alone, and the head give the logits. The paper adds positions in every block of regressor and decoder; here they are
    added once.

    Args: as `ViTForPreTraining`'s, without `num_predict`.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        vocab_size: int,
        num_context: int,
        num_predict: int | None = None,
        target: TargetKind = "tokens",
        separate_query_token: bool = False,
    ) -> None:
        super().__init__(vit, vocab_size, CAE, num_context, None, target, separate_query_token)
        if num_predict is not None:
            raise MapetError(f"objective 'cae' predicts all hidden patches at once: leave out {option('num_predict')}")
        self.regressor, self.decoder = _make_blocks(vit), _make_blocks(vit)
        self.decoder_norm = type(vit.blocks[0].norm1)(vit.embed_dim)

    def forward(self, batch: Batch) -> PreTrainingOutput:
        """Compute the loss of the tokens plus `ALIGNMENT_WEIGHT` times that of the latents; see `ViTForPreTraining.forward`."""
        rows, alignment = self.forward_latents(batch)
        output = self.compute_loss(rows, self.hidden_targets(batch))
        return output._replace(loss=output.loss + ALIGNMENT_WEIGHT * alignment)

    def predict(self, batch: Batch) -> Float[Tensor, "B p V"]:
        """Return the logits of the p hidden patches, in permutation order."""
        return self.head(self.forward_latents(batch)[0])

    def forward_latents(self, batch: Batch) -> tuple[Float[Tensor, "B p D"], Float[Tensor, ""]]:
        """Return what the head reads, and the alignment loss."""
        assert batch.permutation is not None
        c = self.num_context if batch.num_context is None else batch.num_context
        context, hidden = batch.permutation[:, :c], batch.permutation[:, c:]
        visible = self.encode_patches(batch, context)
        with torch.no_grad():
            target_latents = self.encode_patches(batch, hidden)[:, self.vit.num_prefix_tokens :]
        positions = self.vit.pos_embed[:, -self.num_patches :].expand(len(hidden), -1, -1)
        rows = self.mask_token + gather_patches(positions, hidden)
        for block in self.regressor:
            rows = run_block(regress, block, rows, visible)
        alignment = F.mse_loss(at_least_float32(rows), at_least_float32(target_latents))
        return self.decoder_norm(self.decoder(rows)), alignment

    def encode_patches(self, batch: Batch, indices: Int[Tensor, "B n"]) -> Float[Tensor, "B T D"]:
        """Run the ViT's own pass over its prefix tokens and these patches alone."""
        vit = self.vit
        assert batch.images is not None
        embedded = vit._pos_embed(vit.patch_embed(batch.images.to(self.mask_token.dtype)))
        prefix, patches = embedded.split([vit.num_prefix_tokens, self.num_patches], dim=1)
        rows = vit.norm_pre(torch.cat([prefix, gather_patches(patches, indices)], dim=1))
        for block, scale in zip(vit.blocks, drop_path_scales(vit, batch.drop_path_rand, rows), strict=True):
            rows = run_block(encode, block, rows, scale)
        return vit.norm(rows)


def encode(block: Block, rows: Float[Tensor, "B T D"], scale: DropPathScale) -> Float[Tensor, "B T D"]:
    """Run a timm Block with the given draws of stochastic depth."""
    return residual_update(block, rows, block.attn(block.norm1(rows)), scale)


def regress(block: Block, rows: Float[Tensor, "B p D"], visible: Float[Tensor, "B T D"]) -> Float[Tensor, "B p D"]:
    """Run a timm Block in which the mask queries attend to the encoder's latents and to each other."""
    q = block.norm1(rows)
    kv = torch.cat([block.norm1(visible), q], dim=1)
    unmasked = [QueryBlock(slice(None), slice(None), masked=False)]
    return residual_update(block, rows, two_stream_attention(block.attn, kv, q, rows.new_empty(0), unmasked))


def _make_blocks(vit: VisionTransformer) -> nn.Sequential:
    """Make `REGRESSOR_DEPTH` fresh blocks like the ViT's, without stochastic depth."""
    first = vit.blocks[0]
    options = {
        "num_heads": first.attn.num_heads,
        "mlp_ratio": first.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": first.attn.qkv.bias is not None,
        "init_values": float(first.ls1.gamma.detach()[0]) if hasattr(first.ls1, "gamma") else None,
        "norm_layer": type(first.norm1),
    }
    blocks = nn.Sequential(*(Block(vit.embed_dim, **options) for _ in range(REGRESSOR_DEPTH)))
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            init_weights_vit_timm(module)
        if isinstance(module, Block):
            module.attn.fused_attn = first.attn.fused_attn
    return blocks
