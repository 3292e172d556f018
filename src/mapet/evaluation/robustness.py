"""Images unlike those of training: another folder, corruptions, other sizes. The classifier stays as it was trained."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from mapet.data.dataset import in_order
from mapet.errors import MapetError
from mapet.evaluation.backbone_wrapper import BackboneWrapper
from mapet.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption, mean_corruption_error
from mapet.evaluation.eval_context import NEIGHBORS, EvalContext, ProtocolResult
from mapet.evaluation.features import LabelledSet, centred_batches
from mapet.evaluation.intervals import MetricValue, accuracy_with_ci, bootstrap
from mapet.evaluation.probes import knn_scores, nearest_neighbors

MAX_CORRUPTED = 1000
"""Test images, at most, that are corrupted in each of 75 ways."""
SIZE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Input sizes that are tried, relative to the trained one."""


def ood(context: EvalContext) -> ProtocolResult:
    """Measure accuracy on other labelled folders, on the classes they share with training; the choice is among those alone.

    So it is done for ImageNet-A and -R, which have 200 of the 1,000 classes.
    """
    result, options, classes = ProtocolResult(), context.options, context.classes
    own_or_probe = "own_classifier" if context.backbone.classes else "logistic"
    for name, everything in context.data.ood.items():
        shared, data = shared_classes(everything, classes, name)
        logits, features, index = [], [], []
        for rows, images in _batches(context, data, context.backbone):
            logits.append(context.classify(images))
            pooled = context.backbone.pooled_features(images, [context.backbone.num_layers], options.pool)[0]
            features.append(pooled.cpu())
            index.append(rows)
        labels = torch.from_numpy(data.labels)[torch.cat(index)]
        found = nearest_neighbors(context.train.layer_blocks(), torch.cat(features), NEIGHBORS)
        votes = knn_scores(context.train, len(classes), *found)
        for metric, scores, selected in (
            (own_or_probe, torch.cat(logits), context.classifier),
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


def corruptions(context: EvalContext) -> ProtocolResult:
    """Measure accuracy under 15 corruptions in 5 severities; `add_mce` adds mCE."""
    if context.backbone.channels not in (1, 3):
        raise MapetError(
            f"corruptions are of grey or RGB images, {context.backbone.name} takes {context.backbone.channels} channels"
        )
    data = context.data.test.sample(MAX_CORRUPTED)
    clean, index = _is_correct(context, data, context.backbone)
    totals = torch.zeros(len(data.labels))
    errors: dict[str, list[float]] = {}
    for number, name in enumerate(CORRUPTIONS):
        errors[name] = []
        for severity in SEVERITIES:
            options = {"augment": Corruption(name, severity), "seed": number * 10 + severity}
            correct, rows = _is_correct(context, data, context.backbone, **options)
            totals[rows] += correct.float()
            errors[name].append(1 - float(correct.float().mean()))
    each = (totals[index] / (len(errors) * len(SEVERITIES))).numpy()
    mean = bootstrap(lambda weight: float(weight @ each / weight.sum()), len(each), selected=context.classifier)
    return ProtocolResult(
        {
            "corruption_clean": accuracy_with_ci(int(clean.sum()), len(clean), context.classifier),
            "corruption_mean": mean,
        },
        details={"errors": errors},
    )


def add_mce(results: Mapping[str, Mapping[str, ProtocolResult]]) -> None:
    """Add mCE to each backbone's corruptions: its errors over those of the first backbone (AlexNet's place in the paper)."""
    found = [own["corruptions"] for own in results.values() if "corruptions" in own]
    for result in found:
        mean, each = mean_corruption_error(result.details["errors"], found[0].details["errors"])
        over = f"{result.metrics['corruption_mean'].over}, relative to the first"
        result.metrics["mce"] = MetricValue(mean, over=over)
        result.details["corruption_errors"] = each


def resolution(context: EvalContext) -> ProtocolResult:
    """Measure accuracy at other input sizes, positions interpolated."""
    result, backbone = ProtocolResult(), context.backbone
    step = backbone.patch_size
    height, width = backbone.image_size
    sizes = [(size, size) for size in context.options.eval_image_sizes or ()] or [
        (max(1, round(height * f / step)) * step, max(1, round(width * f / step)) * step) for f in SIZE_FACTORS
    ]
    for size in dict.fromkeys(sizes):
        correct, _ = _is_correct(context, context.data.test, backbone.with_image_size(size))
        name = f"resolution_{size[0]}" if size[0] == size[1] else f"resolution_{size[0]}x{size[1]}"
        trained = " (trained size)" if size == backbone.image_size else ""
        result.metrics[name] = accuracy_with_ci(int(correct.sum()), len(correct), context.classifier + trained)
    return result


def _is_correct(
    context: EvalContext, data: LabelledSet, backbone: BackboneWrapper, **dataset: Any
) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"]]:
    """Tell whether each readable image is classified correctly, and its index."""
    correct, index = [], []
    labels = torch.from_numpy(data.labels)
    for rows, images in _batches(context, data, backbone, **dataset):
        correct.append(context.classify(images, backbone).argmax(1) == labels[rows])
        index.append(rows)
    return torch.cat(correct), torch.cat(index)


def _batches(
    context: EvalContext, data: LabelledSet, backbone: BackboneWrapper, **dataset: Any
) -> Iterator[tuple[Int[Tensor, " b"], UInt8[Tensor, "b C H W"]]]:
    batches = in_order(len(data.images), context.cache.batch_size)
    return centred_batches(data.images, backbone.image_size, backbone.channels, batches, None, **dataset)
