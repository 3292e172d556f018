"""Options of `check` and `prepare`."""

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import ClassVar

from pydantic import PositiveInt

from mapet.config import shared
from mapet.errors import option


class CheckConfig(shared.ImageOptions, shared.InputOptions, shared.EncoderOptions):
    """Options of `check`."""

    out_is_file: ClassVar[bool] = True
    teacher: str = "pixels"
    """Teacher of the one-batch benchmark, as in fit-tokenizer."""
    teacher_checkpoint: str | None = None
    """Local weights file of the teacher."""
    benchmark: bool = True
    """Run one batch through teacher and student to measure time."""
    out: Path | None = None
    """Text file for the list of unreadable images, one `reason<TAB>path` a line."""


class PrepareConfig(shared.ImageOptions, shared.UnreadableImageOptions, shared.ResumeOptions):
    """Options of `prepare`."""

    out: Path
    """New folder for the prepared images; give it to other stages as --images."""
    short_side: PositiveInt = 256
    """Short side of the prepared images, pixels; at least the student's and the teacher's input. Smaller ones are kept."""
    channels: PositiveInt = 3
    """Channels: 1 gray, 3 RGB, others from .npy arrays."""
    value_range: tuple[float, float] | None = None
    """Values of 16-bit, integer and floating-point images that become 0 and 255, e.g. 0 4095 for 12 bits, -1000 400 for lungs in
    a CT; beyond is cut off, 8-bit images stay as they are; automatic: the upper 8 of 16 bits, others are bad images."""
    streaming: bool = False
    """With hf:NAME: read it once as it comes, in order; its originals are never all on this disk."""

    def problems(self) -> Iterator[str]:
        """Say what contradicts itself or each other."""
        if self.streaming and not self.images.startswith(shared.HF_PREFIX):
            yield f"{option('streaming', True)} is for hf:NAME, not {self.images}: other sources are read where they are, tar shards by URL too"
        if self.value_range is not None:
            low, high = self.value_range
            if not -inf < low < high < inf:
                yield f"{option('value_range')} {low:g} {high:g}: the smaller first, e.g. 0 4095"
