"""Balanced accuracy and AUROC, for test images of which one class has more than its equal part."""

from collections.abc import Callable, Mapping
from functools import partial
from math import nan
from statistics import fmean
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor

IMBALANCE = 1.2
"""Images are imbalanced if their largest class has more than this many times its equal part of them."""
METRIC_NAMES = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "accuracy": "accuracy"}
"""Kinds of metrics of a classifier, those first that lead on imbalanced images -> text for the user."""

Value = TypeVar("Value")
Statistic = Callable[[Float[np.ndarray, " n"]], float]
"""A metric of test images; it takes the weight of each, how often it counts, as `bootstrap_ci` hands it over."""


def is_imbalanced(labels: Int[np.ndarray, " n"]) -> bool:
    """Return whether the largest class has more than `IMBALANCE` times n / K images, of the K classes that have images.

    Labels of the images that are tested on decide: in the accuracy on them large classes count more than small ones. However many training
    images a class has, the accuracy on equally many test images of each class is the balanced accuracy.
    """
    _, counts = np.unique(labels, return_counts=True)
    return bool(counts.max() > IMBALANCE * counts.mean())


def balanced_accuracy(
    correct: Shaped[np.ndarray, " n"], labels: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> float:
    """Return the mean recall of the classes that have images, scikit-learn's `balanced_accuracy_score`, 0 to 1, in a fraction of its time.

    Args:
        correct: 1 or True for each image that is classified correctly, else 0; or the fraction of several predictions that are correct.
        labels: class index of each.
        weights: how often each counts.
    """
    counts, hits = np.bincount(labels, weights), np.bincount(labels, weights * correct)
    return float(np.mean(hits[counts > 0] / counts[counts > 0]))


def one_vs_rest_auroc(logits: Float[Tensor, "n K"], labels: Int[np.ndarray, " n"]) -> Statistic:
    """Return the function from weights to the AUROC, the area under the ROC curve, as scikit-learn's `roc_auc_score` defines it.

    Scores are class probabilities, the softmax of the logits. Of two classes it is the AUROC of the second; of more, the mean over the classes
    that have images, each against all others (macro, one-vs-rest). Scores are compared once, not for each resample of a bootstrap.

    Args:
        logits: of each image; -inf excludes a class. Those of a probe that has diverged, NaN or infinite, count as equal.
        labels: class index of each image.

    Returns:
        Function that returns NaN if all images of positive weight have one class.
    """
    probabilities = logits.double().softmax(1).nan_to_num(0.0).numpy()
    classes = [1] if logits.shape[1] == 2 else np.unique(labels).tolist()
    parts = []
    for index in classes:
        shown, scores = np.flatnonzero(labels == index), probabilities[:, index]
        values = np.unique(scores[shown])
        # Bin of each image: 2 i + 1 if it has the score values[i], an even number if its score lies between two of them, ascending.
        bins = np.searchsorted(values, scores, "left") + np.searchsorted(values, scores, "right")
        parts.append((shown, bins, 2 * len(values) + 1))

    def auroc(weights: Float[np.ndarray, " n"]) -> float:
        areas = []
        for shown, bins, num_bins in parts:
            positive = np.bincount(bins[shown], weights[shown], num_bins)
            negative = np.bincount(bins, weights, num_bins) - positive
            if pairs := positive.sum() * negative.sum():
                # An image of the class is ahead of the others with lower scores, and counts half where the scores are equal.
                areas.append(float(positive @ (negative.cumsum() - negative / 2) / pairs))
        return fmean(areas) if areas else nan

    return auroc


def imbalance_statistics(logits: Float[Tensor, "n K"], labels: Int[Tensor, " n"]) -> dict[str, Statistic]:
    """Return the metrics of a classifier that lead on imbalanced images: 'balanced_accuracy' and 'auroc'; {} on other images.

    Args:
        logits: of each test image, on the CPU; -inf excludes a class.
        labels: class index of each.
    """
    truth = labels.numpy()
    if not is_imbalanced(truth):
        return {}
    correct = (logits.argmax(1) == labels).numpy()
    return {
        "balanced_accuracy": partial(balanced_accuracy, correct, truth),
        "auroc": one_vs_rest_auroc(logits, truth),
    }


def score_classifier(logits: Float[Tensor, "n K"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """Return 'accuracy', top-1, of a classifier, 0 to 1; on imbalanced images 'balanced_accuracy' and 'auroc' stand before it.

    Args:
        logits: of each test image, on the CPU; -inf excludes a class.
        labels: class index of each.
    """
    leading = imbalance_statistics(logits, labels)
    scores = {kind: statistic(np.ones(len(labels))) for kind, statistic in leading.items()}
    return scores | {"accuracy": float((logits.argmax(1) == labels).double().mean())}


def name_rows(name: str, metrics: Mapping[str, Value]) -> dict[str, Value]:
    """Return 'NAME_balanced_accuracy', 'NAME_auroc' and, for 'accuracy', NAME itself -> value, from metrics of a classifier by kind."""
    return {name if kind == "accuracy" else f"{name}_{kind}": value for kind, value in metrics.items()}
