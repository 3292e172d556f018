"""Several classes an image: average precision."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def average_precisions(
    scores: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], weights: Float[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " K"]:
    """Area under the precision-recall curve of each class, without interpolation; NaN for a class that no image has.

    The mean precision at the ranks of the images that have the class; images of one score share a rank.

    Args:
        weights: how often each image counts.
    """
    found = np.full(scores.shape[1], np.nan)
    weight = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=float)
    values, wanted = scores.double().numpy(), targets.numpy() > 0
    for column in range(scores.shape[1]):
        order = np.argsort(-values[:, column], kind="stable")
        hits = np.cumsum(weight[order] * wanted[order, column])
        if hits[-1] == 0:
            continue
        ranks = np.cumsum(weight[order])
        last = np.append(np.diff(values[order, column]) != 0, True)  # of each group of equal scores
        hits, ranks = hits[last], ranks[last]
        precision = np.divide(hits, ranks, out=np.zeros_like(hits), where=ranks > 0)
        found[column] = float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])
    return found


def mean_average_precision(
    scores: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], weights: Float[np.ndarray, " n"] | None = None
) -> float:
    """Mean over the classes that some image has (macro mAP); 0 where none is."""
    found = average_precisions(torch.as_tensor(scores), torch.as_tensor(targets), weights)
    return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0
