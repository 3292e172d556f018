"""Options of `prepare`."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import PositiveInt

from mapet.config import shared
from mapet.errors import option


class PrepareConfig(shared.ImageOptions, shared.UnreadableImageOptions, shared.ResumeOptions):
    """Options of `prepare`."""

    out: Path
    """New folder for the prepared images; other commands take it as `images`."""
    short_side: PositiveInt = 256
    """Short side of the prepared images, pixels; at least the student's and the teacher's input. Smaller images are kept as they are."""
    channels: PositiveInt = 3
    """Image channels: 1 gray, 3 RGB, or as many bands as the files have."""
    streaming: bool = False
    """Read hf:NAME once as it arrives, in order, so that its originals are never all on this disk."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each option that is invalid or contradicts another one; `Config` makes the first an error."""
        if self.streaming and not self.images.startswith(shared.HF_PREFIX):
            yield f"{option('streaming', True)} is for hf:NAME, but {option('images')} is {self.images}, which is read in place: omit it"
        if self.streaming and self.value_range == ():
            yield f"{option('value_range')} percentiles needs all images, which {option('streaming', True)} does not keep: give LOW HIGH"
