"""A timm VisionTransformer that learns an objective: pack the segments, run its blocks under the attention mask, predict."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from mapet.data.dataset import Batch, DropPathRand, Targets
from mapet.errors import MapetError, option
from mapet.models.objectives import CAE, Objective
from mapet.models.packing import (
    PackedLayout,
    QueryBlock,
    TargetIndices,
    gather_patches,
    pack,
    truncate_blocks,
    two_stream_attention,
)

REGRESSOR_DEPTH = 4
"""Blocks of CAE's regressor, and of its decoder (the paper's for ViT-B)."""
ALIGNMENT_WEIGHT = 2.0
"""Weight of CAE's alignment loss."""
TargetKind = Literal["tokens", "pixels", "features"]
CHUNK_ROWS = {"cpu": 512, "gpu": 8192}
"""Rows of logits at once: few enough for a CPU's cache, enough to fill a GPU; not so few that adding up the weight's
gradient, once a chunk, costs more than the logits."""
CrossEntropyFn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
DropPathScale = tuple[Float[Tensor, "B 1 1"] | None, Float[Tensor, "B 1 1"] | None]
"""What stochastic depth multiplies a block's two branches by: 0, or 1 / probability of being kept."""


# ---- losses of a patch's prediction: its visual token, or, as controls, its pixels or its teacher's feature


class LossOutput(NamedTuple):
    """A mean loss, how many rows have their token as the likeliest (None where there are no tokens), each row's loss."""

    loss: Float[Tensor, ""]
    num_correct: Int[Tensor, ""] | None
    losses: Float[Tensor, " n"]


def cross_entropy_with_grad(
    product: Float[Tensor, "n V"], bias: Float[Tensor, " V"], target: Int[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n 1"], Int[Tensor, ""]]:
    """Return the loss's gradient by logits = product + bias (softmax less one-hot, in the dtype of `product`), the loss of each
    row, and how many rows have their target as the likeliest token.

    Written so that torch.compile makes one pass of it; as it stands it reads and writes the logits in turn.
    """
    full = torch.promote_types(product.dtype, torch.float32)
    logits = product.to(full).add_(bias.to(full))  # on CPUs sums of two dtypes are slow: convert first
    highest, likeliest = logits.max(dim=1, keepdim=True)
    probability = logits.softmax(dim=1)
    # log-sum-exp = highest - log of its probability
    losses = highest - logits.gather(1, target) - probability.gather(1, likeliest).log()
    gradient = probability.scatter_add_(1, target, -torch.ones_like(highest)).to(product.dtype)
    return gradient, losses, (likeliest == target).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Linear layer and cross-entropy in one, in chunks: the (rows, V) logits never exist as a whole.

    The gradients are made in the forward pass, while a chunk's logits are at hand (as in Liger, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cross_entropy: CrossEntropyFn
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(x)
        full = torch.promote_types(x.dtype, torch.float32)  # the softmax and all sums are never in half precision
        chunks = -(-rows // CHUNK_ROWS["cpu" if x.device.type == "cpu" else "gpu"])
        chunk = -(-rows // chunks)  # about the same size each
        dx = torch.empty_like(x)
        dweight, dbias = (torch.zeros_like(parameter, dtype=full) for parameter in (weight, bias))
        losses, num_correct = x.new_empty(rows, dtype=full), targets.new_zeros(())
        parts = (x, dx, targets[:, None], losses[:, None])
        for part, dpart, target, loss in zip(*(tensor.split(chunk) for tensor in parts), strict=True):
            gradient, loss[:], correct = cross_entropy(part @ weight.T, bias, target)
            num_correct += correct
            torch.mm(gradient, weight, out=dpart)
            dweight += (gradient.T @ part).to(full)
            dbias += gradient.sum(dim=0, dtype=full)
        ctx.save_for_backward(dx, dweight.to(weight.dtype), dbias.to(bias.dtype))
        ctx.rows = rows
        ctx.mark_non_differentiable(num_correct, losses)
        return losses.sum() / rows, num_correct, losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _num_correct: None, _losses: None) -> tuple[Tensor | None, ...]:
        return *(saved * (gradient / ctx.rows).to(saved.dtype) for saved in ctx.saved_tensors), None, None


def linear_cross_entropy(
    x: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"], targets: Int[Tensor, " n"],
    cross_entropy: CrossEntropyFn = cross_entropy_with_grad,
) -> LossOutput:  # fmt: skip
    """Compute the mean `cross_entropy(linear(x, weight, bias), targets)` in nats with memory for one chunk of logits.

    Sums and softmax are in float32 at least, products in the dtype of `x`.

    Args:
        cross_entropy: `cross_entropy_with_grad`, or that compiled.
    """
    return LossOutput(*_LinearCrossEntropy.apply(x, weight, bias, targets, cross_entropy))


def token_loss(
    rows: Float[Tensor, "n D"], head: nn.Linear, tokens: Int[Tensor, " n"], cross_entropy: CrossEntropyFn = cross_entropy_with_grad
) -> LossOutput:  # fmt: skip
    """Compute the cross-entropy, nats (BEiT, MaPeT)."""
    return linear_cross_entropy(rows, head.weight, head.bias, tokens, cross_entropy)


def compiled_token_loss() -> Callable[[Tensor, nn.Linear, Tensor], LossOutput]:
    """Return a `token_loss` that makes one pass over the logits."""
    return partial(token_loss, cross_entropy=torch.compile(cross_entropy_with_grad, dynamic=False))


def pixel_loss(rows: Float[Tensor, "n D"], head: nn.Linear, patches: Float[Tensor, "n F"]) -> LossOutput:
    """Compute the mean squared error of `normalized_patches` (MAE, arXiv 2111.06377): 1 for always predicting the mean."""
    return mean_loss((at_least_float32(head(rows)) - patches).square().mean(dim=1))


def feature_loss(rows: Float[Tensor, "n D"], head: nn.Linear, features: Float[Tensor, "n F"]) -> LossOutput:
    """Compute 1 - cosine similarity with the teacher's feature (MVP, arXiv 2203.05175; EVA, arXiv 2211.07636)."""
    return mean_loss(1 - F.cosine_similarity(at_least_float32(head(rows)), features, dim=1))


def mean_loss(losses: Float[Tensor, " n"]) -> LossOutput:
    """Average the losses of rows that have no token."""
    return LossOutput(losses.mean(), None, losses.detach())


LOSSES: dict[TargetKind, Callable[[Tensor, nn.Linear, Tensor], LossOutput]] = {
    "tokens": token_loss, "pixels": pixel_loss, "features": feature_loss,
}  # fmt: skip


def normalized_patches(images: Float[Tensor, "B C H W"], grid: tuple[int, int]) -> Float[Tensor, "B N F"]:
    """Return the pixels of each patch, row-major, less their mean and divided by their standard deviation (MAE)."""
    patches = images.unflatten(2, (grid[0], -1)).unflatten(4, (grid[1], -1)).permute(0, 2, 4, 1, 3, 5)
    flat = patches.flatten(3).flatten(1, 2)
    return (flat - flat.mean(2, keepdim=True)) / (flat.var(2, keepdim=True) + 1e-6).sqrt()


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32: losses are never in less."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


# ---- the model


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
        self, vit: VisionTransformer, vocab_size: int, objective: Objective, num_context: int, num_predict: int | None = None,
        target: TargetKind = "tokens", separate_query_token: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        num_patches = vit.patch_embed.num_patches
        if not 0 <= num_context < num_patches:
            reason = f"an image has {num_patches} patches, so 0 to {num_patches - 1}"
            raise MapetError(f"{num_context} context patches ({option('mask_ratio')}) out of range: {reason}")
        if num_predict is not None and not 1 <= num_predict <= num_patches - num_context:
            reason = f"{num_patches - num_context} patches are hidden, so 1 to that"
            raise MapetError(f"{num_predict} targets ({option('num_predict')}) out of range: {reason}")
        if vit.pos_embed is None:
            raise MapetError("the ViT has no learned position embedding, which mask tokens need: choose one that has")
        if separate_query_token and "query" not in objective.segments:
            raise MapetError(f"objective '{objective.name}' has no query tokens to separate from mask tokens")
        self.vit, self.objective = vit, objective
        self.num_patches, self.num_context, self.num_predict = num_patches, num_context, num_predict
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
            counts = self.vit.num_prefix_tokens, c, self.num_patches - c
            self._layouts[c] = PackedLayout.from_counts(self.objective, *counts)
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
    block: Block, rows: Float[Tensor, "B R D"], num_kv: int, attn_bias: Float[Tensor, "R C"],
    query_blocks: list[QueryBlock], scale: DropPathScale,
) -> Float[Tensor, "B R D"]:  # fmt: skip
    """Run a timm Block in which all rows have queries and the first `num_kv` keys and values."""
    q = block.norm1(rows)
    kv = q[:, :num_kv].contiguous()  # as its products would make it, each time
    return residual_update(block, rows, two_stream_attention(block.attn, kv, q, attn_bias, query_blocks), scale)


def block_forward_queries(
    block: Block, rows: Float[Tensor, "B R D"], num_kv: int, query_rows: slice | Int[Tensor, " m"],
    attn_bias: Float[Tensor, "m C"], query_blocks: list[QueryBlock], scale: DropPathScale,
) -> Float[Tensor, "B m D"]:  # fmt: skip
    """Run a timm Block of which only the outputs of `query_rows` are needed."""
    kv, rows = rows[:, :num_kv], rows[:, query_rows]
    attended = two_stream_attention(block.attn, block.norm1(kv), block.norm1(rows), attn_bias, query_blocks)
    return residual_update(block, rows, attended, scale)


def residual_update(
    block: Block, rows: Float[Tensor, "B R D"], attended: Float[Tensor, "B R D"], scale: DropPathScale = (None, None)
) -> Float[Tensor, "B R D"]:
    """Do what timm's Block does after its attention; its DropPath draws where there is no scale."""
    branch = block.ls1(attended)
    rows = rows + (block.drop_path1(branch) if scale[0] is None else branch * scale[0])
    branch = block.ls2(block.mlp(block.norm2(rows)))
    return rows + (block.drop_path2(branch) if scale[1] is None else branch * scale[1])


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
    blocks = zip(vit.blocks, pairs, strict=True)
    return [(scale(block.drop_path1, first), scale(block.drop_path2, second)) for block, (first, second) in blocks]


# ---- CAE: its encoder runs on visible patches alone; a regressor predicts the latents of hidden ones, a decoder their tokens


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
        self, vit: VisionTransformer, vocab_size: int, num_context: int, num_predict: int | None = None,
        target: TargetKind = "tokens", separate_query_token: bool = False,
    ) -> None:  # fmt: skip
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
        "num_heads": first.attn.num_heads, "mlp_ratio": first.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": first.attn.qkv.bias is not None, "norm_layer": type(first.norm1),
        "init_values": float(first.ls1.gamma.detach()[0]) if hasattr(first.ls1, "gamma") else None,
    }  # fmt: skip
    blocks = nn.Sequential(*(Block(vit.embed_dim, **options) for _ in range(REGRESSOR_DEPTH)))
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            init_weights_vit_timm(module)
        if isinstance(module, Block):
            module.attn.fused_attn = first.attn.fused_attn
    return blocks
