"""A timm VisionTransformer that learns an objective: pack the segments, run its own blocks under the table, read."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.model.objective import Objective, Segment, segment_lengths, visibility


class Prediction(NamedTuple):
    """What one pass gives: `logits` for, and `targets` of, the p predicted patches in permutation order."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "B p V"]
    targets: Int[Tensor, "B p"]


class Pretrainer(nn.Module):
    """MaPeT (or another row of the objective table) over an unmodified timm ViT (arXiv 2306.07346, section 3).

    The ViT owns everything that fine-tuning needs; only the mask token and the token head are added here, so the
    backbone is exported by saving `vit.state_dict()`.

    Args:
        vit: with learned absolute positions; any prefix tokens, norms, LayerScale, stochastic depth.
        vocab_size: V, the number of visual words.
        objective: a row of `mapet.model.objective`.
        num_context: c, from 0 to N - 1.

    Raises:
        MapetError: c out of range, or the ViT lacks something the objective needs.
    """

    visibility: Tensor

    def __init__(self, vit: VisionTransformer, vocab_size: int, objective: Objective, num_context: int) -> None:
        super().__init__()
        num_patches = vit.patch_embed.num_patches
        if not 0 <= num_context < num_patches:
            raise MapetError(
                f"{num_context} context patches out of range: an image has {num_patches} patches, so 0 to {num_patches - 1}"
            )
        if vit.pos_embed is None:
            raise MapetError(
                "the ViT has no learned position embedding, which mask tokens need; choose a model that has one"
            )
        self.vit = vit
        self.objective = objective
        self.num_patches = num_patches
        self.num_context = num_context
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.head = nn.Linear(vit.embed_dim, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        table = visibility(objective, vit.num_prefix_tokens, num_context, self.num_predicted)
        self.register_buffer("visibility", table, persistent=False)

    @property
    def num_predicted(self) -> int:
        """p = N - c."""
        return self.num_patches - self.num_context

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        tokens: Int[Tensor, "B N"],
        permutation: Int[Tensor, "B N"],
    ) -> Prediction:
        """Mean cross-entropy over the B x p predicted patches.

        Args:
            images: normalised.
            tokens: visual word of each patch, row-major.
            permutation: patch indices; the first c are context, the others are predicted in this order.
        """
        rows = self.pack(images, permutation)
        rows = self.encode(rows)
        logits = self.head(self.read(rows))
        targets = tokens.gather(1, permutation[:, self.num_context :])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return Prediction(loss, logits, targets)

    def pack(self, images: Float[Tensor, "B C H W"], permutation: Int[Tensor, "B N"]) -> Float[Tensor, "B R D"]:
        """Initial embeddings of the objective's segments, in permutation order, one after the other."""
        vit = self.vit
        embedded = vit._pos_embed(
            vit.patch_embed(images)
        )  # prefix tokens and patches, with positions, as in fine-tuning
        prefix, patches = embedded.split([vit.num_prefix_tokens, self.num_patches], dim=1)
        positions = vit.pos_embed[:, -self.num_patches :].expand_as(patches)
        content = _gather(patches, permutation)
        hidden = permutation[:, self.num_context :]
        masked = vit.pos_drop(self.mask_token + _gather(positions, hidden)).to(content.dtype)
        parts: dict[Segment, Tensor] = {
            "context": torch.cat([prefix, content[:, : self.num_context]], dim=1),
            "target": content[:, self.num_context :],
            "mask": masked,
            "query": masked,
        }
        return vit.norm_pre(torch.cat([parts[segment] for segment in self.objective.segments], dim=1))

    def encode(self, rows: Float[Tensor, "B R D"]) -> Float[Tensor, "B R D"]:
        """The ViT's own blocks as masked self-attention under the visibility table, then its final norm."""
        for block in self.vit.blocks:
            rows = block(rows, attn_mask=self.visibility)
        return self.vit.norm(rows)

    def read(self, rows: Float[Tensor, "B R D"]) -> Float[Tensor, "B p D"]:
        """The rows that predict: one for each hidden patch, in permutation order."""
        return self.segment(rows, self.objective.read_at)

    def segment(self, rows: Float[Tensor, "B R D"], name: Segment) -> Float[Tensor, "B S D"]:
        """One segment's rows of a packed tensor."""
        lengths = segment_lengths(self.objective, self.vit.num_prefix_tokens, self.num_context, self.num_predicted)
        return rows.split(list(lengths.values()), dim=1)[list(lengths).index(name)]


def _gather(values: Float[Tensor, "B N D"], order: Int[Tensor, "B n"]) -> Float[Tensor, "B n D"]:
    return values.gather(1, order[:, :, None].expand(-1, -1, values.shape[-1]))
