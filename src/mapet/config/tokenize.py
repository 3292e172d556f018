"""Options of `tokenize`."""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from mapet.config.shared import BadImages, Device, Loading, Views
from mapet.config.types import Source


class TokenizeOptions(Views, Loading):
    """Options of `tokenize` that a larger config has as a section."""

    num_views: PositiveInt | None = None
    """Views stored of each image; automatic: 1 for center, 2 for center-flip, 8 for random-crop."""
    teacher_checkpoint: str | None = None
    """The teacher's weights file, if it is no longer where it was when the tokenizer was fitted."""


class TokenizeConfig(TokenizeOptions, BadImages, Device):
    """Options of `tokenize`."""

    images: Source
    """Folder of images, text file of paths, .tar shards (also by URL), or hf:NAME[:SPLIT] of Hugging Face's `datasets`."""
    tokenizer: Path
    """Folder made by `fit-tokenizer`."""
    out: Path
    """New folder for the token store."""
    seed: NonNegativeInt = 0
    """Seed of the views."""
    trust_teacher: str | None = None
    """Only for a tokenizer that runs your own package.module:function: repeat its name to allow that."""
    resume: bool = False
    """Go on with an unfinished store."""
