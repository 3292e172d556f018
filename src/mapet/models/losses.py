"""Losses of a patch's prediction: its visual token, or, as controls, its pixels or its teacher's feature."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

TargetKind = Literal["tokens", "pixels", "features"]
CHUNK_ROWS = {"cpu": 512, "gpu": 8192}
"""Rows of logits at once: few enough for a CPU's cache, enough to fill a GPU; not so few that adding up the weight's
gradient, once a chunk, costs more than the logits."""
CrossEntropyFn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


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
