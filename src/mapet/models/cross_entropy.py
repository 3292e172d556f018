"""Linear layer and cross-entropy in one, in chunks: the (rows, V) logits never exist as a whole."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ROWS = {"cpu": 512, "gpu": 8192}
"""Rows of logits at once: few enough for a CPU's cache, enough to fill a GPU; not so few that adding up the weight's
gradient, once a chunk, costs more than the logits."""
Softmax = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def softmax_gradient(
    product: Float[Tensor, "n V"], bias: Float[Tensor, " V"], target: Int[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n 1"], Int[Tensor, ""]]:
    """The loss's gradient by logits = product + bias (softmax less one-hot, in the dtype of `product`), the loss of each row, and
    how many rows have their target as the likeliest word.

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
    """The gradients are made in the forward pass, while a chunk's logits are at hand (as in Liger, arXiv 2410.10989)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, softmax: Softmax
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(x)
        full = torch.promote_types(x.dtype, torch.float32)  # the softmax and all sums are never in half precision
        chunks = -(-rows // CHUNK_ROWS["cpu" if x.device.type == "cpu" else "gpu"])
        chunk = -(-rows // chunks)  # about the same size each
        dx = torch.empty_like(x)
        dweight, dbias = (torch.zeros_like(parameter, dtype=full) for parameter in (weight, bias))
        losses, correct = x.new_empty(rows, dtype=full), targets.new_zeros(())
        parts = (x, dx, targets[:, None], losses[:, None])
        for part, dpart, target, loss in zip(*(whole.split(chunk) for whole in parts), strict=True):
            gradient, loss[:], right = softmax(part @ weight.T, bias, target)
            correct += right
            torch.mm(gradient, weight, out=dpart)
            dweight += (gradient.T @ part).to(full)
            dbias += gradient.sum(dim=0, dtype=full)
        ctx.save_for_backward(dx, dweight.to(weight.dtype), dbias.to(bias.dtype))
        ctx.rows = rows
        ctx.mark_non_differentiable(correct, losses)
        return losses.sum() / rows, correct, losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _correct: None, _losses: None) -> tuple[Tensor | None, ...]:
        return *(saved * (gradient / ctx.rows).to(saved.dtype) for saved in ctx.saved_tensors), None, None


def linear_cross_entropy(
    x: Float[Tensor, "n D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"],
    targets: Int[Tensor, " n"],
    softmax: Softmax = softmax_gradient,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""], Float[Tensor, " n"]]:
    """Mean `cross_entropy(linear(x, weight, bias), targets)` in nats, how many rows have their target as the likeliest
    word, and the loss of each row (without gradient), with memory for one chunk of logits.

    Sums and softmax are in float32 at least, products in the dtype of `x`.

    Args:
        softmax: `softmax_gradient`, or that compiled.
    """
    return _LinearCrossEntropy.apply(x, weight, bias, targets, softmax)
