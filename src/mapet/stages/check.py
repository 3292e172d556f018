"""Stage: what is in a folder of images, and what the next stages will cost."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from mapet.recipe import Size, Source, stage
from mapet.stages.options import BadImages, Device, Precision, VocabSize, automatic_workers

if TYPE_CHECKING:
    from mapet.data.census import Census

log = logging.getLogger("mapet")


class CheckConfig(Device):
    """Options of `check`."""

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
    teacher_size: Size | None = None
    """Height and width the teacher sees, pixels; automatic: the model's own."""
    vocab_size: VocabSize | None = None
    """Visual words; automatic as in fit-tokenizer."""
    epochs: PositiveInt = 300
    """Passes to estimate the time of."""
    precision: Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""
    dry_run: bool = True
    """Run one batch through teacher and student to measure time."""
    out: Path | None = None
    """Text file for the list of unreadable images, one `reason<TAB>path` a line."""


@stage
def check(config: CheckConfig) -> "Census":
    """Read every image, report what is there and what is wrong, and estimate what the next stages need.

    Example:
      mapet check --images PHOTOS
      mapet check --images PHOTOS --model vit_base_patch16_224 --teacher resnet50x64_clip.openai
    """
    from mapet.data.census import take_census
    from mapet.data.sources import scan
    from mapet.files import atomic

    images = scan(config.images)
    census = take_census(images, config.channels, automatic_workers() + 1)
    for line in census.lines():
        log.info("%s", line)
    for line in census.doubts(config.image_size, BadImages().max_bad):
        log.warning("%s", line)
    if config.out:
        with atomic(config.out) as temporary:
            temporary.write_text(
                "".join(f"{why}\t{name}\n" for name, why in census.bad.items()),
                encoding="utf-8",
                errors="surrogateescape",
            )
        log.info("list of unreadable images in %s", config.out)
    if config.dry_run and len(census.bad) < len(images):
        from mapet.training.estimate import estimate

        for line in estimate(config, images, [i for i in range(len(images)) if images.id(i) not in census.bad]):
            log.info("%s", line)
    return census
