"""Stage: frozen teacher features -> a codebook of visual words."""

import logging
from typing import TYPE_CHECKING

from mapet.commands.command import command
from mapet.config.fit_tokenizer import QUANTIZER_OPTIONS, FitTokenizerConfig
from mapet.config.shared import changed
from mapet.errors import MapetError

if TYPE_CHECKING:
    from mapet.tokenizers.codebook import Tokenizer
    from mapet.tokenizers.teachers import Teacher

log = logging.getLogger("mapet")


@command(FitTokenizerConfig, distributed=True)
def fit_tokenizer(config: FitTokenizerConfig) -> "Tokenizer":
    """Cluster a frozen teacher's patch features into a codebook of visual words.

    Example:
      mapet fit-tokenizer --images PHOTOS --out runs/tokenizer
      mapet fit-tokenizer --images PHOTOS --out runs/kclip --teacher resnet50x64_clip.openai --restarts 5
    """
    import math

    import numpy as np
    from tqdm import tqdm

    from mapet import distributed
    from mapet.data.census import warn_of_unused
    from mapet.data.dataset import Quarantine, ViewDataset
    from mapet.data.sources import scan
    from mapet.data.views import ViewSpec
    from mapet.device import Compute
    from mapet.files import new_folder
    from mapet.tokenizers.codebook import Health, Tokenizer, describe, save_tokenizer
    from mapet.tokenizers.extract import sample_features
    from mapet.tokenizers.feature_store import FeatureStore
    from mapet.tokenizers.fit import fit_kmeans, fit_scalar, use_own
    from mapet.tokenizers.kmeans import automatic_vocab_size
    from mapet.tokenizers.quantizers import levels_for
    from mapet.tokenizers.teachers import make_teacher
    from mapet.training.sizing import free_memory

    new_folder(config.out, create=False)
    checkpoint = config.out.with_name(f"{config.out.name}.kmeans.safetensors")
    if checkpoint.exists() and not config.resume:
        raise MapetError(f"{checkpoint} holds an interrupted fit: go on with --resume, or delete it to begin again")
    distributed.barrier()  # all have looked before one writes
    compute = Compute.choose(config.device, config.precision)
    images = scan(config.images)
    if distributed.rank() == 0:
        warn_of_unused(images, config.channels, config.image_size)
    size = config.image_size
    teacher = make_teacher(
        config.teacher,
        size,
        config.patch_size,
        config.channels,
        config.teacher_checkpoint,
        config.teacher_size,
        config.layer,
        compute.precision,
        config.final_norm,
    ).to(compute.device)
    per_image = teacher.grid[0] * teacher.grid[1]
    num_patches, own, levels = len(images) * per_image, teacher.own_quantizer, config.levels
    vocab_size = config.vocab_size or automatic_vocab_size(num_patches)
    if own is not None:
        if unused := changed(config, ("vocab_size", "quantizer", *QUANTIZER_OPTIONS)):
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise MapetError(f"teacher '{config.teacher}' brings its own {own.vocab_size} words: leave out {flags}")
        vocab_size = own.vocab_size
    elif config.quantizer != "kmeans":
        levels = config.levels or list(levels_for(vocab_size, signs=config.quantizer == "lfq"))
        vocab_size = math.prod(levels)
        if config.vocab_size not in (None, vocab_size):
            log.warning(
                "%s makes %d words, not %d: its levels are %s; --levels gives others",
                config.quantizer, vocab_size, config.vocab_size, " x ".join(map(str, levels)),
            )  # fmt: skip
    log.info(
        "%s images, %s patches, teacher %s at %s px in %s, V = %s",
        f"{len(images):,}",
        f"{num_patches:,}",
        teacher.name,
        teacher.image_size,
        compute.precision,
        f"{vocab_size:,}",
    )

    order = np.random.default_rng(config.seed).permutation(len(images)).tolist()
    capacity = min(config.points_per_word * vocab_size, num_patches)
    sample = order[: -(-capacity // per_image)]
    rank, number = distributed.rank(), distributed.world_size()
    if len(sample) < number:
        raise MapetError(f"{number} processes for {len(sample)} images: start fewer")
    # Each process has a stretch of the sample, so that all points together are numbered as those of one would be.
    first, last = (len(sample) * part // number for part in (rank, rank + 1))
    dataset = ViewDataset(images, ViewSpec(image_size=size), config.channels, teacher_size=teacher.image_size)
    quarantine = Quarantine(images, config.max_bad)
    reading = quarantine, compute, config.batch_size, config.num_workers
    if own is not None:
        fitted = use_own(teacher, own, dataset, sample[first:last], *reading)
    else:
        sharing = 1 if compute.device.type == "cuda" else number
        memory = int(config.memory * 1e9) if config.memory else free_memory(compute.device) // (2 * sharing)
        room = min(capacity, last * per_image) - first * per_image
        with FeatureStore(room, memory, config.scratch or config.out.parent, compute.device) as points:
            sample_features(teacher, dataset, sample[first:last], points, *reading)
            if levels:
                fitted = fit_scalar(points, levels)
            else:
                rounds = config.restarts * config.iterations
                with tqdm(total=rounds, desc="k-means", unit="round", disable=None) as bar:
                    fitted = fit_kmeans(
                        points, vocab_size, config.pca, config.metric,
                        iterations=config.iterations, restarts=config.restarts, seed=config.seed, dtype=compute.dtype,
                        progress=lambda distance: bar.set_postfix(error=f"{distance:.4g}", refresh=False) or bar.update(),
                        start=config.start, batch_points=config.batch_points, checkpoint=checkpoint,
                    )  # fmt: skip
    health = Health.measure(fitted.usage, fitted.relative_error)
    options = {"vocab_size", "quantizer", "pca", "levels", "iterations", "restarts", "points_per_word", "seed"}
    options |= {"start", "batch_points", "metric"}
    fitting = {} if own is not None else config.model_dump(mode="json", include=options)
    fitting |= {
        "images_hash": images.hash,
        "num_images": len(images),
        "patches": health.patches,
        "mean_squared_distance": fitted.error,
    }
    tokenizer = Tokenizer(teacher, fitted.quantizer, describe(teacher, fitted.quantizer, health, fitting))
    if rank == 0:
        save_tokenizer(tokenizer, fitted.usage, config.out)
        checkpoint.unlink(missing_ok=True)
    if teacher.own_grid not in (None, teacher.grid):
        log.warning(
            "the teacher's grid of %d x %d is interpolated to the student's %d x %d%s",
            *teacher.own_grid, *teacher.grid, _size_that_fits(teacher),
        )  # fmt: skip
    log.info("codebook: %s", health)
    log.info("saved %s", config.out)
    return tokenizer


def _size_that_fits(teacher: "Teacher") -> str:
    """Advice on the teacher's views that would give the student's grid, if there are such."""
    assert teacher.own_grid is not None
    sides = list(zip(teacher.image_size, teacher.grid, teacher.own_grid, strict=True))
    if any(side * wanted % given for side, wanted, given in sides):
        return ""
    height, width = (side * wanted // given for side, wanted, given in sides)
    return f": --teacher-size {height} {width} would do without, if the teacher takes it"
