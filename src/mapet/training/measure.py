"""Facts of a folder and timings of this machine, in some seconds, for the plan of `run` (`training.plan`)."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from mapet.config.base import build_config
from mapet.config.pretraining import PretrainConfig
from mapet.config.tokenizers import FitTokenizerOptions
from mapet.data.dataset import Batch, ViewDataset
from mapet.data.dataset_stats import ImageInfo
from mapet.data.image_list import ImageList
from mapet.data.views import ViewSpec, normalize
from mapet.device import ComputeContext, num_workers, usable_cores
from mapet.errors import MapetError, option
from mapet.evaluation.controls import HOGFeatures, KMeansPatches
from mapet.evaluation.datasets import LabeledSet
from mapet.evaluation.logistic_regression import fit_logistic
from mapet.models.backbone import prepare_for_device
from mapet.tokenizers.tokenizer import Teacher, make_teacher
from mapet.training.plan import (
    DEFAULT_OBJECTIVE,
    DEFAULT_TEACHER,
    PROBE_OFFSET,
    Candidate,
    FolderFacts,
    Timings,
    UserOptions,
)
from mapet.training.step import ForwardBackward, auto_micro_batch
from mapet.training.tasks.pretraining import build_model_for

NUM_TIMED = 16
"""Images that are read to time reading and the teacher."""
TIMED_BATCHES, MAX_STEP_SECONDS = (4, 16, 64), 0.5
"""Images of a training step that is timed: of small models a step of few images is mostly overhead; until a step takes this long."""
NUM_TIMED_CONTROLS = 4
"""Images of the batch that controls are timed on."""
NUM_PROBED, PROBED_DIM = 128, 64
"""Random features that a linear probe is timed on."""
MATMUL_SIZE = 1024


def folder_facts(
    images: ImageList, infos: Sequence[ImageInfo], labeled: tuple[LabeledSet, LabeledSet] | None
) -> FolderFacts:
    """Return what the plan needs to know of a folder.

    Args:
        images: to pre-train on.
        infos: facts on some or all of them, read as RGB.
        labeled: training and test set of the evaluation; None without labels.

    Raises:
        MapetError: no image could be read.
    """
    if not infos:
        raise MapetError(
            f"{option('images', images.root)}: no image that was looked at is readable: `mapet check` lists reasons"
        )
    num_train, num_test = (len(part) for part in labeled) if labeled else (0, 0)
    short_side = int(np.median([min(info.size) for info in infos]))
    gray, num_classes = all(info.gray for info in infos), len(labeled[0].classes) if labeled else 0
    return FolderFacts(len(images), short_side, gray, num_classes, num_train, num_test)


def measure_machine(
    images: ImageList, facts: FolderFacts, candidates: Sequence[Candidate], user_options: UserOptions, device: str, budget: float
) -> list[Timings]:  # fmt: skip
    """Time reading, teacher, training steps and controls on some of the images, for each candidate.

    Candidates are timed from small to large until one would see too few images in the whole budget.

    Args:
        images: to pre-train on.
        facts: on them.
        candidates: from `list_candidates`.
        user_options: options that the user has given.
        device: option `device`.
        budget: seconds.

    Raises:
        MapetError: none of the images that are read is readable, or an option of model or teacher is wrong.
    """
    compute = ComputeContext.from_options(device, user_options.get("pretrain", {}).get("precision", "auto"))
    on_gpu = compute.device.type != "cpu"
    machine = {
        "probe": _time_probe(facts.num_classes), "flops": _measure_flops(compute), "precision": compute.precision, "on_gpu": on_gpu,
        "num_processes": torch.cuda.device_count() if on_gpu else 1,
    }  # fmt: skip
    timings: list[Timings] = []
    for candidate in candidates:
        if timings and budget / timings[-1].training < candidate.tier.images_seen:
            break
        timings.append(_time_candidate(images, facts, candidate, user_options, compute, machine))
    return timings


def _time_candidate(
    images: ImageList, facts: FolderFacts, candidate: Candidate, user_options: UserOptions, compute: ComputeContext, machine: Mapping[str, Any]
) -> Timings:  # fmt: skip
    """Return what is timed with a candidate, beside what does not depend on it; see `measure_machine`."""
    fitting = {"teacher": DEFAULT_TEACHER, "channels": 1 if facts.gray else 3, **user_options.get("fit_tokenizer", {})}
    sizes = {"image_size": candidate.image_size, "patch_size": candidate.patch_size}
    options = build_config(FitTokenizerOptions, {**fitting, **sizes})
    teacher = make_teacher(options, compute.precision).to(compute.device)
    batch, reading = _read_batch(images, candidate, options.channels, teacher)
    assert batch.teacher_images is not None
    views = compute.to(batch.teacher_images)
    if teacher.is_fitted_to_images:
        teacher.fit(lambda: [views], len(views))
    with torch.inference_mode():
        feature_size = teacher(views[:1]).shape[1]
        teaching = _time(lambda: teacher(views)) / len(views)
    tier = candidate.tier
    tier_options = {"model": tier.model, "model_args": dict(tier.model_args), "drop_path": tier.drop_path}
    paths = {"images": "images", "tokenizer": "tokenizer", "out": "out"}  # not read here
    config = build_config(
        PretrainConfig, {"objective": DEFAULT_OBJECTIVE, **tier_options, **user_options.get("pretrain", {}), **paths}
    )
    training = time_training(config, candidate.image_size, candidate.patch_size, options.channels, compute)
    features = _time_controls(candidate, options.channels, compute) + 2 * training / 3 + 2 * teaching
    reading /= max(1, min(usable_cores(), num_workers()))
    return Timings(training, reading, teaching, feature_size, features, **machine)


def _time(function: Callable[[], Any]) -> float:
    """Return the seconds of a call after one that does not count: the shorter one of two."""
    function()
    seconds = math.inf
    for _ in range(2):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds


def _read_batch(images: ImageList, candidate: Candidate, channels: int, teacher: Teacher) -> tuple[Batch, float]:
    """Read the views of images at equal distances in the list; return them and the seconds per image in this process."""
    dataset = ViewDataset(
        images, ViewSpec(image_size=candidate.image_size), channels, candidate.image_size, teacher.image_size
    )
    rows = np.linspace(0, len(images) - 1, min(NUM_TIMED, len(images))).astype(int).tolist()
    started = time.perf_counter()
    batch = dataset.batch([(0, index) for index in islice(cycle(rows), NUM_TIMED)])
    if not len(batch):
        raise MapetError(
            f"{option('images', images.root)}: no image that was looked at is readable: `mapet check` lists reasons"
        )
    return batch, (time.perf_counter() - started) / NUM_TIMED


def time_training(
    config: PretrainConfig, image_size: tuple[int, int], patch_size: int, channels: int, compute: ComputeContext
) -> float:
    """Return the seconds per image of a training step with these options, on random pixels; of its paths none is read."""
    model = build_model_for(config, image_size, patch_size, channels, vocab_size=512, feature_size=512)
    model = prepare_for_device(model, compute)
    num_patches, seconds = model.num_patches, 0.0
    for count in TIMED_BATCHES:
        pixels = torch.randint(256, (count, channels, *image_size), dtype=torch.uint8)
        shape = (count, num_patches) if model.target == "tokens" else (count, num_patches, model.head.out_features)
        targets = torch.zeros(shape, dtype=torch.int64 if model.target == "tokens" else torch.float32)
        permutation = torch.stack([torch.randperm(num_patches) for _ in range(count)])
        batch = Batch(torch.arange(count), normalize(pixels, channels), targets=targets, permutation=permutation).to(
            compute.device
        )
        indices = model.sample_target_indices(model.num_context, seed=[0])
        batch = replace(
            batch, num_context=model.num_context, target_indices=None if indices is None else compute.to(indices)
        )
        step = ForwardBackward(model, compute, auto_micro_batch(model, count, compute))
        seconds = _time(lambda: step(batch)) / count  # noqa: B023, called at once
        if seconds * count > MAX_STEP_SECONDS:
            break
    return seconds


def _time_controls(candidate: Candidate, channels: int, compute: ComputeContext) -> float:
    """Return the seconds per image of HOG and k-means patch features."""
    pixels = torch.rand(NUM_TIMED_CONTROLS, channels, *candidate.image_size, device=compute.device)
    hog, seconds = HOGFeatures(), 0.0
    with torch.inference_mode():
        if min(candidate.image_size) >= 3:
            kmeans = KMeansPatches([pixels], patches_per_image=100)
            seconds = _time(lambda: kmeans(pixels))
        return (seconds + _time(lambda: hog(pixels))) / NUM_TIMED_CONTROLS


def _time_probe(num_classes: int) -> float:
    """Return the seconds of a linear probe for each training image and dimension (plus `PROBE_OFFSET`); 0 without classes."""
    if not num_classes:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_PROBED, PROBED_DIM, generator=generator)
    classes = min(num_classes, NUM_PROBED // 20)  # of at least so many images that C is chosen by cross-validation
    labels = torch.arange(NUM_PROBED) % classes
    started = time.perf_counter()
    fit_logistic(features, labels, classes)
    seconds = time.perf_counter() - started
    return seconds / (NUM_PROBED * (PROBE_OFFSET + PROBED_DIM)) * max(1.0, num_classes / classes)


def _measure_flops(compute: ComputeContext) -> float:
    """Return the operations per second of a matrix product of `MATMUL_SIZE` cubed, a multiplication with its addition counted as two."""
    matrix = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=compute.device, dtype=compute.dtype)
    return 2 * MATMUL_SIZE**3 / _time(lambda: float((matrix @ matrix)[0, 0]))
