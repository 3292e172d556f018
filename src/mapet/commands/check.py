"""Stage: what is in a folder of images, and what the next stages will cost."""

import logging
from typing import TYPE_CHECKING

from mapet.commands.command import command
from mapet.config.data import CheckConfig
from mapet.config.shared import BadImages

if TYPE_CHECKING:
    from mapet.data.census import Census

log = logging.getLogger("mapet")


@command(CheckConfig)
def check(config: CheckConfig) -> "Census":
    """Read every image, report what is there and what is wrong, and estimate what the next stages need.

    Example:
      mapet check --images PHOTOS
      mapet check --images PHOTOS --model vit_base_patch16_224 --teacher resnet50x64_clip.openai
    """
    from mapet.data.census import take_census
    from mapet.data.sources import scan
    from mapet.device import num_workers
    from mapet.files import atomic

    images = scan(config.images)
    census = take_census(images, config.channels, num_workers() + 1)
    for line in census.lines():
        log.info("%s", line)
    for line in census.doubts(config.image_size, BadImages().max_unreadable):
        log.warning("%s", line)
    if config.out:
        with atomic(config.out) as temporary:
            temporary.write_text(
                "".join(f"{why}\t{name}\n" for name, why in census.bad.items()),
                encoding="utf-8",
                errors="surrogateescape",
            )
        log.info("list of unreadable images in %s", config.out)
    if config.benchmark and len(census.bad) < len(images):
        from mapet.training.estimate import estimate

        for line in estimate(config, images, [i for i in range(len(images)) if images.id(i) not in census.bad]):
            log.info("%s", line)
    return census
