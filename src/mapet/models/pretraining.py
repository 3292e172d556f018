"""A timm VisionTransformer that learns an objective: pack the segments, run its own blocks under the table, read."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.models.attention import RowBlock, attend, clip, row_blocks
from mapet.models.losses import LOSSES, TargetKind, compiled_token_loss
from mapet.models.objectives import Objective, Segment, content_rows, segment_lengths, visibility

Ranks = Int[Tensor, " m"]
Survival = Float[Tensor, "B branches"]
"""A number from 0 to 1 for each residual branch, two a block."""
Fate = tuple[Float[Tensor, "B 1 1"] | None, Float[Tensor, "B 1 1"] | None]
"""What stochastic depth multiplies a block's two branches by: 0, or 1 / probability of survival."""
Targets = Int[Tensor, "B N"] | Float[Tensor, "B N F"]
"""What there is to know about each patch, row-major: its visual word, or numbers."""


class Prediction(NamedTuple):
    """What a pass gives.

    Attributes:
        loss: mean over the m predicted patches of each image; nats, if they are words.
        correct: how many words were right; None where targets are numbers.
        targets: of the predicted patches.
        losses: of each image, without gradient.
    """

    loss: Float[Tensor, ""]
    correct: Int[Tensor, ""] | None
    targets: Int[Tensor, "B m"] | Float[Tensor, "B m F"]
    losses: Float[Tensor, " B"]


class Layout(NamedTuple):
    """The packed rows for one c.

    Attributes:
        lengths: rows of each segment, in packing order.
        table: who sees whom.
        num_content: C, rows that are seen: the columns of attention.
        read_at: the rows that predict.
        bias: 0 where a row sees a column, -inf elsewhere.
        all_blocks: of all rows; `read_blocks` of those that predict.
    """

    lengths: dict[Segment, int]
    table: Bool[Tensor, "R R"]
    num_content: int
    read_at: slice
    bias: Float[Tensor, "R C"]
    all_blocks: list[RowBlock]
    read_blocks: list[RowBlock]

    @classmethod
    def of(cls, objective: Objective, num_prefix: int, num_context: int, num_predicted: int) -> "Layout":
        lengths = segment_lengths(objective, num_prefix, num_context, num_predicted)
        table = visibility(objective, num_prefix, num_context, num_predicted)
        num_content = content_rows(objective, lengths)
        seen = table[:, :num_content]
        start = sum(lengths[s] for s in objective.segments[: objective.segments.index(objective.read_at)])
        read_at = slice(start, start + lengths[objective.read_at])
        bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        return cls(lengths, table, num_content, read_at, bias, row_blocks(seen), row_blocks(seen[read_at]))


class Pretrainer(nn.Module):
    """MaPeT (or another row of the objective table) over an unmodified timm ViT (arXiv 2306.07346, section 3).

    The ViT owns everything that fine-tuning needs; only the mask token and the token head are added here, so the
    backbone is exported by saving `vit.state_dict()`.

    Args:
        vit: with learned absolute positions; any prefix tokens, norms, LayerScale, stochastic depth.
        vocab_size: V, the number of visual words.
        objective: a row of `mapet.models.objectives`.
        num_context: c, from 0 to N - 1, where a pass doesn't say otherwise.
        num_targets: m; in training predict so many of the p = N - c patches, at the ranks of `draw_ranks`: an unbiased
            estimate of the same loss from fewer query rows. None: all of them.
        target: what is predicted of a patch; `vocab_size` is the number of values of the head.
        separate_query: give query tokens a parameter of their own (it starts as the mask token).

    Raises:
        MapetError: c or m out of range, or the ViT lacks something the objective needs.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        vocab_size: int,
        objective: Objective,
        num_context: int,
        num_targets: int | None = None,
        target: TargetKind = "tokens",
        separate_query: bool = False,
    ) -> None:
        super().__init__()
        num_patches = vit.patch_embed.num_patches
        if not 0 <= num_context < num_patches:
            raise MapetError(
                f"{num_context} context patches (--num-context) out of range: an image has {num_patches} patches, so 0 to {num_patches - 1}"
            )
        if num_targets is not None and not 1 <= num_targets <= num_patches - num_context:
            raise MapetError(
                f"{num_targets} targets (--num-targets) out of range: {num_patches - num_context} patches are hidden, so 1 to that"
            )
        if vit.pos_embed is None:
            raise MapetError(
                "the ViT has no learned position embedding, which mask tokens need; choose a model that has one"
            )
        if separate_query and "query" not in objective.segments:
            raise MapetError(f"objective '{objective.name}' has no query tokens to separate from mask tokens")
        self.vit = vit
        self.objective = objective
        self.num_patches = num_patches
        self.num_context = num_context
        self.num_targets = num_targets
        self.target: TargetKind = target
        self._loss = LOSSES[target]
        self._block, self._last_block = whole_block, reading_block
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.head = nn.Linear(vit.embed_dim, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.query_token = nn.Parameter(self.mask_token.detach().clone()) if separate_query else None
        self._layouts: dict[int, Layout] = {}
        self.layout()  # an impossible one is refused now

    @property
    def num_predicted(self) -> int:
        """p = N - c."""
        return self.num_patches - self.num_context

    def layout(self, num_context: int | None = None) -> Layout:
        """The packed rows for c (None: the model's own), on its device and in its dtype."""
        c = self.num_context if num_context is None else num_context
        if c not in self._layouts:
            self._layouts[c] = Layout.of(self.objective, self.vit.num_prefix_tokens, c, self.num_patches - c)
        found, like = self._layouts[c], self.mask_token
        if found.bias.dtype != like.dtype or found.bias.device != like.device:
            found = self._layouts[c] = found._replace(bias=found.bias.to(like))
        return found

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        targets: Targets,
        permutation: Int[Tensor, "B N"],
        num_context: int | None = None,
        ranks: Ranks | None = None,
        survival: Survival | None = None,
    ) -> Prediction:
        """Mean loss over the B x m predicted patches: the cross-entropy of their words.

        Args:
            images: normalised.
            targets: visual word of each patch, row-major (or what `target` says).
            permutation: patch indices; the first c are context, the others are predicted in this order.
            num_context: c of this pass; None: the model's own.
            ranks: which of the hidden patches to predict, ascending; None: all of them.
            survival: what stochastic depth decides by, see `residual`; None: it draws for itself.
        """
        c = self.num_context if num_context is None else num_context
        rows = self.encode(images, permutation, self.layout(c), ranks, survival)
        targets = gather(targets, permutation[:, c:])
        if ranks is not None:
            targets = targets[:, ranks]
        return self.score(rows, targets)

    def score(self, rows: Float[Tensor, "B m D"], targets: Int[Tensor, "B m"] | Float[Tensor, "B m F"]) -> Prediction:
        """The head's reading of the rows against what was there."""
        loss, correct, losses = self._loss(rows.flatten(0, 1), self.head, targets.flatten(0, 1))
        return Prediction(loss, correct, targets, losses.unflatten(0, rows.shape[:2]).mean(dim=1))

    def compile(self) -> None:
        """Compile, at the first step, what takes a step's time: packing, a block (once for all of them), the softmax of the words."""
        self.pack = torch.compile(self.pack, dynamic=False)  # type: ignore[method-assign]
        self._block, self._last_block = (torch.compile(f, dynamic=False) for f in (whole_block, reading_block))
        if self.target == "tokens":
            self._loss = compiled_token_loss()

    def draw_ranks(self, num_context: int, seed: list[int]) -> Ranks | None:
        """The m ranks of a step, ascending, on the CPU; None where all are predicted."""
        if self.num_targets is None:
            return None
        drawn = np.random.default_rng(seed).permutation(self.num_patches - num_context)[: self.num_targets]
        return torch.from_numpy(np.sort(drawn))

    def predict(self, images: Float[Tensor, "B C H W"], permutation: Int[Tensor, "B N"]) -> Float[Tensor, "B p V"]:
        """Logits of the p hidden patches, in permutation order."""
        return self.head(self.encode(images, permutation, self.layout()))

    def encode(
        self,
        images: Float[Tensor, "B C H W"],
        permutation: Int[Tensor, "B N"],
        layout: Layout,
        ranks: Ranks | None = None,
        survival: Survival | None = None,
    ) -> Float[Tensor, "B m D"]:
        """What the head reads: the final outputs of the rows that predict `ranks` (None: all p).

        Content rows go through all blocks but the last, where they are only seen and no longer ask.
        """
        content, read_at = layout.num_content, layout.read_at
        asks_only = read_at.start >= content  # the reading rows are query rows, packed for `ranks` alone
        rows, bias = self.pack(images, permutation, layout, ranks), layout.bias
        read_bias = bias[read_at]
        if ranks is not None:
            read_bias = read_bias[ranks]
            bias = torch.cat([bias[:content], read_bias]) if asks_only else bias
        (*blocks, last), (*fates, last_fate) = self.vit.blocks, fates_of(self.vit, survival, rows)
        blocks_of_rows = clip(layout.all_blocks, len(bias))
        for block, fate in zip(blocks, fates, strict=True):
            rows = self._block(block, rows, content, bias, blocks_of_rows, fate)
        reading: slice | Tensor = read_at
        if ranks is not None and not asks_only:
            reading = read_at.start + ranks
        blocks_of_rows = clip(layout.read_blocks, len(read_bias))
        return self.vit.norm(self._last_block(last, rows, content, reading, read_bias, blocks_of_rows, last_fate))

    def pack(
        self,
        images: Float[Tensor, "B C H W"],
        permutation: Int[Tensor, "B N"],
        layout: Layout,
        ranks: Ranks | None = None,
    ) -> Float[Tensor, "B R D"]:
        """Initial embeddings of the objective's segments, in permutation order; `query` only for `ranks` (None: all)."""
        vit = self.vit
        c = layout.lengths["context"] - vit.num_prefix_tokens
        # Prefix tokens and patches, with positions, as in fine-tuning.
        embedded = vit._pos_embed(vit.patch_embed(images))
        prefix, patches = embedded.split([vit.num_prefix_tokens, self.num_patches], dim=1)
        positions = gather(vit.pos_embed[:, -self.num_patches :].expand_as(patches), permutation[:, c:])
        content = gather(patches, permutation)

        def tokens(token: Tensor) -> Tensor:
            return vit.pos_drop(token + positions).to(content.dtype)

        parts: dict[Segment, Tensor] = {}
        for segment in layout.lengths:
            if segment == "context":
                part = torch.cat([prefix, content[:, :c]], dim=1)
            elif segment == "target":
                part = content[:, c:]
            elif segment == "next":
                before = (
                    content[:, c - 1 : -1]
                    if c
                    else torch.cat([self.mask_token.expand(len(content), -1, -1), content[:, :-1]], 1)
                )
                part = tokens(before)
            elif segment == "query" and self.query_token is not None:
                part = tokens(self.query_token)
            else:
                part = parts["mask"] if "mask" in parts else tokens(self.mask_token)
            parts[segment] = part if ranks is None or segment != "query" else part[:, ranks]
        return vit.norm_pre(torch.cat(list(parts.values()), dim=1))


def whole_block(
    block: Block,
    rows: Float[Tensor, "B R D"],
    content: int,
    bias: Float[Tensor, "R C"],
    blocks_of_rows: list[RowBlock],
    fate: Fate,
) -> Float[Tensor, "B R D"]:
    """A timm Block in which all rows ask; the first `content` of them are seen."""
    asking = block.norm1(rows)
    seen = asking[:, :content].contiguous()  # as its products would make it, each time
    return residual(block, rows, attend(block.attn, seen, asking, bias, blocks_of_rows), fate)


def reading_block(
    block: Block,
    rows: Float[Tensor, "B R D"],
    content: int,
    reading: slice | Int[Tensor, " m"],
    bias: Float[Tensor, "m C"],
    blocks_of_rows: list[RowBlock],
    fate: Fate,
) -> Float[Tensor, "B m D"]:
    """A timm Block of which only the rows at `reading` are wanted."""
    seen, rows = rows[:, :content], rows[:, reading]
    attended = attend(block.attn, block.norm1(seen), block.norm1(rows), bias, blocks_of_rows)
    return residual(block, rows, attended, fate)


def residual(
    block: Block, rows: Float[Tensor, "B R D"], attended: Float[Tensor, "B R D"], fate: Fate = (None, None)
) -> Float[Tensor, "B R D"]:
    """What timm's Block does after its attention."""
    rows = rows + surviving(block.drop_path1, block.ls1(attended), fate[0])
    return rows + surviving(block.drop_path2, block.ls2(block.mlp(block.norm2(rows))), fate[1])


def surviving(
    path: nn.Module, branch: Float[Tensor, "B R D"], factor: Float[Tensor, "B 1 1"] | None
) -> Float[Tensor, "B R D"]:
    return path(branch) if factor is None else branch * factor


def fates_of(vit: VisionTransformer, survival: Survival | None, rows: Float[Tensor, "B R D"]) -> list[Fate]:
    """Of each block's two branches, in the dtype of `rows`.

    Stochastic depth (arXiv 1603.09382) keeps a branch for the images whose number in `survival` is below the branch's
    probability; given from outside, the draws don't depend on which images are computed together.
    """

    def factor(path: nn.Module, number: Float[Tensor, " B"]) -> Float[Tensor, "B 1 1"] | None:
        if not path.training:
            return None
        # That of the first block is 1; it is multiplied by nevertheless, so that its compiled block is the others'.
        probability = 1 - path.drop_prob if isinstance(path, DropPath) else 1
        return ((number < probability).to(rows.dtype) / probability)[:, None, None]

    if survival is None:
        return [(None, None)] * len(vit.blocks)
    pairs = survival.unflatten(1, (-1, 2)).permute(1, 2, 0)
    return [
        (factor(block.drop_path1, first), factor(block.drop_path2, second))
        for block, (first, second) in zip(vit.blocks, pairs, strict=True)
    ]


def gather(values: Tensor, order: Int[Tensor, "B n"]) -> Tensor:
    """(B, N, ...) -> (B, n, ...)."""
    return values.gather(1, order if values.ndim == 2 else order[:, :, None].expand(-1, -1, values.shape[2]))
