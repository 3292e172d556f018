"""Classifiers on frozen features: weighted k-NN and logistic regression."""

import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor


def nearest_neighbours(
    bank: Iterable[tuple[int, Float[Tensor, "b D"]]], queries: Float[Tensor, "m D"], k: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Cosine similarities and indices of the `k` nearest rows of a bank, nearest first (fewer, if it has fewer).

    Args:
        bank: (index of the first row, rows), a block at a time: the bank may be larger than memory.
    """
    queries = F.normalize(queries, dim=1)
    best = torch.empty(len(queries), 0)
    found = torch.empty(len(queries), 0, dtype=torch.int64)
    for start, block in bank:
        block = F.normalize(block, dim=1)
        kept = []
        for part, old, old_index in zip(queries.split(1024), best.split(1024), found.split(1024), strict=True):
            similarity, index = (part @ block.T).topk(min(k, len(block)), dim=1)
            together, indices = torch.cat([old, similarity], 1), torch.cat([old_index, index + start], 1)
            top, place = together.topk(min(k, together.shape[1]), dim=1)
            kept.append((top, indices.gather(1, place)))
        best, found = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return best, found


def knn_votes(
    similarity: Float[Tensor, "m k"], labels: Int[Tensor, "m k"], classes: int, temperature: float = 0.07
) -> Float[Tensor, "m K"]:
    """Votes of the neighbours for each class, weighted by exp(s / T) (DINO, arXiv 2104.14294, appendix F.1)."""
    votes = torch.zeros(len(similarity), classes)
    return votes.scatter_add_(1, labels, (similarity / temperature).exp())


def knn_accuracy(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    test_labels: Int[Tensor, " m"],
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 of the weighted k-NN of DINO: cosine similarity, weights exp(s / T)."""
    similarity, neighbours = nearest_neighbours([(0, train)], test, k)
    votes = knn_votes(similarity, train_labels[neighbours], int(train_labels.max()) + 1, temperature)
    return int((votes.argmax(1) == test_labels).sum()) / len(test)


def linear_accuracy(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    test_labels: Int[Tensor, " m"],
    strength: float | None = None,
    max_iterations: int = 300,
    scaled: bool = False,
) -> float:
    """Top-1 of multinomial logistic regression on standardised features.

    Args:
        scaled: they are standardised already, by more images than these.
        strength: scikit-learn's C; None chooses among 0.01, 0.1, 1 on a fifth of the training set (never on the test set).
    """
    found = linear_predictions(train, train_labels, test, strength, max_iterations, scaled)
    return int((found == test_labels).sum()) / len(test)


def linear_predictions(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    strength: float | None = None,
    max_iterations: int = 300,
    scaled: bool = False,
) -> Int[Tensor, " m"]:
    """The classes that `linear_accuracy` judges."""
    if not scaled:
        mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
        train, test = (train - mean) / std, (test - mean) / std
    if strength is None:
        held = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        fit, check = held[len(held) // 5 :], held[: max(1, len(held) // 5)]
        scores = {
            c: int((_fit_and_predict(train[fit], train_labels[fit], train[check], c, 100) == train_labels[check]).sum())
            for c in (0.01, 0.1, 1.0)
        }
        strength = max(scores, key=lambda c: scores[c])
    return _fit_and_predict(train, train_labels, test, strength, max_iterations)


def _fit_and_predict(x: Tensor, y: Tensor, x_test: Tensor, strength: float, iterations: int) -> Int[Tensor, " m"]:
    if len(y.unique()) < 2:
        return y[:1].expand(len(x_test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=iterations).fit(x.numpy(), y.numpy())
    return torch.from_numpy(model.predict(x_test.numpy()))
