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


class TeacherOptions(shared.InputOptions):
    """The frozen encoder whose features become visual tokens, and the patches that it computes them for."""

    teacher: str = "pixels"
    """Frozen encoder: 'pixels', a timm model, or package.module:function."""
    teacher_checkpoint: str | None = None
    """Local weights file of the teacher; otherwise timm downloads them."""
    teacher_image_size: shared.Size | None = None
    """Height and width of the teacher's input, pixels; automatic: the model's own."""
    teacher_final_norm: bool = False
    """Apply the timm model's last normalization to the features as well."""
    teacher_layer: int = -1
    """Index of the timm model's intermediate feature map; -1 is the last."""


class FitTokenizerOptions(TeacherOptions):
    """Options of `fit-tokenizer` that say how to fit, not to which images and where to write; a section of `run` and `study`."""

    teacher: str = "pixels"
    """Frozen encoder: 'pixels' (raw patches, label-free), a timm model (the paper's: resnet50x64_clip.openai), vqkd
    (a tokenizer of `train-tokenizer` or of BEiT v2), or package.module:function."""
    vocab_size: shared.VocabSize | None = None
    """V, number of codes; automatic: a power of two up to the paper's 8192, at least 64 patches for each."""
    quantizer: Literal["kmeans", "fsq", "lfq"] = "kmeans"
    """How features become tokens: the nearest k-means centroid (kmeans); or, without a codebook to fit, principal components rounded to
    levels (fsq) or to their signs (lfq). A teacher with a built-in codebook (vqkd, dalle) keeps it."""
    pca_dim: PositiveInt | None = None
    """Number of principal components that k-means clusters instead of the features; automatic: no projection (fsq and lfq use one per
    level)."""
    fsq_levels: list[PositiveInt] | None = None
    """Number of levels of each component, for fsq; automatic: those the paper recommends for --vocab-size."""
    kmeans_iters: PositiveInt = 20
    """Rounds of k-means."""
    kmeans_n_init: PositiveInt = 1
    """Runs of k-means from different first centroids, of which the best is kept (the paper: 5)."""
    kmeans_init: Literal["random", "k-means++"] = "random"
    """First centroids: random patches, or patches chosen by k-means++, which costs about 1/32 of a round."""
    kmeans_batch_size: PositiveInt | None = None
    """Patches per round of k-means (mini-batch k-means; the last round visits all); automatic: all."""
    kmeans_metric: Literal["l2", "cosine"] = "l2"
    """Distance of patches and centroids: Euclidean (l2), or by angle (cosine, spherical k-means)."""
    patches_per_code: PositiveInt = 512
    """Maximum number of patches per code that the tokenizer is fitted to."""
    precision: shared.Precision = "auto"
    """Precision of the matrix products of teacher and k-means; auto: bfloat16 where the hardware accelerates it. The tokenizer always
    runs its teacher in the precision it was fitted with."""
    memory_gb: PositiveFloat | None = None
    """Memory of the device for features, GB; larger features go to a scratch file beside `out`, with the same result; automatic: half of
    what is free."""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the options: an image size that patches do not fill, or an option of another quantizer.

        An option that is not used would be recorded with the tokenizer as if it had been.
        """
        check_divisible(self.image_size, self.patch_size)
        for name in shared.non_default_options(self, QUANTIZER_OPTIONS):
            user = QUANTIZER_OPTIONS[name]
            if user != self.quantizer:
                yield f"{option(name)} is for {user}; {self.quantizer} does not use it: leave it out or give {option('quantizer', user)}"


class _JobOptions(
    shared.ImageOptions, shared.UnreadableImageOptions, shared.DeviceOptions, shared.ResumeOptions, shared.SeedOptions
):
    """Options that `fit-tokenizer` and `tokenize` share."""


class FitTokenizerConfig(FitTokenizerOptions, _JobOptions):
    """Options of `fit-tokenizer`."""

    out: Path
    """New folder for the tokenizer."""


class TokenizeOptions(shared.ViewOptions):
    """Options of `tokenize` that a larger config has as a section."""

    num_views: PositiveInt | None = None
    """Stored views per image; automatic: 1 for center, 2 for center-flip, 8 for random-crop."""


class TokenizeConfig(TokenizeOptions, shared.TrustTeacherOptions, _JobOptions):
    """Options of `tokenize`."""

    tokenizer: Path
    """Folder made by `fit-tokenizer`."""
    out: Path
    """New folder for the token store."""


class TrainTokenizerConfig(
    shared.ImageOptions, TeacherOptions, shared.EncoderOptions, shared.ViewOptions, shared.TrainerConfig
):
    """Options of `train-tokenizer`. Defaults are those of the released BEiT v2 config (arXiv 2208.06366) unless the help says otherwise."""

    file_only: ClassVar[frozenset[str]] = shared.LOOP_OPTIONS
    out: Path
    """New run folder; the tokenizer is OUT/vqkd/vqkd.safetensors."""
    teacher: str = "pixels"
    """Frozen encoder whose features the codes should preserve: 'pixels' (label-free), a timm model (the paper's:
    vit_base_patch16_clip_224.openai), or package.module:function."""

    model: str = "vit_tiny_patch16_224"
    """The tokenizer's encoder, a plain timm ViT with a head dimension of 64; the released one is vit_base_patch16_224."""
    decoder_depth: PositiveInt = 3
    """Blocks of the decoder, which is as wide as the encoder and is used in training alone."""
    vocab_size: shared.VocabSize | None = None
    """V, number of codes; automatic: a power of two up to the paper's 8192, at least 64 patches for each."""
    codebook_dim: PositiveInt = 32
    """Dimension of a code."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the codes' exponential moving averages, per step."""
    dead_code_threshold: float = Field(default=0.05, ge=0, lt=1)
    """A code that fewer than this fraction of the average number of patches per code have is dead, and becomes the feature of a random
    patch; 0: never, as released."""

    batch_size: PositiveInt = 64
    """Images per step (released: 512)."""
    lr: PositiveFloat | None = None
    """Peak learning rate; automatic: 2e-4 * sqrt(batch / 512)."""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW weight decay."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Maximum drop-path rate of the encoder (increases linearly with depth)."""
    views: Literal["center", "center-flip", "random-crop"] = "random-crop"
    """center: largest centered box; center-flip: that and its mirror image; random-crop: random boxes, mirrored half the time."""
    min_crop_scale: float = Field(default=0.08, gt=0, le=1)
    """Smallest random box, as a fraction of the centered one's area (for random-crop)."""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the image size: it is not square, or the patch size does not divide it."""
        height, width = self.image_size
        if height != width or height % self.patch_size:
            fix = f"change {option('image_size')} or {option('patch_size')}"
            yield f"image size {height} x {width}: a VQ-KD tokenizer takes squares that the patch size {self.patch_size} divides; {fix}"


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
    """Store made by `tokenize` of these images, to be compared with the tokens that the tokenizer computes now."""
    sample: PositiveInt = 1000
    """Number of images that are measured, chosen at random."""
