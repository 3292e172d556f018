"""Options of `inspect-tokenizer`."""

from pathlib import Path
from typing import ClassVar

from pydantic import NonNegativeInt, PositiveInt

from mapet.config.shared import Device, Loading
from mapet.config.types import Source


class InspectTokenizerConfig(Loading, Device):
    """Options of `inspect-tokenizer`."""

    positional: ClassVar[str | None] = "tokenizer"
    tokenizer: Path
    """Folder made by `fit-tokenizer`."""
    images: Source
    """Folder of images, text file of paths, .tar shards or hf:NAME. With labels (CLASS/image.jpg) tokens are compared with the classes,
    too."""
    out: Path
    """New folder for tokenizer_report.md, tokenizer_metrics.json and the figures."""
    tokens: Path | None = None
    """Store made by `tokenize` of these images, to be compared with what the tokenizer says now."""
    sample: PositiveInt = 1000
    """Images measured, drawn at random."""
    num_images: PositiveInt = 6
    """Images shown."""
    seed: NonNegativeInt = 0
    """Seed of the choice of images and of the changes made to them."""
    trust_teacher: str | None = None
    """Only for a tokenizer that runs your own package.module:function: repeat its name to allow that."""
    teacher_checkpoint: str | None = None
    """The teacher's weights file, if it is no longer where it was when the tokenizer was fitted."""
