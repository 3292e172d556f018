"""The stages `fit-tokenizer` and `tokenize`: a quantizer fitted to a sample of patch features; the token ids of all images."""

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
from mapet.config.shared import non_default_options
from mapet.config.tokenizers import QUANTIZER_OPTIONS, FitTokenizerConfig, TokenizeConfig
from mapet.data.dataset import UnreadableImages, ViewDataset, create_loader, inference_batch_size, readable_batches
from mapet.data.dataset_stats import warn_of_unused
from mapet.data.image_list import ImageList
from mapet.data.sources import list_images
from mapet.data.token_store import TokenShard, TokenStore
from mapet.data.views import ViewSpec
from mapet.device import ComputeContext, free_memory
from mapet.errors import Interrupted, MapetError, format_size, option, pluralize
from mapet.files import MANIFEST, create_output_dir
from mapet.signals import stop_signals
from mapet.tokenizers.feature_store import FeatureStore, rows_at_once
from mapet.tokenizers.kmeans import KMeans, automatic_vocab_size
from mapet.tokenizers.quantizers import Quantizer, levels_for, principal_components, project
from mapet.tokenizers.tokenizer import Teacher, Tokenizer, load_tokenizer, make_teacher, save_tokenizer

log = logging.getLogger("mapet")
RECORDED = {"vocab_size", "quantizer", "patches_per_code", "seed", *QUANTIZER_OPTIONS}
"""Options that are stored with the tokenizer."""
NUM_VIEWS = {"center": 1, "center-flip": 2, "random-crop": 8}
"""Default number of stored views."""


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
    create_output_dir(config.out, create=False)
    checkpoint = config.out.with_name(f"{config.out.name}.kmeans.safetensors")
    if checkpoint.exists() and not config.resume:
        raise MapetError(
            f"{checkpoint} holds an interrupted fit: go on with {option('resume', True)}, or delete it to begin again"
        )
    distributed.barrier()  # all have looked before one writes
    compute = ComputeContext.from_options(config.device, config.precision)
    images = list_images(config.images)
    if distributed.rank() == 0:
        warn_of_unused(images, config.channels, config.image_size)
    teacher = make_teacher(
        config.teacher, config.image_size, config.patch_size, config.channels, config.teacher_checkpoint, config.teacher_image_size,
        config.teacher_layer, compute.precision, config.teacher_final_norm,
    ).to(compute.device)  # fmt: skip
    num_patches = len(images) * math.prod(teacher.grid)
    vocab_size, levels = _choose_vocabulary(config, teacher, num_patches)
    log.info(
        "%s images, %s patches, teacher %s at %s px in %s, V = %s",
        f"{len(images):,}", f"{num_patches:,}", teacher.name, teacher.image_size, compute.precision, f"{vocab_size:,}",
    )  # fmt: skip
    sample, max_rows = _local_sample(config, teacher, len(images), vocab_size)
    spec = ViewSpec(image_size=config.image_size)
    dataset = ViewDataset(images, spec, config.channels, teacher_size=teacher.image_size)
    unreadable = UnreadableImages(images, config.max_unreadable)
    size = inference_batch_size(teacher.image_size)
    batches = [[(0, index) for index in sample[start : start + size]] for start in range(0, len(sample), size)]
    features = (
        teacher.batch_features(batch, images, compute).permute(0, 2, 3, 1).flatten(0, 2)
        for batch in readable_batches(dataset, batches, unreadable, "teacher features")
    )
    if teacher.builtin_quantizer is not None:
        result = count_tokens(teacher.builtin_quantizer, features)
    else:
        part = 2 if compute.device.type == "cuda" else 2 * distributed.world_size()
        memory = int(config.memory_gb * 1e9) if config.memory_gb else free_memory(compute.device) // part
        with FeatureStore(max_rows, memory, config.out.parent, compute.device) as points:
            for rows in features:
                points.append(rows)
            result = (
                fit_fsq(points, levels) if levels else fit_kmeans(points, vocab_size, config, compute.dtype, checkpoint)
            )
    fit_config = {} if teacher.builtin_quantizer is not None else config.model_dump(mode="json", include=RECORDED)
    fit_config |= {"images_hash": images.hash, "num_images": len(images), "num_patches": int(result.usage.sum())}
    fit_config["mean_squared_distance"] = result.error
    tokenizer = save_tokenizer(config.out, teacher, result.quantizer, result.usage, result.relative_error, fit_config)
    if distributed.rank() == 0:
        checkpoint.unlink(missing_ok=True)
    _warn_if_interpolated(teacher)
    log.info("saved %s", config.out)
    return tokenizer


def fit_kmeans(
    points: FeatureStore, vocab_size: int, config: FitTokenizerConfig, dtype: torch.dtype, checkpoint: Path
) -> FitResult:
    """Fit k-means centroids to the features, or to their first `config.pca_dim` principal components.

    Args:
        dtype, checkpoint: as for `KMeans`.
    """
    projection = principal_components(points, config.pca_dim, whiten=False) if config.pca_dim else {}
    kmeans = KMeans(
        vocab_size, config.kmeans_iters, config.kmeans_n_init, config.seed, dtype, config.kmeans_init, config.kmeans_batch_size,
        config.kmeans_metric,
    )  # fmt: skip
    with FeatureStore(len(points), points.memory, points.scratch, points.device) as projected:
        if projection:
            for _, block in points.blocks(rows_at_once(points.device)):
                projected.append(project(block, **projection))
        centroids, usage, error, variance = kmeans.fit(projected if projection else points, checkpoint)
    quantizer = Quantizer({"kind": "nearest", "metric": config.kmeans_metric}, {"centroids": centroids, **projection})
    return FitResult(quantizer, usage, error, error / variance if variance > 0 else 0.0)


def fit_fsq(points: FeatureStore, levels: Sequence[int]) -> FitResult:
    """Fit whitened principal components, one for each number of levels (FSQ; LFQ where all levels are 2)."""
    projection = principal_components(points, len(levels), whiten=True)
    quantizer = Quantizer({"kind": "scalar", "levels": list(levels)}, projection)
    return count_tokens(quantizer, (block for _, block in points.blocks(rows_at_once(points.device))))


def count_tokens(quantizer: Quantizer, blocks: Iterable[Float[Tensor, "n F"]]) -> FitResult:
    """Count how many patches, of all ranks, have each code of a quantizer."""
    usage = torch.zeros(quantizer.vocab_size, dtype=torch.int64)
    for block in blocks:
        usage += torch.bincount(quantizer(block), minlength=len(usage)).cpu()
    return FitResult(quantizer, distributed.all_reduce(usage))


def _choose_vocabulary(config: FitTokenizerConfig, teacher: Teacher, num_patches: int) -> tuple[int, list[int] | None]:
    """Return V, and the levels of FSQ or LFQ (None for k-means).

    Raises:
        MapetError: options for a codebook, but the teacher has one built in.
    """
    if teacher.builtin_quantizer is not None:
        words = teacher.builtin_quantizer.vocab_size
        if unused := non_default_options(config, ("vocab_size", "quantizer", *QUANTIZER_OPTIONS)):
            flags = " and ".join(option(name) for name in unused)
            raise MapetError(f"teacher '{config.teacher}' brings its own {words} words: leave out {flags}")
        return words, None
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


def _local_sample(config: FitTokenizerConfig, teacher: Teacher, images: int, vocab_size: int) -> tuple[list[int], int]:
    """Return this rank's images of the sample, and how many of their patches to keep.

    Ranks have consecutive parts, so that all points together are in the order that one process would give them.
    """
    patches_per_image = math.prod(teacher.grid)
    max_patches = min(config.patches_per_code * vocab_size, images * patches_per_image)
    order = np.random.default_rng(config.seed).permutation(images).tolist()
    sample = order[: -(-max_patches // patches_per_image)]
    rank, number = distributed.rank(), distributed.world_size()
    if len(sample) < number:
        raise MapetError(f"{number} processes for {len(sample)} images: start fewer")
    first, last = (len(sample) * part // number for part in (rank, rank + 1))
    return sample[first:last], min(max_patches, last * patches_per_image) - first * patches_per_image


def _warn_if_interpolated(teacher: Teacher) -> None:
    """Name the size of the teacher's views that would give the student's grid, if there is one."""
    if teacher.native_grid is None or teacher.native_grid == teacher.grid:
        return
    sides, hint = list(zip(teacher.image_size, teacher.grid, teacher.native_grid, strict=True)), ""
    if not any(side * wanted % given for side, wanted, given in sides):
        size = option("teacher_image_size", *(side * wanted // given for side, wanted, given in sides))
        hint = f": {size} would do without, if the teacher takes it"
    grids = format_size(teacher.native_grid), format_size(teacher.grid)
    log.warning("the teacher's grid of %s is interpolated to the student's %s%s", *grids, hint)


def tokenize(config: TokenizeConfig) -> TokenStore:
    """Write the token ids of every image into `config.out`, a new store or one that was interrupted.

    All ranks of a process group call it; each writes every n-th shard that is unfinished.

    Raises:
        Interrupted: a signal came; what is done is saved.
        MapetError: the store is of other images, another tokenizer or other views; too many images are unreadable.
    """
    compute = ComputeContext.from_options(config.device, "float32")  # the teacher has the precision it was fitted with
    images = list_images(config.images)
    tokenizer = load_tokenizer(config.tokenizer, trusted_teacher=config.trust_teacher).to(compute.device)
    teacher = tokenizer.teacher
    assert teacher is not None
    store = _open_store(config, images, tokenizer)
    dataset = ViewDataset(images, store.view_spec, teacher.settings["channels"], teacher_size=teacher.image_size)
    unreadable = UnreadableImages(images, config.max_unreadable, dict(store.unreadable))
    work = _batches_to_do(store, max(1, inference_batch_size(teacher.image_size) // store.num_views))
    batches = [[(view, row) for row in rows for view in range(store.num_views)] for _, rows in work]
    several = f" (process 1 of {distributed.world_size()})" if distributed.world_size() > 1 else ""
    total, silent = sum(len(rows) for _, rows in work), None if work else True
    with (
        stop_signals("saving after this batch") as stop,
        tqdm(total=total, desc=f"tokenize{several}", unit="img", disable=silent) as bar,
    ):
        for (shard, rows), batch in zip(work, create_loader(dataset, batches), strict=True):
            unreadable.add(batch.unreadable)
            tokens = torch.zeros(len(rows), store.num_views, math.prod(store.grid), dtype=torch.int64)
            if len(batch):  # without the unreadable images, whose ids stay 0
                ids = tokenizer.quantize(teacher.batch_features(batch, images, compute)).flatten(1).cpu()
                for index in batch.image_index.unique():
                    tokens[index - rows.start] = ids[batch.image_index == index]
            shard.write(tokens.numpy(), dict(batch.unreadable))
            bar.update(len(rows))
            if stop.signal_name:
                shard.save_progress()
                raise Interrupted(f"stopped by {stop.signal_name}, saved")
    distributed.barrier()
    store = TokenStore.open(config.out, images, tokenizer.hash)
    UnreadableImages(images, config.max_unreadable).add([*store.unreadable.items()], quiet=True)  # those of all ranks
    log.info(
        "tokens of %s x %s in %s (%d unreadable left out)",
        pluralize(len(images) - len(store.unreadable), "image"), pluralize(store.num_views, "view"), config.out, len(store.unreadable),
    )  # fmt: skip
    return store


def _open_store(config: TokenizeConfig, images: ImageList, tokenizer: Tokenizer) -> TokenStore:
    """Open the store to write to; rank 0 creates it, unless an unfinished one is resumed."""
    size, num_views = tokenizer.student_size, config.num_views or NUM_VIEWS[config.views]
    spec = ViewSpec.from_config(config, size, config.seed)
    if distributed.rank() == 0 and not (config.resume and (config.out / MANIFEST).exists()):
        create_output_dir(config.out)
        TokenStore.create(config.out, images, tokenizer.hash, tokenizer.vocab_size, tokenizer.grid, spec, num_views)
    distributed.barrier()
    store = TokenStore.open(config.out, images, tokenizer.hash, writable=True)
    if (store.view_spec, store.num_views) != (spec, num_views):
        raise MapetError(
            f"{config.out} was begun with {store.num_views} views {store.view_spec.model_dump()}, now asked for {num_views} "
            f"{spec.model_dump()}: use the same options or a new {option('out')}"
        )
    distributed.barrier()  # all have looked before one writes
    return store


def _batches_to_do(store: TokenStore, batch_size: int) -> list[tuple[TokenShard, range]]:
    """Return (shard, rows of the store) of each batch that this rank has to write."""
    shards = [shard for shard in store.shards if not shard.is_done][distributed.rank() :: distributed.world_size()]
    return [
        (shard, range(start, min(start + batch_size, shard.first + shard.count)))
        for shard in shards
        for start in range(shard.first + shard.num_done, shard.first + shard.count, batch_size)
    ]
