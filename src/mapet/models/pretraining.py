"""A timm VisionTransformer that learns an objective: pack the segments, run its blocks under the attention mask, predict."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mapet.data.dataset import Batch, DropPathRand, Targets
from mapet.errors import MapetError, option
from mapet.models.losses import LOSSES, TargetKind, compiled_token_loss
from mapet.models.objectives import Objective
from mapet.models.packing import (
    PackedLayout,
    QueryBlock,
    TargetIndices,
    gather_patches,
    pack,
    truncate_blocks,
    two_stream_attention,
)

DropPathScale = tuple[Float[Tensor, "B 1 1"] | None, Float[Tensor, "B 1 1"] | None]
"""What stochastic depth multiplies a block's two branches by: 0, or 1 / probability of being kept."""


class PreTrainingOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        loss: mean over the m predicted patches of each image; nats for tokens.
        num_correct: predicted tokens that are right; None where targets are regression vectors.
        targets: of the predicted patches.
        loss_per_image: without gradient.
    """

    loss: Float[Tensor, ""]
    num_correct: Int[Tensor, ""] | None
    targets: Int[Tensor, "B m"] | Float[Tensor, "B m F"]
    loss_per_image: Float[Tensor, " B"]


class ViTForPreTraining(nn.Module):
    """MaPeT (or another row of the objective table) over an unmodified timm ViT (arXiv 2306.07346, section 3).

    The ViT owns everything that fine-tuning needs; only the mask token and the prediction head are added here, so the
    backbone is exported by saving `vit.state_dict()`.

    Args:
        vit: with learned absolute positions; any prefix tokens, norms, LayerScale, stochastic depth.
        vocab_size: V, the number of visual tokens.
        objective: a row of `mapet.models.objectives`.
        num_context: c, from 0 to N - 1, where a batch doesn't say otherwise.
        num_predict: m; in training predict so many of the p = N - c hidden patches, those of `sample_target_indices`: an
            unbiased estimate of the same loss from fewer query rows. None: all of them.
        target: what is predicted of a patch; `vocab_size` is the number of outputs of the head.
        separate_query_token: give query tokens a parameter of their own (it starts as the mask token).

    Raises:
        MapetError: c or m out of range, or the ViT lacks something the objective needs.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        vocab_size: int,
        objective: Objective,
        num_context: int,
        num_predict: int | None = None,
        target: TargetKind = "tokens",
        separate_query_token: bool = False,
    ) -> None:
        super().__init__()
        num_patches = vit.patch_embed.num_patches
        if not 0 <= num_context < num_patches:
            raise MapetError(
                f"{num_context} context patches ({option('mask_ratio')}) out of range: an image has {num_patches} patches, so 0 to {num_patches - 1}"
            )
        if num_predict is not None and not 1 <= num_predict <= num_patches - num_context:
            raise MapetError(
                f"{num_predict} targets ({option('num_predict')}) out of range: {num_patches - num_context} patches are hidden, so 1 to that"
            )
        if vit.pos_embed is None:
            raise MapetError(
                "the ViT has no learned position embedding, which mask tokens need; choose a model that has one"
            )
        if separate_query_token and "query" not in objective.segments:
            raise MapetError(f"objective '{objective.name}' has no query tokens to separate from mask tokens")
        self.vit = vit
        self.objective = objective
        self.num_patches = num_patches
        self.num_context = num_context
        self.num_predict = num_predict
        self.target: TargetKind = target
        self._loss = LOSSES[target]
        self._pack, self._block, self._last_block = pack, block_forward, block_forward_queries
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.head = nn.Linear(vit.embed_dim, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.query_token = nn.Parameter(self.mask_token.detach().clone()) if separate_query_token else None
        self._layouts: dict[int, PackedLayout] = {}
        self.layout()  # an impossible one is refused now

    @property
    def num_hidden(self) -> int:
        """p = N - c."""
        return self.num_patches - self.num_context

    def layout(self, num_context: int | None = None) -> PackedLayout:
        """Return the packed rows for c (None: the model's own), on its device and in its dtype."""
        c = self.num_context if num_context is None else num_context
        if c not in self._layouts:
            self._layouts[c] = PackedLayout.from_counts(
                self.objective, self.vit.num_prefix_tokens, c, self.num_patches - c
            )
        layout, like = self._layouts[c], self.mask_token
        if layout.attn_bias.dtype != like.dtype or layout.attn_bias.device != like.device:
            layout = self._layouts[c] = layout._replace(attn_bias=layout.attn_bias.to(like))
        return layout

    def forward(self, batch: Batch) -> PreTrainingOutput:
        """Compute the mean loss over the B x m predicted patches: for tokens the cross-entropy.

        Args:
            batch: with normalized images, targets and permutations: the first c patches of each are context, the others
                are predicted in this order.
        """
        return self.compute_loss(self.encode(batch), self.hidden_targets(batch))

    def hidden_targets(self, batch: Batch) -> Targets:
        """Return the targets of the m predicted patches, in permutation order."""
        assert batch.targets is not None and batch.permutation is not None
        c = self.num_context if batch.num_context is None else batch.num_context
        targets = gather_patches(batch.targets, batch.permutation[:, c:])
        return targets if batch.target_indices is None else targets[:, batch.target_indices]

    def compute_loss(self, rows: Float[Tensor, "B m D"], targets: Targets) -> PreTrainingOutput:
        """Compare the head's predictions from the rows with the targets of the same patches."""
        loss, num_correct, losses = self._loss(rows.flatten(0, 1), self.head, targets.flatten(0, 1))
        return PreTrainingOutput(loss, num_correct, targets, losses.unflatten(0, rows.shape[:2]).mean(dim=1))

    def compile(self) -> None:
        """Compile, at the first step, what takes a step's time: packing, a block (once for all of them), the cross-entropy."""
        self._pack, self._block, self._last_block = (
            torch.compile(function, dynamic=False) for function in (pack, block_forward, block_forward_queries)
        )
        if self.target == "tokens":
            self._loss = compiled_token_loss()

    def sample_target_indices(self, num_context: int, seed: list[int]) -> TargetIndices | None:
        """Draw a step's m target indices, ascending, on the CPU; None where all patches are predicted."""
        if self.num_predict is None:
            return None
        order = np.random.default_rng(seed).permutation(self.num_patches - num_context)
        return torch.from_numpy(np.sort(order[: self.num_predict]))

    def predict(self, batch: Batch) -> Float[Tensor, "B m V"]:
        """Return the logits of the predicted patches, in permutation order."""
        return self.head(self.encode(batch))

    def encode(self, batch: Batch) -> Float[Tensor, "B m D"]:
        """Return the final outputs of the rows that predict.

        Rows that are attended to go through all blocks but the last, where they have keys and values only.
        """
        assert batch.images is not None and batch.permutation is not None
        layout, indices = self.layout(batch.num_context), batch.target_indices
        num_kv, output_rows = layout.num_kv, layout.output_rows
        images, tokens = batch.images.to(self.mask_token.dtype), (self.mask_token, self.query_token)
        rows = self._pack(self.vit, *tokens, images, batch.permutation, layout.segment_lengths, indices)
        bias, output_bias, query_rows = layout.attn_bias, layout.attn_bias[output_rows], output_rows
        if indices is not None:
            output_bias = output_bias[indices]
            if layout.queries_only:
                bias = torch.cat([bias[:num_kv], output_bias])
            else:
                query_rows = output_rows.start + indices
        (*blocks, last), (*scales, last_scale) = self.vit.blocks, drop_path_scales(self.vit, batch.drop_path_rand, rows)
        query_blocks = truncate_blocks(layout.blocks, len(bias))
        for block, scale in zip(blocks, scales, strict=True):
            rows = run_block(self._block, block, rows, num_kv, bias, query_blocks, scale)
        query_blocks = truncate_blocks(layout.output_blocks, len(output_bias))
        rows = run_block(self._last_block, last, rows, num_kv, query_rows, output_bias, query_blocks, last_scale)
        return self.vit.norm(rows)


def run_block(function: Callable[..., Tensor], block: nn.Module, *args: Any) -> Tensor:
    """Call `function(block, ...)`; FSDP2, which gathers a block's weights for its methods only, gives blocks a method `run`."""
    return block.run(function, *args) if hasattr(block, "run") else function(block, *args)  # type: ignore[operator]


def block_forward(
    block: Block,
    rows: Float[Tensor, "B R D"],
    num_kv: int,
    attn_bias: Float[Tensor, "R C"],
    query_blocks: list[QueryBlock],
    scale: DropPathScale,
) -> Float[Tensor, "B R D"]:
    """Run a timm Block in which all rows have queries and the first `num_kv` keys and values."""
    q = block.norm1(rows)
    kv = q[:, :num_kv].contiguous()  # as its products would make it, each time
    return residual_update(block, rows, two_stream_attention(block.attn, kv, q, attn_bias, query_blocks), scale)


def block_forward_queries(
    block: Block,
    rows: Float[Tensor, "B R D"],
    num_kv: int,
    query_rows: slice | Int[Tensor, " m"],
    attn_bias: Float[Tensor, "m C"],
    query_blocks: list[QueryBlock],
    scale: DropPathScale,
) -> Float[Tensor, "B m D"]:
    """Run a timm Block of which only the outputs of `query_rows` are needed."""
    kv, rows = rows[:, :num_kv], rows[:, query_rows]
    attended = two_stream_attention(block.attn, block.norm1(kv), block.norm1(rows), attn_bias, query_blocks)
    return residual_update(block, rows, attended, scale)


def residual_update(
    block: Block, rows: Float[Tensor, "B R D"], attended: Float[Tensor, "B R D"], scale: DropPathScale = (None, None)
) -> Float[Tensor, "B R D"]:
    """Do what timm's Block does after its attention."""
    rows = rows + apply_drop_path(block.drop_path1, block.ls1(attended), scale[0])
    return rows + apply_drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(rows))), scale[1])


def apply_drop_path(
    path: nn.Module, branch: Float[Tensor, "B R D"], scale: Float[Tensor, "B 1 1"] | None
) -> Float[Tensor, "B R D"]:
    """Scale a residual branch, or let timm's DropPath draw where there is no scale."""
    return path(branch) if scale is None else branch * scale


def drop_path_scales(
    vit: VisionTransformer, drop_path_rand: DropPathRand | None, rows: Float[Tensor, "B R D"]
) -> list[DropPathScale]:
    """Return the factors of each block's two branches, in the dtype of `rows`.

    Stochastic depth (arXiv 1603.09382) keeps a branch for the images whose number in `drop_path_rand` is below the branch's
    probability; given from outside, the draws don't depend on which images are computed together.
    """

    def scale(path: nn.Module, rand: Float[Tensor, " B"]) -> Float[Tensor, "B 1 1"] | None:
        if not path.training:
            return None
        # That of the first block is 1; it is multiplied by nevertheless, so that its compiled block is the others'.
        keep_prob = 1 - path.drop_prob if isinstance(path, DropPath) else 1
        return ((rand < keep_prob).to(rows.dtype) / keep_prob)[:, None, None]

    if drop_path_rand is None:
        return [(None, None)] * len(vit.blocks)
    pairs = drop_path_rand.unflatten(1, (-1, 2)).permute(1, 2, 0)
    return [
        (scale(block.drop_path1, first), scale(block.drop_path2, second))
        for block, (first, second) in zip(vit.blocks, pairs, strict=True)
    ]
