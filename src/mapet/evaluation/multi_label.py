"""Several classes an image: a linear probe for each class, evaluated by mean average precision."""

from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import average_precision_score
from torch import Tensor

from mapet.evaluation.eval_context import EvalContext, ProtocolResult
from mapet.evaluation.intervals import bootstrap
from mapet.evaluation.probes import fit_logistic, fit_scaler


def average_precisions(
    scores: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], weights: Float[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " K"]:
    """Compute the area under each class's precision-recall curve, without interpolation; NaN for a class that no image has.

    Args:
        weights: how often each image counts.
    """
    weight = np.ones(len(scores)) if weights is None else weights
    return np.array(
        [
            average_precision_score(target, score, sample_weight=weight) if weight @ target > 0 else np.nan
            for score, target in zip(scores.T.numpy(), targets.T.numpy(), strict=True)
        ]
    )


def mean_average_precision(
    scores: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], weights: Float[np.ndarray, " n"] | None = None
) -> float:
    """Average over the classes that some image has (macro mAP); 0 where none is."""
    found = average_precisions(scores, targets, weights)
    return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0


def multi_label(context: EvalContext) -> ProtocolResult:
    """Evaluate linear probes, one logistic regression a class."""
    assert context.data.boxes is not None
    train, test = context.data.boxes
    targets, truth = (
        torch.from_numpy(part.image_labels)[cache.index]
        for part, cache in ((train, context.train), (test, context.test))
    )
    fit, check, scaler = context.train.layer_features(), context.test.layer_features(), fit_scaler(context.train)
    logits = [fit_logistic(fit, target, 2, scaler=scaler)(check) for target in targets.T]
    scores = torch.stack(
        [own[:, 1] - own[:, 0] for own in logits], 1
    ).nan_to_num()  # infinite: shown in all, or in none
    each = zip(train.classes, average_precisions(scores, truth), strict=True)
    return ProtocolResult(
        {"multi_label_map": bootstrap(partial(mean_average_precision, scores, truth), len(truth))},
        details={"ap": {label: None if np.isnan(ap) else round(float(ap), 4) for label, ap in each}},
    )
