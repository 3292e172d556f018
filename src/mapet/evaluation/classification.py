"""Protocols of classes: linear, k-NN and attentive probes, few labels, and several classes an image."""

from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import average_precision_score
from torch import Tensor

from mapet.evaluation.datasets import few_shot_split
from mapet.evaluation.eval_context import NEIGHBORS, EvalContext, ProtocolResult, protocol
from mapet.evaluation.features import PatchTokenCache
from mapet.evaluation.intervals import bootstrap, over_seeds
from mapet.evaluation.probes import fit_attentive, fit_linear_sgd, fit_logistic, fit_scaler, knn_scores


@protocol("labels")
def logistic(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe: logistic regression on the last layer's standardized features."""
    result, probe = ProtocolResult(), context.logistic
    predicted = probe(context.test.layer_features()).argmax(1)
    result.add_accuracy("logistic", predicted, context.test.labels, context.classes, f"C {probe.C:g}")
    return result


@protocol("labels")
def knn(context: EvalContext) -> ProtocolResult:
    """Evaluate weighted k-NN of the last layer's features."""
    result, k = ProtocolResult(), min(NEIGHBORS, len(context.train))
    votes = knn_scores(context.train, len(context.classes), *(part[:, :k] for part in context.test_neighbors))
    result.add_accuracy("knn", votes.argmax(1), context.test.labels, context.classes, f"k {k}")
    return result


@protocol("labels")
def linear_sgd(context: EvalContext) -> ProtocolResult:
    """Evaluate linear probes trained by SGD, plain and with batch norm, over layers and learning rates."""
    result, options, compute = ProtocolResult(), context.options, context.backbone.compute
    probes = fit_linear_sgd(context.train, len(context.classes), compute, options.linear_epochs, options.seed)
    for name, (probe, by_layer) in probes.items():
        selected = f"layer {probe.layer}, lr {probe.rates[0]:g}"
        predicted = probe.predict(context.test).argmax(1)
        result.add_accuracy(name, predicted, context.test.labels, context.classes, selected)
        result.details[name] = {"val_accuracy_by_layer": {str(layer): value for layer, value in by_layer.items()}}
    return result


@protocol("labels")
def attentive(context: EvalContext) -> ProtocolResult:
    """Evaluate the attentive probe of the last layer's patch tokens."""
    result, compute, test = ProtocolResult(), context.backbone.compute, context.data.test
    train_tokens, test_tokens = (
        PatchTokenCache(context.backbone, part, context.cache) for part in (context.data.train, test)
    )
    probe, lr = fit_attentive(train_tokens, len(context.classes), compute, context.options.seed)
    predicted, index = [], []
    with torch.inference_mode():
        for rows, tokens in test_tokens.epoch():
            predicted.append(probe(compute.to(tokens)).argmax(1).cpu())
            index.append(rows)
    labels = torch.from_numpy(test.labels)[torch.cat(index)]
    result.add_accuracy("attentive", torch.cat(predicted), labels, context.classes, f"lr {lr:g}")
    return result


@protocol("labels")
def few_shot(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe with few labels, over several fixed splits, standardized with all training images."""
    result = ProtocolResult()
    train, features, scaler = context.train, context.test.layer_features(), fit_scaler(context.train)
    row_of = torch.full((len(context.data.train),), -1)
    row_of[train.index] = torch.arange(len(train))
    for amount in context.options.few_shot:
        scores = []
        for seed in range(context.options.num_seeds):
            rows = row_of[torch.from_numpy(few_shot_split(context.data.train, amount, seed))]
            rows = rows[rows >= 0]  # that could be read
            probe = fit_logistic(train.layer_features(rows), train.labels[rows], len(context.classes), scaler=scaler)
            scores.append(float((probe(features).argmax(1) == context.test.labels).double().mean()))
        name = f"few_shot_{100 * amount:g}pct" if amount < 1 else f"few_shot_{amount:g}"
        result.metrics[name] = over_seeds(scores)
        result.details[name] = scores
    return result


def average_precisions(
    scores: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " K"]:
    """Compute the area under each class's precision-recall curve, without interpolation; NaN for a class that no image has.

    Args:
        weights: how often each image counts.
    """
    columns = zip(scores.T.numpy(), targets.T.numpy(), strict=True)
    each = [average_precision_score(y, s, sample_weight=weights) if weights @ y > 0 else np.nan for s, y in columns]
    return np.array(each)


def mean_average_precision(
    scores: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], weights: Float[np.ndarray, " n"]
) -> float:
    """Average over the classes that some image has (macro mAP); 0 where none is."""
    found = average_precisions(scores, targets, weights)
    return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0


@protocol("annotations")
def multi_label(context: EvalContext) -> ProtocolResult:
    """Evaluate linear probes, one logistic regression a class, by mean average precision."""
    assert context.data.boxes is not None
    train, test = context.data.boxes
    targets, truth = (
        torch.from_numpy(part.image_labels)[cache.index]
        for part, cache in ((train, context.train), (test, context.test))
    )
    fit, check, scaler = context.train.layer_features(), context.test.layer_features(), fit_scaler(context.train)
    logits = [fit_logistic(fit, target, 2, scaler=scaler)(check) for target in targets.T]
    # Infinite where training images show it all, or none.
    scores = torch.stack([own[:, 1] - own[:, 0] for own in logits], 1).nan_to_num()
    each = zip(train.classes, average_precisions(scores, truth, np.ones(len(truth))), strict=True)
    return ProtocolResult(
        {"multi_label_map": bootstrap(partial(mean_average_precision, scores, truth), len(truth))},
        details={"ap": {label: None if np.isnan(ap) else round(float(ap), 4) for label, ap in each}},
    )
