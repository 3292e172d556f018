"""Options of `prepare`."""

from math import isfinite
from pathlib import Path

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from mapet.config.shared import (
    BadImages,
)
from mapet.config.types import HUGGING_FACE, Source
from mapet.errors import option


class PrepareConfig(BadImages):
    """Options of `prepare`."""

    images: Source
    """Folder of images, text file of paths, .tar shards (also by URL), or hf:NAME[:SPLIT] of Hugging Face's `datasets`."""
    out: Path
    """New folder for the prepared images; give it to other stages as --images."""
    short_side: PositiveInt = 256
    """Short side of the prepared images, pixels; at least the student's and the teacher's input. Smaller ones are kept."""
    channels: PositiveInt = 3
    """Channels: 1 grey, 3 RGB, others from .npy arrays."""
    jpeg_quality: int = Field(default=90, ge=1, le=100)
    """JPEG quality of resized images."""
    value_range: tuple[float, float] | None = None
    """Values of 16-bit, integer and floating-point images that become 0 and 255, e.g. 0 4095 for 12 bits, -1000 400 for lungs in
    a CT; beyond is cut off, 8-bit images stay as they are; automatic: the upper 8 of 16 bits, others are bad images."""
    streaming: bool = False
    """With hf:NAME: read it once as it comes, in order; its originals are never all on this disk."""
    resume: bool = False
    """Go on with an unfinished one."""

    @model_validator(mode="after")
    def _streams_of_the_hub(self) -> "PrepareConfig":
        if self.streaming and not str(self.images).startswith(HUGGING_FACE):
            raise ValueError(
                f"{option('streaming', True)} is for hf:NAME, not {self.images}: other sources are read where they are, tar shards by URL too"
            )
        return self

    @model_validator(mode="after")
    def _a_range(self) -> "PrepareConfig":
        if self.value_range is not None and not (
            all(map(isfinite, self.value_range)) and self.value_range[0] < self.value_range[1]
        ):
            raise ValueError(
                f"{option('value_range')} {self.value_range[0]:g} {self.value_range[1]:g}: the smaller first, e.g. 0 4095"
            )
        return self
