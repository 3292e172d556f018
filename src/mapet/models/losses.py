"""What is predicted of a patch: its visual word, or, as controls, its pixels or its teacher's feature."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mapet.models.cross_entropy import Softmax, linear_cross_entropy, softmax_gradient

TargetKind = Literal["tokens", "pixels", "features"]


class Scores(NamedTuple):
    """A mean loss, how many rows have their word as the likeliest (None where there are no words), each row's loss."""

    loss: Float[Tensor, ""]
    correct: Int[Tensor, ""] | None
    losses: Float[Tensor, " n"]


def token_loss(
    rows: Float[Tensor, "n D"], head: nn.Linear, words: Int[Tensor, " n"], softmax: Softmax = softmax_gradient
) -> Scores:
    """Cross-entropy, nats (BEiT, MaPeT)."""
    return Scores(*linear_cross_entropy(rows, head.weight, head.bias, words, softmax))


def compiled_token_loss() -> Callable[[Tensor, nn.Linear, Tensor], Scores]:
    """`token_loss` that makes one pass over the logits."""
    return partial(token_loss, softmax=torch.compile(softmax_gradient, dynamic=False))


def pixel_loss(rows: Float[Tensor, "n D"], head: nn.Linear, patches: Float[Tensor, "n F"]) -> Scores:
    """Mean squared error of `normalized_patches` (MAE, arXiv 2111.06377): 1 for always guessing the mean."""
    return mean_of((full_precision(head(rows)) - patches).square().mean(dim=1))


def feature_loss(rows: Float[Tensor, "n D"], head: nn.Linear, features: Float[Tensor, "n F"]) -> Scores:
    """1 - cosine similarity with the teacher's feature (MVP, arXiv 2203.05175; EVA, arXiv 2211.07636)."""
    return mean_of(1 - F.cosine_similarity(full_precision(head(rows)), features, dim=1))


def mean_of(losses: Float[Tensor, " n"]) -> Scores:
    return Scores(losses.mean(), None, losses.detach())


LOSSES: dict[TargetKind, Callable[[Tensor, nn.Linear, Tensor], Scores]] = {
    "tokens": token_loss,
    "pixels": pixel_loss,
    "features": feature_loss,
}


def normalized_patches(images: Float[Tensor, "B C H W"], grid: tuple[int, int]) -> Float[Tensor, "B N F"]:
    """The pixels of each patch, row-major, less their mean and divided by their standard deviation (MAE)."""
    patches = images.unflatten(2, (grid[0], -1)).unflatten(4, (grid[1], -1)).permute(0, 2, 4, 1, 3, 5)
    flat = patches.flatten(3).flatten(1, 2)
    return (flat - flat.mean(2, keepdim=True)) / (flat.var(2, keepdim=True) + 1e-6).sqrt()


def full_precision(values: Tensor) -> Tensor:
    """Losses are never in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
