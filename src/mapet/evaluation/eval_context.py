"""What protocols take and return: a backbone with its data, and metrics with their intervals; and the table of protocols."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mapet.config.evaluation import EvaluateConfig
from mapet.data.sources import list_images
from mapet.errors import MapetError, option
from mapet.evaluation import datasets
from mapet.evaluation.datasets import DetectionSet, LabeledSet, SegmentationSet
from mapet.evaluation.features import BackboneWrapper, CacheConfig, FeatureCache
from mapet.evaluation.probes import KNN_K, LogisticProbe, fit_logistic, nearest_neighbors

NUM_SHOWN = 8
"""Neighbors of each image in the figure, at most."""
ALPHA = 0.05
"""Intervals cover 1 - ALPHA; two values differ significantly if the corrected p is below it."""


# ---- metrics and their intervals


class MetricValue(NamedTuple):
    """A metric and its 95 % interval.

    Attributes:
        ci_low, ci_high: ends of the interval; None where none is known.
        over: what the interval counts over, e.g. '1,000 images', '5 seeds'.
        selected: hyperparameters that were selected for the metric, e.g. 'layer 12, lr 0.1'.
    """

    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    over: str = ""
    selected: str = ""


def wilson_interval(num_correct: int, num_images: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval (1927) of an accuracy; it stays in [0, 1] and is not empty at 0 and 1."""
    from scipy import stats  # takes a second to import

    low, high = stats.binomtest(num_correct, num_images).proportion_ci(1 - ALPHA, method="wilson")
    return float(low), float(high)


def accuracy_with_ci(correct: Tensor, selected: str = "") -> MetricValue:
    """Return the accuracy with Wilson's interval; `correct` is 1 or True for each test image that was classified correctly, else 0."""
    count, interval = len(correct), wilson_interval(int(correct.sum()), len(correct))
    return MetricValue(float(correct.double().mean()), *interval, f"{count:,} images", selected)


def mean_and_margin(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval by Student's t, for normal, independent values.

    The half width is None for one value, which says nothing of the spread.
    """
    if len(values) < 2:
        return fmean(values), None
    from scipy import stats  # takes a second to import

    return fmean(values), float(stats.t.ppf(1 - ALPHA / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def mean_over_seeds(values: Sequence[float], minimum: float = 0.0) -> MetricValue:
    """Return the mean over seeds with Student's interval, cut off at the metric's range, `minimum` to 1; one seed has no interval."""
    mean, margin = mean_and_margin(values)
    if margin is None:
        return MetricValue(mean, over="1 seed")
    return MetricValue(mean, max(minimum, mean - margin), min(1.0, mean + margin), f"{len(values)} seeds")


def bootstrap_ci(
    statistic: Callable[[Float[np.ndarray, " n"]], float], num_images: int, draws: int = 200, selected: str = ""
) -> MetricValue:
    """Return a statistic of all test images with the percentile interval over resampled images (Efron, 1979).

    Args:
        statistic: takes how often each of the `num_images` images counts and returns the metric; all ones give its value.
        draws: number of resampled sets of images.
    """
    rng = np.random.default_rng(0)
    uniform = np.full(num_images, 1 / num_images)
    resampled = [statistic(rng.multinomial(num_images, uniform).astype(float)) for _ in range(draws)]
    low, high = np.nanquantile(resampled, [ALPHA / 2, 1 - ALPHA / 2])
    return MetricValue(statistic(np.ones(num_images)), float(low), float(high), f"{num_images:,} images", selected)


# ---- what protocols return


@dataclass
class ProtocolResult:
    """What a protocol measured on one backbone.

    Attributes:
        metrics: rows of the table of all backbones; names have no spaces.
        per_class: for some metrics, (correct, all) images of each class; for segmentation, pixels of (intersection, union).
        details: further results, as JSON.
    """

    metrics: dict[str, MetricValue] = field(default_factory=dict)
    per_class: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add_accuracy(
        self, name: str, predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], classes: list[str], selected: str
    ) -> "ProtocolResult":
        """Add top-1 accuracy with its interval, and the counts of each class; return self.

        Args:
            predicted: class indices; `labels` are the true ones.
            classes: names by class index.
            selected: hyperparameters that were selected, for the table.
        """
        correct = predicted == labels
        self.metrics[name] = accuracy_with_ci(correct, selected)
        counts, hits = (torch.bincount(part, minlength=len(classes)).tolist() for part in (labels, labels[correct]))
        self.per_class[name] = dict(zip(classes, zip(hits, counts, strict=True), strict=True))
        return self

    def to_json(self) -> dict[str, Any]:
        """Return metrics and details as JSON; per_class.csv has the classes."""
        return {"metrics": {row: metric._asdict() for row, metric in self.metrics.items()}, "details": self.details}


# ---- what protocols take

Requirement = Literal["images", "labels", "ood", "masks", "annotations"]
"""Data that a protocol cannot do without."""


@dataclass
class EvalData:
    """Training and test images. Without class folders `classes` is empty and all labels are 0.

    Attributes:
        ood: further labeled test sets by name.
        masks: training and test images with a class for every pixel.
        boxes: training and test images with COCO annotations.
    """

    train: LabeledSet
    test: LabeledSet
    ood: dict[str, LabeledSet] = field(default_factory=dict)
    masks: tuple[SegmentationSet, SegmentationSet] | None = None
    boxes: tuple[DetectionSet, DetectionSet] | None = None

    @classmethod
    def load(cls, config: EvaluateConfig) -> "EvalData":
        """List the images of `config` with their annotations, else masks, else labels, else nothing.

        Raises:
            MapetError: options do not fit these images.
        """
        root, test_root = Path(config.images), None if config.test_images is None else Path(config.test_images)
        if config.ood_images and not list_images(config.images).classes():
            classes = f"{option('images')} must have class folders, CLASS/image.jpg, for {option('ood_images')}, which have the same classes"
            raise MapetError(
                f"{classes}: {root} has none. Sort its images into such folders, or omit {option('ood_images')}"
            )
        if config.annotations is not None:
            boxes = datasets.load_detection_sets(root, config.annotations, test_root, config.test_annotations)
            train, test = (LabeledSet.without_labels(part.images) for part in boxes)
            return cls(train, test, boxes=boxes)
        masks = datasets.load_segmentation_sets(
            root, config.seg_masks, test_root, config.test_seg_masks, config.ignore_labels
        )
        if masks is not None:
            train, test = (LabeledSet.without_labels(part.images) for part in masks)
            return cls(train, test, masks=masks)
        if config.test_seg_masks is not None or config.ignore_labels:
            names = f"{option('test_seg_masks')} and {option('ignore_labels')}"
            raise MapetError(f"{names} need masks of the training images: give {option('seg_masks')}")
        images = list_images(config.images)
        if images.classes():
            ood = {name: LabeledSet.from_images(list_images(source)) for name, source in config.ood_images.items()}
            return cls(*datasets.load_train_test(config.images, config.test_images), ood)
        if config.test_images is None:
            return cls(*datasets.split_train_test(LabeledSet.without_labels(images)))
        return cls(LabeledSet.without_labels(images), LabeledSet.without_labels(list_images(config.test_images)))

    def has(self, requirement: Requirement) -> bool:
        """Return whether the data is there that a protocol requires; `load` reads `ood` only beside labels."""
        data = {"labels": self.train.classes, "ood": self.ood, "masks": self.masks, "annotations": self.boxes}
        return requirement == "images" or bool(data[requirement])


@dataclass
class EvalContext:
    """One backbone and its data; features are computed when first needed, and shared by the protocols.

    Attributes:
        backbone: the frozen backbone at its own input size.
        data: training and test images.
        cache: where features are kept, and the inference batch size.
        options: of the command `evaluate`.
    """

    backbone: BackboneWrapper
    data: EvalData
    cache: CacheConfig
    options: EvaluateConfig

    @property
    def classes(self) -> list[str]:
        """Names by class index; empty without labels."""
        return self.data.train.classes

    @cached_property
    def train(self) -> FeatureCache:
        """Features of the training images from up to four layers; the last layer's are its `layer_features`."""
        return self._extract(self.data.train)

    @cached_property
    def test(self) -> FeatureCache:
        """Features of the test images from the same layers."""
        return self._extract(self.data.test)

    def _extract(self, data: LabeledSet) -> FeatureCache:
        layers = self.backbone.evenly_spaced_layers()
        return FeatureCache.extract(self.backbone, data, self.cache, layers, self.options.pool)

    @cached_property
    def test_neighbors(self) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """Cosine similarities and rows in `train` of the `KNN_K` training images nearest to each row of `test`, nearest first."""
        return nearest_neighbors(self.train.layer_blocks(), self.test.layer_features(), KNN_K)

    @cached_property
    def logistic(self) -> LogisticProbe:
        """The linear probe, fitted on the training images."""
        return fit_logistic(self.train.layer_features(), self.train.labels, len(self.classes))

    @property
    def classifier(self) -> str:
        """Description of what `classify` uses: the model's own classifier if it has one with class names, else the linear probe."""
        return "own classifier" if self.backbone.classes else f"logistic, C {self.logistic.C:g}"

    def pooled(self, backbone: BackboneWrapper, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Return the last layer's features on the CPU; `backbone` may be `self.backbone` for another input size."""
        return backbone.pooled_features(images, [backbone.num_layers], self.options.pool)[0].cpu()

    def classify(self, backbone: BackboneWrapper, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return logits of `classes` on the CPU, by the model's own classifier if it has one with class names, else by the linear probe.

        Args:
            backbone: `self.backbone`, perhaps for another input size.

        Raises:
            MapetError: the model's own classifier lacks a class of the training images.
        """
        if not backbone.classes:
            return self.logistic(self.pooled(backbone, images))
        if unknown := set(self.classes) - set(backbone.classes):
            hint = f"remove its folder from {option('images')} and {option('test_images')}, or fine-tune with it"
            raise MapetError(f"{backbone.name} was fine-tuned without the class '{min(unknown)}': {hint}")
        return backbone.logits(images)[:, [backbone.classes.index(name) for name in self.classes]].cpu()

    def is_correct(self, backbone: BackboneWrapper, data: LabeledSet, **dataset: Any) -> Float[Tensor, " m"]:
        """Return 1 for each readable image that `classify` classifies correctly, else 0, in an order that is always the same.

        Args:
            backbone: `self.backbone`, perhaps for another input size.
            data: images with labels that are indices into `classes`.
            dataset: further arguments of `ViewDataset`: `augment`, `seed`.
        """
        labels = torch.from_numpy(data.labels)
        batches = backbone.batches(data.images, self.cache, **dataset)
        return torch.cat([(self.classify(backbone, x).argmax(1) == labels[rows]).double() for rows, x in batches])

    def close(self) -> None:
        """Free the features' memory and scratch files; `train` and `test` cannot be used after it."""
        for name in ("train", "test"):
            if name in self.__dict__:
                self.__dict__[name].close()


# ---- the table of protocols


Run = Callable[[EvalContext], ProtocolResult]
AnyRun = TypeVar("AnyRun", bound=Run)


class Protocol(NamedTuple):
    """A row of the table of protocols.

    Attributes:
        run: measures a backbone.
        requires: data that it cannot do without.
        is_expensive: it only runs if `protocols` names it.
    """

    run: Run
    requires: Requirement
    is_expensive: bool = False


PROTOCOLS: dict[str, Protocol] = {}
"""All protocols by name, once `mapet.evaluation.protocols` is imported."""


def protocol(requires: Requirement, is_expensive: bool = False) -> Callable[[AnyRun], AnyRun]:
    """Return a decorator that adds a function to `PROTOCOLS`, `few_shot` as 'few-shot'; see `Protocol` for the arguments."""

    def register(run: AnyRun) -> AnyRun:
        PROTOCOLS[run.__name__.replace("_", "-")] = Protocol(run, requires, is_expensive)
        return run

    return register
