"""Options of `train-tokenizer`, `fit-tokenizer`, `tokenize` and `inspect-tokenizer`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mapet.config import shared
from mapet.config.base import Config
from mapet.config.limits import LimitOptions
from mapet.errors import check_divisible, option

KMEANS_OPTIONS = ("pca_dim", "kmeans_iters", "kmeans_n_init", "kmeans_init", "kmeans_batch_size", "kmeans_metric")
QUANTIZER_OPTIONS = {"fsq_levels": "fsq", **dict.fromkeys(KMEANS_OPTIONS, "kmeans")}
"""Option -> the quantizer that uses it."""
TEACHER_PRESETS: dict[str, dict[str, Any]] = {
    "k-clip": {
        "teacher": "resnet50x64_clip.openai", "teacher_image_size": (448, 448), "teacher_layer": -1, "teacher_output": "block",
    },
    "vqkd-clip": {
        "teacher": "vit_base_patch16_clip_quickgelu_224.openai", "teacher_image_size": (224, 224), "teacher_layer": -1,
        "teacher_output": "projection",
    },
}  # fmt: skip
"""Name of a published teacher -> the options that make it.

k-clip: the teacher of arXiv 2306.07346, CLIP's RN50x64: the 14 x 14 x 4096 map of its last stage before the attention pool, not normalized.
vqkd-clip: the teacher of BEiT v2's VQ-KD (arXiv 2208.06366; `get_regress_target` of its modeling_vqkd.py), OpenAI's CLIP ViT-B/16 with
QuickGELU: the 14 x 14 patch tokens after the final norm and CLIP's visual projection, 512 channels.
"""


LABEL_FREE_TEACHERS = ("pixels", "hog", "whitened")
"""Teachers that have learned nothing from labels or other images: nothing at all, or a whitening of the images that they are used for."""


class HOGOptions(Config):
    """The histograms of oriented gradients of the teacher 'hog'."""

    file_only: ClassVar[frozenset[str]] = frozenset({"window", "cells", "bins", "color"})
    window: PositiveInt | None = None
    """Side of the square around each patch whose gradients count, pixels; auto: `cells` times the side of a patch."""
    cells: PositiveInt = 3
    """Rows and columns of cells in a window, which have a histogram each."""
    bins: PositiveInt = 9
    """Orientations of a histogram."""
    color: NonNegativeFloat = 0.25
    """Weight of the patch's mean color, from 0 to 1 in each channel, beside the histograms of a window, whose squares sum to 1; 0: without
    color."""

    def problems(self) -> Iterator[str]:
        """Yield a message if windows cannot be divided into cells of whole pixels; `Config` makes it an error."""
        if (self.window or 0) % self.cells:
            yield f"{option('window')}: must be a multiple of {option('cells')} {self.cells}, got {self.window}"


class WhitenedOptions(Config):
    """The whitened windows of the teacher 'whitened'."""

    file_only: ClassVar[frozenset[str]] = frozenset({"window"})
    window: PositiveInt | None = None
    """Side of the square around each patch whose pixels count; auto: twice the side of a patch."""


Teachers = Annotated[tuple[str, ...], Field(min_length=1)]
"""Names of teachers whose features are joined; one text is one name."""


class TeacherOptions(shared.InputOptions):
    """The frozen encoder whose features become visual tokens, and the patches that it computes them for."""

    teacher: Teachers = ("pixels",)
    """Frozen encoder: pixels, hog, whitened, k-clip (the paper's), vqkd-clip (BEiT v2's), a timm model, the folder of a run, or
    package.module:function; several: their features side by side."""
    hog: HOGOptions = HOGOptions()
    whitened: WhitenedOptions = WhitenedOptions()
    teacher_checkpoint: str | None = None
    """Local weights file of the teacher; none: timm downloads the weights."""
    teacher_image_size: shared.Size | None = None
    """Height and width of the teacher's input, pixels; auto: the model's own."""
    teacher_output: Literal["block", "norm", "projection"] = "block"
    """Where the timm model's features are taken: block (the feature map as it is), norm (after the model's final norm) or projection (after
    final norm and head, of CLIP its visual projection)."""
    teacher_layer: int = -1
    """Index of the intermediate feature map of the timm model or run; -1: the last."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        """Return the options with the name of a preset in `teacher` (`TEACHER_PRESETS`) replaced by the preset's options, before validation.

        Args:
            values: field name -> value as given. Options given beside `teacher` win over the preset's. Anything but a mapping,
                and options whose `teacher` has no preset, are returned unchanged.
        """
        names: Any = values.get("teacher") if isinstance(values, Mapping) else None
        names = [names] if isinstance(names, str) else names
        for name in names if isinstance(names, (list, tuple)) else ():
            if preset := TEACHER_PRESETS.get(str(name)):
                teachers = [preset["teacher"] if other == name else other for other in names]
                values = {**preset, **values, "teacher": teachers}
        return values


class FitTokenizerOptions(TeacherOptions):
    """Options of `fit-tokenizer` but for images, output folder and device; `run` has them as a section, `study` one set per tokenizer."""

    file_only: ClassVar[frozenset[str]] = frozenset(
        {"kmeans_init", "kmeans_n_init", "kmeans_batch_size", "kmeans_metric"}
    )
    teacher: Teachers = ("pixels",)
    """Frozen encoder: pixels (raw patches), hog (histograms of oriented gradients) or whitened (whitened patches), which are label-free;
    k-clip (the paper's: resnet50x64_clip.openai at 448 px), any timm model, vqkd (codes of `train-tokenizer` or of BEiT v2), the folder of a
    run (its backbone), or package.module:function. Several, as in hog whitened: their features side by side, each scaled to variance 1."""
    vocab_size: shared.VocabSize | None = None
    """V, number of visual tokens; auto: a power of two up to the paper's 8192, with at least 64 patches for each."""
    quantizer: Literal["kmeans", "fsq", "lfq"] = "kmeans"
    """Mapping from features to tokens: kmeans; or, without a codebook to fit, principal components rounded to levels (fsq) or to their
    signs (lfq). A teacher with a built-in codebook (vqkd, dalle) keeps it."""
    pca_dim: PositiveInt | None = None
    """Principal components that k-means clusters instead of the features; auto: no PCA (fsq and lfq take one component per level)."""
    fsq_levels: list[PositiveInt] | None = None
    """Levels of each component, for fsq; auto: those that the FSQ paper recommends for `vocab_size`."""
    kmeans_iters: PositiveInt = 20
    """Iterations of k-means."""
    kmeans_n_init: PositiveInt = 1
    """Runs of k-means, of which the best is kept (the paper: 5)."""
    kmeans_init: Literal["random", "k-means++"] = "random"
    """Initial centroids: random patches, or those of k-means++, which costs about 1/32 of an iteration."""
    kmeans_batch_size: PositiveInt | None = None
    """Patches per iteration of k-means (mini-batches; the last iteration takes all); auto: all."""
    kmeans_metric: Literal["l2", "cosine"] = "l2"
    """Distance of k-means: l2, or cosine (spherical k-means)."""
    patches_per_code: PositiveInt = 512
    """Largest number of patches per code used in fitting."""
    precision: shared.Precision = "auto"
    """Matmul precision of the teacher and k-means; auto: the faster one in a timing. The tokenizer's teacher keeps it."""
    memory_gb: PositiveFloat | None = None
    """GB of memory (the device's) for features; more than that go to a scratch file beside `out`, with the same result; auto: half of what
    is free."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each option that was changed from its default but that the chosen quantizer does not use.

        Such an option would be recorded with the tokenizer as if it had been used. `Config` calls this after validating each option
        by itself, and makes the first message an error.

        Raises:
            MapetError: `patch_size` does not divide `image_size`.
        """
        check_divisible(self.image_size, self.patch_size)
        for name in shared.non_default_options(self, QUANTIZER_OPTIONS):
            user = QUANTIZER_OPTIONS[name]
            if user != self.quantizer:
                yield f"{option(name)} is for {user}; {self.quantizer} does not use it: omit it or give {option('quantizer', user)}"


class FitTokenizerConfig(FitTokenizerOptions, shared.ImageOptions, shared.JobOptions):
    """Options of `fit-tokenizer`."""

    out: Path
    """New folder for the tokenizer."""


class TokenizeOptions(shared.ViewOptions):
    """Options of `tokenize` that a larger config has as a section."""

    num_views: PositiveInt | None = None
    """Views stored per image; auto: 1 for center, 2 for center-flip, 8 for random-crop."""


class TokenizeConfig(TokenizeOptions, shared.TrustTeacherOptions, shared.ImageOptions, shared.JobOptions):
    """Options of `tokenize`."""

    tokenizer: Path
    """Folder written by `fit-tokenizer`."""
    out: Path
    """New folder for the token store."""


class TrainTokenizerConfig(
    shared.ImageOptions, TeacherOptions, shared.EncoderOptions, shared.ViewOptions, shared.TrainerConfig
):
    """Options of `train-tokenizer`. Defaults are those of the released BEiT v2 config (arXiv 2208.06366) unless the help says otherwise."""

    file_only: ClassVar[frozenset[str]] = shared.LOOP_OPTIONS | {"codebook_dim", "dead_code_threshold"}
    out: Path
    """New run folder; the tokenizer is OUT/vqkd/vqkd.safetensors."""
    teacher: Teachers = ("pixels",)
    """Frozen encoder whose features the codes are trained to reconstruct: pixels, hog or whitened (label-free), vqkd-clip (the released one:
    CLIP ViT-B/16's patch tokens after its visual projection), a timm model, or package.module:function."""

    model: str = "vit_tiny_patch16_224"
    """Encoder of the tokenizer, a plain timm ViT with head dimension 64; the released one is vit_base_patch16_224."""
    decoder_depth: PositiveInt = 3
    """Blocks of the decoder, which is as wide as the encoder and is not needed after training."""
    vocab_size: shared.VocabSize | None = None
    """V, number of codes; auto: a power of two up to the paper's 8192, with at least 64 patches for each."""
    codebook_dim: PositiveInt = 32
    """Codebook embedding dimension."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the codes' moving averages, per step."""
    dead_code_threshold: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the mean number of patches per code below which a code is re-initialized from a random patch feature; 0: never, as
    released."""

    batch_size: PositiveInt = 64
    """Images per step, over all ranks (released: 512)."""
    lr: PositiveFloat | None = None
    """Peak learning rate; auto: 2e-4 * sqrt(batch / 512)."""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW weight decay."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Maximum drop-path rate of the encoder (increases linearly with depth)."""
    views: Literal["center", "center-flip", "random-crop"] = "random-crop"
    """Views of an image: center (largest centered crop), center-flip (that and its mirror image) or random-crop (random crops, half of them
    mirrored)."""
    min_crop_scale: float = Field(default=0.08, gt=0, le=1)
    """Smallest area of a random crop, as a fraction of the image's area; 1 is the largest. For `views` random-crop only."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each invalid option, also if `image_size` is not square or `patch_size` does not divide it."""
        yield from super().problems()
        height, width = self.image_size
        if height != width or height % self.patch_size:
            hint = f"change {option('image_size')} or {option('patch_size')}"
            yield f"image size {height} x {width}: a VQ-KD tokenizer takes squares that the patch size {self.patch_size} divides; {hint}"


class InspectTokenizerConfig(LimitOptions, shared.TrustTeacherOptions):
    """Options of `inspect-tokenizer`."""

    positional: ClassVar[str | None] = "tokenizer"
    tokenizer: Path
    """Folder written by `fit-tokenizer`."""
    images: shared.Source
    """Folder of images, text file of paths, .tar shards or hf:NAME. With labels (CLASS/image.jpg) tokens are compared with the classes
    too."""
    out: Path
    """New folder for tokenizer_report.md, tokenizer_metrics.json and the figures."""
    tokens: Path | None = None
    """Token store written by `tokenize` from these images, to compare with what the tokenizer computes now."""
    sample: PositiveInt = 1000
    """Images to measure, drawn at random."""
