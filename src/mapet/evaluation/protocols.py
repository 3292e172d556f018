"""The protocols of `mapet evaluate`: one table of functions, each from a backbone and data to metrics."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mapet.evaluation.detection import detection, detection_finetune
from mapet.evaluation.eval_context import NEIGHBORS, EvalContext, ProtocolResult
from mapet.evaluation.feature_cache import PatchTokenCache
from mapet.evaluation.few_shot import few_shot
from mapet.evaluation.label_free import cluster, feature_rank, neighbors
from mapet.evaluation.multi_label import multi_label
from mapet.evaluation.probes import attentive_logits, fit_attentive, fit_linear_sgd, knn_scores
from mapet.evaluation.robustness import corruptions, ood, resolution
from mapet.evaluation.segmentation import segmentation


def logistic(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe: logistic regression on the last layer's standardized features."""
    result, probe = ProtocolResult(), context.logistic
    predicted = probe(context.test.layer_features()).argmax(1)
    result.add_accuracy("logistic", predicted, context.test.labels, context.classes, f"C {probe.C:g}")
    return result


def knn(context: EvalContext) -> ProtocolResult:
    """Evaluate weighted k-NN of the last layer's features."""
    result, k = ProtocolResult(), min(NEIGHBORS, len(context.train))
    votes = knn_scores(context.train, len(context.classes), *(part[:, :k] for part in context.test_neighbors))
    result.add_accuracy("knn", votes.argmax(1), context.test.labels, context.classes, f"k {k}")
    return result


def linear_sgd(context: EvalContext) -> ProtocolResult:
    """Evaluate linear probes trained by SGD, plain and with batch norm, over layers and learning rates."""
    result, options = ProtocolResult(), context.options
    probes = fit_linear_sgd(context.train, len(context.classes), context.compute, options.linear_epochs, options.seed)
    for name, probe in probes.items():
        predicted = probe.predict(context.test).argmax(1)
        result.add_accuracy(name, predicted, context.test.labels, context.classes, probe.selected)
        result.details[name] = {"val_accuracy_by_layer": {str(k): v for k, v in probe.val_accuracy.items()}}
    return result


def attentive(context: EvalContext) -> ProtocolResult:
    """Evaluate the attentive probe of the last layer's patch tokens."""
    result, data = ProtocolResult(), context.data
    train, test = (PatchTokenCache(context.backbone, part, context.cache) for part in (data.train, data.test))
    probe, lr = fit_attentive(train, len(context.classes), context.compute, seed=context.options.seed)
    index, logits = attentive_logits(probe, test, context.compute)
    labels = torch.from_numpy(data.test.labels)[index]
    result.add_accuracy("attentive", logits.argmax(1), labels, context.classes, f"lr {lr:g}")
    return result


@dataclass(frozen=True)
class Protocol:
    """A row of the table.

    Attributes:
        requires: 'labels', 'images', 'ood', 'masks', 'annotations': data it can't do without.
        expensive: only run when asked for.
    """

    run: Callable[[EvalContext], ProtocolResult]
    requires: str
    expensive: bool = False


PROTOCOLS: dict[str, Protocol] = {
    "logistic": Protocol(logistic, "labels"),
    "knn": Protocol(knn, "labels"),
    "linear-sgd": Protocol(linear_sgd, "labels"),
    "attentive": Protocol(attentive, "labels"),
    "few-shot": Protocol(few_shot, "labels"),
    "cluster": Protocol(cluster, "labels"),
    "feature-rank": Protocol(feature_rank, "images"),
    "nearest-neighbors": Protocol(neighbors, "images"),
    "ood": Protocol(ood, "ood"),
    "corruptions": Protocol(corruptions, "labels", expensive=True),
    "resolution": Protocol(resolution, "labels", expensive=True),
    "multi-label": Protocol(multi_label, "annotations"),
    "segmentation": Protocol(segmentation, "masks"),
    "detection": Protocol(detection, "annotations", expensive=True),
    "detection-finetune": Protocol(detection_finetune, "annotations", expensive=True),
}
