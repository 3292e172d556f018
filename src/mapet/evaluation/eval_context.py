"""What a protocol takes and returns: a backbone with its data, and metrics with their intervals; and the table of protocols."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mapet.config.evaluation import EvaluateConfig
from mapet.data.sources import list_images
from mapet.errors import MapetError, option
from mapet.evaluation import datasets
from mapet.evaluation.datasets import DetectionSet, LabeledSet, SegmentationSet, unlabeled
from mapet.evaluation.features import BackboneWrapper, CacheConfig, FeatureCache
from mapet.evaluation.probes import KNN_K, LogisticProbe, fit_logistic, nearest_neighbors

NUM_SHOWN = 8
"""Neighbors in the figure, at most."""
ALPHA = 0.05
"""Intervals cover 1 - ALPHA; corrected p below which two values are told apart."""


# ---- metrics and their intervals


class MetricValue(NamedTuple):
    """A metric and its 95 % interval, where one is known.

    Attributes:
        over: what the interval counts over, e.g. '1,000 images', '5 seeds'.
        selected: hyperparameters chosen to get it, e.g. 'layer 12, lr 0.1'.
    """

    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    over: str = ""
    selected: str = ""


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval (1927) of a proportion; it stays within 0..1 and is not empty at 0 and 1."""
    from scipy import stats

    low, high = stats.binomtest(correct, count).proportion_ci(1 - ALPHA, method="wilson")
    return float(low), float(high)


def accuracy_with_ci(correct: int, count: int, selected: str = "") -> MetricValue:
    """Make an accuracy over test images, with Wilson's interval."""
    return MetricValue(correct / count, *wilson_interval(correct, count), f"{count:,} images", selected)


def mean_and_margin(values: Sequence[float]) -> tuple[float, float | None]:
    """Compute the mean and half the width of its 95 % interval by Student's t, for normal, independent values.

    The width is None below two values: nothing is then known of the spread.
    """
    if len(values) < 2:
        return fmean(values), None
    from scipy import stats  # a second to import

    return fmean(values), float(stats.t.ppf(1 - ALPHA / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def mean_over_seeds(values: Sequence[float], least: float = 0.0) -> MetricValue:
    """Average over seeds, with Student's interval cut off at the metric's range, `least` to 1."""
    mean, width = mean_and_margin(values)
    if width is None:
        return MetricValue(mean, over="1 seed")
    return MetricValue(mean, max(least, mean - width), min(1.0, mean + width), f"{len(values)} seeds")


def bootstrap_ci(
    statistic: Callable[[Float[np.ndarray, " n"]], float], count: int, draws: int = 200, selected: str = ""
) -> MetricValue:
    """Compute a statistic of all test images, with the percentile interval over resampled ones (Efron, 1979).

    Args:
        statistic: takes how often each of the `count` images is drawn; all ones is the metric itself.
    """
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.multinomial(count, np.full(count, 1 / count)).astype(float)) for _ in range(draws)]
    low, high = np.nanquantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    return MetricValue(float(statistic(np.ones(count))), float(low), float(high), f"{count:,} images", selected)


# ---- what a protocol returns and takes


@dataclass
class ProtocolResult:
    """What a protocol found.

    Attributes:
        metrics: rows of the table of all backbones; names have no spaces.
        per_class: of some metrics, (correct, images) of each class; of segmentation, pixels of (intersection, union).
        details: further results, as JSON.
    """

    metrics: dict[str, MetricValue] = field(default_factory=dict)
    per_class: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add_accuracy(
        self, name: str, predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], classes: list[str], selected: str
    ) -> "ProtocolResult":
        """Add top-1 accuracy with its interval, and the table of classes."""
        correct = predicted == labels
        self.metrics[name] = accuracy_with_ci(int(correct.sum()), len(labels), selected)
        counts, hits = (torch.bincount(part, minlength=len(classes)).tolist() for part in (labels, labels[correct]))
        self.per_class[name] = dict(zip(classes, zip(hits, counts, strict=True), strict=True))
        return self


@dataclass
class EvalData:
    """The images. Without class folders `classes` is empty and all labels are 0.

    Attributes:
        ood: further labeled test sets, by name.
        masks: training and test images with a class for every pixel.
        boxes: training and test images with COCO annotations.
    """

    train: LabeledSet
    test: LabeledSet
    ood: dict[str, LabeledSet] = field(default_factory=dict)
    masks: tuple[SegmentationSet, SegmentationSet] | None = None
    boxes: tuple[DetectionSet, DetectionSet] | None = None

    def has(self, what: str) -> bool:
        """Tell whether there is what a protocol requires: images, labels, ood, masks or annotations."""
        labels = bool(self.train.classes)
        return {
            "images": True, "labels": labels, "ood": labels and bool(self.ood),
            "masks": self.masks is not None, "annotations": self.boxes is not None,
        }[what]  # fmt: skip


def load_eval_data(config: EvaluateConfig) -> EvalData:
    """Open the images, with annotations, masks or labels where there are some.

    Raises:
        MapetError: options that have no use for these images.
    """
    if config.ood_images and not list_images(config.images).classes():
        raise MapetError(f"{option('ood_images')} are matched by class folders, which {config.images} has not")
    folder, test_folder = Path(config.images), None if config.test_images is None else Path(config.test_images)
    if config.annotations is not None:
        boxes = datasets.detection_sets(folder, config.annotations, test_folder, config.test_annotations)
        return EvalData(unlabeled(boxes[0].images), unlabeled(boxes[1].images), boxes=boxes)
    masks = datasets.segmentation_sets(
        folder, config.seg_masks, test_folder, config.test_seg_masks, config.ignore_labels
    )
    if masks is not None:
        return EvalData(unlabeled(masks[0].images), unlabeled(masks[1].images), masks=masks)
    if config.test_seg_masks is not None or config.ignore_labels:
        raise MapetError(f"{option('test_seg_masks')} and {option('ignore_labels')} need masks: {option('seg_masks')}")
    images = list_images(config.images)
    if images.classes():
        ood = {name: datasets.labeled(list_images(source)) for name, source in config.ood_images.items()}
        return EvalData(*datasets.train_and_test(config.images, config.test_images), ood)
    if config.test_images is None:
        return EvalData(*datasets.split(unlabeled(images)))
    return EvalData(unlabeled(images), unlabeled(list_images(config.test_images)))


@dataclass
class EvalContext:
    """One backbone and its data; features are computed when first needed, and shared by the protocols."""

    backbone: BackboneWrapper
    data: EvalData
    cache: CacheConfig
    options: EvaluateConfig

    @property
    def classes(self) -> list[str]:
        return self.data.train.classes

    @cached_property
    def train(self) -> FeatureCache:
        """Features of the training images, of four layers."""
        return self._extract(self.data.train)

    @cached_property
    def test(self) -> FeatureCache:
        """Features of the test images, of the same layers."""
        return self._extract(self.data.test)

    def _extract(self, data: LabeledSet) -> FeatureCache:
        layers = self.backbone.evenly_spaced_layers()
        return FeatureCache.extract(self.backbone, data, self.cache, layers, self.options.pool)

    @cached_property
    def test_neighbors(self) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """Similarities and rows of the training images nearest to each test image."""
        return nearest_neighbors(self.train.layer_blocks(), self.test.layer_features(), KNN_K)

    @cached_property
    def logistic(self) -> LogisticProbe:
        """The linear probe."""
        return fit_logistic(self.train.layer_features(), self.train.labels, len(self.classes))

    @property
    def classifier(self) -> str:
        """What `classify` reads: the model's own classifier where it has one with names, else the linear probe."""
        return "own classifier" if self.backbone.classes else f"logistic, C {self.logistic.C:g}"

    def pooled(self, images: UInt8[Tensor, "B C H W"], backbone: BackboneWrapper | None = None) -> Float[Tensor, "B F"]:
        """Compute the last layer's features, on the CPU; `backbone`: the same model for another input size."""
        backbone = backbone or self.backbone
        return backbone.pooled_features(images, [backbone.num_layers], self.options.pool)[0].cpu()

    def classify(
        self, images: UInt8[Tensor, "B C H W"], backbone: BackboneWrapper | None = None
    ) -> Float[Tensor, "B K"]:
        """Compute logits of the training images' classes, on the CPU.

        Args:
            backbone: the same model for another input size.

        Raises:
            MapetError: the model's own classifier lacks some of them.
        """
        backbone = backbone or self.backbone
        if not backbone.classes:
            return self.logistic(self.pooled(images, backbone))
        place = {name: index for index, name in enumerate(backbone.classes)}
        if unknown := [name for name in self.classes if name not in place]:
            raise MapetError(f"{backbone.name} was fine-tuned without the class '{unknown[0]}'")
        return backbone.logits(images)[:, [place[name] for name in self.classes]].cpu()

    def close(self) -> None:
        """Give the features' memory back."""
        for name in ("train", "test"):
            if name in self.__dict__:
                self.__dict__[name].close()


# ---- the table of protocols


Run = Callable[[EvalContext], ProtocolResult]
AnyRun = TypeVar("AnyRun", bound=Run)


class Protocol(NamedTuple):
    """A row of the table.

    Attributes:
        requires: 'labels', 'images', 'ood', 'masks', 'annotations': data it can't do without.
        expensive: only run when asked for.
    """

    run: Run
    requires: str
    expensive: bool = False


PROTOCOLS: dict[str, Protocol] = {}
"""By name; `mapet.evaluation.protocols` has all of them."""


def protocol(requires: str, expensive: bool = False) -> Callable[[AnyRun], AnyRun]:
    """Register a function, few_shot say, as the protocol few-shot; see `Protocol`."""

    def register(run: AnyRun) -> AnyRun:
        PROTOCOLS[run.__name__.replace("_", "-")] = Protocol(run, requires, expensive)
        return run

    return register
