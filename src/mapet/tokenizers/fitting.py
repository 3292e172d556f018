"""Fit a tokenizer: a teacher and a quantizer of its features, by k-means, FSQ or LFQ, on a sample of the images."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mapet import distributed
from mapet.config.shared import non_default_options
from mapet.config.tokenizers import QUANTIZER_OPTIONS, FitTokenizerConfig, TrainTokenizerConfig
from mapet.data.dataset import (
    Batch,
    UnreadableImages,
    ViewDataset,
    inference_batch_size,
    readable_batches,
)
from mapet.data.dataset_stats import find_value_range, warn_from_sample, warn_outside_range
from mapet.data.image_list import ImageList
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec
from mapet.device import ComputeContext, free_memory
from mapet.errors import MapetError, format_size, option, pluralize
from mapet.files import KMEANS_STATE, check_same_options, create_output_dir
from mapet.tokenizers.feature_store import FeatureStore, points_per_block
from mapet.tokenizers.kmeans import KMeans, default_vocab_size
from mapet.tokenizers.quantizers import FitResult, Quantizer, levels_for, principal_components, project
from mapet.tokenizers.tokenizer import (
    DESCRIPTION,
    SETTINGS,
    Teacher,
    Tokenizer,
    load_tokenizer,
    make_teacher,
    save_tokenizer,
)

log = logging.getLogger("mapet")
RECORDED_OPTIONS = {"vocab_size", "quantizer", "patches_per_code", "seed", *QUANTIZER_OPTIONS}
"""Options that are stored with the tokenizer."""
NUM_FIT_IMAGES = 2_000
"""A teacher that learns from images is fitted to at most so many."""


def fit_tokenizer(config: FitTokenizerConfig) -> Tokenizer:
    """Fit a quantizer to patch features of a sample of the images, and save the tokenizer in `config.out`.

    All ranks of a process group call it; each computes the features of its part of the sample, rank 0 saves.

    The folder appears at the end, complete. Until then only k-means saves its state, in the file OUT/.kmeans.safetensors, which the
    tokenizer's folder replaces. With `config.resume` and the same options, a fit that was stopped computes the features again and resumes at
    the last saved round of k-means; a fit stopped before that restarts, and one that had finished is returned.

    Args:
        config: options of `mapet fit-tokenizer`.

    Returns:
        The tokenizer, with its teacher, on the device of `config`.

    Raises:
        Interrupted: Ctrl-C during k-means, after its state was saved. Ctrl-C before that raises KeyboardInterrupt and nothing is kept.
        MapetError: options that contradict each other or the teacher; `config.out` is not empty; the state of an earlier fit exists
            without `config.resume`, is damaged, or is of other options; too many unreadable images; fewer patches than codes or fewer
            images than ranks; the teacher's weights cannot be read or downloaded; or its features do not fit memory and disk.
    """
    if config.resume and (config.out / DESCRIPTION).exists():
        return _load_finished(config)
    create_output_dir(config.out, create=False)
    checkpoint = config.out / KMEANS_STATE
    if checkpoint.exists() and not config.resume:
        raise MapetError(f"{checkpoint} holds an interrupted fit: give {option('resume', True)} or delete the file")
    distributed.barrier()  # every rank has checked before one writes
    compute = ComputeContext.from_options(config.device, config.precision)
    images = find_value_range(list_images(config.images, config), config.channels)
    if distributed.rank() == 0:
        warn_outside_range(images, config.channels)
        warn_from_sample(images, config.channels, config.image_size)
    unreadable = UnreadableImages(images, config.max_unreadable)
    teacher = make_teacher(config, compute.precision).to(compute.device)
    fit_teacher(config, teacher, images, unreadable, compute)
    num_patches = len(images) * math.prod(teacher.grid)
    vocab_size, levels = _choose_codes(config, teacher, num_patches)
    log.info(
        "%s images, %s patches, teacher %s at %s px in %s, V = %s",
        f"{len(images):,}", f"{num_patches:,}", teacher.name, format_size(teacher.image_size), compute.precision, f"{vocab_size:,}",
    )  # fmt: skip
    indices, max_patches = _local_sample(config, teacher, len(images), vocab_size)
    batches = _read_batches(config, teacher, images, indices, unreadable, "teacher features")
    features = (teacher.batch_features(batch, images, compute).permute(0, 2, 3, 1).flatten(0, 2) for batch in batches)
    if teacher.builtin_quantizer is not None:  # nothing is fitted: only the usage of its codes is counted
        fit_config = {}
        result = count_tokens(teacher.builtin_quantizer, features)
    else:
        fit_config = config.model_dump(mode="json", include=RECORDED_OPTIONS)
        # By default half of the free memory; a CPU's is divided among the ranks, a GPU belongs to one rank.
        divisor = 2 if compute.device.type == "cuda" else 2 * distributed.world_size()
        memory = int(config.memory_gb * 1e9) if config.memory_gb else free_memory(compute.device) // divisor
        hint = f", more {option('memory_gb')} or fewer {option('patches_per_code')}"
        with FeatureStore(max_patches, memory, config.out.parent, compute.device, hint) as points:
            for rows in features:
                points.append(rows)
            result = fit_fsq(points, levels) if levels else fit_kmeans(points, vocab_size, config, compute, checkpoint)
    fit_config |= {"num_images": len(images), "num_patches": int(result.usage.sum())}
    fit_config |= {"images_hash": images.hash, "mean_squared_distance": result.error}
    tokenizer = save_tokenizer(config.out, teacher, result, fit_config, images.read_options)
    _warn_if_interpolated(teacher)
    log.info("saved %s", config.out)
    return tokenizer


def _load_finished(config: FitTokenizerConfig) -> Tokenizer:
    """Load the tokenizer that an earlier call with `config.out` has finished.

    Raises:
        MapetError: it was fitted with other images or options, or is damaged.
    """
    tokenizer = load_tokenizer(config.out)
    recorded = tokenizer.description["teacher"] | tokenizer.description["fit_config"]
    values = config.model_dump(mode="json")
    current = {key: values[name] for key, name in SETTINGS.items()} | {name: values[name] for name in RECORDED_OPTIONS}
    current |= {"images_hash": list_images(config.images).hash}
    # as `make_teacher` records it
    current["teacher"] = config.teacher[0] if len(config.teacher) == 1 else [*config.teacher]
    current = {key: value for key, value in current.items() if key in recorded and value is not None}
    check_same_options(config.out, {key: recorded[key] for key in current}, current)
    log.info("%s is finished", config.out)
    return tokenizer


def fit_kmeans(
    points: FeatureStore, vocab_size: int, config: FitTokenizerConfig, compute: ComputeContext, checkpoint: Path
) -> FitResult:
    """Fit k-means centroids to the features, or to their first `config.pca_dim` principal components.

    All ranks of a process group call it, and all return the same.

    Args:
        points: this rank's features, already limited to `config.patches_per_code` patches per code over all ranks.
        vocab_size: K, number of centroids.
        config: its kmeans_* options, `seed` and `pca_dim` are used; `pca_dim` None: no projection.
        compute: its `dtype` is that of the matrix products, float32 or bfloat16.
        checkpoint: file that k-means saves its state to, every minute and on Ctrl-C. If it exists, k-means resumes from it: the caller has
            checked that `config.resume` allows this. It is not deleted here.

    Returns:
        The quantizer (nearest centroid, behind the projection if there is one), the number of patches of each centroid, and the mean
        squared distance to the nearest centroid, in the projected space. Divided by the mean squared distance to the mean of all
        points it is the relative error; 0 where all points are equal.

    Raises:
        Interrupted: Ctrl-C, after the state was saved in `checkpoint`.
        KeyboardInterrupt: Ctrl-C before the first round ended; nothing is saved.
        MapetError: more codes than patches, `config.pca_dim` exceeds the features' width, or `checkpoint` is damaged or of other
            options, features or number of ranks.
    """
    kmeans = KMeans(
        vocab_size, config.kmeans_iters, config.kmeans_n_init, config.seed, compute.dtype, config.kmeans_init, config.kmeans_batch_size,
        config.kmeans_metric,
    )  # fmt: skip
    projection = {}
    # Without a projection this store stays empty, which takes no memory.
    with FeatureStore(len(points), points.memory_limit, points.scratch_dir, points.device, points.hint) as projected:
        if config.pca_dim:
            projection = principal_components(points, config.pca_dim, whiten=False)
            for _, block in points.blocks(points_per_block(points.device)):
                projected.append(project(block, **projection))
            points = projected
        centroids, usage, error, variance = kmeans.fit(points, checkpoint)
    quantizer = Quantizer({"kind": "nearest", "metric": config.kmeans_metric}, {"centroids": centroids, **projection})
    return FitResult(quantizer, usage, error, error / variance if variance > 0 else 0.0)


def fit_fsq(points: FeatureStore, levels: Sequence[int]) -> FitResult:
    """Fit a quantizer that rounds whitened principal components to levels (FSQ; LFQ if all levels are 2).

    All ranks of a process group call it, and all return the same.

    Args:
        points: this rank's features.
        levels: number of levels of each component, the component of largest variance first; V is their product.

    Returns:
        The quantizer and how many patches have each code; the errors are None, as there are no centroids.

    Raises:
        MapetError: more levels than the features' width.
    """
    projection = principal_components(points, len(levels), whiten=True)
    quantizer = Quantizer({"kind": "scalar", "levels": list(levels)}, projection)
    return count_tokens(quantizer, (block for _, block in points.blocks(points_per_block(points.device))))


def count_tokens(quantizer: Quantizer, blocks: Iterable[Float[Tensor, "n F"]]) -> FitResult:
    """Quantize features and count the patches that have each code, over all ranks.

    Args:
        quantizer: already fitted, on the device of `blocks`; returned unchanged in the result.
        blocks: this rank's features; each block is used before the next is requested, so blocks may share memory.

    Returns:
        `quantizer` and the counts (V,), on the CPU; its errors are None.
    """
    usage = torch.zeros(quantizer.vocab_size, dtype=torch.int64)
    for block in blocks:
        usage += torch.bincount(quantizer(block), minlength=len(usage)).cpu()
    return FitResult(quantizer, distributed.all_reduce(usage))


def _choose_codes(config: FitTokenizerConfig, teacher: Teacher, num_patches: int) -> tuple[int, list[int] | None]:
    """Return V, and the levels of FSQ or LFQ (None for k-means or a built-in codebook).

    For FSQ and LFQ, V is the product of the levels. `config.fsq_levels`, or FSQ's table, may make another number of codes than
    `config.vocab_size`: this is logged as a warning.

    Args:
        config: `vocab_size`, `quantizer` and `fsq_levels` are used; with a built-in codebook no option of quantizers may be given.
        num_patches: of all images; the default V depends on it.
        teacher: its built-in codebook, if it has one, gives V.

    Raises:
        MapetError: options for a codebook, but the teacher has one built in; or `vocab_size` is too small for FSQ, or no power of two
            for LFQ.
    """
    if teacher.builtin_quantizer is not None:
        num_codes = teacher.builtin_quantizer.vocab_size
        if unused := non_default_options(config, ("vocab_size", "quantizer", *QUANTIZER_OPTIONS)):
            names = " and ".join(option(name) for name in unused)
            raise MapetError(f"teacher '{teacher.name}' has {num_codes} built-in codes: omit {names}")
        return num_codes, None
    vocab_size = config.vocab_size or default_vocab_size(num_patches)
    if config.quantizer == "kmeans":
        return vocab_size, None
    levels = config.fsq_levels or list(levels_for(vocab_size, signs=config.quantizer == "lfq"))
    if config.vocab_size not in (None, math.prod(levels)):
        log.warning(
            f"%s uses %d codes, not {option('vocab_size')} %d: its levels are %s; to have others, give {option('fsq_levels')}",
            config.quantizer, math.prod(levels), config.vocab_size, " x ".join(map(str, levels)),
        )  # fmt: skip
    return math.prod(levels), levels


def _local_sample(
    config: FitTokenizerConfig, teacher: Teacher, num_images: int, vocab_size: int
) -> tuple[list[int], int]:
    """Choose random images with at most `config.patches_per_code` patches per code in all, and return this rank's part of them.

    Ranks have consecutive parts, so that all patches together are in the order that one process would give them.

    Args:
        config: `patches_per_code` and `seed` are used; every rank draws the same sample from the seed.
        num_images: of the whole list.
        vocab_size: V.

    Returns:
        Indices of this rank's images, in random order, and how many of their patches to use: of the last rank perhaps not all.
        Unreadable images are not known yet, and are not replaced later.

    Raises:
        MapetError: there are more ranks than images in the sample.
    """
    patches_per_image = math.prod(teacher.grid)
    max_patches = min(config.patches_per_code * vocab_size, num_images * patches_per_image)
    sample_size = math.ceil(max_patches / patches_per_image)
    sample = np.random.default_rng(config.seed).permutation(num_images)[:sample_size].tolist()
    rank, world_size = distributed.rank(), distributed.world_size()
    if len(sample) < world_size:
        raise MapetError(
            f"{world_size} processes for a sample of {pluralize(len(sample), 'image')}: start fewer processes or give more images"
        )
    first, last = len(sample) * rank // world_size, len(sample) * (rank + 1) // world_size
    return sample[first:last], min(max_patches, last * patches_per_image) - first * patches_per_image


def fit_teacher(
    config: FitTokenizerConfig | TrainTokenizerConfig, teacher: Teacher, images: ImageList, unreadable: UnreadableImages,
    compute: ComputeContext,
) -> None:  # fmt: skip
    """Fit a new teacher to at most `NUM_FIT_IMAGES` random images; one that learns nothing from images is left as it is.

    All ranks of a process group call it; each reads all these images.

    Args:
        config: `image_size` (of the center crop), `channels` and `seed` are used.
        teacher: on the device of `compute`.
        images: the whole list.
        unreadable: counts the images that can't be read.

    Raises:
        MapetError: too many images are unreadable.
    """
    if not teacher.is_fitted_to_images:
        return
    indices = np.random.default_rng(config.seed).permutation(len(images))[:NUM_FIT_IMAGES].tolist()

    def read() -> Iterator[Tensor]:
        for batch in _read_batches(config, teacher, images, indices, unreadable, f"fitting teacher {teacher.name}"):
            assert batch.teacher_images is not None
            yield compute.to(batch.teacher_images)

    teacher.fit(read, len(indices))


def _read_batches(
    config: FitTokenizerConfig | TrainTokenizerConfig, teacher: Teacher, images: ImageList, indices: list[int],
    unreadable: UnreadableImages, title: str,
) -> Iterator[Batch]:  # fmt: skip
    """Yield batches of the center crops of the images at `indices`, in this order, at the teacher's size.

    Args:
        config: `image_size` (of the center crop) and `channels` are used.
        teacher: gives the size.
        images: the whole list.
        indices: of this rank's images.
        unreadable: counts the images that can't be read; they are excluded, with a warning each.
        title: of the progress bar.

    Raises:
        MapetError: too many images are unreadable.
    """
    dataset = ViewDataset(
        images, ViewSpec(image_size=config.image_size), config.channels, teacher_size=teacher.image_size
    )
    size = inference_batch_size(teacher.image_size)
    positions = [(0, index) for index in indices]  # view 0 of each image
    batches = [positions[start : start + size] for start in range(0, len(positions), size)]
    yield from readable_batches(dataset, batches, unreadable, title)


def _warn_if_interpolated(teacher: Teacher) -> None:
    """Warn if the teacher's feature map is interpolated to the student's grid, and name the view size that would avoid it.

    That size is the student's grid times the teacher's patch size (the view's side divided by the map's), if that is whole pixels.

    Args:
        teacher: if it has not run yet, its `native_grid` is None and nothing is logged.
    """
    if teacher.native_grid is None or teacher.native_grid == teacher.grid:
        return
    sizes, hint = np.multiply(teacher.image_size, teacher.grid) / teacher.native_grid, ""
    if (sizes % 1 == 0).all():
        hint = f": {option('teacher_image_size', *map(int, sizes))} would avoid it, if the teacher takes that size"
    grids = format_size(teacher.native_grid), format_size(teacher.grid)
    log.warning("the teacher's grid of %s is interpolated to the student's %s%s", *grids, hint)
