"""Options of `fit-tokenizer`."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mapet.config.shared import BadImages, Device, FrozenTeacher, Loading, Precision, VocabSize, refuse_unused
from mapet.config.types import Size, Source
from mapet.errors import must_be_divisible

QUANTIZER_OPTIONS = {
    "fsq_levels": ("fsq",),
    "pca_dim": ("kmeans",),
    "kmeans_iters": ("kmeans",),
    "kmeans_n_init": ("kmeans",),
    "kmeans_init": ("kmeans",),
    "kmeans_batch_size": ("kmeans",),
    "kmeans_metric": ("kmeans",),
}
"""Option -> which quantizers use it."""


class FitTokenizerOptions(FrozenTeacher, Loading):
    """Options of `fit-tokenizer` that say how to fit, not on what and where to; a section of `run` and `study`."""

    teacher: str = "pixels"
    """Frozen encoder: 'pixels' (raw patches, label-free), a timm model (the paper's: resnet50x64_clip.openai), vqkd
    (words of `train-tokenizer` or of BEiT v2), or package.module:function."""
    image_size: Size = (224, 224)
    """Height and width of the student's input, pixels."""
    patch_size: PositiveInt = 16
    """Side of the student's patches, pixels."""
    channels: PositiveInt = 3
    """Channels of the images: 1 grey, 3 RGB, others from .npy arrays."""
    vocab_size: VocabSize | None = None
    """V, number of visual words; automatic: a power of two up to the paper's 8192, at least 64 patches for each."""
    quantizer: Literal["kmeans", "fsq", "lfq"] = "kmeans"
    """How features become words: k-means; or, with no codebook to fit, principal components rounded to levels (fsq) or to
    their signs (lfq). A teacher that brings its own words (vqkd, dalle) keeps them."""
    pca_dim: PositiveInt | None = None
    """Principal components that k-means sees instead of the features; automatic: none (fsq and lfq take one a level)."""
    fsq_levels: list[PositiveInt] | None = None
    """Levels of each component, for fsq; automatic: those the paper recommends for --vocab-size."""
    kmeans_iters: PositiveInt = 20
    """Rounds of k-means."""
    kmeans_n_init: PositiveInt = 1
    """Runs of k-means, of which the best is kept (the paper: 5)."""
    kmeans_init: Literal["random", "k-means++"] = "random"
    """First centroids: random patches, or patches that k-means++ spreads, which costs about 1/32 of a round."""
    kmeans_batch_size: PositiveInt | None = None
    """Patches that a round of k-means visits (mini-batches; the last round visits all); automatic: all."""
    kmeans_metric: Literal["l2", "cosine"] = "l2"
    """What nearest means: by distance, or by angle (spherical k-means)."""
    patches_per_code: PositiveInt = 512
    """Most patches for each visual word used in fitting."""
    precision: Precision = "auto"
    """Of the teacher's and k-means' matrix products; auto takes bfloat16 where it is fast. The teacher keeps it for good."""
    memory_gb: PositiveFloat | None = None
    """GB of memory (the device's) for features; more than that go to a scratch file, with the same result; automatic: half
    of what is free."""
    scratch_dir: Path | None = None
    """Folder for the scratch file, which goes away by itself; automatic: beside `out`."""

    @model_validator(mode="after")
    def _divisible(self) -> "FitTokenizerOptions":
        must_be_divisible(self.image_size, self.patch_size)
        return self

    @model_validator(mode="after")
    def _options_of_the_quantizer(self) -> "FitTokenizerOptions":
        refuse_unused(self, QUANTIZER_OPTIONS, self.quantizer)
        return self


class FitTokenizerConfig(FitTokenizerOptions, BadImages, Device):
    """Options of `fit-tokenizer`."""

    images: Source
    """Folder of images, text file of paths, .tar shards (also by URL), or hf:NAME[:SPLIT] of Hugging Face's `datasets`."""
    out: Path
    """New folder for the tokenizer."""
    seed: NonNegativeInt = 0
    """Seed of the sample of patches and of k-means."""
    resume: bool = False
    """Go on with k-means where it was interrupted; features are computed again, and checked to be the same."""
