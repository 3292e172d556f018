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
from mapet.data.readers import BadImage, DecodedImage
from mapet.errors import by, counted, option

log = logging.getLogger("mapet")
SHOWN = 10
FEW_IMAGES = 100
FEW_LEVELS = 128
"""Of 256: fewer, and pictures look flat."""
ONE_CHANNEL = "grey, and read as three equal channels: 1 channel would do"


@dataclass(frozen=True)
class Census:
    """Figures of a list of images.

    Attributes:
        sizes: (n, 2) height and width of the readable ones, upright.
        modes: how many of each mode, e.g. 'JPEG RGB'.
        bad: id -> reason.
        ranges: (m, 2) the 0.1 % and 99.9 % points of the values of each 16-bit image.
        grey: how many are read as colour, their three channels all the same.
    """

    images: ImageList = field(repr=False)
    sizes: np.ndarray = field(repr=False)
    modes: Counter[str]
    bad: dict[str, str]
    ranges: np.ndarray = field(repr=False)
    grey: int

    def lines(self) -> Iterator[str]:
        """The report."""
        total = int(self.images.file_sizes.clip(min=0).sum())
        size = f"{total / 1e6:,.1f} MB" if total >= 1e5 else f"{total / 1e3:.1f} kB"
        yield f"{len(self.images):,} images in {self.images.root}, {size}; {self.images.ignored} other files ignored"
        classes = self.images.classes()
        if classes:
            counts = np.bincount(classes[1])
            names = ", ".join(classes[0][:SHOWN]) + (", ..." if len(classes[0]) > SHOWN else "")
            yield f"labels: {len(classes[0])} classes, {counts.min()} to {counts.max()} images each ({names})"
        else:
            yield "labels: none (they are taken from class folders, CLASS/image.jpg, if every image is in one)"
        if len(self.sizes):
            low, middle, high = (np.percentile(self.sizes, q, axis=0).astype(int) for q in (0, 50, 100))
            yield f"height x width: smallest {low[0]} x {low[1]}, median {middle[0]} x {middle[1]}, largest {high[0]} x {high[1]} px"
            yield "modes: " + ", ".join(f"{mode} {count:,}" for mode, count in self.modes.most_common())
        if len(self.ranges):
            yield f"note: {Levels.of(self.ranges)}"
        if self.grey and self.grey == len(self.sizes):
            yield f"note: all are {ONE_CHANNEL}"
        yield f"unreadable: {len(self.bad):,}"
        for name, reason in list(self.bad.items())[:SHOWN]:
            yield f"  {name!r}: {reason}"
        if len(self.bad) > SHOWN:
            yield f"  ... and {len(self.bad) - SHOWN} more; {option('out')} FILE lists them all"

    def doubts(self, image_size: tuple[int, int], max_unreadable: float) -> Iterator[str]:
        """What will make other stages refuse these images, or make little of them.

        Args:
            image_size: height and width of the student's input.
            max_unreadable: the share of unreadable images that other stages allow by default.
        """
        count, bad = len(self.images), len(self.bad)
        if bad > max(1, max_unreadable * count):
            yield (
                f"{bad:,} of {count:,} are unreadable: other commands refuse more than {max_unreadable:.0%}; remove them "
                f"or raise {option('max_unreadable')}"
            )
        if count - bad < FEW_IMAGES:
            yield few_images(count - bad)
        if (share := smaller(self.sizes, image_size)) > 0.5:
            yield f"{share:.0%} are {enlarged(image_size)}"


def few_images(count: int) -> str:
    """A warning."""
    return (
        f"{counted(count, 'image')} {'is' if count == 1 else 'are'} very few to learn from: expect little, and hundreds of passes (see how much "
        "data and time, in docs/how_much.md)"
    )


def smaller(sizes: np.ndarray, image_size: tuple[int, int]) -> float:
    """The share of images that are smaller than the input."""
    return float((sizes < image_size).any(axis=1).mean()) if len(sizes) else 0.0


def enlarged(image_size: tuple[int, int]) -> str:
    """What is wrong with those."""
    return (
        f"smaller than the input, {by(image_size)} px, and would be enlarged, which takes time and shows nothing new: choose a smaller "
        f"{option('image_size')}, with a {option('patch_size')} that divides it"
    )


class Levels(NamedTuple):
    """Values of 16-bit images, of which the upper 8 bits are used."""

    low: int
    high: int

    @classmethod
    def of(cls, ranges: np.ndarray) -> "Levels":
        """Of images with such `Census.ranges`."""
        return cls(int(np.percentile(ranges[:, 0], 1)), int(np.percentile(ranges[:, 1], 99)))

    @property
    def number(self) -> int:
        """How many of 256 they tell apart."""
        return (self.high >> 8) - (self.low >> 8) + 1

    def __str__(self) -> str:
        return (
            f"16-bit images hold values of about {self.low:,} to {self.high:,}, of which the upper 8 bits are used: {self.number} of "
            f"256 levels. `mapet prepare --value-range {self.low} {self.high}` makes use of all"
        )


def warn_of_unused(images: ImageList, channels: int, image_size: tuple[int, int]) -> None:
    """Of some images, for those who take no census: pixels, levels or channels that say nothing."""
    found = [_facts(images, int(i), channels) for i in np.linspace(0, len(images) - 1, min(SHOWN, len(images)))]
    facts = [fact for fact in found if isinstance(fact, Facts)]
    ranges = [fact.range for fact in facts if fact.range is not None]
    if ranges and (levels := Levels.of(_pairs(ranges))).number < FEW_LEVELS:
        log.warning("%s", levels)
    if facts and all(fact.grey for fact in facts):
        log.warning("all %d images looked at are %s", len(facts), ONE_CHANNEL)
    if (share := smaller(_pairs([fact.size for fact in facts]), image_size)) > 0.5:
        log.warning("%.0f%% of %d images looked at are %s", 100 * share, len(facts), enlarged(image_size))


def take_census(images: ImageList, channels: int, threads: int) -> Census:
    """Decode every image."""
    sizes, ranges, modes, bad, grey = [], [], Counter[str](), {}, 0
    with ThreadPoolExecutor(threads) as pool:
        facts = pool.map(lambda i: _facts(images, i, channels), range(len(images)))
        for index, fact in enumerate(tqdm(facts, total=len(images), desc="check", unit="img", disable=None)):
            if isinstance(fact, str):
                bad[images.id(index)] = fact
            else:
                sizes.append(fact.size)
                modes[fact.mode] += 1
                grey += fact.grey
                if fact.range is not None:
                    ranges.append(fact.range)
    return Census(images, _pairs(sizes), modes, bad, _pairs(ranges), grey)


def _pairs(rows: list[tuple[int, int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


class Facts(NamedTuple):
    """What a readable image is.

    Attributes:
        size: height and width, upright.
        range: of values that are more than 8 bits, their 0.1 % and 99.9 % points.
        grey: whether it is read as colour, its three channels all the same.
    """

    size: tuple[int, int]
    mode: str
    range: tuple[int, int] | None
    grey: bool


def _facts(images: ImageList, index: int, channels: int) -> Facts | str:
    """Of an image; or why it can't be read."""
    try:
        picture = images.open(index, channels)
        pixels = picture.read()
    except BadImage as error:
        return str(error)
    values = None
    if isinstance(picture, DecodedImage) and picture.is_deep:
        low, high = np.percentile(picture.array, (0.1, 99.9))
        values = int(low), int(high)
    # of a few pixels first, which is enough for most in colour
    grey = len(pixels) == 3 and all(bool((part == part[:1]).all()) for part in (pixels[:, ::16, ::16], pixels))
    return Facts(picture.size, picture.kind, values, grey)
