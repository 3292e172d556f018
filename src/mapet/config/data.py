"""Options of `check` and `prepare`."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pydantic import PositiveInt

from mapet.config import shared
from mapet.errors import option


class CheckConfig(shared.ImageOptions, shared.InputOptions, shared.EncoderOptions):
    """Options of `check`."""

    out_is_file: ClassVar[bool] = True
    teacher: str = "pixels"
    """Teacher for the one-batch benchmark, as in `fit-tokenizer`."""
    teacher_checkpoint: str | None = None
    """Local weights file of the teacher; none: timm downloads the weights."""
    benchmark: bool = True
    """Run one batch through teacher and student to measure time."""
    out: Path | None = None
    """Text file for the list of unreadable images, one `reason<TAB>path` a line; none: no file."""


class PrepareConfig(shared.ImageOptions, shared.UnreadableImageOptions, shared.ResumeOptions):
    """Options of `prepare`."""

    out: Path
    """New folder for the prepared images; other commands take it as `images`."""
    short_side: PositiveInt = 256
    """Short side of the prepared images, pixels; at least the student's and the teacher's input. Smaller images are kept as they are."""
    channels: PositiveInt = 3
    """Image channels: 1 gray, 3 RGB, others from .npy arrays."""
    value_range: tuple[float, float] | None = None
    """Values of 16-bit, integer and floating-point images that become 0 and 255, e.g. 0 4095 for 12 bits, -1000 400 for lungs in a CT;
    values beyond are clipped, 8-bit images stay as they are; auto: the upper 8 of 16 bits, others are unreadable images."""
    streaming: bool = False
    """Read hf:NAME once as it arrives, in order, so that its originals are never all on this disk."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each option that is invalid or contradicts another one; `Config` makes the first an error."""
        if self.streaming and not self.images.startswith(shared.HF_PREFIX):
            yield f"{option('streaming', True)} is for hf:NAME, but {option('images')} is {self.images}, which is read in place: omit it"
        if self.value_range is not None:
            low, high = self.value_range
            if not low < high:
                yield f"{option('value_range')} {low:g} {high:g}: must be two numbers, the smaller one first, e.g. 0 4095"
