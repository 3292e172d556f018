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
"""Metric of a classifier, as in the results -> its name in text. Those for imbalanced images come first, as they do in tables."""

Value = TypeVar("Value")
Statistic = Callable[[Float[np.ndarray, " n"]], float]
"""Function from a weight of each of n test images, how often the image counts, to a metric. `bootstrap_ci` draws the weights of a resample;
with all weights 1 it is the metric of the images themselves."""


def is_imbalanced(labels: Int[np.ndarray, " n"]) -> bool:
    """Return whether the largest class has more than `IMBALANCE` times n / K images, of the K classes that have images.

    Accuracy on imbalanced test images weighs large classes more; on equally many test images of each class it equals the balanced accuracy,
    however imbalanced the training images are.

    Args:
        labels: class index of each test image; at least one image.
    """
    _, counts = np.unique(labels, return_counts=True)
    return bool(counts.max() > IMBALANCE * counts.mean())


def balanced_accuracy(
    correct: Shaped[np.ndarray, " n"], labels: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> float:
    """Return the mean recall of the classes that have images, 0 to 1: scikit-learn's `balanced_accuracy_score`, but faster.

    Args:
        correct: 1 or True for each image that is classified correctly, else 0; or the fraction of several predictions that are correct.
            With differences of two classifiers, -1 to 1, the result is the difference of their balanced accuracies.
        labels: class index of each image.
        weights: how often each image counts, at least 0; a class whose images all have weight 0 does not count.
    """
    counts, hits = np.bincount(labels, weights), np.bincount(labels, weights * correct)
    return float(np.mean(hits[counts > 0] / counts[counts > 0]))


def one_vs_rest_auroc(logits: Float[Tensor, "n K"], labels: Int[np.ndarray, " n"]) -> Statistic:
    """Return the AUROC, the area under the ROC curve as scikit-learn's `roc_auc_score` defines it, as a function of the images' weights.

    Scores are class probabilities, the softmax of the logits. Of two classes it is the AUROC of the second; of more, the mean over the classes
    that have images, each against all others (macro, one-vs-rest). Scores are sorted here, once; the function that is returned is fast
    enough for the thousands of resamples of a bootstrap.

    Args:
        logits: of each image, on the CPU; -inf for a class that is never predicted. Images whose probabilities are NaN, because the
            classifier has diverged, have score 0.
        labels: class index of each image.

    Returns:
        Function from the weight of each image to the AUROC, 0 to 1; NaN if all images of positive weight have one class.
    """
    probabilities = logits.double().softmax(1).nan_to_num(0.0).numpy()
    classes = [1] if logits.shape[1] == 2 else np.unique(labels).tolist()
    parts = []  # for each class: rows of its images, bin of the score of every image, number of bins
    for index in classes:
        members, scores = np.flatnonzero(labels == index), probabilities[:, index]
        values = np.unique(scores[members])
        # Bin of each image: 2 i + 1 if it has the score values[i], an even number if its score lies between two of them, ascending.
        bins = np.searchsorted(values, scores, "left") + np.searchsorted(values, scores, "right")
        parts.append((members, bins, 2 * len(values) + 1))

    def auroc(weights: Float[np.ndarray, " n"]) -> float:
        """Return the mean area over the classes that have positive and negative images of positive weight; NaN without any."""
        areas = []
        for members, bins, num_bins in parts:
            positive = np.bincount(bins[members], weights[members], num_bins)
            negative = np.bincount(bins, weights, num_bins) - positive
            if pairs := positive.sum() * negative.sum():
                # An image of the class is ahead of the others with lower scores, and counts half where the scores are equal.
                areas.append(float(positive @ (negative.cumsum() - negative / 2) / pairs))
        return fmean(areas) if areas else nan

    return auroc


def imbalance_statistics(logits: Float[Tensor, "n K"], labels: Int[Tensor, " n"]) -> dict[str, Statistic]:
    """Return the metrics that are given before the accuracy on imbalanced images, as functions of the images' weights.

    Args:
        logits: of each test image, on the CPU; -inf for a class that is never predicted.
        labels: class index of each image.

    Returns:
        'balanced_accuracy' and 'auroc' -> function, see `Statistic`; {} if the images are not imbalanced.
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
    """Return the metrics of a classifier on test images, each 0 to 1.

    Args:
        logits: of each test image, on the CPU; -inf for a class that is never predicted.
        labels: class index of each image.

    Returns:
        'accuracy' (top-1) -> value; on imbalanced images 'balanced_accuracy' and 'auroc' come before it.
    """
    leading = imbalance_statistics(logits, labels)
    scores = {kind: statistic(np.ones(len(labels))) for kind, statistic in leading.items()}
    return scores | {"accuracy": float((logits.argmax(1) == labels).double().mean())}


def name_rows(name: str, metrics: Mapping[str, Value]) -> dict[str, Value]:
    """Return a classifier's metrics with their names in tables of results.

    Args:
        name: of the classifier, 'logistic'; it becomes the name of its accuracy.
        metrics: 'accuracy', 'balanced_accuracy', 'auroc' -> value of any type.

    Returns:
        'logistic', 'logistic_balanced_accuracy', 'logistic_auroc' -> the same values, in the same order.
    """
    return {name if kind == "accuracy" else f"{name}_{kind}": value for kind, value in metrics.items()}
