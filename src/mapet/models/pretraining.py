"""A timm VisionTransformer that learns an objective: pack the segments, run its blocks under the attention mask, predict.

Sizes: B images, N patches, c context and p = N - c masked ones, of which m are predicted; V tokens, D embedding dimensions,
F values of a regression target; R rows in the packed sequence, of which the first C have keys and values.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mapet.data.dataset import Batch, DropPathRand, Targets
from mapet.errors import MapetError, option
from mapet.models.objectives import Objective
from mapet.models.packing import PackedLayout, QueryBlock, TargetIndices, gather_patches, pack, two_stream_attention

MAE_EPS = 1e-6
"""Added to the variance of a patch's pixels, as in MAE."""
INIT_STD = 0.02
"""Standard deviation of the first mask token and head weights (BEiT's)."""
TargetKind = Literal["tokens", "pixels", "features"]
CHUNK_ROWS = {"cpu": 512, "gpu": 8192}
"""Maximum rows of logits in memory at once: few enough for a CPU's cache, enough to fill a GPU; not so few that summing the
weight's gradient, once per chunk, costs more than the logits."""
CrossEntropyFn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`cross_entropy_with_grad`, or that function compiled."""
DropPathScale = Float[Tensor, "2 B 1 1"] | None
"""Factors of a block's two residual branches for each image: 0 if dropped, else 1 / keep probability; None: the block draws."""


# ---- losses of a patch's prediction: its visual token, or, as controls, its pixels or its teacher's feature


class LossOutput(NamedTuple):
    """Cross-entropy of n rows, nats.

    Attributes:
        loss: mean over rows, with gradient.
        num_correct: rows whose most likely token is the target.
        loss_per_row: without gradient.
    """

    loss: Float[Tensor, ""]
    num_correct: Int[Tensor, ""]
    loss_per_row: Float[Tensor, " n"]


def cross_entropy_with_grad(
    product: Float[Tensor, "n V"], bias: Float[Tensor, " V"], target: Int[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n 1"], Int[Tensor, ""]]:
    """Compute the cross-entropy of the logits `product + bias`, and its gradient.

    torch.compile fuses it into one pass over the logits; uncompiled, each operation reads and writes them.

    Args:
        product: input rows times the layer's weight, without bias, in any floating dtype; softmax and losses are computed in float32
            at least. If it is float32 or wider, its memory is overwritten.
        bias: of the linear layer.
        target: token id of each row, 0 to V - 1.

    Returns:
        (gradient of each row's loss by its logits, in the dtype of `product`; loss of each row, nats; number of rows whose
        most likely token is the target)
    """
    wide = torch.promote_types(product.dtype, torch.float32)
    logits = product.to(wide).add_(bias.to(wide))  # on CPUs sums of two dtypes are slow: convert first
    max_logit, predicted = logits.max(dim=1, keepdim=True)
    probability = logits.softmax(dim=1)
    log_sum_exp = max_logit - probability.gather(1, predicted).log()
    losses = log_sum_exp - logits.gather(1, target)
    # softmax - one-hot, in the memory of `probability`
    gradient = probability.scatter_add_(1, target, -torch.ones_like(max_logit)).to(product.dtype)
    return gradient, losses, (predicted == target).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Linear layer and mean cross-entropy in one, in chunks of rows: the (n, V) logits are never in memory as a whole.

    The gradients are computed in the forward pass, while a chunk's logits are in memory (as in Liger, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cross_entropy: CrossEntropyFn
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the cross-entropy of `F.linear(x, weight, bias)` in chunks of rows, and already its gradients, for `backward`.

        A chunk of at most `CHUNK_ROWS` rows is few enough for its (rows, V) logits to stay in a cache or small memory.

        Args:
            ctx: autograd's context; it keeps the gradients of the loss summed over rows by x, weight and bias, and the number of rows.
            x: (n, D), inputs of the linear layer, in the dtype of `weight`; n is at least 1.
            weight: (V, D).
            bias: (V,).
            targets: (n,), token id of each row, 0 to V - 1.
            cross_entropy: `cross_entropy_with_grad`, or that function compiled. For a chunk it gets `x @ weight.T`, the bias and the
                targets as (rows, 1), and returns the gradient of each row's loss by its logits, the losses as (rows, 1) in nats, and
                the number of correct rows.

        Returns:
            (mean loss in nats; number of rows whose most likely token is the target; (n,) loss of each row). Only the mean loss has a
            gradient. Losses are float32, or wider if `x` is.
        """
        num_rows = len(x)
        wide = torch.promote_types(x.dtype, torch.float32)  # the softmax and all sums are never in half precision
        num_chunks = math.ceil(num_rows / CHUNK_ROWS["cpu" if x.device.type == "cpu" else "gpu"])
        chunk_size = math.ceil(num_rows / num_chunks)  # all chunks have about the same size
        dx = torch.empty_like(x)
        dweight, dbias = torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)
        losses, num_correct = x.new_empty(num_rows, dtype=wide), targets.new_zeros(())
        chunks = (tensor.split(chunk_size) for tensor in (x, dx, targets[:, None], losses[:, None]))
        # `dx_chunk` and `loss` are views, written in place
        for x_chunk, dx_chunk, target, loss in zip(*chunks, strict=True):
            gradient, loss[:], correct = cross_entropy(x_chunk @ weight.T, bias, target)
            num_correct += correct
            torch.mm(gradient, weight, out=dx_chunk)
            dweight += (gradient.T @ x_chunk).to(wide)
            dbias += gradient.sum(dim=0, dtype=wide)
        ctx.save_for_backward(dx, dweight.to(weight.dtype), dbias.to(bias.dtype))
        ctx.num_rows = num_rows
        ctx.mark_non_differentiable(num_correct, losses)
        return losses.sum() / num_rows, num_correct, losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _num_correct: None, _losses: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs of `forward`: of x, weight and bias those saved there, of the mean; the others have none.

        Args:
            ctx: holds the gradients of the summed loss and the number of rows.
            gradient: derivative of the final loss by the mean loss, scalar.
            _num_correct, _losses: the same of the other outputs, which have no gradient: None, not used.
        """
        return *(saved * (gradient / ctx.num_rows).to(saved.dtype) for saved in ctx.saved_tensors), None, None


def linear_cross_entropy(
    x: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"], targets: Int[Tensor, " n"],
    cross_entropy: CrossEntropyFn = cross_entropy_with_grad,
) -> LossOutput:  # fmt: skip
    """Compute `F.cross_entropy(F.linear(x, weight, bias), targets)`, nats, with memory for one chunk of logits.

    Softmax and sums are in float32 at least, matrix products in the dtype of `x`.

    Args:
        x: inputs of the linear layer.
        weight: of the linear layer.
        bias: of the linear layer.
        targets: token id of each row, 0 to V - 1; n is at least 1.
        cross_entropy: `cross_entropy_with_grad`, or that function compiled.

    Returns:
        Mean loss, with a gradient; number of rows whose most likely token is the target; loss of each row, without a gradient.
    """
    return LossOutput(*_LinearCrossEntropy.apply(x, weight, bias, targets, cross_entropy))


def pixel_loss(predictions: Float[Tensor, "B m F"], patches: Float[Tensor, "B m F"]) -> Float[Tensor, "B m"]:
    """Compute each patch's mean squared error from `normalized_patches` (MAE, arXiv 2111.06377): about 1 if 0 is predicted."""
    return (predictions - patches).square().mean(dim=2)


def feature_loss(predictions: Float[Tensor, "B m F"], features: Float[Tensor, "B m F"]) -> Float[Tensor, "B m"]:
    """Compute 1 - cosine similarity with the teacher's features (MVP, arXiv 2203.05175; EVA, arXiv 2211.07636)."""
    return 1 - F.cosine_similarity(predictions, features, dim=2)


REGRESSION_LOSSES = {"pixels": pixel_loss, "features": feature_loss}
"""Losses of targets that are no tokens. Tokens have `linear_cross_entropy`."""


def normalized_patches(images: Float[Tensor, "B C H W"], grid: tuple[int, int]) -> Float[Tensor, "B N F"]:
    """Return the pixels of each patch, normalized to mean 0 and variance 1 within the patch (MAE).

    Args:
        images: of any normalization; H and W are multiples of the grid's rows and columns.
        grid: (rows, columns) of patches, N in all.

    Returns:
        Patches in row-major order, each with its F = C x height x width values in (channel, row, column) order. The variance is the
        unbiased one, with F - 1.
    """
    blocks = images.unflatten(2, (grid[0], -1)).unflatten(4, (grid[1], -1))  # (B, C, rows, height, columns, width)
    patches = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + MAE_EPS).sqrt()


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32, in which losses are computed; wider types are kept."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


# ---- the model


class PreTrainingOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        loss: mean over all images and their m predicted patches, with gradient; nats for tokens.
        num_correct: patches whose most likely token is the target; None where targets are regression vectors.
        targets: of the predicted patches, in permutation order.
        loss_per_image: mean over the image's predicted patches, without gradient.
    """

    loss: Float[Tensor, ""]
    num_correct: Int[Tensor, ""] | None
    targets: Int[Tensor, "B m"] | Float[Tensor, "B m F"]
    loss_per_image: Float[Tensor, " B"]


class ViTForPreTraining(nn.Module):
    """A timm ViT with the mask token and prediction head of MaPeT (arXiv 2306.07346, section 3) or another objective.

    The ViT itself is not modified and owns all that fine-tuning needs, so the backbone is exported by saving
    `vit.state_dict()`.

    Attributes:
        vit: the ViT, unchanged.
        objective: which segments of tokens are packed, and which attends to which.
        num_patches, num_context, num_predict: N, c and m, see `__init__`.
        target: what is predicted of a patch: 'tokens', 'pixels' or 'features'.
        mask_token: (1, 1, D), vector of mask tokens before positions are added.
        query_token: the same for query tokens; None: the mask token is used.
        head: linear layer from D to the outputs of a patch.
    """

    def __init__(
        self, vit: VisionTransformer, vocab_size: int, objective: Objective, num_context: int, num_predict: int | None = None,
        target: TargetKind = "tokens", separate_query_token: bool = False,
    ) -> None:  # fmt: skip
        """Add a mask token and a prediction head, with random weights, to a ViT.

        Args:
            vit: with learned absolute positions; any prefix tokens, norms, LayerScale, stochastic depth. It is kept, not copied.
            vocab_size: number of outputs of the head for a patch: V for tokens, F for the other targets.
            objective: which segments (context, mask tokens, ...) are packed into one sequence, and which attends to which.
            num_context: c, number of patches in the context, from 0 to N - 1, of batches whose `num_context` is None.
            num_predict: m: `sample_target_indices` draws so many of the p = N - c masked patches for a training step, an unbiased
                estimate of the same loss from fewer rows. None: all are predicted.
            target: what is predicted of a patch: 'tokens' (ids), 'pixels' (normalized within the patch) or 'features' (the teacher's).
            separate_query_token: give query tokens a parameter of their own, which starts as a copy of the mask token.

        Raises:
            MapetError: `num_context` or `num_predict` is out of range, the ViT has no position embeddings, the objective has no query
                tokens for `separate_query_token`, or without context and class token a query would attend to nothing.
        """
        super().__init__()
        num_patches = vit.patch_embed.num_patches
        if not 0 <= num_context < num_patches:
            expected = f"an image has {num_patches} patches: give 0 to {num_patches - 1}"
            raise MapetError(f"{num_context} context patches ({option('mask_ratio')}) are out of range, {expected}")
        num_masked = num_patches - num_context
        if num_predict is not None and not 1 <= num_predict <= num_masked:
            expected = f"{num_masked} patches are masked: give 1 to {num_masked}"
            raise MapetError(f"{option('num_predict', num_predict)} is out of range, {expected}")
        if vit.pos_embed is None:
            problem = "the ViT has no position embeddings (timm: pos_embed 'none'), which are added to mask tokens"
            raise MapetError(f"{problem}: choose another {option('model')} or {option('model_args')}")
        if separate_query_token and "query" not in objective.attends_to:
            raise MapetError(f"objective '{objective.name}' has no query tokens: omit {option('separate_query_token')}")
        self.vit, self.objective = vit, objective
        self.num_patches, self.num_context, self.num_predict = num_patches, num_context, num_predict
        self.target: TargetKind = target
        self._pack, self._block_forward, self._cross_entropy = pack, block_forward, cross_entropy_with_grad
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.head = nn.Linear(vit.embed_dim, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=INIT_STD)
        nn.init.trunc_normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)
        self.query_token = nn.Parameter(self.mask_token.detach().clone()) if separate_query_token else None
        self._layouts: dict[int, PackedLayout] = {}
        self.layout()  # raises now if a row would attend to nothing

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that timm's optimizers do not decay, beside biases and norms: positions and single tokens."""
        return {"mask_token", "query_token", *(f"vit.{name}" for name in self.vit.no_weight_decay())}

    @property
    def drop_path_blocks(self) -> Sequence[nn.Module]:
        """Return the blocks in the order in which a forward pass runs them: `Batch.drop_path_rand` has two numbers for each."""
        return list(self.vit.blocks)

    @property
    def num_masked(self) -> int:
        """Return p = N - c, for the model's own c."""
        return self.num_patches - self.num_context

    def layout(self, num_context: int | None = None) -> PackedLayout:
        """Return the packed layout (which row of the sequence is what, and attends to which) for c context patches; cached by c.

        Its `attn_bias` is on the model's device and in its dtype. The caller must not change the layout.

        Args:
            num_context: c, 0 to N - 1; None: the model's own.

        Raises:
            MapetError: without context and class token a row would attend to nothing.
        """
        c = self.num_context if num_context is None else num_context
        if c not in self._layouts:
            counts = self.vit.num_prefix_tokens, c, self.num_patches - c
            self._layouts[c] = PackedLayout.from_counts(self.objective, *counts)
        layout, like = self._layouts[c], self.mask_token
        if layout.attn_bias.dtype != like.dtype or layout.attn_bias.device != like.device:
            layout = self._layouts[c] = layout._replace(attn_bias=layout.attn_bias.to(like))
        return layout

    def forward(self, batch: Batch) -> PreTrainingOutput:
        """Compute the loss of a batch.

        Args:
            batch: normalized `images` (B, C, H, W); `targets`, for each patch in row-major order its token id (B, N) or regression vector
                (B, N, F); and `permutation` (B, N), patch indices, of which the first c are context and the others are predicted in this
                order. Optional: `num_context` (c; None: the model's own), `target_indices` (m indices, which of the masked patches are
                predicted; None: all), `drop_path_rand` (random numbers of stochastic depth; None: drawn by the blocks).

        Returns:
            Mean loss with gradient; number of correct predictions (None unless the targets are tokens); targets of the predicted patches,
            in permutation order; loss of each image, without gradient.
        """
        return self.compute_loss(self.encode(batch), self.hidden_targets(batch))

    def hidden_targets(self, batch: Batch) -> Targets:
        """Return the targets of the m predicted patches, in permutation order: token ids (B, m) or vectors (B, m, F).

        Args:
            batch: its `targets`, `permutation`, `num_context` and `target_indices` are used; see `forward`.
        """
        assert batch.targets is not None and batch.permutation is not None
        c = self.num_context if batch.num_context is None else batch.num_context
        targets = gather_patches(batch.targets, batch.permutation[:, c:])
        return targets if batch.target_indices is None else targets[:, batch.target_indices]

    def compute_loss(self, rows: Float[Tensor, "B m D"], targets: Targets) -> PreTrainingOutput:
        """Apply the prediction head to the ViT's final outputs, and compute the loss.

        Args:
            rows: outputs of the m predicted patches, as `encode` returns them.
            targets: of the same patches, as `hidden_targets` returns them: token ids (B, m), for which the loss is the cross-entropy, or
                pixels or teacher features (B, m, F), for which it is that of `REGRESSION_LOSSES`.

        Returns:
            Mean loss with gradient; number of correct predictions (None unless the targets are tokens); `targets`; loss of each image.
        """
        if self.target == "tokens":
            layer = self.head.weight, self.head.bias
            output = linear_cross_entropy(rows.flatten(0, 1), *layer, targets.flatten(), self._cross_entropy)
            loss_per_image = output.loss_per_row.view(targets.shape).mean(dim=1)
            return PreTrainingOutput(output.loss, output.num_correct, targets, loss_per_image)
        losses = REGRESSION_LOSSES[self.target](at_least_float32(self.head(rows)), targets)
        return PreTrainingOutput(losses.mean(), None, targets, losses.detach().mean(dim=1))

    def compile(self) -> None:
        """Let torch.compile compile what takes a step's time, when it runs first: packing, a block (once for all), the cross-entropy.

        Shapes are static: a new batch size or number of context patches is compiled again. `state_dict` stays as it is.
        """
        self._pack = torch.compile(pack, dynamic=False)
        self._block_forward = torch.compile(block_forward, dynamic=False)
        self._cross_entropy = torch.compile(cross_entropy_with_grad, dynamic=False)

    def sample_target_indices(self, num_context: int, seed: list[int]) -> TargetIndices | None:
        """Draw which m of the p masked patches a step predicts, on the CPU; None where all are predicted.

        Args:
            num_context: c of the step; m must be at most N - c.
            seed: integers for NumPy's generator; equal seeds draw equal indices.
        """
        if self.num_predict is None:
            return None
        order = np.random.default_rng(seed).permutation(self.num_patches - num_context)
        return torch.from_numpy(np.sort(order[: self.num_predict]))

    def predict(self, batch: Batch) -> Float[Tensor, "B m V"]:
        """Return the head's outputs for the m predicted patches, in permutation order: logits of V tokens, or F predicted values."""
        return self.head(self.encode(batch))

    def encode(self, batch: Batch) -> Float[Tensor, "B m D"]:
        """Return the ViT's final output of the m predicted patches, in permutation order.

        The images and the mask and query tokens of the objective are packed into one sequence of R rows. All rows go through all
        blocks but the last, of which only the outputs of the predicted patches are computed. The ViT's last norm is applied.

        Args:
            batch: normalized images, permutation and optional fields, see `forward`; its targets are not used.
        """
        assert batch.images is not None and batch.permutation is not None
        # `layout` says where the segments are, which rows predict (`output_rows`), and which rows attend to which; `indices`: which
        # m of the p masked patches are predicted, None for all.
        layout, indices = self.layout(batch.num_context), batch.target_indices
        images, tokens = batch.images.to(self.mask_token.dtype), (self.mask_token, self.query_token)
        rows = self._pack(self.vit, *tokens, images, batch.permutation, layout.segment_lengths, indices)
        attn_bias, output_bias = layout.attn_bias, layout.attn_bias[layout.output_rows]
        output_rows: slice | Tensor = layout.output_rows
        if indices is not None:
            output_bias = output_bias[indices]
            if layout.queries_only:  # nothing attends to the output rows: `pack` has omitted those not predicted
                attn_bias = torch.cat([attn_bias[: layout.num_kv], output_bias])
            else:
                output_rows = layout.output_rows.start + indices
        *scales, last_scale = drop_path_scales(self.drop_path_blocks, batch.drop_path_rand, rows)
        (*blocks, last_block), forward, num_kv = self.vit.blocks, self._block_forward, layout.num_kv
        for block, scale in zip(blocks, scales, strict=True):
            rows = run_block(forward, block, rows, num_kv, slice(None), attn_bias, layout.blocks, scale)
        last_args = num_kv, output_rows, output_bias, layout.output_blocks, last_scale
        return self.vit.norm(run_block(forward, last_block, rows, *last_args))


def run_block(function: Callable[..., Tensor], block: nn.Module, *args: Any) -> Tensor:
    """Return `function(block, *args)`, called through the block's method `run` if `apply_fsdp` has added one.

    FSDP2 gathers a block's sharded weights only while a forward method of the block runs.
    """
    return block.run(function, *args) if hasattr(block, "run") else function(block, *args)  # type: ignore[operator]


def block_forward(
    block: Block, rows: Float[Tensor, "B R D"], num_kv: int, query_rows: slice | Int[Tensor, " r"],
    attn_bias: Float[Tensor, "r C"], query_blocks: list[QueryBlock], scale: DropPathScale,
) -> Float[Tensor, "B r D"]:  # fmt: skip
    """Run a timm Block under an attention mask, and return the outputs of some rows.

    Args:
        block: of the ViT.
        rows: inputs of the block.
        num_kv: C: keys and values are those of the first C rows; nothing attends to the others.
        query_rows: the r rows whose queries and outputs are computed; `slice(None)`: all.
        attn_bias: 0 where a row of `query_rows` attends to one of the first C rows, -inf elsewhere.
        query_blocks: calls of attention that together compute the r rows, see `two_stream_attention`.
        scale: factors of stochastic depth of the two residual branches, see `residual_update`; None: the block draws.
    """
    normalized = block.norm1(rows)
    kv = normalized[:, :num_kv].contiguous()  # once, as both its projections need it
    attended = two_stream_attention(block.attn, kv, kv, normalized[:, query_rows], attn_bias, query_blocks)
    return residual_update(block, rows[:, query_rows], attended, scale)


def residual_update(
    block: Block, rows: Float[Tensor, "B R D"], attended: Float[Tensor, "B R D"], scale: DropPathScale = None
) -> Float[Tensor, "B R D"]:
    """Compute what follows attention in timm's Block: add its output to the rows, then the MLP's.

    Args:
        block: with its LayerScale, DropPath, norm and MLP.
        rows: inputs of the block.
        attended: outputs of its attention.
        scale: (2, B, 1, 1), for each image the factors of the attention and of the MLP branch, 0 (dropped) or 1 / keep probability, in
            place of the block's DropPath. None: the block's DropPath draws.

    Returns:
        Outputs of the block; `rows` is not changed.
    """
    branch = block.ls1(attended)
    rows = rows + (block.drop_path1(branch) if scale is None else branch * scale[0])
    branch = block.ls2(block.mlp(block.norm2(rows)))
    return rows + (block.drop_path2(branch) if scale is None else branch * scale[1])


def drop_path_scales(
    blocks: Sequence[nn.Module], drop_path_rand: DropPathRand | None, rows: Float[Tensor, "B R D"]
) -> list[DropPathScale]:
    """Return the factors of the residual branches of each block, in the dtype of `rows`.

    Stochastic depth (arXiv 1603.09382) keeps a branch for the images whose random number is below the branch's keep
    probability. As the numbers come with the images, the result doesn't depend on which images are computed together.

    Args:
        blocks: their DropPath modules have the drop probability; a block without one, as the first, keeps all (factors of 1).
        drop_path_rand: (B, 2 x blocks), uniform in [0, 1): of each block the attention's and the MLP's number; None: every block draws
            for itself.
        rows: a tensor whose dtype the factors get.

    Returns:
        For each block its (2, B, 1, 1) factors of the attention and of the MLP branch. All are None if `drop_path_rand` is None, where the
        blocks draw, or in evaluation mode, where nothing is dropped.
    """
    if drop_path_rand is None or not blocks[0].training:
        return [None] * len(blocks)
    scales: list[DropPathScale] = []
    for block, rand in zip(blocks, drop_path_rand.T.unflatten(0, (-1, 2)), strict=True):
        # Factors of 1 are multiplied by as well, so that all blocks share one compiled function.
        keep_prob = 1 - block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 1
        scales.append(((rand < keep_prob).to(rows.dtype) / keep_prob)[:, :, None, None])
    return scales
