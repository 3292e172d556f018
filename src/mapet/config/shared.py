"""Types of options, and the options that several commands share."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.functional_validators import AfterValidator, BeforeValidator

from mapet.config.base import Config, Options
from mapet.config.limits import LimitOptions
from mapet.errors import MapetError, option


def _as_pair(value: object) -> object:
    """Return [v, v] for a single value, v or [v], and any other list or tuple as a list; pydantic calls it before validation."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values


Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_as_pair)]
"""Height and width, pixels; one number means a square."""
Ratio = Annotated[tuple[float, float], BeforeValidator(_as_pair)]
"""Smallest and largest fraction; one number means both."""
VocabSize = Annotated[int, Field(ge=2)]
"""V, number of visual tokens, at least 2: with one there is nothing to predict."""
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""Random seed, as large as NumPy and scikit-learn take one."""
Precision = Literal["auto", "float32", "bfloat16"]
"""Data type of matrix products; auto: the faster one in a timing (`device.faster_precision`)."""
HF_PREFIX = "hf:"
"""Prefix of sources that are data sets of Hugging Face."""


def is_url(source: str) -> bool:
    """Return whether a source of images is a URL, perhaps with a pattern of several shards, rather than a path."""
    return "://" in source


def _as_source(value: object) -> object:
    """Return a path as normalized text (no doubled or final slashes); URLs, hf:NAME and values of other types unchanged."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    return text if not isinstance(text, str) or text.startswith(HF_PREFIX) or is_url(text) else str(Path(text))


Source = Annotated[str, BeforeValidator(_as_source)]
"""Source of images: a path, a URL (`Path` would drop one of its slashes), or hf:NAME."""
BackboneSource = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A backbone, as `mapet.load` takes it: a path or 'timm:NAME'."""


def _fraction_or_count(amount: float) -> float:
    """Return `amount` if it is below 1 (a fraction) or whole (a count).

    Raises:
        ValueError: it is neither.
    """
    if amount >= 1 and amount != int(amount):
        raise ValueError(f"must be a fraction below 1 or a whole number of images, got {amount:g}")
    return amount


Labels = Annotated[PositiveInt | PositiveFloat, AfterValidator(_fraction_or_count)]
"""Labeled images of each class: a fraction of them if below 1, else their number."""


Pool = Literal["mean", "cls", "2x2", "3x3"]
"""Pooling of a feature map to one vector, see `mapet.models.pooling.pool_tokens`."""
DEFAULT_POOL: Pool = "mean"


class FeatureOptions(Config):
    """Features of an image, for probes and everything else that takes frozen features."""

    pool: Pool = DEFAULT_POOL
    """Pooling of a layer's feature map: mean (of all patches), cls (the class token), 2x2 or 3x3 (means of that many cells, concatenated)."""
    layers: tuple[int, ...] = Field(default=(-1,), min_length=1)
    """Layers whose features are concatenated: a ViT's blocks, another network's stages, from 0; negative ones count from the last, -1."""

    @property
    def features_description(self) -> str:
        """Return both options as text for reports, e.g. 'pool mean, layers -1'."""
        return f"pool {self.pool}, layers {' '.join(map(str, self.layers))}"


def _percentiles_as_empty(value: object) -> object:
    """Return () for 'percentiles', alone or as the only item of a list, and any other value unchanged; pydantic calls it before validation."""
    return () if value in ("percentiles", ["percentiles"]) else value


def _check_ranges(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return values that are pairs of a lower and a higher number, perhaps none; raise ValueError otherwise."""
    if len(values) % 2 or any(low >= high for low, high in zip(values[::2], values[1::2], strict=True)):
        raise ValueError("must be pairs of numbers, the smaller one first, e.g. 0 4095")
    return values


ValueRange = Annotated[tuple[FiniteFloat, ...], BeforeValidator(_percentiles_as_empty), AfterValidator(_check_ranges)]
"""LOW HIGH of all channels or of each, in turn; empty, or 'percentiles': to be found from the images."""


class ReadOptions(Config):
    """How image files are read. Stored with tokenizers and backbones, so that later images are read the same way."""

    value_range: ValueRange | None = None
    """Values that become 0 and 255 in images of more than 8 bits, which are clipped beyond: LOW HIGH for all channels or a pair for each,
    e.g. 0 4095 for 12 bits, -1000 400 for lungs in a CT; percentiles: found from a sample; auto: the tokenizer's or backbone's, without one
    the upper 8 of 16 bits, values of other types are unreadable images."""
    bands: tuple[PositiveInt, ...] | None = None
    """Bands to read as channels, counted from 1, e.g. 4 3 2; auto: the tokenizer's or backbone's, without one all, as many as channels."""
    pages: Literal["first", "each", "bands"] | None = None
    """Of files with several pages, slices or frames: the first, each as an image, or all as the bands of one; auto: as the tokenizer or backbone had
    them, without one they are unreadable."""

    @property
    def read_options(self) -> "ReadOptions":
        """Return these options alone, of a config that has others, too."""
        return ReadOptions(**{name: getattr(self, name) for name in ReadOptions.model_fields})

    def override(self, other: "ReadOptions") -> "ReadOptions":
        """Return these options with those of the other that are given, i.e. not None."""
        return self.model_copy(update={name: value for name, value in other.read_options if value is not None})

    def check_channels(self, channels: int) -> None:
        """Raise MapetError unless the options give this number of channels."""
        counts = {"bands": len(self.bands or ()), "value_range": len(self.value_range or ()) // 2}
        for name, count in counts.items():
            if count not in (0, channels) and not (name == "value_range" and count == 1):
                problem = f"{option(name, *getattr(self, name))} gives {count} channels, expected {channels}"
                raise MapetError(f"{problem}: give {option('channels', count)}", field=name, value=getattr(self, name))


AS_STORED = ReadOptions()
"""All bands of the only page, with 8-bit values as they are and the upper 8 of 16 bits."""


def _check_group_by(value: int | str) -> int | str:
    """Return a number of a folder, from 1, also as text, or a regular expression; raise ValueError for another."""
    if isinstance(value, str) and not value.isdecimal():
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"must be a number of a folder, or a regular expression: {error}") from None
        return value
    if int(value) < 1:
        raise ValueError("must be at least 1, the first folder of a path")
    return int(value)


GroupBy = Annotated[int | str, AfterValidator(_check_group_by)]
"""Number of a folder in the path of an image, from 1, or a regular expression for the path."""


class GroupOptions(Config):
    """Splits into training and test images."""

    group_by: GroupBy | None = None
    """What images of one patient, volume or scene share, which then lie on one side of every split: the number of a folder in their paths
    below the source (2: that in CLASS/PATIENT/image.png), or a regular expression whose first group is its name (patient(\\d+)); auto:
    only files of equal bytes are kept together."""


class ImageOptions(ReadOptions, LimitOptions):
    """Images, labeled or not."""

    images: Source
    """Folder of images, pattern of files or folders in quotes ('site*/slices'), text file of paths, .tar shards (also by URL), or
    hf:NAME[:SPLIT] of Hugging Face's `datasets`."""


class InputOptions(Config):
    """The student's input."""

    image_size: Size = (224, 224)
    """Height and width of the student's input, pixels."""
    patch_size: PositiveInt = 16
    """Side of the student's patches, pixels."""
    channels: PositiveInt = 3
    """Image channels: 1 gray, 3 RGB, or as many bands as the files have."""


class EncoderOptions(Config):
    """A ViT with random weights."""

    model: str = "vit_tiny_patch16_224"
    """timm VisionTransformer, by name."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further keywords of the ViT, e.g. embed_dim=128 depth=6 num_heads=4."""


class SeedOptions(Config):
    """Random draws."""

    seed: Seed = 0
    """Random seed."""


class ResumeOptions(Config):
    """Work that can be interrupted."""

    resume: bool = False
    """Resume the interrupted work in `out`; what is finished is kept."""
    take_over: bool = Field(default=False, exclude=True)  # of this call alone: not in config.yaml
    """Take `out` over from a process that holds its lock but is gone, or shall end: within a minute it notices, and does."""


class TrustTeacherOptions(Config):
    """Tokenizers of others."""

    trust_teacher: str | None = None
    """Name (package.module:function) of the custom teacher that the tokenizer may run; needed only for tokenizers that have one. It counts
    on the command line, in a Python call and in the environment variable MAPET_TRUSTED_TEACHERS, but not in a config file."""


class DeviceOptions(Config):
    """Where to compute."""

    device: str = "auto"
    """Device: auto (the first available of CUDA, MPS, CPU), cpu, cuda, cuda:1, mps."""


class UnreadableImageOptions(Config):
    """What to do about images that can't be read."""

    max_unreadable: float = Field(default=0.05, ge=0, le=1)
    """Largest fraction of images that may be unreadable (they are skipped with a warning); one is always allowed."""


class JobOptions(UnreadableImageOptions, DeviceOptions, ResumeOptions, SeedOptions):
    """Work on all images that can be interrupted."""


class ViewOptions(Config):
    """Which views of an image are tokenized and shown to the student."""

    views: Literal["center", "center-flip", "random-crop"] = "center"
    """Views of an image: center (largest centered crop, as in the released config), center-flip (that and its mirror image) or random-crop
    (random crops, half of them mirrored)."""
    min_crop_scale: float = Field(default=0.2, gt=0, le=1)
    """Smallest area of a random crop, as a fraction of the image's area; 1 is the largest. For `views` random-crop only."""


RARE_LOOP_OPTIONS = frozenset({"schedule", "max_minutes"})
"""Options of the training loop that have no flag: Python and config files set them."""
_LOOP_OPTIONS = """min_lr precision clip_grad micro_batch_size compile fsdp checkpoint_interval_min max_rollbacks log_interval
max_unreadable"""
LOOP_OPTIONS = frozenset(_LOOP_OPTIONS.split()) | RARE_LOOP_OPTIONS
"""Options of the training loop that are flags of `pretrain` alone; for the other trainers Python and config files set them."""


class TrainerOptions(Config):
    """Options of the training loop, the same for all tasks."""

    epochs: float = Field(default=100, gt=0)
    """Number of training epochs, rounded to whole steps; with a fraction, as in 12.5, the last one ends early."""
    max_minutes: PositiveFloat | None = None
    """Minutes that training may take, of all sessions together: `epochs` is corrected to fit, at most three times, by the measured speed.
    Only with `schedule` constant; none: `epochs` stay as given."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warmup: cosine (down to `min_lr` over all steps) or constant, which falls to `min_lr` over the last fifth
    of the steps."""
    warmup_epochs: NonNegativeFloat | None = None
    """Epochs of linear learning-rate warmup, laid over the beginning of the schedule; auto: a tenth of `epochs`."""
    batch_size: PositiveInt | None = None
    """Images per step, over all ranks."""
    opt: str = "adamw"
    """timm optimizer: adamw, lion, muon, lamb, sgd, ... The automatic learning rate is meant for adamw."""
    lr: PositiveFloat | None = None
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1e-5
    """Final learning rate of the schedule, at most `lr`."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; none on biases, norms, positions and tokens."""
    clip_grad: PositiveFloat | None = None
    """Gradient-norm clipping threshold; none: no clipping."""
    precision: Precision = "auto"
    """Matmul precision (weights and optimizer state stay float32); auto: the faster one in a timing."""
    micro_batch_size: PositiveInt | None = None
    """Images per forward pass within a step, for memory and speed only; auto: all on a GPU, on a CPU what its cache holds."""
    compile: bool | None = None
    """Compile the step with torch.compile (about a minute at the start); auto: on CUDA, for at least 1000 steps of one shape."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer state across ranks (FSDP2), for a model larger than a device's memory."""
    checkpoint_interval_min: PositiveFloat = 10
    """Minutes between checkpoints."""
    max_rollbacks: NonNegativeInt = 0
    """Times that a run with too many skipped steps in a row goes back to earlier weights and continues with the next images, instead of
    stopping."""
    log_interval: PositiveInt | None = None
    """Largest number of steps between lines of metrics (an epoch is divided evenly); auto: one line per epoch, at most 50 steps."""
    track: list[Literal["wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    """Trackers that get the metrics too, as run PARENT-FOLDER of project mapet; their own environment variables configure them
    (WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...). One that fails is a warning."""

    def problems(self) -> Iterator[str]:
        """Yield a message if the warmup is longer than the run, or the schedule does not allow `max_minutes`; `Config` makes it an error."""
        yield from super().problems()
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            yield f"{option('warmup_epochs')} {self.warmup_epochs:g}: must be at most {option('epochs')}, which is {self.epochs:g}"
        if self.max_minutes is not None and self.schedule != "constant":
            problem = "corrects the number of steps, which a cosine depends on from the first step"
            yield f"{option('max_minutes')} {problem}: give {option('schedule', 'constant')}"


class TrainerConfig(TrainerOptions, JobOptions):
    """Options of every command that trains, as the trainer reads them."""

    out: Path | None = None
    """New run folder."""


HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of timm model names that timm loads from a hub or a local folder."""


def is_custom_teacher(teacher: str) -> bool:
    """Return whether a teacher's name is the user's own 'package.module:function'."""
    return ":" in teacher and not teacher.startswith(HUB_PREFIXES)


def format_teachers(teachers: str | Iterable[str]) -> str:
    """Return the name of a teacher, or the names of several joined by ' + '."""
    return teachers if isinstance(teachers, str) else " + ".join(teachers)


TRUSTED_TEACHERS = "MAPET_TRUSTED_TEACHERS"
"""Environment variable: the custom teachers that may run, with commas between them. A command adds those that its caller names."""


@contextmanager
def trust_teachers(options: Options) -> Iterator[None]:
    """Let the custom teachers run that a command line or Python call names, until the context ends, also in processes that it starts.

    What a file names (a config, a run's folder, a tokenizer) is not among them: a file of others could name any code.

    Args:
        options: option -> value, as the command line or the call gave them; sections are mappings or configs. The options `teacher` and
            `trust_teacher` count.
    """

    def iter_names(section: Options) -> Iterator[str]:
        """Yield the values of these two options, at any depth."""
        for name, value in section.items():
            if isinstance(value, (Mapping, Config)):
                yield from iter_names(dict(value))
            elif name in ("teacher", "trust_teacher"):
                texts = value if isinstance(value, (list, tuple)) else [value]
                yield from (text for text in texts if isinstance(text, str))

    previous = os.environ.get(TRUSTED_TEACHERS)
    os.environ[TRUSTED_TEACHERS] = ",".join([previous or "", *filter(is_custom_teacher, iter_names(options))])
    try:
        yield
    finally:
        os.environ.pop(TRUSTED_TEACHERS)
        os.environ |= {} if previous is None else {TRUSTED_TEACHERS: previous}


def is_trusted_teacher(teacher: str) -> bool:
    """Return whether a custom teacher may run: the caller has named it, see `trust_teachers`, or the environment variable does."""
    return teacher in os.environ.get(TRUSTED_TEACHERS, "").split(",")


def non_default_options(config: Config, options: Iterable[str]) -> list[str]:
    """Return the field names among `options` whose value in `config` differs from the default of its class, in their order."""
    return [name for name in options if getattr(config, name) != type(config).model_fields[name].default]
