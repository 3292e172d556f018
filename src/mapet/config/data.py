"""Options of `check` and `prepare`."""

from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt, model_validator

from mapet.config.base import Config
from mapet.config.shared import HUGGING_FACE, BadImages, Size, Source
from mapet.errors import option


class CheckConfig(Config):
    """Options of `check`."""

    out_is_file: ClassVar[bool] = True

    images: Source
    """Folder of images, text file of paths, .tar shards (also by URL), or hf:NAME[:SPLIT] of Hugging Face's `datasets`."""
    channels: PositiveInt = 3
    """Channels of the images: 1 grey, 3 RGB, others from .npy arrays."""
    model: str = "vit_tiny_patch16_224"
    """timm VisionTransformer for the dry run."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further keywords of the ViT, e.g. embed_dim=128 depth=6 num_heads=4."""
    image_size: Size = (224, 224)
    """Height and width of the student's input, pixels."""
    patch_size: PositiveInt = 16
    """Side of the student's patches, pixels."""
    teacher: str = "pixels"
    """Teacher for the dry run, as in fit-tokenizer."""
    teacher_checkpoint: str | None = None
    """Local weights file of the teacher."""
    benchmark: bool = True
    """Run one batch through teacher and student to measure time."""
    out: Path | None = None
    """Text file for the list of unreadable images, one `reason<TAB>path` a line."""


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
    value_range: tuple[float, float] | None = None
    """Values of 16-bit, integer and floating-point images that become 0 and 255, e.g. 0 4095 for 12 bits, -1000 400 for lungs in
    a CT; beyond is cut off, 8-bit images stay as they are; automatic: the upper 8 of 16 bits, others are bad images."""
    streaming: bool = False
    """With hf:NAME: read it once as it comes, in order; its originals are never all on this disk."""
    resume: bool = False
    """Go on with an unfinished one."""

    @model_validator(mode="after")
    def _fit_together(self) -> "PrepareConfig":
        if self.streaming and not self.images.startswith(HUGGING_FACE):
            raise ValueError(
                f"{option('streaming', True)} is for hf:NAME, not {self.images}: other sources are read where they are, tar shards by URL too"
            )
        if self.value_range is not None:
            low, high = self.value_range
            if not (isfinite(low) and isfinite(high) and low < high):
                raise ValueError(f"{option('value_range')} {low:g} {high:g}: the smaller first, e.g. 0 4095")
        return self
