"""What protocols take and return: a backbone with its data, and metrics with their intervals; and the table of protocols."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mapet.config.evaluation import EvaluateConfig
from mapet.config.shared import ReadOptions
from mapet.data.sources import list_images, read_as_trained
from mapet.errors import MapetError, option
from mapet.evaluation import datasets
from mapet.evaluation.datasets import AnyImageSet, DetectionSet, LabeledSet, SegmentationSet
from mapet.evaluation.features import BackboneWrapper, CacheConfig, FeatureCache
from mapet.evaluation.imbalance import Statistic, balanced_accuracy, imbalance_statistics, name_rows
from mapet.evaluation.logistic_regression import LogisticProbe, fit_logistic
from mapet.evaluation.probes import KNN_K, fit_scaler, nearest_neighbors

NUM_SHOWN = 8
"""Neighbors of each image in the figure, at most."""
ALPHA = 0.05
"""Intervals cover 1 - ALPHA; two values differ significantly if the corrected p is below it."""


# ---- metrics and their intervals


class MetricValue(NamedTuple):
    """A metric and its 95 % interval.

    Attributes:
        value: the metric, e.g. an accuracy in [0, 1].
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
    """Return the ends of Wilson's 95 % interval (1927) of the accuracy num_correct / num_images, a binomial proportion.

    The interval stays in [0, 1], and has a width above 0 even if no image or every image is correct.
    """
    from scipy import stats  # takes a second to import

    low, high = stats.binomtest(num_correct, num_images).proportion_ci(1 - ALPHA, method="wilson")
    return float(low), float(high)


def measure_classifier(
    logits: Float[Tensor, "n K"], labels: Int[Tensor, " n"], selected: str = ""
) -> dict[str, MetricValue]:
    """Return 'accuracy', top-1, of a classifier, 0 to 1, with Wilson's 95 % interval over the test images.

    On imbalanced test images (`is_imbalanced`) 'balanced_accuracy' and 'auroc' stand before it, with bootstrap intervals.

    Args:
        logits: of each readable test image, on the CPU; -inf excludes a class.
        labels: class index of each.
        selected: hyperparameters that were selected, for the table.
    """
    count, correct = len(labels), logits.argmax(1) == labels
    leading = imbalance_statistics(logits, labels)
    metrics = {kind: bootstrap_ci(statistic, count, selected=selected) for kind, statistic in leading.items()}
    interval = wilson_interval(int(correct.sum()), count)
    return metrics | {"accuracy": MetricValue(float(correct.double().mean()), *interval, f"{count:,} images", selected)}


def paired_interval(
    differences: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"] | None = None
) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two accuracies, or balanced accuracies, on the same test images.

    Of accuracies it is the adjusted Wald interval of Bonett and Price (2012, Journal of Educational and Behavioral Statistics 37, 479-488):
    one image that only the first classifies correctly, and one that only the second does, are added. Of balanced accuracies it is the
    bootstrap over test images.

    Args:
        differences: of each test image, 1 if only the first classifies it correctly, -1 if only the second does, else 0.
        labels: class index of each, for the balanced accuracy; None: the accuracy.
    """
    if labels is not None:
        metric = bootstrap_ci(partial(balanced_accuracy, differences, labels), len(labels))
        assert metric.ci_low is not None and metric.ci_high is not None
        return metric.ci_low, metric.ci_high
    from scipy import stats  # takes a second to import

    adjusted = np.append(differences, [1.0, -1.0])
    margin = float(stats.norm.ppf(1 - ALPHA / 2) * adjusted.std()) / len(adjusted) ** 0.5
    return max(-1.0, float(adjusted.mean()) - margin), min(1.0, float(adjusted.mean()) + margin)


def mean_and_margin(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval by Student's t, for normal, independent values.

    The half width is None for one value, which says nothing of the spread.
    """
    if len(values) < 2:
        return fmean(values), None
    from scipy import stats  # takes a second to import

    return fmean(values), float(stats.t.ppf(1 - ALPHA / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def mean_over_seeds(values: Sequence[float], minimum: float = 0.0) -> MetricValue:
    """Return the mean over seeds with Student's 95 % interval, cut off at the range of the metric.

    Args:
        values: value of the metric for each seed; a single one has no interval.
        minimum: lowest possible value of the metric; the highest is 1.
    """
    mean, margin = mean_and_margin(values)
    if margin is None:
        return MetricValue(mean, over="1 seed")
    return MetricValue(mean, max(minimum, mean - margin), min(1.0, mean + margin), f"{len(values)} seeds")


def bootstrap_ci(statistic: Statistic, num_images: int, draws: int = 200, selected: str = "") -> MetricValue:
    """Return a statistic of all test images with the 95 % percentile interval over bootstrap resamples of the images (Efron, 1979).

    Args:
        statistic: takes the (n,) weights of the images, how often each image counts, and returns the metric. All ones give its value; a
            resample has whole numbers that sum to n. Resamples for which it returns NaN are ignored.
        num_images: number of test images, n.
        draws: number of resamples, the same ones every time.
        selected: hyperparameters that were selected, for the table.
    """
    rng = np.random.default_rng(0)
    uniform = np.full(num_images, 1 / num_images)
    resampled = [statistic(rng.multinomial(num_images, uniform).astype(float)) for _ in range(draws)]
    low, high = np.nanquantile(resampled, [ALPHA / 2, 1 - ALPHA / 2])
    return MetricValue(statistic(np.ones(num_images)), float(low), float(high), f"{num_images:,} images", selected)


# ---- what protocols return


@dataclass
class ProtocolResult:
    """Metrics of a protocol on one backbone.

    Attributes:
        metrics: rows of the table of all backbones; names have no spaces.
        per_class: for some metrics, (correct, all) images of each class; for segmentation, pixels of (intersection, union).
        details: further results, JSON values by name; see the protocol.
        correct: for each accuracy, whether each readable test image was classified correctly, and the class index of each; the order is
            the same for every backbone.
    """

    metrics: dict[str, MetricValue] = field(default_factory=dict)
    per_class: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    correct: dict[str, tuple[Bool[Tensor, " n"], Int[Tensor, " n"]]] = field(default_factory=dict)

    def add_accuracy(
        self, name: str, logits: Float[Tensor, "n K"], labels: Int[Tensor, " n"], classes: list[str], selected: str
    ) -> "ProtocolResult":
        """Add what `measure_classifier` returns to `metrics`, by `name_rows`, and each class's (correct, all) images to `per_class`; return self.

        Args:
            name: of the accuracy, the key in both.
            logits: of each readable test image, on the CPU; -inf excludes a class.
            labels: true class index of each.
            classes: names by class index.
            selected: hyperparameters that were selected, for the table.
        """
        self.metrics |= name_rows(name, measure_classifier(logits, labels, selected))
        correct = logits.argmax(1) == labels
        self.correct[name] = correct, labels
        counts, hits = (torch.bincount(part, minlength=len(classes)).tolist() for part in (labels, labels[correct]))
        self.per_class[name] = dict(zip(classes, zip(hits, counts, strict=True), strict=True))
        return self

    def to_json(self) -> dict[str, Any]:
        """Return {'metrics': name -> fields of its `MetricValue`, 'details': `details`}, without what has no JSON."""
        return {"metrics": {row: metric._asdict() for row, metric in self.metrics.items()}, "details": self.details}


# ---- what protocols take

Requirement = Literal["images", "labels", "ood", "masks", "annotations"]
"""Data that a protocol cannot do without."""


@dataclass
class EvalData:
    """Training and test images, with what annotations there are.

    Attributes:
        train, test: all images, with a class each; if `load` read masks, boxes or images without labels, `classes` is empty and all
            labels are 0.
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
        """List the images of `config` with one kind of annotation: COCO annotations if given, else masks, else labels, else none.

        Without test images a fifth of the images is held out as the test set, the same images every time.

        Args:
            config: its options `images`, `test_images`, `annotations`, `seg_masks`, their counterparts for test images, `ignore_labels`
                and `ood_images` are used. `ood_images` are read only beside labels.

        Returns:
            The sets, with fields for one kind of annotation; `max_images` limits labeled ones.

        Raises:
            MapetError: a file or folder is missing or of another layout, options do not fit the images, training and test images have
                different classes, or images are too few to hold some out.
        """
        root, test_root = Path(config.images), None if config.test_images is None else Path(config.test_images)
        if config.ood_images and not list_images(config.images, config).classes():
            classes = f"{option('images')} must have class folders, CLASS/image.jpg, for {option('ood_images')}, which have the same classes"
            raise MapetError(
                f"{classes}: {root} has none. Sort its images into such folders, or omit {option('ood_images')}"
            )
        if config.annotations is not None:
            boxes = datasets.load_detection_sets(
                root, config.annotations, test_root, config.test_annotations, config.group_by
            )
            train, test = (LabeledSet.without_labels(part.images) for part in boxes)
            return cls(train, test, boxes=boxes)
        masks = datasets.load_segmentation_sets(
            root, config.seg_masks, test_root, config.test_seg_masks, config.ignore_labels, config.group_by
        )
        if masks is not None:
            train, test = (LabeledSet.without_labels(part.images) for part in masks)
            return cls(train, test, masks=masks)
        if config.test_seg_masks is not None or config.ignore_labels:
            problem = f"{option('test_seg_masks')} and {option('ignore_labels')} are for masks of the training images, but {root} has no masks"
            raise MapetError(f"{problem}: give {option('seg_masks')}")
        images = list_images(config.images, config)
        if images.classes():
            ood = {
                name: LabeledSet.from_images(list_images(source, config)) for name, source in config.ood_images.items()
            }
            train, test = datasets.load_train_test(config.images, config.test_images, config, config.group_by)
            count = config.max_images or max(len(train), len(test))
            return cls(train.sample(count), test.sample(count), ood)
        if config.test_images is None:
            return cls(*datasets.split_train_test(LabeledSet.without_labels(images), config.group_by))
        return cls(
            LabeledSet.without_labels(images), LabeledSet.without_labels(list_images(config.test_images, config))
        )

    def read_as_trained(self, config: EvaluateConfig, trained: ReadOptions | None) -> "EvalData":
        """Return the data, whose images are read as a backbone's training images were, but for what `config` gives; see `list_as_trained`."""

        def convert(part: AnyImageSet) -> AnyImageSet:
            """Return the set with images that are read by the merged options."""
            return replace(part, images=read_as_trained(part.images, config, trained))

        ood = {name: convert(part) for name, part in self.ood.items()}
        masks = self.masks and (convert(self.masks[0]), convert(self.masks[1]))
        boxes = self.boxes and (convert(self.boxes[0]), convert(self.boxes[1]))
        return EvalData(convert(self.train), convert(self.test), ood, masks, boxes)

    def has(self, requirement: Requirement) -> bool:
        """Return whether the data is there that a protocol requires: 'images' always, the others if `load` has read them."""
        data = {"labels": self.train.classes, "ood": self.ood, "masks": self.masks, "annotations": self.boxes}
        return requirement == "images" or bool(data[requirement])


@dataclass
class EvalContext:
    """One backbone and its data; features are computed when first needed, and shared by the protocols.

    Attributes:
        backbone: the frozen backbone at its own input size.
        data: training and test images.
        cache: where features are kept, how much memory they may take, and the inference batch size.
        options: of the command `evaluate`; its `layers` and `pool` define the features.
    """

    backbone: BackboneWrapper
    data: EvalData
    cache: CacheConfig
    options: EvaluateConfig

    @property
    def classes(self) -> list[str]:
        """Return the names by class index; empty without labels."""
        return self.data.train.classes

    @cached_property
    def train(self) -> FeatureCache:
        """Compute the features of the readable training images, from the layers of the option `layers`."""
        return self._extract(self.data.train)

    @cached_property
    def test(self) -> FeatureCache:
        """Compute the features of the readable test images from the same layers as `train`."""
        return self._extract(self.data.test)

    def _extract(self, data: LabeledSet) -> FeatureCache:
        """Compute the features of a set by the options `layers` and `pool`."""
        return FeatureCache.extract(self.backbone, data, self.cache, self.options.layers, self.options.pool)

    @cached_property
    def scaler(self) -> StandardScaler:
        """Fit mean and standard deviation of the features of `train`, by which features are standardized."""
        return fit_scaler(self.train)

    @cached_property
    def test_neighbors(self) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """Return (cosine similarities of standardized features, rows in `train`) of the `KNN_K` training images nearest to each row of `test`.

        They are compared by the features of all `layers`; with fewer than `KNN_K` readable training images, k is their number.
        """
        return nearest_neighbors(self.train.blocks(), self.test.layer_features(), KNN_K, self.scaler)

    @cached_property
    def logistic(self) -> LogisticProbe:
        """Fit the linear probe on the features of the readable training images; its C is selected, see `fit_logistic`."""
        return fit_logistic(self.train.layer_features(), self.train.labels, len(self.classes))

    @property
    def classifier(self) -> str:
        """Describe what `classify` uses: the model's own classifier if it has one with class names, else the linear probe."""
        return "own classifier" if self.backbone.classes else f"logistic, {self.logistic.selected}"

    def pooled(self, backbone: BackboneWrapper, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Return the features of uint8 images by the options `layers` and `pool`, as in `train`, float32 on the CPU.

        Args:
            backbone: `self.backbone`, perhaps for another input size.
            images: pixels at its input size.

        Raises:
            MapetError: the model has no such layer, or no class token for `pool` 'cls'.
        """
        return torch.cat(backbone.pooled_features(images, self.options.layers, self.options.pool), 1).cpu()

    @cached_property
    def num_features(self) -> int:
        """Return F, the width of the features, by running the model once on a black image."""
        black = torch.zeros(1, self.backbone.channels, *self.backbone.image_size, dtype=torch.uint8)
        return self.pooled(self.backbone, black).shape[1]

    def classify(self, backbone: BackboneWrapper, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return logits of `classes` on the CPU, by the model's own classifier if it has one with class names, else by the linear probe.

        Args:
            backbone: `self.backbone`, perhaps for another input size.
            images: pixels at its input size, uint8.

        Returns:
            (B, K), for the K `classes` in their order, which the model's own classifier may have in another order.

        Raises:
            MapetError: the model's own classifier lacks a class of the training images.
        """
        if not backbone.classes:
            return self.logistic(self.pooled(backbone, images))
        if unknown := set(self.classes) - set(backbone.classes):
            hint = f"remove this class from {option('images')} and {option('test_images')}, or fine-tune with it"
            raise MapetError(f"{backbone.name} was fine-tuned without the class '{min(unknown)}': {hint}")
        return backbone.logits(images)[:, [backbone.classes.index(name) for name in self.classes]].cpu()

    def classify_images(
        self, backbone: BackboneWrapper, data: LabeledSet, **dataset: Any
    ) -> tuple[Float[Tensor, "m K"], Int[Tensor, " m"]]:
        """Return (logits by `classify`, class indices) of the readable images, in an order that is always the same.

        Args:
            backbone: `self.backbone`, perhaps for another input size.
            data: images with labels that are indices into `classes`.
            dataset: further arguments of `ViewDataset`, for changed images: `augment`, which changes an image's pixels, and `seed`.

        Raises:
            MapetError: more than the fraction `MAX_UNREADABLE` of the images is unreadable, or the model's own classifier lacks a class.
        """
        labels = torch.from_numpy(data.labels)
        batches = backbone.batches(data.images, self.cache, **dataset)
        parts = [(self.classify(backbone, pixels), labels[rows]) for rows, pixels in batches]
        logits, classes = map(torch.cat, zip(*parts, strict=True))
        return logits, classes

    def close(self) -> None:
        """Free memory and scratch files of `train` and `test`, if they have been computed; they cannot be used any more."""
        for name in {"train", "test"} & self.__dict__.keys():  # `cached_property` keeps what it has computed there
            self.__dict__[name].close()


# ---- the table of protocols


Run = Callable[[EvalContext], ProtocolResult]
AnyRun = TypeVar("AnyRun", bound=Run)


class Protocol(NamedTuple):
    """A row of the table of protocols.

    Attributes:
        run: the function that measures a backbone.
        requires: data that it cannot do without; 'images' is always there.
        is_expensive: it only runs if `protocols` names it.
    """

    run: Run
    requires: Requirement
    is_expensive: bool = False


PROTOCOLS: dict[str, Protocol] = {}
"""All protocols by name, once `mapet.evaluation.protocols` is imported."""


def protocol(requires: Requirement, is_expensive: bool = False) -> Callable[[AnyRun], AnyRun]:
    """Return a decorator that adds a protocol to the table `PROTOCOLS`, by its function's name with hyphens ('few-shot' for `few_shot`).

    The decorated function, from an `EvalContext` to a `ProtocolResult`, is returned unchanged.

    Args:
        requires: data that the protocol cannot do without; 'images' is always there.
        is_expensive: the protocol only runs if the option `protocols` names it.
    """

    def register(run: AnyRun) -> AnyRun:
        """Add the function to the table, and return it."""
        PROTOCOLS[run.__name__.replace("_", "-")] = Protocol(run, requires, is_expensive)
        return run

    return register
