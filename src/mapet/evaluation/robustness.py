"""Images unlike those of training: another folder, corruptions, other sizes. The classifier stays as it was trained."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mapet.errors import MapetError
from mapet.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption, mean_corruption_error
from mapet.evaluation.datasets import LabelledSet
from mapet.evaluation.eval_context import NEIGHBORS, EvalContext, ProtocolResult, protocol
from mapet.evaluation.features import BackboneWrapper
from mapet.evaluation.intervals import MetricValue, accuracy_with_ci, bootstrap
from mapet.evaluation.probes import knn_scores, nearest_neighbors

MAX_CORRUPTED = 1000
"""Test images, at most, that are corrupted in each of 75 ways."""
SIZE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Input sizes that are tried, relative to the trained one."""


@protocol("ood")
def ood(context: EvalContext) -> ProtocolResult:
    """Measure accuracy on other labelled folders, on the classes they share with training; the choice is among those alone.

    So it is done for ImageNet-A and -R, which have 200 of the 1,000 classes.
    """
    result, options, classes, backbone = ProtocolResult(), context.options, context.classes, context.backbone
    for name, everything in context.data.ood.items():
        shared, data = shared_classes(everything, classes, name)
        logits, features, index = [], [], []
        for rows, images in backbone.batches(data.images, context.cache):
            logits.append(context.classify(images))
            features.append(backbone.pooled_features(images, [backbone.num_layers], options.pool)[0].cpu())
            index.append(rows)
        labels = torch.from_numpy(data.labels)[torch.cat(index)]
        found = nearest_neighbors(context.train.layer_blocks(), torch.cat(features), NEIGHBORS)
        votes = knn_scores(context.train, len(classes), *found)
        for metric, scores, selected in (
            ("own_classifier" if backbone.classes else "logistic", torch.cat(logits), context.classifier),
            ("knn", votes, f"k {found[1].shape[1]}"),
        ):
            scores[:, ~torch.from_numpy(shared)] = -torch.inf
            result.add_accuracy(f"ood_{name}_{metric}", scores.argmax(1), labels, classes, selected)
        result.details[name] = {"classes": int(shared.sum()), "images": len(labels)}
    return result


def shared_classes(data: LabelledSet, names: list[str], what: str) -> tuple[Bool[np.ndarray, " K"], LabelledSet]:
    """Find which of `names` the data has, and its images of those, labelled by their place in `names`.

    Raises:
        MapetError: none is shared.
    """
    place = {name: index for index, name in enumerate(names)}
    labels = np.array([place.get(name, -1) for name in data.classes])[data.labels]
    if not (labels >= 0).any():
        raise MapetError(
            f"'{what}' ({data.images.root}) shares no class with the training images: {', '.join(data.classes[:3])} ... "
            f"beside {', '.join(names[:3])} ...; folders of one class need one name"
        )
    images = data.images.subset(np.flatnonzero(labels >= 0))
    return np.isin(names, data.classes), LabelledSet(images, names, labels[labels >= 0])


@protocol("labels", expensive=True)
def corruptions(context: EvalContext) -> ProtocolResult:
    """Measure accuracy under 15 corruptions in 5 severities; `add_mce` adds mCE."""
    backbone, data = context.backbone, context.data.test.sample(MAX_CORRUPTED)
    if backbone.channels not in (1, 3):
        raise MapetError(f"corruptions are of grey or RGB images, {backbone.name} takes {backbone.channels} channels")
    clean = _is_correct(context, data, backbone)
    readable = ~clean.isnan()
    correct = {
        name: [
            _is_correct(context, data, backbone, augment=Corruption(name, severity), seed=number * 10 + severity)[
                readable
            ]
            for severity in SEVERITIES
        ]
        for number, name in enumerate(CORRUPTIONS)
    }
    each = torch.stack([one for several in correct.values() for one in several]).mean(0).numpy()
    mean = bootstrap(lambda weight: float(weight @ each / weight.sum()), len(each), selected=context.classifier)
    accuracy = accuracy_with_ci(int(clean[readable].sum()), len(each), context.classifier)
    return ProtocolResult(
        {"corruption_clean": accuracy, "corruption_mean": mean},
        details={"errors": {name: [1 - float(one.mean()) for one in several] for name, several in correct.items()}},
    )


def add_mce(results: Mapping[str, Mapping[str, ProtocolResult]]) -> None:
    """Add mCE to each backbone's corruptions: its errors over those of the first backbone (AlexNet's place in the paper)."""
    found = [own["corruptions"] for own in results.values() if "corruptions" in own]
    for result in found:
        mean, each = mean_corruption_error(result.details["errors"], found[0].details["errors"])
        over = f"{result.metrics['corruption_mean'].over}, relative to the first"
        result.metrics["mce"] = MetricValue(mean, over=over)
        result.details["corruption_errors"] = each


@protocol("labels", expensive=True)
def resolution(context: EvalContext) -> ProtocolResult:
    """Measure accuracy at other input sizes, positions interpolated."""
    result, backbone = ProtocolResult(), context.backbone
    step = backbone.patch_size
    height, width = backbone.image_size
    sizes = [(size, size) for size in context.options.eval_image_sizes or ()] or [
        (max(1, round(height * f / step)) * step, max(1, round(width * f / step)) * step) for f in SIZE_FACTORS
    ]
    for size in dict.fromkeys(sizes):
        correct = _is_correct(context, context.data.test, backbone.with_image_size(size))
        correct = correct[~correct.isnan()]
        name = f"resolution_{size[0]}" if size[0] == size[1] else f"resolution_{size[0]}x{size[1]}"
        trained = " (trained size)" if size == backbone.image_size else ""
        result.metrics[name] = accuracy_with_ci(int(correct.sum()), len(correct), context.classifier + trained)
    return result


def _is_correct(
    context: EvalContext, data: LabelledSet, backbone: BackboneWrapper, **dataset: Any
) -> Float[Tensor, " n"]:
    """1 for each image that is classified correctly, else 0; NaN for unreadable ones."""
    correct, labels = torch.full((len(data),), torch.nan, dtype=torch.float64), torch.from_numpy(data.labels)
    for rows, images in backbone.batches(data.images, context.cache, **dataset):
        correct[rows] = (context.classify(images, backbone).argmax(1) == labels[rows]).double()
    return correct
