"""CAE: the encoder sees visible patches alone; a regressor guesses the latents of the hidden ones, a decoder their words."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.models.attention import RowBlock, attend
from mapet.models.losses import TargetKind, full_precision
from mapet.models.objectives import CAE
from mapet.models.pretraining import Prediction, Pretrainer, Ranks, Survival, Targets, fates_of, gather, residual

DEPTH = 4
"""Blocks of the regressor, and of the decoder (the paper's for ViT-B)."""
ALIGNMENT = 2.0
"""Weight of the alignment loss."""


class ContextAutoencoder(Pretrainer):
    """Context autoencoder (arXiv 2202.03026, section 3) over an unmodified timm ViT.

    Mask queries (mask token + position) pass through the latent regressor: blocks whose keys and values are the encoder's
    latents of the visible patches and the queries themselves. The alignment loss is the mean squared difference of what
    comes out from the encoder's latents of the hidden patches, without gradient; the decoder, blocks among those rows
    alone, and the head give the words. The paper adds positions in every block of regressor and decoder; here they are
    added once.

    Args: as `Pretrainer`'s, without `num_targets`.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        vocab_size: int,
        num_context: int,
        num_targets: int | None = None,
        target: TargetKind = "tokens",
        separate_query: bool = False,
    ) -> None:
        super().__init__(vit, vocab_size, CAE, num_context, None, target, separate_query)
        if num_targets is not None:
            raise MapetError("objective 'cae' predicts all hidden patches at once: leave out --num-targets")
        first = vit.blocks[0]

        def blocks() -> nn.Sequential:
            return nn.Sequential(
                *(
                    Block(
                        vit.embed_dim,
                        first.attn.num_heads,
                        first.mlp.fc1.out_features / vit.embed_dim,
                        qkv_bias=first.attn.qkv.bias is not None,
                        init_values=float(first.ls1.gamma.detach()[0]) if hasattr(first.ls1, "gamma") else None,
                        norm_layer=type(first.norm1),
                    )
                    for _ in range(DEPTH)
                )
            )

        self.regressor, self.decoder = blocks(), blocks()
        self.decoder_norm = type(first.norm1)(vit.embed_dim)
        for module in [*self.regressor.modules(), *self.decoder.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, Block):
                module.attn.fused_attn = first.attn.fused_attn

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        targets: Targets,
        permutation: Int[Tensor, "B N"],
        num_context: int | None = None,
        ranks: Ranks | None = None,
        survival: Survival | None = None,
    ) -> Prediction:
        """Loss of the words plus `ALIGNMENT` times that of the latents; arguments as `Pretrainer.forward`'s."""
        c = self.num_context if num_context is None else num_context
        rows, alignment = self.autoencode(images, permutation, c, survival)
        prediction = self.score(rows, gather(targets, permutation[:, c:]))
        return prediction._replace(loss=prediction.loss + ALIGNMENT * alignment)

    def predict(self, images: Float[Tensor, "B C H W"], permutation: Int[Tensor, "B N"]) -> Float[Tensor, "B p V"]:
        """Logits of the p hidden patches, in permutation order."""
        return self.head(self.autoencode(images, permutation, self.num_context)[0])

    def autoencode(
        self,
        images: Float[Tensor, "B C H W"],
        permutation: Int[Tensor, "B N"],
        num_context: int,
        survival: Survival | None = None,
    ) -> tuple[Float[Tensor, "B p D"], Float[Tensor, ""]]:
        """What the head reads, and the alignment loss."""
        visible = self.latents(images, permutation[:, :num_context], survival)
        with torch.no_grad():
            wanted = self.latents(images, permutation[:, num_context:], survival)[:, self.vit.num_prefix_tokens :]
        positions = self.vit.pos_embed[:, -self.num_patches :].expand(len(images), -1, -1)
        rows = self.mask_token + gather(positions, permutation[:, num_context:])
        bias = rows.new_empty(0)  # all see all
        for block in self.regressor:
            assert isinstance(block, Block)
            normal = block.norm1(rows)
            seen = torch.cat([block.norm1(visible), normal], dim=1)
            whole = [RowBlock(slice(None), slice(None), masked=False)]
            rows = residual(block, rows, attend(block.attn, seen, normal, bias, whole))
        alignment = F.mse_loss(full_precision(rows), full_precision(wanted))
        return self.decoder_norm(self.decoder(rows)), alignment

    def latents(
        self, images: Float[Tensor, "B C H W"], chosen: Int[Tensor, "B n"], survival: Survival | None = None
    ) -> Float[Tensor, "B T D"]:
        """The ViT's own pass over its prefix tokens and the chosen patches alone."""
        vit = self.vit
        embedded = vit._pos_embed(vit.patch_embed(images))
        prefix, patches = embedded.split([vit.num_prefix_tokens, self.num_patches], dim=1)
        rows = vit.norm_pre(torch.cat([prefix, gather(patches, chosen)], dim=1))
        for block, fate in zip(vit.blocks, fates_of(vit, survival, rows), strict=True):
            rows = residual(block, rows, block.attn(block.norm1(rows)), fate)
        return vit.norm(rows)
