"""CAE: the encoder runs on visible patches alone; a regressor predicts the latents of masked ones, a decoder their targets.

Sizes: B images, N patches, c context and p = N - c masked ones; D embedding dimensions.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mapet.data.dataset import Batch
from mapet.errors import MapetError, option
from mapet.models.objectives import CAE
from mapet.models.packing import QueryBlock, gather_patches, two_stream_attention
from mapet.models.pretraining import (
    DropPathScale,
    PreTrainingOutput,
    TargetKind,
    ViTForPreTraining,
    at_least_float32,
    drop_path_scales,
    residual_update,
    run_block,
)

REGRESSOR_DEPTH = 4
"""Blocks of the regressor, and of the decoder (the paper's for ViT-B)."""
ALIGNMENT_WEIGHT = 2.0
"""Weight of the alignment loss (the paper's)."""


class RegressorBlock(Block):
    """timm Block with a norm each for queries (`norm1`), keys (`norm_k`) and values (`norm_v`), for `regressor_block_forward`."""

    def __init__(self, dim: int, *, norm_layer: type[nn.Module], **options: Any) -> None:
        """Create the block.

        Args:
            dim: D, width of the rows.
            norm_layer: class of all norms.
            options: further keywords of timm's Block: `num_heads`, `mlp_ratio`, `drop_path`, ...
        """
        super().__init__(dim, norm_layer=norm_layer, **options)
        self.norm_k, self.norm_v = norm_layer(dim), norm_layer(dim)


class ContextAutoencoder(ViTForPreTraining):
    """Context autoencoder (arXiv 2202.03026, section 3; github.com/Atten4Vis/CAE, models/modeling_cae.py) over an unmodified timm ViT.

    The latent regressor turns a mask token for each masked patch into a prediction of the encoder's latent of that patch. The alignment
    loss is their mean squared difference; the encoder's latents of masked patches get no gradient. The decoder, blocks in which the
    predicted latents attend to each other, and the head predict the targets. docs/objectives.md lists the differences from the release.

    Attributes:
        regressor, decoder: `REGRESSOR_DEPTH` blocks each, of the sizes and options of the ViT's.
        regressor_norm, decoder_norm: norms after the last block of each.
        positions: (N, D), sine-cosine positions of patches, for regressor and decoder; not in the state dict.
    """

    positions: Float[Tensor, "N D"]

    def __init__(
        self, vit: VisionTransformer, vocab_size: int, num_context: int, num_predict: int | None = None,
        target: TargetKind = "tokens", separate_query_token: bool = False,
    ) -> None:  # fmt: skip
        """Add mask token, prediction head, latent regressor and decoder, all with random weights, to a ViT.

        Args:
            vit: a ViT with learned absolute positions; it becomes the attribute `vit`, and is not copied.
            vocab_size: number of outputs of the head for a patch: V for the target 'tokens'; for 'pixels' or 'features' the number of values.
            num_context: c, number of visible patches, 0 to N - 1, of batches whose `num_context` is None.
            num_predict: must be None, as all masked patches are predicted.
            target: what is predicted of a patch: 'tokens', 'pixels' or 'features'.
            separate_query_token: must be False, as CAE has no query tokens.

        Raises:
            MapetError: `num_predict` or `separate_query_token` is set, `num_context` is out of range, the ViT has no position
                embeddings, or its width is no multiple of 4.
        """
        super().__init__(vit, vocab_size, CAE, num_context, None, target, separate_query_token)
        if num_predict is not None:
            raise MapetError(f"objective 'cae' predicts all masked patches at once: omit {option('num_predict')}")
        if vit.embed_dim % 4:
            problem = f"the ViT's width is {vit.embed_dim}, but objective 'cae' needs a multiple of 4 for its sine-cosine positions"
            raise MapetError(f"{problem}: choose another {option('model')}")
        norm = type(vit.blocks[0].norm1)
        self.regressor, self.decoder = _make_blocks(vit, RegressorBlock), _make_blocks(vit, Block)
        self.regressor_norm, self.decoder_norm = norm(vit.embed_dim), norm(vit.embed_dim)
        positions = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), vit.embed_dim, interleave_sin_cos=True)
        self.register_buffer("positions", positions, persistent=False)

    @property
    def drop_path_blocks(self) -> Sequence[nn.Module]:
        """Return the blocks in the order in which a forward pass runs them, each with its own factors of stochastic depth.

        The ViT's blocks come twice: they encode the context patches, then the masked ones.
        """
        return [*self.vit.blocks, *self.vit.blocks, *self.regressor, *self.decoder]

    def forward(self, batch: Batch) -> PreTrainingOutput:
        """Compute the loss of the targets plus `ALIGNMENT_WEIGHT` times the alignment loss, of regressor and encoder.

        Args:
            batch: see `ViTForPreTraining.forward`; `target_indices` must be None, as all masked patches are predicted.

        Returns:
            As `ViTForPreTraining.forward`: loss, number of correct predictions, ... The alignment loss is in `loss`, not in
            `loss_per_image`.
        """
        rows, alignment_loss = self.forward_latents(batch)
        output = self.compute_loss(rows, self.hidden_targets(batch))
        return output._replace(loss=output.loss + ALIGNMENT_WEIGHT * alignment_loss)

    def encode(self, batch: Batch) -> Float[Tensor, "B p D"]:
        """Return the rows from which the head predicts: the decoder's normalized outputs of the p masked patches, in permutation order.

        Args:
            batch: see `forward_latents`.
        """
        return self.forward_latents(batch)[0]

    def forward_latents(self, batch: Batch) -> tuple[Float[Tensor, "B p D"], Float[Tensor, ""]]:
        """Encode the c context patches, predict the latents of the p masked ones by the regressor, and decode these.

        Args:
            batch: normalized `images`, `permutation`, and optionally `num_context` and `drop_path_rand`; see `ViTForPreTraining.forward`.

        Returns:
            (the decoder's normalized output of the masked patches, in permutation order; the alignment loss: mean squared difference of
            the regressor's normalized output from the encoder's latents of the masked patches, which have no gradient)
        """
        assert batch.permutation is not None
        c = self.num_context if batch.num_context is None else batch.num_context
        context, masked = batch.permutation[:, :c], batch.permutation[:, c:]
        # An iterator: the ViT (twice), the regressor and the decoder each take the factors of their own blocks, in this order.
        scales = iter(drop_path_scales(self.drop_path_blocks, batch.drop_path_rand, self.mask_token))
        context_latents = self.encode_patches(batch, context, scales)
        with torch.no_grad():
            target_latents = self.encode_patches(batch, masked, scales)
        all_positions = self.positions.to(self.mask_token.dtype).expand(len(masked), -1, -1)
        positions = gather_patches(all_positions, batch.permutation)
        rows = self.mask_token.expand(*masked.shape, -1)
        for block, scale in zip(self.regressor, scales):  # noqa: B905
            rows = run_block(regressor_block_forward, block, rows, context_latents, positions, scale)
        rows = self.regressor_norm(rows)
        alignment_loss = F.mse_loss(at_least_float32(rows), at_least_float32(target_latents))
        rows = rows + positions[:, c:]
        for block, scale in zip(self.decoder, scales, strict=True):
            rows = run_block(encoder_block_forward, block, rows, scale)
        return self.decoder_norm(rows), alignment_loss

    def encode_patches(
        self, batch: Batch, indices: Int[Tensor, "B n"], scales: Iterator[DropPathScale]
    ) -> Float[Tensor, "B n D"]:
        """Encode n patches of each image by the ViT: they and the prefix tokens attend to each other, and to no other patch.

        Args:
            batch: only its normalized `images` are used.
            indices: row-major indices of the n patches of each image.
            scales: drop-path scales of the blocks, in the order of a forward pass. One is taken for each of the ViT's blocks: the caller
                passes the same iterator on to the network that runs next.

        Returns:
            Latents of the n patches, in the order of `indices`: the ViT's output after its final norm, without prefix tokens.
        """
        vit = self.vit
        assert batch.images is not None
        embedded = vit._pos_embed(vit.patch_embed(batch.images.to(self.mask_token.dtype)))
        prefix, patches = embedded.split([vit.num_prefix_tokens, self.num_patches], dim=1)
        rows = vit.norm_pre(torch.cat([prefix, gather_patches(patches, indices)], dim=1))
        for block, scale in zip(vit.blocks, scales):  # noqa: B905
            rows = run_block(encoder_block_forward, block, rows, scale)
        return vit.norm(rows)[:, vit.num_prefix_tokens :]


def encoder_block_forward(block: Block, rows: Float[Tensor, "B T D"], scale: DropPathScale) -> Float[Tensor, "B T D"]:
    """Run a timm Block in which all T rows attend to each other.

    Args:
        block: of the ViT or the decoder.
        rows: input of the block.
        scale: factors of stochastic depth of its attention and MLP branches, see `residual_update`; None: the block draws them.
    """
    return residual_update(block, rows, block.attn(block.norm1(rows)), scale)


def regressor_block_forward(
    block: RegressorBlock, rows: Float[Tensor, "B p D"], context_latents: Float[Tensor, "B c D"],
    positions: Float[Tensor, "B N D"], scale: DropPathScale,
) -> Float[Tensor, "B p D"]:  # fmt: skip
    """Run a block of the regressor, in which the rows of masked patches attend to the latents of the context and to each other.

    Positions are added before the norms of queries and keys, not to values or the rows. Unlike in timm's Block, the output of `norm2` is
    not only the MLP's input but also what the MLP branch is added to.

    Args:
        block: of the regressor.
        rows: of the p masked patches: in the first block mask tokens, then the output of the block before.
        context_latents: the encoder's outputs of the c visible patches, without prefix tokens, the same in all blocks.
        positions: of the c visible patches, then of the p masked ones.
        scale: (2, B, 1, 1) factors of stochastic depth of the attention and of the MLP branch; None: the block draws them.

    Returns:
        Outputs of the block for the masked patches; those of the context are not computed.
    """
    values = torch.cat([context_latents, rows], dim=1)
    q, k = block.norm1(rows + positions[:, context_latents.shape[1] :]), block.norm_k(values + positions)
    # One block of queries: all rows attend to all keys.
    unmasked = [QueryBlock(slice(None), slice(None), masked=False)]
    branch = block.ls1(two_stream_attention(block.attn, k, block.norm_v(values), q, rows.new_empty(0), unmasked))
    rows = block.norm2(rows + (block.drop_path1(branch) if scale is None else branch * scale[0]))
    branch = block.ls2(block.mlp(rows))
    return rows + (block.drop_path2(branch) if scale is None else branch * scale[1])


def _make_blocks(vit: VisionTransformer, kind: type[Block]) -> nn.ModuleList:
    """Make `REGRESSOR_DEPTH` blocks with Xavier-uniform weights and the sizes and options of the ViT's blocks.

    Drop-path rates increase linearly from 0 to that of the ViT's last block. LayerScale starts at the present first factor of the ViT's first block.

    Args:
        vit: its blocks are alike but for their drop-path rates.
        kind: `RegressorBlock`, or timm's Block for the decoder.

    Returns:
        The blocks.
    """
    first, max_drop_path = vit.blocks[0], getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0)
    options = {
        "num_heads": first.attn.num_heads, "mlp_ratio": first.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": first.attn.qkv.bias is not None, "norm_layer": type(first.norm1),
        "init_values": float(first.ls1.gamma.detach()[0]) if hasattr(first.ls1, "gamma") else None,
    }  # fmt: skip
    rates = torch.linspace(0, max_drop_path, REGRESSOR_DEPTH).tolist()
    blocks = [kind(vit.embed_dim, drop_path=rate, **options) for rate in rates]
    for block in blocks:
        block.attn.fused_attn = first.attn.fused_attn
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The released block has a matrix for each of q, k and v; the bound of each is sqrt(2) times that of the one joint matrix.
        if kind is RegressorBlock:
            nn.init.xavier_uniform_(block.attn.qkv.weight, gain=math.sqrt(2))
    return nn.ModuleList(blocks)
