"""Images unlike those of training: another folder, corruptions, other sizes. The classifier stays as it was trained."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mapet.data.dataset import in_order
from mapet.errors import MapetError
from mapet.evaluation.bench import Bench, Outcome
from mapet.evaluation.classifiers import knn_votes, nearest_neighbours
from mapet.evaluation.corruptions import KINDS, Corruption, mean_corruption_error
from mapet.evaluation.encoder import Encoder
from mapet.evaluation.features import LabelledSet, centred_batches
from mapet.evaluation.intervals import Figure, bootstrap, share

SIZES = (0.5, 0.75, 1.25, 1.5, 2.0)
"""Of the trained side."""


def other_sets(bench: Bench) -> Outcome:
    """Accuracy on other labelled folders, on the classes they share with training; the choice is among those alone.

    So it is done for ImageNet-A and -R, which have 200 of the 1,000 classes.
    """
    outcome = Outcome()
    names = bench.sets.train.classes
    for name, data in bench.sets.others.items():
        shared, data = shared_classes(data, names, name)
        logits, features, index = [], [], []
        for rows, images in _batches(bench, data):
            logits.append(bench.classify(images))
            features.append(bench.encoder.pooled(images, [max(bench.layers)], bench.options.pool)[0].cpu())
            index.append(rows)
        labels = torch.from_numpy(data.labels)[torch.cat(index)]
        similarity, rows = nearest_neighbours(bench.train.layer_blocks(), torch.cat(features), bench.options.k)
        votes = knn_votes(similarity, bench.train.labels[rows], len(names))
        for measure, scores, choice in (
            (bench.classifier.split(",")[0], torch.cat(logits), bench.classifier),
            (f"k-NN, k {bench.options.k}", votes, ""),
        ):
            scores[:, ~torch.from_numpy(shared)] = -torch.inf
            outcome.classify(f"{name}: {measure}", scores.argmax(1), labels, names, choice)
        outcome.details[name] = {"classes": int(shared.sum()), "images": len(labels)}
    return outcome


def shared_classes(data: LabelledSet, names: list[str], what: str) -> tuple[Bool[np.ndarray, " K"], LabelledSet]:
    """Which of `names` the data has, and its images of those, labelled by their place in `names`.

    Raises:
        MapetError: none is shared.
    """
    place = {name: number for number, name in enumerate(names)}
    new = np.array([place.get(name, -1) for name in data.classes])
    labels = new[data.labels]
    if not (labels >= 0).any():
        raise MapetError(
            f"'{what}' ({data.images.root}) shares no class with the training images: {', '.join(data.classes[:3])} ... "
            f"beside {', '.join(names[:3])} ...; folders of one class need one name"
        )
    kept = data.subset(np.flatnonzero(labels >= 0))
    shared = np.zeros(len(names), dtype=bool)
    shared[new[new >= 0]] = True
    return shared, LabelledSet(kept.images, names, labels[labels >= 0])


def corruptions(bench: Bench) -> Outcome:
    """Accuracy under 15 corruptions in 5 severities; `relative_to_first` adds mCE."""
    if bench.encoder.channels not in (1, 3):
        raise MapetError(
            f"corruptions are of grey or RGB images, {bench.encoder.name} takes {bench.encoder.channels} channels"
        )
    kinds = bench.options.corruption_kinds or KINDS
    severities = bench.options.corruption_severities
    data = _sample(bench.sets.test, bench.options.corruption_images)
    clean, index = _right(bench, data)
    right = torch.zeros(len(data.labels))
    errors: dict[str, list[float]] = {}
    for kind in kinds:
        errors[kind] = []
        for severity in severities:
            found, seen = _right(
                bench, data, augment=Corruption(kind, severity), seed=KINDS.index(kind) * 10 + severity
            )
            right[seen] += found.float()
            errors[kind].append(1 - float(found.float().mean()))
    each = (right[index] / (len(kinds) * len(severities))).numpy()
    mean = bootstrap(lambda weight: float((weight * each).sum() / weight.sum()), len(each), choice=bench.classifier)
    return Outcome(
        {"clean, same images": share(int(clean.sum()), len(clean), bench.classifier), "corrupted, mean": mean},
        details={"errors": errors, "severities": list(severities)},
    )


def relative_to_first(found: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Add to each backbone's corruptions mCE, its errors over those of the first backbone (AlexNet's place in the paper)."""
    outcomes = [own["corruptions"] for own in found.values() if "corruptions" in own]
    for outcome in outcomes:
        mean, each = mean_corruption_error(outcome.details["errors"], outcomes[0].details["errors"])
        outcome.figures["mCE, relative to the first"] = Figure(mean, of=outcome.figures["corrupted, mean"].of)
        outcome.details["corruption_errors"] = each


def resolution(bench: Bench) -> Outcome:
    """Accuracy at other input sizes, positions interpolated."""
    outcome = Outcome()
    step = bench.encoder.patch
    height, width = bench.encoder.image_size
    if bench.options.sizes:
        sizes = [(size, size) for size in bench.options.sizes]
    else:
        factors = sorted((*SIZES, 1.0))
        sizes = [tuple(max(1, round(side * f / step)) * step for side in (height, width)) for f in factors]  # type: ignore[misc]
    for size in dict.fromkeys(sizes):
        encoder = bench.encoder.at_size(size)
        right, _ = _right(bench, bench.sets.test, encoder)
        name = f"at {size[0]} px" if size[0] == size[1] else f"at {size[0]} x {size[1]} px"
        trained = " (trained size)" if size == bench.encoder.image_size else ""
        outcome.figures[name] = share(int(right.sum()), len(right), bench.classifier + trained)
    return outcome


def _right(
    bench: Bench, data: LabelledSet, encoder: Encoder | None = None, **dataset: Any
) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"]]:
    """Whether each readable image is classified rightly, and its index."""
    right, index = [], []
    labels = torch.from_numpy(data.labels)
    for rows, images in _batches(bench, data, encoder, **dataset):
        right.append(bench.classify(images, encoder).argmax(1) == labels[rows])
        index.append(rows)
    return torch.cat(right), torch.cat(index)


def _batches(bench: Bench, data: LabelledSet, encoder: Encoder | None = None, **dataset: Any) -> Any:
    encoder = encoder or bench.encoder
    batches = in_order(len(data.images), bench.place.batch_size)
    return centred_batches(
        data.images, encoder.image_size, encoder.channels, batches, bench.place.workers, None, **dataset
    )


def _sample(data: LabelledSet, most: int) -> LabelledSet:
    """A sample by the images' ids, the same for every backbone."""
    return data if len(data.labels) <= most else data.subset(np.sort(np.argsort(data.images.keys())[:most]))
