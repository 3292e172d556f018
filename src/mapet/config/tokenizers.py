"""Options of `train-tokenizer`, `fit-tokenizer`, `tokenize` and `inspect-tokenizer`."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from mapet.config import shared
from mapet.errors import check_divisible, option

KMEANS_OPTIONS = ("pca_dim", "kmeans_iters", "kmeans_n_init", "kmeans_init", "kmeans_batch_size", "kmeans_metric")
QUANTIZER_OPTIONS = {"fsq_levels": "fsq", **dict.fromkeys(KMEANS_OPTIONS, "kmeans")}
"""Option -> the quantizer that uses it."""


class FitTokenizerOptions(shared.TeacherOptions, shared.InputOptions):
    """Options of `fit-tokenizer` that say how to fit, not on what and where to; a section of `run` and `study`."""

    teacher: str = "pixels"
    """Frozen encoder: 'pixels' (raw patches, label-free), a timm model (the paper's: resnet50x64_clip.openai), vqkd
    (words of `train-tokenizer` or of BEiT v2), or package.module:function."""
    vocab_size: shared.VocabSize | None = None
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
    precision: shared.Precision = "auto"
    """Of the teacher's and k-means' matrix products; auto takes bfloat16 where it is fast. The teacher keeps it for good."""
    memory_gb: PositiveFloat | None = None
    """GB of memory (the device's) for features; more than that go to a scratch file beside `out`, with the same result; automatic:
    half of what is free."""

    def problems(self) -> Iterator[str]:
        """Say what contradicts itself or each other."""
        check_divisible(self.image_size, self.patch_size)
        for name in shared.non_default_options(
            self, QUANTIZER_OPTIONS
        ):  # it would be written down as if it had changed something
            if (user := QUANTIZER_OPTIONS[name]) != self.quantizer:
                yield f"{option(name)} is for {user}; {self.quantizer} has no use for it"


class FitTokenizerConfig(
    FitTokenizerOptions,
    shared.ImageOptions,
    shared.UnreadableImageOptions,
    shared.DeviceOptions,
    shared.ResumeOptions,
    shared.SeedOptions,
):
    """Options of `fit-tokenizer`."""

    out: Path
    """New folder for the tokenizer."""


class TokenizeOptions(shared.ViewOptions):
    """Options of `tokenize` that a larger config has as a section."""

    num_views: PositiveInt | None = None
    """Views stored of each image; automatic: 1 for center, 2 for center-flip, 8 for random-crop."""


class TokenizeConfig(
    TokenizeOptions,
    shared.ImageOptions,
    shared.UnreadableImageOptions,
    shared.DeviceOptions,
    shared.TrustTeacherOptions,
    shared.ResumeOptions,
    shared.SeedOptions,
):
    """Options of `tokenize`."""

    tokenizer: Path
    """Folder made by `fit-tokenizer`."""
    out: Path
    """New folder for the token store."""


class TrainTokenizerConfig(
    shared.ImageOptions,
    shared.TeacherOptions,
    shared.InputOptions,
    shared.EncoderOptions,
    shared.ViewOptions,
    shared.TrainerConfig,
):
    """Options of `train-tokenizer`. Defaults are the released recipe's (BEiT v2, arXiv 2208.06366) unless they say
    otherwise."""

    file_only: ClassVar[frozenset[str]] = shared.LOOP_OPTIONS
    out: Path
    """New run folder; the tokenizer is OUT/vqkd/vqkd.safetensors."""
    teacher: str = "pixels"
    """Frozen encoder whose features the codes are to keep: 'pixels' (label-free), a timm model (the paper's:
    vit_base_patch16_clip_224.openai), or package.module:function."""

    model: str = "vit_tiny_patch16_224"
    """The tokenizer's encoder, a plain timm ViT with 64 numbers a head; the released one is vit_base_patch16_224."""
    decoder_depth: PositiveInt = 3
    """Blocks of the decoder, which is as wide as the encoder and not needed afterwards."""
    vocab_size: shared.VocabSize | None = None
    """V, number of codes; automatic: a power of two up to the paper's 8192, at least 64 patches for each."""
    codebook_dim: PositiveInt = 32
    """Numbers of a code."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the codes' moving averages, a step."""
    dead_code_threshold: float = Field(default=0.05, ge=0, lt=1)
    """A code with less than this part of an even share of the patches is moved to where one is; 0 for never, as released."""

    batch_size: PositiveInt = 64
    """Images a step (released: 512)."""
    lr: PositiveFloat | None = None
    """Peak learning rate; automatic: 2e-4 * sqrt(batch / 512)."""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW's."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the encoder's last block."""
    views: Literal["center", "center-flip", "random-crop"] = "random-crop"
    """center: largest centered box; center-flip: that and its mirror image; random-crop: random boxes, mirrored half the time."""
    min_crop_scale: float = Field(default=0.08, gt=0, le=1)
    """Smallest random box, as a share of the centered one's area (for random-crop)."""

    def problems(self) -> Iterator[str]:
        """Say what contradicts itself or each other."""
        height, width = self.image_size
        if height != width or height % self.patch_size:
            yield f"image size {height} x {width}: a VQ-KD tokenizer takes squares that the patch size {self.patch_size} divides"


class InspectTokenizerConfig(shared.TrustTeacherOptions):
    """Options of `inspect-tokenizer`."""

    positional: ClassVar[str | None] = "tokenizer"
    tokenizer: Path
    """Folder made by `fit-tokenizer`."""
    images: shared.Source
    """Folder of images, text file of paths, .tar shards or hf:NAME. With labels (CLASS/image.jpg) tokens are compared with the classes,
    too."""
    out: Path
    """New folder for tokenizer_report.md, tokenizer_metrics.json and the figures."""
    tokens: Path | None = None
    """Store made by `tokenize` of these images, to be compared with what the tokenizer says now."""
    sample: PositiveInt = 1000
    """Images measured, drawn at random."""
