"""Fitting a tokenizer: a sample of a frozen teacher's patch features -> a quantizer, saved with what made it."""

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from mapet import distributed
from mapet.config.shared import changed
from mapet.config.tokenizers import QUANTIZER_OPTIONS, FitTokenizerConfig
from mapet.data.census import warn_of_unused
from mapet.data.dataset import Quarantine, ViewDataset
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.data.views import ViewSpec
from mapet.device import Compute, free_memory
from mapet.errors import MapetError, by, option
from mapet.files import new_folder
from mapet.tokenizers.codebook import CodebookStats, Tokenizer, describe, save_tokenizer
from mapet.tokenizers.extract import FeatureExtractor
from mapet.tokenizers.feature_store import FeatureStore, rows_at_once
from mapet.tokenizers.kmeans import automatic_vocab_size, kmeans
from mapet.tokenizers.quantizers import Quantizer, levels_for, principal_components, project
from mapet.tokenizers.teacher import Teacher, make_teacher

log = logging.getLogger("mapet")
RECORDED = {
    "vocab_size", "quantizer", "pca_dim", "fsq_levels", "kmeans_iters", "kmeans_n_init", "patches_per_code", "seed",
    "kmeans_init", "kmeans_batch_size", "kmeans_metric",
}  # fmt: skip
"""Options that are stored with the tokenizer."""


class FitResult(NamedTuple):
    """A quantizer and how it does on the patches it was fitted to.

    Attributes:
        usage: number of patches that have each code.
        error: mean squared distance to the nearest centroid; None without centroids.
        relative_error: `error` divided by the mean squared distance to the global mean.
    """

    quantizer: Quantizer
    usage: Int[Tensor, " K"]
    error: float | None = None
    relative_error: float | None = None


def fit_tokenizer(config: FitTokenizerConfig) -> Tokenizer:
    """Fit a codebook to patch features of a sample of the images, and save the tokenizer in `config.out`.

    All ranks of a process group call it; each computes the features of its part of the sample, rank 0 saves.

    Raises:
        MapetError: options that contradict each other, an output folder in use, images or weights that cannot be had.
    """
    checkpoint = _check_output(config)
    compute = Compute.choose(config.device, config.precision)
    images = scan(config.images)
    if distributed.rank() == 0:
        warn_of_unused(images, config.channels, config.image_size)
    teacher = _make_teacher(config, compute)
    num_patches = len(images) * math.prod(teacher.grid)
    vocab_size, levels = _choose_vocabulary(config, teacher, num_patches)
    log.info(
        "%s images, %s patches, teacher %s at %s px in %s, V = %s",
        f"{len(images):,}", f"{num_patches:,}", teacher.name, teacher.image_size, compute.precision, f"{vocab_size:,}",
    )  # fmt: skip
    sample, max_rows = _local_sample(config, len(images), math.prod(teacher.grid), vocab_size)
    dataset = ViewDataset(
        images, ViewSpec(image_size=config.image_size), config.channels, teacher_size=teacher.image_size
    )
    unreadable = Quarantine(images, config.max_unreadable)
    extractor = FeatureExtractor(teacher, dataset, unreadable, compute)
    if teacher.builtin_quantizer is not None:
        result = count_builtin_tokens(teacher.builtin_quantizer, extractor.patch_features(sample, "tokens"))
    else:
        with FeatureStore(max_rows, _memory_limit(config, compute), config.out.parent, compute.device) as points:
            for rows in extractor.patch_features(sample):
                points.append(rows)
            result = (
                fit_fsq(points, levels) if levels else fit_kmeans(points, vocab_size, config, compute.dtype, checkpoint)
            )
    return _save(config, images, teacher, result, checkpoint)


def fit_kmeans(
    points: FeatureStore,
    vocab_size: int,
    config: FitTokenizerConfig,
    dtype: torch.dtype,
    checkpoint: Path | None = None,
) -> FitResult:
    """Fit k-means centroids to the features, or to their first `config.pca_dim` principal components.

    Args:
        dtype, checkpoint: as for `kmeans`.
    """
    projection = principal_components(points, config.pca_dim, whiten=False) if config.pca_dim else {}
    with (
        FeatureStore(len(points), points.memory, points.scratch, points.device) as projected,
        tqdm(total=config.kmeans_n_init * config.kmeans_iters, desc="k-means", unit="round", disable=None) as bar,
    ):

        def show(distance: float) -> None:
            bar.set_postfix(error=f"{distance:.4g}", refresh=False)
            bar.update()

        if projection:
            for _, block in points.blocks(rows_at_once(points.device)):
                projected.append(project(block, **projection))
        centroids, usage, error, variance = kmeans(
            projected if projection else points, vocab_size, config.kmeans_iters, config.kmeans_n_init, config.seed, dtype, show,
            init=config.kmeans_init, batch_size=config.kmeans_batch_size, metric=config.kmeans_metric, checkpoint=checkpoint,
        )  # fmt: skip
    quantizer = Quantizer({"kind": "nearest", "metric": config.kmeans_metric}, {"centroids": centroids, **projection})
    return FitResult(quantizer, usage, error, error / variance if variance > 0 else 0.0)


def fit_fsq(points: FeatureStore, levels: Sequence[int]) -> FitResult:
    """Fit whitened principal components, one for each number of levels (FSQ; LFQ where all levels are 2)."""
    projection = principal_components(points, len(levels), whiten=True)
    quantizer = Quantizer({"kind": "scalar", "levels": list(levels)}, projection).to(points.device)
    return count_builtin_tokens(quantizer, (block for _, block in points.blocks(rows_at_once(points.device))))


def count_builtin_tokens(quantizer: Quantizer, blocks: Iterable[Float[Tensor, "n F"]]) -> FitResult:
    """Count how many patches, of all ranks, have each code of a quantizer that needs no fit."""
    usage = torch.zeros(quantizer.vocab_size, dtype=torch.int64)
    for block in blocks:
        usage += torch.bincount(quantizer(block), minlength=len(usage)).cpu()
    return FitResult(quantizer, distributed.all_reduce(usage))


def _check_output(config: FitTokenizerConfig) -> Path:
    """Check that nothing is overwritten, and return the path of the k-means checkpoint."""
    new_folder(config.out, create=False)
    checkpoint = config.out.with_name(f"{config.out.name}.kmeans.safetensors")
    if checkpoint.exists() and not config.resume:
        raise MapetError(
            f"{checkpoint} holds an interrupted fit: go on with {option('resume', True)}, or delete it to begin again"
        )
    distributed.barrier()  # all have looked before one writes
    return checkpoint


def _make_teacher(config: FitTokenizerConfig, compute: Compute) -> Teacher:
    return make_teacher(
        config.teacher, config.image_size, config.patch_size, config.channels, config.teacher_checkpoint, config.teacher_image_size,
        config.teacher_layer, compute.precision, config.teacher_final_norm,
    ).to(compute.device)  # fmt: skip


def _choose_vocabulary(config: FitTokenizerConfig, teacher: Teacher, num_patches: int) -> tuple[int, list[int] | None]:
    """Return V, and the levels of FSQ or LFQ (None for k-means).

    Raises:
        MapetError: options for a codebook, but the teacher has one built in.
    """
    if teacher.builtin_quantizer is not None:
        if unused := changed(config, ("vocab_size", "quantizer", *QUANTIZER_OPTIONS)):
            flags = " and ".join(option(name) for name in unused)
            raise MapetError(
                f"teacher '{config.teacher}' brings its own {teacher.builtin_quantizer.vocab_size} words: leave out {flags}"
            )
        return teacher.builtin_quantizer.vocab_size, None
    vocab_size = config.vocab_size or automatic_vocab_size(num_patches)
    if config.quantizer == "kmeans":
        return vocab_size, None
    levels = config.fsq_levels or list(levels_for(vocab_size, signs=config.quantizer == "lfq"))
    if config.vocab_size not in (None, math.prod(levels)):
        log.warning(
            f"%s makes %d words, not %d: its levels are %s; {option('fsq_levels')} gives others",
            config.quantizer, math.prod(levels), config.vocab_size, " x ".join(map(str, levels)),
        )  # fmt: skip
    return math.prod(levels), levels


def _local_sample(
    config: FitTokenizerConfig, num_images: int, patches_per_image: int, vocab_size: int
) -> tuple[list[int], int]:
    """Return this rank's images of the sample, and how many of their patches to keep.

    Ranks have consecutive parts, so that all points together are in the order that one process would give them.
    """
    max_patches = min(config.patches_per_code * vocab_size, num_images * patches_per_image)
    order = np.random.default_rng(config.seed).permutation(num_images).tolist()
    sample = order[: -(-max_patches // patches_per_image)]
    rank, number = distributed.rank(), distributed.world_size()
    if len(sample) < number:
        raise MapetError(f"{number} processes for {len(sample)} images: start fewer")
    first, last = (len(sample) * part // number for part in (rank, rank + 1))
    return sample[first:last], min(max_patches, last * patches_per_image) - first * patches_per_image


def _memory_limit(config: FitTokenizerConfig, compute: Compute) -> int:
    """Return the bytes of memory for features: as asked for, or half of this rank's part of what is free."""
    if config.memory_gb:
        return int(config.memory_gb * 1e9)
    return free_memory(compute.device) // (2 if compute.device.type == "cuda" else 2 * distributed.world_size())


def _save(
    config: FitTokenizerConfig, images: ImageList, teacher: Teacher, result: FitResult, checkpoint: Path
) -> Tokenizer:
    """Write the tokenizer (rank 0), remove the k-means checkpoint, and report."""
    stats = CodebookStats.from_counts(result.usage, result.relative_error)
    fit_config = {} if teacher.builtin_quantizer is not None else config.model_dump(mode="json", include=RECORDED)
    fit_config |= {
        "images_hash": images.hash,
        "num_images": len(images),
        "num_patches": stats.num_patches,
        "mean_squared_distance": result.error,
    }
    tokenizer = Tokenizer(teacher, result.quantizer, describe(teacher, result.quantizer, stats, fit_config))
    if distributed.rank() == 0:
        save_tokenizer(tokenizer, result.usage, config.out)
        checkpoint.unlink(missing_ok=True)
    if teacher.native_grid not in (None, teacher.grid):
        log.warning(
            "the teacher's grid of %s is interpolated to the student's %s%s",
            by(teacher.native_grid), by(teacher.grid), _matching_size_hint(teacher),
        )  # fmt: skip
    log.info("codebook: %s", stats)
    log.info("saved %s", config.out)
    return tokenizer


def _matching_size_hint(teacher: Teacher) -> str:
    """Name the size of the teacher's views that would give the student's grid, if there is one."""
    assert teacher.native_grid is not None
    sides = list(zip(teacher.image_size, teacher.grid, teacher.native_grid, strict=True))
    if any(side * wanted % given for side, wanted, given in sides):
        return ""
    height, width = (side * wanted // given for side, wanted, given in sides)
    return f": {option('teacher_image_size')} {height} {width} would do without, if the teacher takes it"
