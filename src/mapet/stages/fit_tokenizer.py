"""Stage: frozen teacher features -> k-means codebook."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mapet.errors import MapetError
from mapet.recipe import Size, stage
from mapet.stages.options import BadImages, Loading, Precision

if TYPE_CHECKING:
    from mapet.tokenizer.codebook import Tokenizer

log = logging.getLogger("mapet")


class FitTokenizerConfig(Loading, BadImages):
    """Options of `fit-tokenizer`."""

    images: Path
    """Folder of images, or text file of paths."""
    out: Path
    """New folder for the tokenizer."""
    teacher: str = "pixels"
    """Frozen encoder: 'pixels' (raw patches, label-free), a timm model (the paper's: resnet50x64_clip.openai), or
    package.module:function."""
    teacher_checkpoint: str | None = None
    """Local weights file of the teacher; otherwise timm downloads them."""
    teacher_size: Size | None = None
    """Height and width the teacher sees, pixels; automatic: the model's own."""
    layer: int = -1
    """Which of the timm model's intermediate feature maps; -1 is the last."""
    image_size: Size = (224, 224)
    """Height and width of the student's input, pixels."""
    patch_size: PositiveInt = 16
    """Side of the student's patches, pixels."""
    channels: PositiveInt = 3
    """Channels of the images: 1 grey, 3 RGB, others from .npy arrays."""
    vocab_size: PositiveInt | None = None
    """K, number of visual words; automatic: a power of two up to the paper's 8192, at least 64 patches for each."""
    iterations: PositiveInt = 20
    """Rounds of k-means."""
    restarts: PositiveInt = 1
    """Runs of k-means, of which the best is kept (the paper: 5)."""
    start: Literal["random", "k-means++"] = "random"
    """First centroids: random patches, or patches that k-means++ spreads, which costs about 1/32 of a round."""
    batch_points: PositiveInt | None = None
    """Patches that a round of k-means visits (mini-batches; the last round visits all); automatic: all."""
    metric: Literal["l2", "cosine"] = "l2"
    """What nearest means: by distance, or by angle (spherical k-means)."""
    points_per_word: PositiveInt = 512
    """Most patches for each visual word used in fitting."""
    seed: NonNegativeInt = 0
    """Seed of the sample of patches and of k-means."""
    precision: Precision = "auto"
    """Of the teacher's and k-means' matrix products; auto takes bfloat16 where it is fast. The teacher keeps it for good."""
    memory: PositiveFloat | None = None
    """GB of memory (the device's) for features; more than that go to a scratch file, with the same result; automatic: half
    of what is free."""
    scratch: Path | None = None
    """Folder for the scratch file, which goes away by itself; automatic: beside `out`."""
    resume: bool = False
    """Go on with k-means where it was interrupted; features are computed again, and checked to be the same."""

    @model_validator(mode="after")
    def _divisible(self) -> "FitTokenizerConfig":
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(
                f"image size {self.image_size[0]} x {self.image_size[1]} is not divisible by the patch size {self.patch_size}"
            )
        return self


@stage
def fit_tokenizer(config: FitTokenizerConfig) -> "Tokenizer":
    """Cluster a frozen teacher's patch features into a codebook of visual words.

    Example:
      mapet fit-tokenizer --images PHOTOS --out runs/tokenizer
      mapet fit-tokenizer --images PHOTOS --out runs/kclip --teacher resnet50x64_clip.openai --restarts 5
    """
    import numpy as np
    from tqdm import tqdm

    from mapet.compute import Compute
    from mapet.data.dataset import Quarantine, ViewDataset
    from mapet.data.image_list import scan
    from mapet.data.views import ViewSpec
    from mapet.files import new_folder
    from mapet.tokenizer.codebook import Health, Tokenizer, describe, save_tokenizer
    from mapet.tokenizer.extract import sample_features
    from mapet.tokenizer.feature_store import FeatureStore
    from mapet.tokenizer.kmeans import automatic_vocab_size, kmeans
    from mapet.tokenizer.teacher import make_teacher
    from mapet.training.sizing import free_memory

    new_folder(config.out, create=False)
    checkpoint = config.out.with_name(f"{config.out.name}.kmeans.safetensors")
    if checkpoint.exists() and not config.resume:
        raise MapetError(f"{checkpoint} holds an interrupted fit: go on with --resume, or delete it to begin again")
    compute = Compute.choose(config.device, config.precision)
    images = scan(config.images)
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
    ).to(compute.device)
    num_patches = len(images) * teacher.grid[0] * teacher.grid[1]
    vocab_size = config.vocab_size or automatic_vocab_size(num_patches)
    log.info(
        "%s images, %s patches, teacher %s at %s px in %s, K = %d",
        f"{len(images):,}",
        f"{num_patches:,}",
        teacher.name,
        teacher.image_size,
        compute.precision,
        vocab_size,
    )

    order = np.random.default_rng(config.seed).permutation(len(images)).tolist()
    dataset = ViewDataset(images, ViewSpec(image_size=size), config.channels, teacher_size=teacher.image_size)
    quarantine = Quarantine(images, config.max_bad)
    capacity = min(config.points_per_word * vocab_size, num_patches)
    memory = int(config.memory * 1e9) if config.memory else free_memory(compute.device) // 2
    with FeatureStore(capacity, memory, config.scratch or config.out.parent, compute.device) as points:
        sample_features(
            teacher, dataset, order, points, quarantine, compute, config.batch_size, config.num_workers
        )  # fmt: skip
        with tqdm(total=config.restarts * config.iterations, desc="k-means", unit="round", disable=None) as bar:
            centroids, counts, error, variance = kmeans(
                points, vocab_size, config.iterations, config.restarts, config.seed, compute.dtype,
                lambda distance: bar.set_postfix(error=f"{distance:.4g}", refresh=False) or bar.update(),
                start=config.start, batch_points=config.batch_points, metric=config.metric, checkpoint=checkpoint,
            )  # fmt: skip
    health = Health.measure(counts, error, variance)
    kept = {"vocab_size", "iterations", "restarts", "points_per_word", "seed", "start", "batch_points", "metric"}
    fitting = config.model_dump(mode="json", include=kept)
    fitting |= {
        "images_hash": images.hash,
        "num_images": len(images),
        "patches": len(points),
        "mean_squared_distance": error,
    }
    tokenizer = Tokenizer(teacher, centroids, describe(teacher, centroids, health, fitting))
    save_tokenizer(tokenizer, counts, config.out)
    checkpoint.unlink(missing_ok=True)
    log.info("codebook: %s", health)
    log.info("saved %s", config.out)
    return tokenizer
