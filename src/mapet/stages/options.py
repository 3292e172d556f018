"""Options that several stages share."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from mapet.recipe import Config

Share = Annotated[float, Field(ge=0, le=1)]
BackboneSource = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A backbone, as `mapet.load_backbone` takes it: a path or 'timm:NAME'."""


class Device(Config):
    """Where to compute."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


class Loading(Device):
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


class BadImages(Config):
    """What to do about images that can't be read."""

    max_bad: Share = 0.05
    """Largest share of images that may be unreadable (they are left out, with a warning); one is always allowed."""


Precision = Literal["auto", "float32", "bfloat16"]


def automatic_workers() -> int:
    """One process a usable core, less the one that computes, from 1 to 8."""
    return max(1, min(8, usable_cores() - 1))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
