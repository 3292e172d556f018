"""A timm VisionTransformer that learns an objective: pack the segments, run its own blocks under the table, read."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.model.attention import attend, clip, row_blocks
from mapet.model.cross_entropy import linear_cross_entropy
from mapet.model.objective import Objective, Segment, content_rows, segment_lengths, visibility

Ranks = Int[Tensor, " m"]


class Prediction(NamedTuple):
    """Mean cross-entropy (nats) over the m predicted patches of each image, how many were right, what they were."""

    loss: Float[Tensor, ""]
    correct: Int[Tensor, ""]
    targets: Int[Tensor, "B m"]


class Pretrainer(nn.Module):
    """MaPeT (or another row of the objective table) over an unmodified timm ViT (arXiv 2306.07346, section 3).

    The ViT owns everything that fine-tuning needs; only the mask token and the token head are added here, so the
    backbone is exported by saving `vit.state_dict()`.

    Args:
        vit: with learned absolute positions; any prefix tokens, norms, LayerScale, stochastic depth.
        vocab_size: V, the number of visual words.
        objective: a row of `mapet.model.objective`.
        num_context: c, from 0 to N - 1.
        num_targets: m; in training predict so many of the p = N - c patches, other ranks each pass: an unbiased estimate
            of the same loss from fewer query rows. None: all of them.

    Raises:
        MapetError: c or m out of range, or the ViT lacks something the objective needs.
    """

    visibility: Tensor
    bias: Tensor

    def __init__(
        self,
        vit: VisionTransformer,
        vocab_size: int,
        objective: Objective,
        num_context: int,
        num_targets: int | None = None,
    ) -> None:
        super().__init__()
        num_patches = vit.patch_embed.num_patches
        if not 0 <= num_context < num_patches:
            raise MapetError(
                f"{num_context} context patches out of range: an image has {num_patches} patches, so 0 to {num_patches - 1}"
            )
        if num_targets is not None and not 1 <= num_targets <= num_patches - num_context:
            raise MapetError(
                f"{num_targets} targets out of range: {num_patches - num_context} patches are hidden, so 1 to that"
            )
        if vit.pos_embed is None:
            raise MapetError(
                "the ViT has no learned position embedding, which mask tokens need; choose a model that has one"
            )
        self.vit = vit
        self.objective = objective
        self.num_patches = num_patches
        self.num_context = num_context
        self.num_targets = num_targets
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.head = nn.Linear(vit.embed_dim, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

        self.lengths = segment_lengths(objective, vit.num_prefix_tokens, num_context, self.num_predicted)
        self.num_content = content_rows(objective, self.lengths)
        table = visibility(objective, vit.num_prefix_tokens, num_context, self.num_predicted)
        seen = table[:, : self.num_content]
        self.register_buffer("visibility", table, persistent=False)
        self.register_buffer("bias", torch.zeros(seen.shape).masked_fill(~seen, float("-inf")), persistent=False)
        self.all_blocks, self.read_blocks = row_blocks(seen), row_blocks(seen[self.read_at])

    @property
    def num_predicted(self) -> int:
        """p = N - c."""
        return self.num_patches - self.num_context

    @property
    def read_at(self) -> slice:
        """The packed rows that predict."""
        return self.rows_of(self.objective.read_at)

    def rows_of(self, segment: Segment) -> slice:
        start = 0
        for name, length in self.lengths.items():
            if name == segment:
                return slice(start, start + length)
            start += length
        raise KeyError(segment)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        tokens: Int[Tensor, "B N"],
        permutation: Int[Tensor, "B N"],
    ) -> Prediction:
        """Mean cross-entropy over the B x m predicted patches.

        Args:
            images: normalised.
            tokens: visual word of each patch, row-major.
            permutation: patch indices; the first c are context, the others are predicted in this order.
        """
        ranks = None
        if self.training and self.num_targets is not None:
            ranks = torch.randperm(self.num_predicted, device=images.device)[: self.num_targets].sort().values
        rows = self.encode(images, permutation, ranks)
        targets = tokens.gather(1, permutation[:, self.num_context :])
        if ranks is not None:
            targets = targets[:, ranks]
        loss, correct = linear_cross_entropy(rows.flatten(0, 1), self.head.weight, self.head.bias, targets.flatten())
        return Prediction(loss, correct, targets)

    def predict(self, images: Float[Tensor, "B C H W"], permutation: Int[Tensor, "B N"]) -> Float[Tensor, "B p V"]:
        """Logits of the p hidden patches, in permutation order."""
        return self.head(self.encode(images, permutation))

    def encode(
        self, images: Float[Tensor, "B C H W"], permutation: Int[Tensor, "B N"], ranks: Ranks | None = None
    ) -> Float[Tensor, "B m D"]:
        """What the head reads: the final outputs of the rows that predict `ranks` (None: all p).

        Content rows go through all blocks but the last, where they are only seen and no longer ask.
        """
        content = self.num_content
        asks_only = self.read_at.start >= content  # the reading rows are query rows, packed for `ranks` alone
        rows, bias = self.pack(images, permutation, ranks), self.bias
        read_bias = bias[self.read_at]
        if ranks is not None:
            read_bias = read_bias[ranks]
            bias = torch.cat([bias[:content], read_bias]) if asks_only else bias
        *blocks, last = self.vit.blocks
        for block in blocks:
            seen, asking = block.norm1(rows).split([content, rows.shape[1] - content], dim=1)
            attended = attend(block.attn, seen, asking, bias, clip(self.all_blocks, len(bias)), content_asks=True)
            rows = residual(block, rows, attended)
        normal = last.norm1(rows)
        asking, rows = (
            x[:, self.read_at] if ranks is None or asks_only else x[:, self.read_at][:, ranks] for x in (normal, rows)
        )
        attended = attend(
            last.attn,
            normal[:, :content],
            asking,
            read_bias,
            clip(self.read_blocks, len(read_bias)),
            content_asks=False,
        )
        return self.vit.norm(residual(last, rows, attended))

    def pack(
        self, images: Float[Tensor, "B C H W"], permutation: Int[Tensor, "B N"], ranks: Ranks | None = None
    ) -> Float[Tensor, "B R D"]:
        """Initial embeddings of the objective's segments, in permutation order; `query` only for `ranks` (None: all)."""
        vit = self.vit
        # Prefix tokens and patches, with positions, as in fine-tuning.
        embedded = vit._pos_embed(vit.patch_embed(images))
        prefix, patches = embedded.split([vit.num_prefix_tokens, self.num_patches], dim=1)
        positions = vit.pos_embed[:, -self.num_patches :].expand_as(patches)
        content = _gather(patches, permutation)
        hidden = permutation[:, self.num_context :]
        masked = vit.pos_drop(self.mask_token + _gather(positions, hidden)).to(content.dtype)
        parts: dict[Segment, Tensor] = {
            "mask": masked,
            "context": torch.cat([prefix, content[:, : self.num_context]], dim=1),
            "target": content[:, self.num_context :],
            "query": masked if ranks is None else masked[:, ranks],
        }
        return vit.norm_pre(torch.cat([parts[segment] for segment in self.objective.segments], dim=1))


def residual(block: Block, rows: Float[Tensor, "B R D"], attended: Float[Tensor, "B R D"]) -> Float[Tensor, "B R D"]:
    """What timm's Block does after its attention."""
    rows = rows + block.drop_path1(block.ls1(attended))
    return rows + block.drop_path2(block.ls2(block.mlp(block.norm2(rows))))


def _gather(values: Float[Tensor, "B N D"], order: Int[Tensor, "B n"]) -> Float[Tensor, "B n D"]:
    return values.gather(1, order[:, :, None].expand(-1, -1, values.shape[-1]))
