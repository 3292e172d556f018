"""Options of `check`."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from mapet.config.shared import Device, Precision, VocabSize
from mapet.config.types import Size, Source


class CheckConfig(Device):
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
    teacher_image_size: Size | None = None
    """Height and width the teacher sees, pixels; automatic: the model's own."""
    vocab_size: VocabSize | None = None
    """Visual words; automatic as in fit-tokenizer."""
    epochs: PositiveInt = 300
    """Passes to estimate the time of."""
    precision: Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""
    benchmark: bool = True
    """Run one batch through teacher and student to measure time."""
    out: Path | None = None
    """Text file for the list of unreadable images, one `reason<TAB>path` a line."""
