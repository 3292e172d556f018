"""Controls beside every probe: features that need no pre-training, as frozen models, and whether a backbone is clearly ahead of them.

A control is a module with timm's `feature_info` and `forward_intermediates`, so that it is pooled and evaluated as a backbone is.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import pi
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mapet.config.base import read_config
from mapet.config.evaluation import EvaluateConfig
from mapet.data.dataset import inference_batch_size
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.evaluation.datasets import LabeledSet
from mapet.evaluation.eval_context import ProtocolResult, paired_interval
from mapet.evaluation.features import RANDOM_PREFIX, BackboneWrapper, CacheConfig
from mapet.evaluation.imbalance import balanced_accuracy, is_imbalanced
from mapet.models.pooling import resolve_layers
from mapet.run_state import CONFIG_FILE, pretrain_folder, read_command, resolve_run_path
from mapet.tokenizers.kmeans import KMeans
from mapet.tokenizers.tokenizer import Teacher, Tokenizer, load_tokenizer

log = logging.getLogger("mapet")

CONTROL_PROTOCOLS = ("logistic", "knn")
"""Protocols that controls are evaluated by."""
MAX_RAW_SIDE, MAX_KMEANS_SIDE = 32, 64
"""Pixels of the longer side that images are shrunk to, if they are larger, for raw pixels and for k-means patch features."""
HOG_BINS, HOG_CELL, MIN_HOG_CELLS = 9, 8, 4
"""Orientations, and pixels of a cell's side, as in MaskFeat (arXiv 2112.09133, section 3.2); images have at least so many cells a side."""
NUM_CENTROIDS, PATCH_SIZE, SMALL_PATCH_SIZE = 200, 6, 3
"""Of k-means patch features; images of less than two patches of 6 px a side have patches of 3 px."""
CONTRAST_OFFSET, ZCA_EPS = 10.0, 0.1
"""Added to the variance of a patch, of pixels from 0 to 255, and to the eigenvalues of the covariance (Coates and Ng 2011)."""
NUM_FIT_IMAGES, NUM_FIT_PATCHES = 2_000, 50_000
"""Training images, at most, and about so many of their patches that k-means is fitted to."""


# ---- the controls


class Control(nn.Module):
    """Base of the controls: `forward` maps pixels in [0, 1] to a feature map, which is given as timm gives a network's only layer."""

    feature_info: tuple[dict[str, Any], ...] = ({},)

    def forward_intermediates(self, images: Float[Tensor, "B C H W"], **_: Any) -> list[Float[Tensor, "B D h w"]]:
        """Return the feature map of the one layer there is; timm's other arguments (indices, norm, ...) don't matter."""
        return [self(images)]


class RawPixels(Control):
    """The pixels of the image, shrunk to `MAX_RAW_SIDE`, as a map of one cell, which every pooling leaves as it is."""

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D 1 1"]:
        return shrink(images, MAX_RAW_SIDE).flatten(1)[:, :, None, None]


class HOGFeatures(Control):
    """Histograms of oriented gradients of each cell and channel, with MaskFeat's parameters (arXiv 2112.09133, section 3.2).

    Each pixel votes with the magnitude of its gradient (differences of its two neighbors, the border replicated) for one of `HOG_BINS`
    unsigned orientations; the histogram of a cell has length 1. Cells are `HOG_CELL` px, smaller in images of fewer than
    `MIN_HOG_CELLS` of them a side.
    """

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Compute the map of D = C x `HOG_BINS` numbers for each cell; pixels beyond the last whole cell are ignored."""
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        # Rounding may make the angle pi, which is in the last bin.
        bins = (torch.atan2(dy, dx) % pi * (HOG_BINS / pi)).long().clamp_max(HOG_BINS - 1)
        votes = images.new_zeros(*images.shape[:2], HOG_BINS, *images.shape[2:])
        votes.scatter_(2, bins[:, :, None], torch.hypot(dx, dy)[:, :, None])
        cell = max(1, min(HOG_CELL, min(images.shape[2:]) // MIN_HOG_CELLS))
        histograms = F.avg_pool2d(votes.flatten(0, 1), cell)  # (B C, bins, h, w)
        return F.normalize(histograms, dim=1).unflatten(0, images.shape[:2]).flatten(1, 2)


class KMeansPatches(Control):
    """K-means features of whitened patches (Coates and Ng 2011, "An analysis of single-layer networks", AISTATS, section 3).

    Each patch, at stride 1, is normalized in brightness and contrast and ZCA-whitened; feature k is max(0, mean(z) - z_k), z_k being
    the distance to centroid k ("triangle"). Images larger than `MAX_KMEANS_SIDE` are shrunk.
    """

    mean: Tensor
    whitening: Tensor
    centroids: Tensor

    def __init__(self, batches: Iterable[Float[Tensor, "B C H W"]], patches_per_image: int) -> None:
        """Fit whitening and centroids to random patches of images.

        Args:
            batches: pixels in [0, 1] of training images of one size, at least 3 px a side, on the device that is computed on.
            patches_per_image: how many different patches are drawn from each image; all, if it has no more.
        """
        super().__init__()
        generator, drawn = torch.Generator().manual_seed(0), []
        for images in batches:
            patches = self.normalized_patches(images).flatten(1, 2)
            rows = (
                torch.rand(patches.shape[:2], generator=generator).argsort(1)[:, :patches_per_image].to(patches.device)
            )
            drawn.append(patches.gather(1, rows[:, :, None].expand(-1, -1, patches.shape[2])).flatten(0, 1))
        points = torch.cat(drawn)
        mean = points.double().cpu().mean(0)
        variances, vectors = torch.linalg.eigh(torch.cov(points.double().cpu().T))
        whitening = vectors @ (variances + ZCA_EPS).rsqrt().diag() @ vectors.T
        self.register_buffer("mean", mean.float().to(points))
        self.register_buffer("whitening", whitening.float().to(points))
        fitted = KMeans(min(NUM_CENTROIDS, len(points))).fit((points - self.mean) @ self.whitening)
        self.register_buffer("centroids", fitted.centroids.to(points))

    def normalized_patches(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w F"]:
        """Return the patches of each image, at stride 1, minus their mean and over their standard deviation."""
        images = 255 * shrink(images, MAX_KMEANS_SIDE)
        size = PATCH_SIZE if min(images.shape[2:]) >= 2 * PATCH_SIZE else SMALL_PATCH_SIZE
        patches = images.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
        variance, mean = torch.var_mean(patches, 3, keepdim=True)
        return (patches - mean) / (variance + CONTRAST_OFFSET).sqrt()

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K h w"]:
        """Compute K features of each patch."""
        patches = (self.normalized_patches(images) - self.mean) @ self.whitening
        z = torch.cdist(patches.flatten(0, 2), self.centroids)
        return F.relu(z.mean(1, keepdim=True) - z).unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)


class TeacherFeatures(Control):
    """Features of a frozen teacher, on the student's grid."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        return self.teacher(_to_uint8(images))


class TokenBag(Control):
    """One-hot visual tokens: their mean is the bag of tokens, the frequency of each code in the image."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B V rows columns"]:
        ids = self.tokenizer(_to_uint8(images))[:, None]
        return images.new_zeros(len(ids), self.tokenizer.vocab_size, *ids.shape[2:]).scatter_(1, ids, 1.0)


def shrink(images: Float[Tensor, "B C H W"], max_side: int) -> Float[Tensor, "B C h w"]:
    """Resize images whose longer side exceeds `max_side` pixels to that, antialiased; smaller ones are returned as they are."""
    scale = max_side / max(images.shape[2:])
    if scale >= 1:
        return images
    size = [max(1, round(scale * side)) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _to_uint8(images: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
    """Return pixels in [0, 1] as tokenizers take them."""
    return (255 * images).round().to(torch.uint8)


# ---- which controls an evaluation has

Loader = Callable[[], BackboneWrapper]
"""Makes a model when it is its turn, so that one is in memory at a time."""
IMAGE_CONTROLS = {"pixels": "raw pixels", "hog": "HOG features", "kmeans": "k-means patch features"}
"""Controls of the images alone: value of the option `controls` -> name in tables."""


def plan_controls(
    config: EvaluateConfig, protocols: Collection[str], train: LabeledSet, backbones: Iterable[BackboneWrapper]
) -> dict[str, Loader]:
    """Return the controls that the option `controls` asks for, name in tables -> function that makes the control.

    Controls of the images alone take the input size and channels of the first backbone. The untrained network and, of a run, its
    teacher and the bag of its tokens are made for each backbone, once for those of equal architecture or tokenizer.

    Args:
        config: options of `evaluate`; `controls`, `backbone`, `seed` and `trust_teacher` are used.
        protocols: names of those that are run.
        train: labeled training images, which k-means patch features are fitted to.
        backbones: those of the option `backbone`, in its order; each is used before the next is requested.

    Raises:
        MapetError: a backbone lacks a layer of `layers`; controls are named, but none of `CONTROL_PROTOCOLS` is run; or a teacher or
            tokens are named, but a tokenizer cannot be loaded, or no backbone is a run with one.
    """
    is_auto = config.controls == ("auto",)
    asked = {*IMAGE_CONTROLS, "untrained", "teacher", "tokens"} if is_auto else {*config.controls} - {"none"}
    if not {*protocols} & {*CONTROL_PROTOCOLS}:
        if asked and not is_auto:
            needed = f"{option('protocols')} {' or '.join(CONTROL_PROTOCOLS)}, which need labels"
            raise MapetError(f"{option('controls')} need {needed}", field="controls", value=config.controls)
        asked = set()
    loaders: dict[str, Loader] = {}
    seen: set[object] = set()  # architectures and hashes of tokenizers
    for backbone in backbones:
        resolve_layers(backbone.model, config.layers)  # raises where there is no such layer
        compute, size = replace(backbone.compute, dtype=torch.float32), backbone.image_size
        for name, title in IMAGE_CONTROLS.items():
            if name in asked and (name != "kmeans" or min(size) >= SMALL_PATCH_SIZE):
                loaders.setdefault(title, partial(_image_control, name, compute, size, backbone.channels, train))
        shapes = tuple(tensor.shape for tensor in backbone.model.state_dict().values())
        architecture = type(backbone.model), size, shapes
        untrained = f"{RANDOM_PREFIX}{backbone.name}"
        is_random = backbone.name.startswith(RANDOM_PREFIX)
        if "untrained" in asked and not is_random and architecture not in seen and untrained not in config.backbone:
            loaders[untrained] = partial(BackboneWrapper.load, untrained, backbone.compute, config.seed)
        seen.add(architecture)
        tokenizer = (
            _load_tokenizer(backbone.name, config.trust_teacher, is_auto) if asked & {"teacher", "tokens"} else None
        )
        if tokenizer is None or tokenizer.hash in seen:
            continue
        seen.add(tokenizer.hash)
        teacher = tokenizer.to(compute.device).teacher
        assert teacher is not None  # `load_tokenizer` makes it unless told not to
        arguments = compute, teacher.image_size, teacher.settings["channels"]
        models = {"teacher": TeacherFeatures(teacher), "tokens": TokenBag(tokenizer)}
        for name, model in models.items():
            if name in asked:
                title = f"{name} of {backbone.name}"
                loaders[title] = partial(_wrap, title, model, *arguments)
    if not is_auto and asked & {"teacher", "tokens"} and not any(isinstance(item, str) for item in seen):
        needed = f"a run with a tokenizer among {option('backbone', *config.backbone)}"
        raise MapetError(
            f"{option('controls', *config.controls)} need {needed}", field="controls", value=config.controls
        )
    return loaders


def control_options(config: EvaluateConfig) -> EvaluateConfig:
    """Return the options of `evaluate` for controls, which have one layer and no class token: they are pooled by the mean instead."""
    return config.model_copy(update={"layers": (-1,), "pool": "mean" if config.pool == "cls" else config.pool})


def _wrap(
    name: str, model: nn.Module, compute: ComputeContext, size: tuple[int, int], channels: int
) -> BackboneWrapper:
    """Return the wrapper of a control, which takes pixels in [0, 1]."""
    return BackboneWrapper(name, model.eval(), compute, size, channels, (0.0,) * channels, (1.0,) * channels)


def _image_control(
    name: str, compute: ComputeContext, size: tuple[int, int], channels: int, train: LabeledSet
) -> BackboneWrapper:
    """Make a control of the images alone.

    Args:
        name: key of `IMAGE_CONTROLS`.
        compute: device, in float32.
        size: (height, width) of its input, pixels.
        channels: of its input.
        train: images that k-means patch features are fitted to: up to `NUM_FIT_IMAGES` of them.
    """
    control = _wrap(IMAGE_CONTROLS[name], RawPixels() if name == "pixels" else HOGFeatures(), compute, size, channels)
    if name == "kmeans":
        sample = train.sample(NUM_FIT_IMAGES)
        views = control.batches(sample.images, CacheConfig(batch_size=inference_batch_size(size)), "patches")
        pixels = (control.normalize(images) for _, images in views)
        control.model = KMeansPatches(pixels, -(-NUM_FIT_PATCHES // len(sample)))
    return control


def _load_tokenizer(source: str, trusted_teacher: str | None, may_fail: bool) -> Tokenizer | None:
    """Load the tokenizer, with its teacher, that a pre-trained backbone was trained with; None if it is no run with a tokenizer.

    Args:
        source: name of a backbone, perhaps the folder of a run, or the backbone folder in it.
        trusted_teacher: the user's own teacher code that may run.
        may_fail: log a warning and return None where the tokenizer cannot be loaded.

    Raises:
        MapetError: it cannot be loaded, and `may_fail` is False.
    """
    for folder in (pretrain_folder(Path(source)), Path(source).parent):
        if read_command(folder) == "pretrain" and (folder / CONFIG_FILE).is_file():
            path = resolve_run_path(folder, read_config(folder / CONFIG_FILE), "tokenizer")
            try:
                return load_tokenizer(Path(path), trusted_teacher=trusted_teacher) if path else None
            except MapetError as error:
                if not may_fail:
                    raise
                log.warning("controls of the tokenizer of %s are skipped: %s", source, error)
    return None


# ---- the verdict


class Verdict(NamedTuple):
    """A backbone against the best control by the same metric, on the same test images.

    Attributes:
        backbone, control: their names in tables.
        metric: e.g. 'logistic'.
        value, control_value: of the metric; the control's is the highest of all controls.
        difference: of the two, with its paired 95 % interval from `ci_low` to `ci_high`.
    """

    backbone: str
    metric: str
    control: str
    value: float
    control_value: float
    difference: float
    ci_low: float
    ci_high: float

    def to_json(self) -> dict[str, Any]:
        """Return all fields, and 'is_ahead'."""
        return {**self._asdict(), "is_ahead": self.is_ahead}

    @property
    def is_ahead(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.ci_low > 0

    def __str__(self) -> str:
        """Return the verdict as a sentence without a final period."""
        interval = f"difference {self.difference:.3f}, 95 % interval {self.ci_low:.3f} to {self.ci_high:.3f}"
        return (
            f"{self.backbone} is {'clearly' if self.is_ahead else 'not clearly'} ahead of the best control by {self.metric}, {self.control}: "
            f"{self.value:.3f} against {self.control_value:.3f} ({interval})"
        )


Results = Mapping[str, Mapping[str, ProtocolResult]]
"""Backbone or control -> protocol -> result."""


def is_control(name: str, config: EvaluateConfig) -> bool:
    """Return whether a name in the results of `evaluate` is a control's: none of the option `backbone`, or random weights."""
    return name not in config.backbone or name.startswith(RANDOM_PREFIX)


def mark_controls(results: Results, config: EvaluateConfig) -> Results:
    """Return the results with ' (control)' after the names of controls, for tables."""
    return {f"{name} (control)" if is_control(name, config) else name: own for name, own in results.items()}


def compare_with_controls(results: Results, config: EvaluateConfig) -> list[Verdict]:
    """Return a verdict for each backbone and each accuracy that it and a control have; on imbalanced test images balanced accuracy.

    Args:
        results: of all backbones and controls.
        config: options of `evaluate`; `backbone` tells which are controls.
    """
    all_correct = {
        name: {k: v for each in own.values() for k, v in each.correct.items()} for name, own in results.items()
    }
    verdicts = []
    for backbone, row in [(name, row) for name, own in all_correct.items() for row in own]:
        correct = {name: own[row][0].double().numpy() for name, own in all_correct.items() if row in own}
        labels = all_correct[backbone][row][1].numpy()
        candidates = [name for name in correct if is_control(name, config)]
        if not candidates or backbone in candidates:
            continue
        balanced = is_imbalanced(labels)
        score = partial(balanced_accuracy, labels=labels, weights=np.ones(len(labels))) if balanced else np.mean
        values = {name: float(score(hits)) for name, hits in correct.items()}
        best = max(candidates, key=values.__getitem__)
        metric = f"{row}_balanced_accuracy" if balanced else row
        interval = paired_interval(correct[backbone] - correct[best], labels if balanced else None)
        difference = values[backbone] - values[best]
        verdicts.append(Verdict(backbone, metric, best, values[backbone], values[best], difference, *interval))
    return verdicts
