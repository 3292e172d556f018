"""Options that several stages share."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mapet.config.base import Config
from mapet.config.types import Size
from mapet.errors import option

Share = Annotated[float, Field(ge=0, le=1)]
VocabSize = Annotated[int, Field(ge=2)]
"""V, visual words: of one there is nothing to predict."""
BackboneSource = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A backbone, as `mapet.load_backbone` takes it: a path or 'timm:NAME'."""


Precision = Literal["auto", "float32", "bfloat16"]


class Device(Config):
    """Where to compute."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


class ModelArgs(Config):
    """Of a backbone that is a weights file."""

    model_args: dict[str, Any] = Field(default_factory=dict)
    """What a weights file doesn't tell of its ViT, e.g. num_heads=6."""


class Loading(Config):
    """Reading images in batches."""

    batch_size: PositiveInt = 64
    """Images at a time; changes speed and memory only."""
    workers: NonNegativeInt | None = None
    """Processes that read images; automatic: one a core, less one, at most 8."""

    @property
    def num_workers(self) -> int:
        return automatic_workers() if self.workers is None else self.workers


class Tracked(Config):
    """Where figures go besides metrics.jsonl and TensorBoard."""

    track: Annotated[
        list[Literal["wandb", "mlflow", "trackio"]], BeforeValidator(lambda x: [x] if isinstance(x, str) else x)
    ] = Field(default_factory=list)
    """Send the figures to these trackers too, as run PARENT-FOLDER of project mapet; their own environment variables say where to
    (WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...). One that fails is a warning."""


class TrainerOptions(Tracked):
    """How the trainer trains, whatever is learned."""

    epochs: PositiveInt = 100
    """Passes over the images."""
    warmup_epochs: NonNegativeFloat | None = None
    """Passes with a rising learning rate; automatic: a tenth."""
    batch_size: PositiveInt | None = None
    """Images a step."""
    opt: str = "adamw"
    """Any optimizer of timm's: adamw, lion, muon, lamb, sgd, ... The automatic learning rate is for adamw."""
    lr: PositiveFloat | None = None
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1e-5
    """Learning rate at the end, at most the peak."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay, none on biases, norms, positions and tokens."""
    clip_grad: PositiveFloat | None = None
    """Largest norm of the gradient."""
    precision: Precision = "auto"
    """Of activations and products (weights and optimizer stay float32); auto takes bfloat16 where it is fast."""
    micro_batch_size: PositiveInt | None = None
    """Images at a time within a step, for memory and speed only; automatic: a GPU takes all, a CPU what its cache holds."""
    compile: bool | None = None
    """Compile the step with torch.compile, about a minute at the start; automatic: on CUDA from 1000 steps on, if all have one shape."""
    fsdp: bool = False
    """Share weights, gradients and optimizer out over the processes (FSDP2), for a model that outgrows its device."""
    workers: NonNegativeInt | None = None
    """Processes that read images; automatic: one a core, less one, at most 8."""
    checkpoint_interval_min: PositiveFloat = 10
    """Time between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""
    max_skipped_steps: PositiveInt = 5
    """Steps in a row that may be left out because loss or gradient is not finite; then the run stops and keeps them."""
    max_rollbacks: NonNegativeInt = 0
    """Instead of stopping then, so many times go back to the weights before and on with the images after."""
    log_interval: PositiveInt | None = None
    """Steps between lines of metrics, at most: an epoch is cut evenly; automatic: a line an epoch, at most 50 steps."""

    @property
    def num_workers(self) -> int:
        """Processes that read images."""
        return automatic_workers() if self.workers is None else self.workers


class BadImages(Config):
    """What to do about images that can't be read."""

    max_unreadable: Share = 0.05
    """Largest share of images that may be unreadable (they are left out, with a warning); one is always allowed."""


class TrainerConfig(TrainerOptions, BadImages, Device):
    """What the trainer reads of a command's config."""

    out: Path | None = None
    """New run folder."""
    seed: NonNegativeInt = 0
    """Seed of all that is drawn."""
    resume: bool = False
    """Go on with an interrupted run in `out`, exactly where it stopped."""


class FrozenTeacher(Config):
    """The encoder whose features become words."""

    teacher: str = "pixels"
    """Frozen encoder: 'pixels', a timm model, or package.module:function."""
    teacher_checkpoint: str | None = None
    """Local weights file of the teacher; otherwise timm downloads them."""
    teacher_image_size: Size | None = None
    """Height and width the teacher sees, pixels; automatic: the model's own."""
    teacher_final_norm: bool = False
    """Apply the timm model's last normalization to the features as well."""
    teacher_layer: int = -1
    """Which of the timm model's intermediate feature maps; -1 is the last."""


def changed(config: Config, options: Iterable[str]) -> list[str]:
    """Those that have another value than the default."""
    return [name for name in options if getattr(config, name) != type(config).model_fields[name].default]


def refuse_unused(config: Config, users: Mapping[str, tuple[str, ...]], kind: str) -> None:
    """Raises ValueError for an option that was given and changes nothing: it would be written down as if it had."""
    for name in changed(config, users):
        if kind not in users[name]:
            raise ValueError(f"{option(name)} is for {', '.join(users[name])}; {kind} has no use for it")


HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
"""How names of timm models that are not in timm begin."""


def is_own_code(teacher: str) -> bool:
    """Whether the name is a person's own 'package.module:function'."""
    return ":" in teacher and not teacher.startswith(HUBS)


def automatic_workers() -> int:
    """One process a usable core, less the one that computes, from 1 to 8."""
    return max(1, min(8, usable_cores() - 1))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class Views(Config):
    """Which views of an image are tokenized and shown to the student."""

    views: Literal["center", "center-flip", "random-crop"] = "center"
    """center: largest centred box (the released recipe); center-flip: that and its mirror image; random-crop: random boxes, mirrored
    half the time."""
    min_crop_scale: float = Field(default=0.2, gt=0, le=1)
    """Smallest random box, as a share of the centred one's area (for random-crop)."""
