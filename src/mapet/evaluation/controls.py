"""Controls beside every probe: features that need no pre-training, as frozen models, and whether a backbone is clearly ahead of them.

A control is a module with timm's `feature_info` and `forward_intermediates`, so that it is pooled and evaluated as a backbone is.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
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
from mapet.tokenizers.teachers.hog import orientation_histograms
from mapet.tokenizers.teachers.whitened import NUM_FIT_PATCHES, draw_patches, fit_zca, normalize_contrast
from mapet.tokenizers.tokenizer import Teacher, Tokenizer, load_tokenizer

log = logging.getLogger("mapet")

CONTROL_PROTOCOLS = ("logistic", "knn", "linear-sgd", "few-shot")
"""Protocols that controls are evaluated by. The untrained network, which has patch tokens, is evaluated by 'attentive', too."""
VERDICT_ROWS = ("logistic", "knn")
"""Accuracies by which a backbone is compared with the best control."""
MAX_RAW_SIDE, MAX_KMEANS_SIDE = 32, 64
"""Pixels of the longer side that images are shrunk to, if they are larger, for raw pixels and for k-means patch features."""
HOG_BINS, HOG_CELL, MIN_HOG_CELLS = 9, 8, 4
"""Orientations, and pixels of a cell's side, as in MaskFeat (arXiv 2112.09133, section 3.2). Cells are made smaller in an image that would
have fewer than `MIN_HOG_CELLS` of them along its shorter side."""
NUM_CENTROIDS, PATCH_SIZE, SMALL_PATCH_SIZE = 200, 6, 3
"""Of k-means patch features: number of centroids, K; pixels of a patch's side; and the same for images with a side of less than two patches."""
NUM_FIT_IMAGES = 2_000
"""K-means patch features are fitted to at most so many training images, and to about `NUM_FIT_PATCHES` patches of them, equally many of each."""


# ---- the controls


class Control(nn.Module):
    """Base of the controls: a module whose `forward` maps pixels in [0, 1] to a feature map, (B, C, H, W) to (B, D, h, w).

    `pooled_features` takes it as it takes a timm network: as one with a single layer, that feature map.
    """

    feature_info: tuple[dict[str, Any], ...] = ({},)

    def forward_intermediates(self, images: Float[Tensor, "B C H W"], **_: Any) -> list[Float[Tensor, "B D h w"]]:
        """Return the feature map of the only layer in a list; timm's other arguments (indices, norm, ...) are ignored."""
        return [self(images)]


class RawPixels(Control):
    """All pixels of the image, shrunk to at most `MAX_RAW_SIDE` a side, as the channels of a map of one cell: pooling changes nothing."""

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D 1 1"]:
        """Return the pixels of the shrunk images as channels."""
        return shrink(images, MAX_RAW_SIDE).flatten(1)[:, :, None, None]


class HOGFeatures(Control):
    """Histograms of oriented gradients of each cell and channel, with MaskFeat's parameters (arXiv 2112.09133, section 3.2).

    They are `orientation_histograms` of `HOG_BINS` orientations; the histogram of a cell has length 1. Cells are `HOG_CELL` px, smaller in
    images of fewer than `MIN_HOG_CELLS` of them a side.
    """

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Compute D = C x `HOG_BINS` features of each of the h x w cells; pixels beyond the last whole cell are ignored."""
        cell = max(1, min(HOG_CELL, min(images.shape[2:]) // MIN_HOG_CELLS))
        by_channel = orientation_histograms(images.flatten(0, 1)[:, None], cell, 1, cell, HOG_BINS)[:, :, 0]
        return F.normalize(by_channel, dim=1).unflatten(0, images.shape[:2]).flatten(1, 2)


class KMeansPatches(Control):
    """K-means features of whitened patches (Coates and Ng 2011, "An analysis of single-layer networks", AISTATS, section 3).

    Each patch, at stride 1, is normalized in brightness and contrast and ZCA-whitened; feature k is max(0, mean(z) - z_k), z_k being
    the distance to centroid k ("triangle"). Images larger than `MAX_KMEANS_SIDE` are shrunk.

    Attributes:
        mean: (F,) of the patches that the features are fitted to, F = C x patch side squared.
        whitening: (F, F) symmetric matrix by which a patch minus `mean` is multiplied (ZCA).
        centroids: (K, F) of the whitened patches; K is `NUM_CENTROIDS`, or the number of patches if that is smaller.
    """

    mean: Tensor
    whitening: Tensor
    centroids: Tensor

    def __init__(self, batches: Iterable[Float[Tensor, "B C H W"]], patches_per_image: int) -> None:
        """Fit whitening and centroids to random patches of images.

        Args:
            batches: pixels in [0, 1] of training images of one size, at least `SMALL_PATCH_SIZE` a side; their device and dtype are
                the control's.
            patches_per_image: number of different patches that are drawn from each image, always the same ones; if an image has fewer,
                all of them.
        """
        super().__init__()
        points = draw_patches((self.normalized_patches(images).flatten(1, 2) for images in batches), patches_per_image)
        mean, whitening = fit_zca(points)
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)
        clusters = KMeans(min(NUM_CENTROIDS, len(points))).fit((points - self.mean) @ self.whitening)
        self.register_buffer("centroids", clusters.centroids.to(points))

    def normalized_patches(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w F"]:
        """Return the patches of each image, at stride 1, each minus its mean and divided by its standard deviation.

        Args:
            images: pixels in [0, 1]; those larger than `MAX_KMEANS_SIDE` are shrunk.

        Returns:
            (B, h, w, F): h x w positions of patches, F = C x patch side squared values of each.
        """
        images = 255 * shrink(images, MAX_KMEANS_SIDE)
        size = PATCH_SIZE if min(images.shape[2:]) >= 2 * PATCH_SIZE else SMALL_PATCH_SIZE
        patches = images.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
        return normalize_contrast(patches)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K h w"]:
        """Compute the K features of the patch at each of h x w positions: how much nearer than average each centroid is, or 0."""
        patches = (self.normalized_patches(images) - self.mean) @ self.whitening
        z = torch.cdist(patches.flatten(0, 2), self.centroids)
        return F.relu(z.mean(1, keepdim=True) - z).unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)


class TeacherFeatures(Control):
    """Features of a frozen teacher, the encoder whose features a tokenizer quantizes, on the grid of the student's patches."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        """Compute the teacher's features of pixels in [0, 1] at its input size."""
        return self.teacher(_to_uint8(images))


class TokenBag(Control):
    """One-hot visual tokens, V channels for V codes. With pooling 'mean' they give the bag of tokens: each code's fraction of the patches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B V rows columns"]:
        """Return the one-hot token ids of pixels in [0, 1] at the teacher's input size."""
        ids = self.tokenizer(_to_uint8(images))[:, None]
        return images.new_zeros(len(ids), self.tokenizer.vocab_size, *ids.shape[2:]).scatter_(1, ids, 1.0)


def shrink(images: Float[Tensor, "B C H W"], max_side: int) -> Float[Tensor, "B C h w"]:
    """Shrink images to a longer side of `max_side` pixels, antialiased, with their aspect ratio; return smaller ones as they are."""
    scale = max_side / max(images.shape[2:])
    if scale >= 1:
        return images
    size = [max(1, round(scale * side)) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _to_uint8(images: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
    """Convert pixels in [0, 1] to uint8, which teachers and tokenizers take."""
    return (255 * images).round().to(torch.uint8)


# ---- which controls an evaluation has

Loader = Callable[[], BackboneWrapper]
"""Function that makes or loads a model; it is called when the model is evaluated, so that one is in memory at a time."""
IMAGE_CONTROLS = {"kmeans": "k-means patch features", "hog": "HOG features", "pixels": "raw pixels"}
"""Controls of the images alone, the best ones first: value of the option `controls` -> name in tables."""


def _requested_controls(config: EvaluateConfig, protocols: Collection[str]) -> set[str]:
    """Return the values of the option `controls` that some protocol evaluates; 'auto' stands for all.

    Args:
        config: options of `evaluate`.
        protocols: names of the protocols that are run.

    Raises:
        MapetError: controls are named, but no protocol for them is run.
    """
    is_auto = config.controls == ("auto",)
    names = (*IMAGE_CONTROLS, "untrained", "teacher", "tokens") if is_auto else config.controls
    requested = {str(name) for name in names} - {"none"}
    if {*protocols} & {*CONTROL_PROTOCOLS}:
        return requested
    possible = requested & {"untrained"} if "attentive" in protocols else set[str]()
    if requested != possible and not is_auto:
        evaluating = f"{', '.join(CONTROL_PROTOCOLS)} or, of untrained alone, attentive"
        problem = (
            f"{option('controls', *config.controls)} need one of the protocols {evaluating}, and none of them is run"
        )
        hint = f"add one to {option('protocols')} and give labeled images, or omit {option('controls')}"
        raise MapetError(f"{problem}: {hint}", field="controls", value=config.controls)
    return possible


def plan_controls(
    config: EvaluateConfig, protocols: Collection[str], train: LabeledSet, backbones: Iterable[BackboneWrapper]
) -> dict[str, Loader]:
    """Return the controls that the option `controls` asks for: features without pre-training that backbones are compared with.

    The controls of `IMAGE_CONTROLS`, which depend on the images alone, take the input size and channels of the first backbone; 'kmeans' is
    omitted for images of a side below `SMALL_PATCH_SIZE`. The untrained network, and of a pre-training run its teacher and its tokens, are
    made for each backbone, once for backbones of equal architecture, or equal tokenizer. A backbone 'random:...' gets no untrained
    network, nor does one whose untrained network is in the option `backbone` itself.

    Args:
        config: options of `evaluate`; `controls`, `backbone`, `layers` and `seed` are used. With `controls` 'auto' a
            control that cannot be made is omitted; one that is named is an error.
        protocols: names of the protocols that are run; without one of `CONTROL_PROTOCOLS` there are no controls, but for 'attentive' the
            untrained network.
        train: labeled training images, which k-means patch features are fitted to.
        backbones: loaded backbones of the option `backbone`, in its order; each is used before the next is requested, so it may be freed.

    Returns:
        Name in tables ('raw pixels', 'random:NAME', 'teacher of NAME', ...) -> function without arguments that makes the control, in the
        order in which controls are evaluated.

    Raises:
        MapetError: a backbone lacks a layer of `layers`; controls are named, but no protocol for them is run; or 'teacher' or
            'tokens' is named, but a tokenizer cannot be loaded, or no backbone belongs to a run with one.
    """
    is_auto = config.controls == ("auto",)
    requested = _requested_controls(config, protocols)
    loaders: dict[str, Loader] = {}
    with_control: set[object] = set()  # architectures (tuples) and hashes of tokenizers (text) that have their controls
    for backbone in backbones:
        resolve_layers(backbone.model, config.layers)  # raises where there is no such layer
        compute, size = replace(backbone.compute, dtype=torch.float32), backbone.image_size
        for name, title in IMAGE_CONTROLS.items():
            if name in requested and (name != "kmeans" or min(size) >= SMALL_PATCH_SIZE):
                loaders.setdefault(title, partial(_image_control, name, compute, size, backbone.channels, train))
        shapes = tuple(tensor.shape for tensor in backbone.model.state_dict().values())
        architecture = type(backbone.model), size, shapes
        untrained = f"{RANDOM_PREFIX}{backbone.name}"
        is_random = backbone.name.startswith(RANDOM_PREFIX)
        if (
            "untrained" in requested
            and not is_random
            and architecture not in with_control
            and untrained not in config.backbone
        ):
            loaders[untrained] = partial(BackboneWrapper.load, untrained, backbone.compute, config.seed)
        with_control.add(architecture)
        if not requested & {"teacher", "tokens"}:
            continue
        # Loaded here to see whether it can be, and again when its control is evaluated: large teachers would fill the memory until then.
        tokenizer = _load_tokenizer(backbone.name, is_auto)
        if tokenizer is None or tokenizer.hash in with_control:
            continue
        with_control.add(tokenizer.hash)
        for name in ("teacher", "tokens"):
            if name in requested:
                title = f"{name} of {backbone.name}"
                loaders[title] = partial(_tokenizer_control, name, title, backbone.name, compute)
    if not is_auto and requested & {"teacher", "tokens"} and not any(isinstance(item, str) for item in with_control):
        problem = f"{option('controls', *config.controls)}: none of {option('backbone', *config.backbone)} is a run with a tokenizer"
        raise MapetError(f"{problem}: add one, or omit teacher and tokens", field="controls", value=config.controls)
    return loaders


def adapt_options(model: nn.Module, config: EvaluateConfig) -> EvaluateConfig:
    """Return the options of `evaluate` for a model: a `Control` has one layer and no class token, so that `pool` 'cls' becomes 'mean'."""
    if not isinstance(model, Control):
        return config
    return config.model_copy(update={"layers": (-1,), "pool": "mean" if config.pool == "cls" else config.pool})


def select_protocols(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of the protocols by which a control is evaluated: `CONTROL_PROTOCOLS`, and 'attentive' if it is a network."""
    allowed = {*CONTROL_PROTOCOLS, *([] if isinstance(model, Control) else ["attentive"])}
    return [name for name in names if name in allowed]


def _wrap(
    name: str, model: nn.Module, compute: ComputeContext, size: tuple[int, int], channels: int
) -> BackboneWrapper:
    """Wrap a control for evaluation: its pixels are normalized by mean 0 and standard deviation 1, which leaves them in [0, 1].

    Args:
        name: of the control in tables.
        model: a `Control`, on `compute.device`; is set to eval mode.
        compute: device and precision.
        size: (height, width) of its input, pixels.
        channels: of its input.
    """
    return BackboneWrapper(name, model.eval(), compute, size, channels, (0.0,) * channels, (1.0,) * channels)


def _image_control(
    name: str, compute: ComputeContext, size: tuple[int, int], channels: int, train: LabeledSet
) -> BackboneWrapper:
    """Make raw pixels, HOG features or k-means patch features, which are fitted here.

    Args:
        name: key of `IMAGE_CONTROLS`: 'pixels', 'hog' or 'kmeans'.
        compute: device, in float32.
        size: (height, width) of its input, pixels.
        channels: of its input.
        train: images that k-means patch features are fitted to: at most `NUM_FIT_IMAGES` of them.

    Raises:
        MapetError: for 'kmeans', more than half of these images are unreadable.
    """
    control = _wrap(IMAGE_CONTROLS[name], RawPixels() if name == "pixels" else HOGFeatures(), compute, size, channels)
    if name == "kmeans":
        sample = train.sample(NUM_FIT_IMAGES)
        # The wrapper of HOG features reads and normalizes images as that of k-means features does; only its model is replaced.
        views = control.batches(sample.images, CacheConfig(batch_size=inference_batch_size(size)), "patches")
        pixels = (control.normalize(images) for _, images in views)
        control.model = KMeansPatches(pixels, -(-NUM_FIT_PATCHES // len(sample)))
    return control


def _tokenizer_control(name: str, title: str, source: str, compute: ComputeContext) -> BackboneWrapper:
    """Load the features of a run's teacher, or the bag of its tokens.

    Args:
        name: 'teacher' or 'tokens'.
        title: of the control in tables.
        source: value of the option `backbone`, which has a tokenizer, see `_load_tokenizer`.
        compute: device, in float32.

    Raises:
        MapetError: the tokenizer cannot be loaded.
    """
    tokenizer = _load_tokenizer(source, may_fail=False)
    assert tokenizer is not None  # `plan_controls` has loaded it before
    teacher = tokenizer.to(compute.device).teacher
    assert teacher is not None
    model = TeacherFeatures(teacher) if name == "teacher" else TokenBag(tokenizer)
    return _wrap(title, model, compute, teacher.image_size, teacher.settings["channels"])


def _load_tokenizer(source: str, may_fail: bool) -> Tokenizer | None:
    """Load the tokenizer, with its teacher, that a backbone was pre-trained with.

    Args:
        source: a value of the option `backbone`; the folder of `mapet run` or `mapet pretrain`, or the backbone folder in it, has a
            tokenizer, other values ('timm:NAME', a weights file, ...) have none.
        may_fail: log a warning and return None where the tokenizer cannot be loaded.

    Returns:
        The tokenizer, on the CPU; None if the backbone is not of a run, or its run predicts targets that need no tokenizer.

    Raises:
        MapetError: the tokenizer cannot be loaded, and `may_fail` is False.
    """
    for folder in (pretrain_folder(Path(source)), Path(source).parent):
        if read_command(folder) == "pretrain" and (folder / CONFIG_FILE).is_file():
            path = resolve_run_path(folder, read_config(folder / CONFIG_FILE), "tokenizer")
            try:
                return load_tokenizer(Path(path)) if path else None
            except MapetError as error:
                if not may_fail:
                    raise
                log.warning("the controls teacher and tokens of %s are skipped: %s", source, error)
    return None


# ---- the verdict


class Verdict(NamedTuple):
    """A backbone against the best control by the same metric, on the same test images.

    Attributes:
        backbone: name in tables, as in the option `backbone`.
        metric: an accuracy, 'logistic', or on imbalanced test images a balanced accuracy, 'logistic_balanced_accuracy'.
        control: name in tables of the control with the highest value of this metric.
        value, control_value: the metric of the backbone and of this control, 0 to 1.
        difference: `value` - `control_value`.
        ci_low, ci_high: paired 95 % interval of the difference.
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
        """Return all fields and 'is_ahead' by name, for JSON."""
        return {**self._asdict(), "is_ahead": self.is_ahead}

    @property
    def is_ahead(self) -> bool:
        """Return whether the whole interval is above 0."""
        return self.ci_low > 0

    def __str__(self) -> str:
        """Return the verdict as a sentence without a final period."""
        interval = f"difference {self.difference:.3f}, 95 % interval {self.ci_low:.3f} to {self.ci_high:.3f}"
        return (
            f"{self.backbone} is {'clearly' if self.is_ahead else 'not clearly'} ahead of the best control by {self.metric}, {self.control}: "
            f"{self.value:.3f} against {self.control_value:.3f} ({interval})"
        )


Results = Mapping[str, Mapping[str, ProtocolResult]]
"""Name in tables of a backbone or control -> protocol -> result."""


def is_control(name: str, config: EvaluateConfig) -> bool:
    """Return whether a name in the results of `evaluate` is a control's: not in the option `backbone`, or random weights ('random:...')."""
    return name not in config.backbone or name.startswith(RANDOM_PREFIX)


def mark_controls(results: Results, config: EvaluateConfig) -> Results:
    """Return the results with ' (control)' after the names of controls, for tables."""
    return {
        f"{name} (control)" if is_control(name, config) else name: by_protocol for name, by_protocol in results.items()
    }


def compare_with_each(results: Results, config: EvaluateConfig) -> list[Verdict]:
    """Compare each backbone with each control and each other backbone by `VERDICT_ROWS`, on imbalanced test images by balanced accuracy.

    Args:
        results: of all backbones and controls. `ProtocolResult.correct` has for each accuracy (whether each test image is classified
            correctly, its class index), the images in the same order for all.
        config: options of `evaluate`; its `backbone` tells which names are controls.

    Returns:
        A verdict, whose `control` is the other one, for each pair and accuracy that both have; backbones of random weights are only others.
    """
    all_correct = {
        name: {row: correct for result in by_protocol.values() for row, correct in result.correct.items()}
        for name, by_protocol in results.items()
    }
    verdicts = []
    for backbone, row in [(name, row) for name, by_row in all_correct.items() for row in by_row if row in VERDICT_ROWS]:
        if is_control(backbone, config):
            continue
        correct = {name: by_row[row][0].double().numpy() for name, by_row in all_correct.items() if row in by_row}
        labels = all_correct[backbone][row][1].numpy()
        balanced = is_imbalanced(labels)
        score = partial(balanced_accuracy, labels=labels, weights=np.ones(len(labels))) if balanced else np.mean
        values = {name: float(score(hits)) for name, hits in correct.items()}
        metric = f"{row}_balanced_accuracy" if balanced else row
        for other in correct.keys() - {backbone}:
            interval = paired_interval(correct[backbone] - correct[other], labels if balanced else None)
            difference = values[backbone] - values[other]
            verdicts.append(Verdict(backbone, metric, other, values[backbone], values[other], difference, *interval))
    order = [*results]
    return sorted(verdicts, key=lambda verdict: (order.index(verdict.backbone), order.index(verdict.control)))


def compare_with_controls(results: Results, config: EvaluateConfig) -> list[Verdict]:
    """Return of `compare_with_each` the verdict against the best control, for each backbone and accuracy; [] without controls."""
    best: dict[tuple[str, str], Verdict] = {}
    for verdict in compare_with_each(results, config):
        key = verdict.backbone, verdict.metric
        if is_control(verdict.control, config) and (key not in best or verdict.control_value > best[key].control_value):
            best[key] = verdict
    return list(best.values())
