"""Options of `inspect`."""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt, model_validator

from mapet.config.base import Source
from mapet.config.shared import Device, Loading


class InspectOptions(Loading):
    """Options of `inspect` that a larger config has as a section."""

    num_images: PositiveInt = 6
    """Images shown."""


class Looking(InspectOptions, Device):
    """What to look at of a run's images."""

    images: Source | None = None
    """Images for the pictures; automatic: those the run was trained on."""
    seed: NonNegativeInt = 0
    """Seed of the choice of images and of the order of prediction."""
    trust_teacher: str | None = None
    """Only for a tokenizer that runs your own package.module:function: repeat its name to allow that."""


class InspectConfig(Looking):
    """Options of `inspect`."""

    run: Path | None = None
    """Run folder of `pretrain` or `run`; this or `tokenizer`."""
    tokenizer: Path | None = None
    """Folder made by `fit-tokenizer`: measure whether its words are any good."""
    out: Path
    """New folder for the pictures and figures."""
    images: Source | None = None
    """Folder of images, text file of paths, .tar shards or hf:NAME; automatic: those the run was trained on; required with
    `tokenizer`. With labels (CLASS/image.jpg) words are held against the classes, too."""
    tokens: Path | None = None
    """With `tokenizer`: a store made by `tokenize` of these images, to be compared with what the tokenizer says now."""
    sample: PositiveInt = 1000
    """With `tokenizer`: images measured, drawn at random."""
    seed: NonNegativeInt = 0
    """Seed of the choice of images, of the changes made to them and of the order of prediction."""
    teacher_checkpoint: str | None = None
    """With `tokenizer`: the teacher's weights file, if it is no longer where it was when the tokenizer was fitted."""

    @model_validator(mode="after")
    def _either(self) -> "InspectConfig":
        if (self.run is None) == (self.tokenizer is None):
            raise ValueError("give either --run, to look at a model, or --tokenizer, to measure its words: exactly one")
        if self.tokenizer is not None and self.images is None:
            raise ValueError("--tokenizer needs --images to measure its words on")
        if self.tokens is not None and self.tokenizer is None:
            raise ValueError("--tokens needs the --tokenizer they were made with")
        return self
