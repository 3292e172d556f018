"""Classifiers on frozen features: weighted k-NN and the linear probe."""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor


def knn_accuracy(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    test_labels: Int[Tensor, " m"],
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 of the weighted k-NN of DINO (arXiv 2104.14294, appendix F.1): cosine similarity, weights exp(s / T)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k = min(k, len(train))
    classes = int(train_labels.max()) + 1
    correct = 0
    for part, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        similarity, neighbours = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(test)


def linear_accuracy(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    test_labels: Int[Tensor, " m"],
    strength: float | None = None,
    max_iterations: int = 300,
) -> float:
    """Top-1 of multinomial logistic regression on standardised features.

    Args:
        strength: scikit-learn's C; None chooses among 0.01, 0.1, 1 on a fifth of the training set (never on the test set).
    """
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    if strength is None:
        held = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        fit, check = held[len(held) // 5 :], held[: max(1, len(held) // 5)]
        scores = {
            c: _fit_and_score(train[fit], train_labels[fit], train[check], train_labels[check], c, 100)
            for c in (0.01, 0.1, 1.0)
        }
        strength = max(scores, key=lambda c: scores[c])
    return _fit_and_score(train, train_labels, test, test_labels, strength, max_iterations)


def _fit_and_score(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, strength: float, iterations: int) -> float:
    if len(y.unique()) < 2:
        return float((y_test == y[0]).float().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=iterations).fit(x.numpy(), y.numpy())
    return float(model.score(x_test.numpy(), y_test.numpy()))
