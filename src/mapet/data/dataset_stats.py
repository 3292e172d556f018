"""What a list of images holds: sizes, modes, classes, and what can't be read."""

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mapet.data.image_list import ImageList
from mapet.data.readers import DecodedImage, ImageDecodeError
from mapet.errors import format_size, option, pluralize

log = logging.getLogger("mapet")
NUM_SHOWN = 10
FEW_IMAGES = 100
FEW_LEVELS = 128
"""Of 256: fewer, and pictures look flat."""
ONE_CHANNEL = "gray, and read as three equal channels: 1 channel would do"


class ImageInfo(NamedTuple):
    """What a readable image is.

    Attributes:
        size: height and width, upright.
        mode: e.g. 'JPEG RGB'.
        range: of values that are more than 8 bits, their 0.1 % and 99.9 % points.
        gray: whether it is read as color, its three channels all the same.
    """

    size: tuple[int, int]
    mode: str
    range: tuple[int, int] | None
    gray: bool


@dataclass(frozen=True)
class DatasetStats:
    """ImageInfo of the readable images of a list, in its order, and the others: id -> reason."""

    images: ImageList = field(repr=False)
    facts: list[ImageInfo] = field(repr=False)
    unreadable: dict[str, str]

    @property
    def modes(self) -> Counter[str]:
        """How many images are of each mode, e.g. 'JPEG RGB'."""
        return Counter(fact.mode for fact in self.facts)

    def lines(self) -> Iterator[str]:
        """The report."""
        total = int(self.images.file_sizes.clip(min=0).sum())
        size = f"{total / 1e6:,.1f} MB" if total >= 1e5 else f"{total / 1e3:.1f} kB"
        yield f"{len(self.images):,} images in {self.images.root}, {size}; {self.images.ignored} other files ignored"
        if classes := self.images.classes():
            counts = np.bincount(classes[1])
            names = ", ".join(classes[0][:NUM_SHOWN]) + (", ..." if len(classes[0]) > NUM_SHOWN else "")
            yield f"labels: {len(classes[0])} classes, {counts.min()} to {counts.max()} images each ({names})"
        else:
            yield "labels: none (they are taken from class folders, CLASS/image.jpg, if every image is in one)"
        if self.facts:
            sizes = np.percentile([fact.size for fact in self.facts], (0, 50, 100), axis=0).astype(int)
            low, middle, high = (f"{height} x {width}" for height, width in sizes)
            yield f"height x width: smallest {low}, median {middle}, largest {high} px"
            yield "modes: " + ", ".join(f"{mode} {count:,}" for mode, count in self.modes.most_common())
            if note := count_levels(self.facts)[1]:
                yield f"note: {note}"
            if all(fact.gray for fact in self.facts):
                yield f"note: all are {ONE_CHANNEL}"
        yield f"unreadable: {len(self.unreadable):,}"
        for name, reason in list(self.unreadable.items())[:NUM_SHOWN]:
            yield f"  {name!r}: {reason}"
        if len(self.unreadable) > NUM_SHOWN:
            yield f"  ... and {len(self.unreadable) - NUM_SHOWN} more; {option('out')} FILE lists them all"

    def warnings(self, image_size: tuple[int, int], max_unreadable: float) -> Iterator[str]:
        """What will make other stages refuse these images, or make little of them.

        Args:
            image_size: height and width of the student's input.
            max_unreadable: the fraction of unreadable images that other stages allow by default.
        """
        count, bad = len(self.images), len(self.unreadable)
        if bad > max(1, max_unreadable * count):
            refused = f"other commands refuse more than {max_unreadable:.0%}"
            yield f"{bad:,} of {count:,} are unreadable: {refused}; remove them or raise {option('max_unreadable')}"
        if len(self.facts) < FEW_IMAGES:
            yield few_images(len(self.facts))
        if warning := find_enlarged(self.facts, image_size):
            yield warning


def few_images(count: int) -> str:
    """A warning."""
    are = f"{pluralize(count, 'image')} {'is' if count == 1 else 'are'}"
    hint = "expect little, and hundreds of passes (see how much data and time, in docs/requirements.md)"
    return f"{are} very few to learn from: {hint}"


def find_enlarged(facts: list[ImageInfo], image_size: tuple[int, int], which: str = "") -> str:
    """Warn if most images are smaller than the input; '' otherwise. `which` says of what images they are a fraction."""
    fraction = np.mean([fact.size[0] < image_size[0] or fact.size[1] < image_size[1] for fact in facts] or [False])
    return "" if fraction <= 0.5 else (
        f"{fraction:.0%}{which} are smaller than the input, {format_size(image_size)} px, and would be enlarged, which takes time and shows "
        f"nothing new: choose a smaller {option('image_size')}, with a {option('patch_size')} that divides it"
    )  # fmt: skip


def count_levels(facts: list[ImageInfo]) -> tuple[int, str]:
    """How many of 256 levels the upper 8 bits of 16-bit images tell apart, and a note on it; (256, '') without such images."""
    ranges = np.array([fact.range for fact in facts if fact.range is not None])
    if not len(ranges):
        return 256, ""
    low, high = int(np.percentile(ranges[:, 0], 1)), int(np.percentile(ranges[:, 1], 99))
    number = (high >> 8) - (low >> 8) + 1
    return number, (
        f"16-bit images hold values of about {low:,} to {high:,}, of which the upper 8 bits are used: {number} of 256 levels. "
        f"`mapet prepare --value-range {low} {high}` makes use of all"
    )


def warn_of_unused(images: ImageList, channels: int, image_size: tuple[int, int]) -> None:
    """Warn, from a sample, about pixels, levels or channels that say nothing, for those who do not run `check`."""
    sample = np.linspace(0, len(images) - 1, min(NUM_SHOWN, len(images)))
    facts = [fact for i in sample if isinstance(fact := _read_image_info(images, int(i), channels), ImageInfo)]
    levels, note = count_levels(facts)
    if levels < FEW_LEVELS:
        log.warning("%s", note)
    if facts and all(fact.gray for fact in facts):
        log.warning("all %d images looked at are %s", len(facts), ONE_CHANNEL)
    if warning := find_enlarged(facts, image_size, f" of {len(facts)} images looked at"):
        log.warning("%s", warning)


def compute_dataset_stats(images: ImageList, channels: int, threads: int) -> DatasetStats:
    """Decode every image."""
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda index: _read_image_info(images, index, channels), range(len(images)))
        every = list(tqdm(found, total=len(images), desc="check", unit="img", disable=None))
    bad = {images.id(index): reason for index, reason in enumerate(every) if isinstance(reason, str)}
    return DatasetStats(images, [facts for facts in every if isinstance(facts, ImageInfo)], bad)


def _read_image_info(images: ImageList, index: int, channels: int) -> ImageInfo | str:
    """Read an image's facts; or the reason why it can't be read."""
    try:
        picture = images.open(index, channels)
        pixels = picture.read()
    except ImageDecodeError as error:
        return str(error)
    values = None
    if isinstance(picture, DecodedImage) and picture.is_deep:
        low, high = np.percentile(picture.array, (0.1, 99.9))
        values = int(low), int(high)
    # of a few pixels first, which is enough for most in color
    gray = len(pixels) == 3 and all(bool((part == part[:1]).all()) for part in (pixels[:, ::16, ::16], pixels))
    return ImageInfo(picture.size, picture.kind, values, gray)
