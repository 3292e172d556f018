"""Statistics of a list of images: sizes, modes, classes, and what cannot be read; warnings that follow from them."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from mapet.data.duplicates import Thumbnail, find_near_duplicates, make_thumbnail
from mapet.data.groups import find_groups
from mapet.data.image_list import ImageList
from mapet.data.readers.image import DecodedImage, ImageDecodeError, LazyImage
from mapet.data.readers.read_each import read_each
from mapet.errors import format_size, option, pluralize

log = logging.getLogger("mapet")
NUM_SHOWN = 10
"""Class names that a report lists, and images that `warn_from_sample` reads."""
NUM_SAMPLED, NUM_VALUES = 256, 20_000
"""Images that a range of values is found from, and values of each band that are taken of an image."""
PERCENTILES = 0.1, 99.9
"""Points of the values of a band that are the ends of its range."""
MAX_OUTSIDE = 0.01
"""Fraction of an image's values that may lie outside the range it is read with."""
NUM_NAMED, MAX_THUMBNAIL = 3, 1 / 4
"""Duplicates and thumbnails that are named; and the largest short side of a thumbnail, as a fraction of the median one."""
MIN_IMAGES = 100
"""Fewer images give a warning."""
MASK_ENDING = re.compile(rb"(.+)([._-](?:masks?|seg|segmentation|gt))", re.IGNORECASE | re.DOTALL)
"""Names, without extension, of what may be a mask beside an image."""
MIN_LEVELS = 128
"""Of 256 levels of gray: images that use fewer look flat."""
ONE_CHANNEL = "gray, and read as three equal channels: 1 channel would do"


class ImageInfo(NamedTuple):
    """Facts about a readable image.

    Attributes:
        size: height and width of the upright image, pixels.
        mode: format and mode, e.g. 'JPEG RGB'.
        value_range: 0.1 % and 99.9 % points of its values, without nodata, if the upper 8 of 16 bits are read; None: they are not.
        gray: whether it is read as RGB and its three channels are the same.
        row: index of the image in the list.
        thumbnail: by which near duplicates are found.
    """

    size: tuple[int, int]
    mode: str
    value_range: tuple[int, int] | None
    gray: bool
    row: int
    thumbnail: Thumbnail


@dataclass(frozen=True)
class DatasetStats:
    """What `mapet check` finds in a list of images.

    Attributes:
        images: the list.
        infos: of the readable images, in its order.
        unreadable: id -> reason, of the others.
        equal: indices of the images of each group whose files have equal bytes.
        alike: indices of each two images that are near duplicates, and not equal; None: too many look alike to tell.
    """

    images: ImageList = field(repr=False)
    infos: list[ImageInfo] = field(repr=False)
    unreadable: dict[str, str]
    equal: list[list[int]] = field(repr=False)
    alike: list[tuple[int, int]] | None = field(repr=False)

    @property
    def modes(self) -> Counter[str]:
        """Count the images of each mode, e.g. 'JPEG RGB'."""
        return Counter(info.mode for info in self.infos)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        total = int(self.images.file_sizes.clip(min=0).sum())  # without files of unknown size, -1
        size = f"{total / 1e6:,.1f} MB" if total >= 1e5 else f"{total / 1e3:.1f} kB"
        yield f"{len(self.images):,} images in {self.images.root}, {size}; {self.images.ignored} other files ignored"
        if classes := self.images.classes():
            counts = np.bincount(classes[1])
            names = ", ".join(classes[0][:NUM_SHOWN]) + (", ..." if len(classes[0]) > NUM_SHOWN else "")
            yield f"labels: {len(classes[0])} classes, {counts.min()} to {counts.max()} images each ({names})"
            if self.images.label_note:
                yield f"note: {self.images.label_note}"
        else:
            yield f"labels: none ({self.images.label_note or 'they are taken from class folders, CLASS/image.jpg, if every image is in one'})"
        if self.infos:
            sizes = np.percentile([info.size for info in self.infos], (0, 50, 100), axis=0).astype(int)
            low, middle, high = (f"{height} x {width}" for height, width in sizes)
            yield f"height x width: smallest {low}, median {middle}, largest {high} px"
            yield "modes: " + ", ".join(f"{mode} {count:,}" for mode, count in self.modes.most_common())
            if note := count_levels(self.infos)[1]:
                yield f"note: {note}"
            if all(info.gray for info in self.infos):
                yield f"note: all are {ONE_CHANNEL}"
        yield from self._duplicate_lines()
        yield f"unreadable: {len(self.unreadable):,}"
        for name, reason in self.unreadable.items():
            yield f"  {name!r}: {reason}"

    def _duplicate_lines(self) -> Iterator[str]:
        """Yield what is known of duplicates, with the first ones by name."""
        if self.equal:
            names = "; ".join(
                " = ".join(repr(self.images.id(i)) for i in group[:3]) for group in self.equal[:NUM_NAMED]
            )
            count = sum(map(len, self.equal))
            yield f"exact duplicates: {count:,} images, in {pluralize(len(self.equal), 'group')} that splits keep together: {names}"
        if self.alike:
            names = "; ".join(f"{self.images.id(a)!r} ~ {self.images.id(b)!r}" for a, b in self.alike[:NUM_NAMED])
            fix = f"splits do not keep them together: remove one of each, or name their groups by {option('group_by')}"
            yield f"near duplicates (resized, recompressed or brightened copies): {pluralize(len(self.alike), 'pair')}: {names}; {fix}"
        elif self.alike is None:
            yield "near duplicates: not looked for, as most images look alike"

    def _class_warnings(self) -> Iterator[str]:
        """Yield a warning if there is one class folder alone, or classes of one image."""
        folders = {image_id.partition(b"/")[0] if b"/" in image_id else b"" for image_id in self.images.ids}
        classes = self.images.classes()
        if classes is None and len(folders) == 1 and b"" not in folders:
            name = next(iter(folders)).decode(errors="backslashreplace")
            fix = "give the folder that holds the class folders, or ignore this if there are no classes"
            yield f"all images are in the folder {name!r} alone, which is no label: {fix}"
        if classes is not None:
            single = [name for name, count in zip(classes[0], np.bincount(classes[1]), strict=True) if count == 1]
            if single:
                names = ", ".join(single[:NUM_SHOWN]) + (", ..." if len(single) > NUM_SHOWN else "")
                yield f"{pluralize(len(single), 'class')} of one image, which can be trained on or tested, not both: {names}"

    def warnings(self, image_size: tuple[int, int], max_unreadable: float) -> Iterator[str]:
        """Yield a warning for each reason why other commands would refuse these images, or learn little from them.

        Args:
            image_size: height and width of the student's input, pixels.
            max_unreadable: fraction of unreadable images that other commands allow by default.
        """
        count, num_unreadable = len(self.images), len(self.unreadable)
        if num_unreadable > max(1, max_unreadable * count):
            refused = f"other commands refuse more than {max_unreadable:.0%}"
            yield f"{num_unreadable:,} of {count:,} are unreadable: {refused}; remove them or raise {option('max_unreadable')}"
        warnings = (
            few_images_warning(len(self.infos)),
            upscaling_warning(self.infos, image_size),
            masks_warning(self.images),
            self._thumbnail_warning(),
            *self._class_warnings(),
        )
        yield from filter(None, warnings)

    def _thumbnail_warning(self) -> str:
        """Return a warning if a few images are much smaller than the others, else ''."""
        sides = np.array([min(info.size) for info in self.infos] or [1])
        small = np.flatnonzero(sides < MAX_THUMBNAIL * np.median(sides))
        if not len(small):
            return ""
        names = ", ".join(repr(self.images.id(self.infos[place].row)) for place in small[:NUM_NAMED])
        return (
            f"{pluralize(len(small), 'image')} of less than a quarter of the median size, perhaps thumbnails or icons: {names}"
            f"{', ...' if len(small) > NUM_NAMED else ''}: remove them if they are"
        )


def few_images_warning(count: int) -> str:
    """Return a warning if there are fewer than `MIN_IMAGES` images, else ''."""
    are = f"{pluralize(count, 'image')} {'is' if count == 1 else 'are'}"
    hint = "expect little, and train for hundreds of epochs (see docs/requirements.md)"
    return f"{are} very few to learn from: {hint}" if count < MIN_IMAGES else ""


def masks_warning(images: ImageList) -> str:
    """Return a warning if names of the list are those of other images with an ending of `MASK_ENDING`, e.g. 0_mask.png beside 0.png, else ''."""
    stems = {os.path.splitext(name)[0] for name in images.ids}
    masks = [match for stem in stems if (match := MASK_ENDING.fullmatch(stem)) and match[1] in stems]
    if not masks:
        return ""
    ending = masks[0][2].decode()
    hint = f"move them to a folder of their own, which {option('seg_masks')} of `mapet evaluate` takes"
    return f"{len(masks)} names end in {ending}, each beside an image of that name, and are taken for images: if they are masks, {hint}"


def upscaling_warning(infos: list[ImageInfo], image_size: tuple[int, int], which: str = "") -> str:
    """Return a warning if most images are smaller than the student's input, else ''.

    Args:
        image_size: height and width of the input, pixels.
        which: ' of ...', which images these are, if not all.
    """
    smaller = [info.size[0] < image_size[0] or info.size[1] < image_size[1] for info in infos]
    if sum(smaller) <= len(infos) / 2:
        return ""
    return (
        f"{np.mean(smaller):.0%}{which} are smaller than the input, {format_size(image_size)} px, and would be enlarged, which takes "
        f"time and shows nothing new: choose a smaller {option('image_size')}, with a {option('patch_size')} that divides it"
    )


def count_levels(infos: list[ImageInfo]) -> tuple[int, str]:
    """Count how many of 256 levels the upper 8 bits of 16-bit images use.

    Returns:
        (the number, a note on it); (256, '') if no image has more than 8 bits.
    """
    ranges = np.array([info.value_range for info in infos if info.value_range is not None])
    if not len(ranges):
        return 256, ""
    low, high = int(np.percentile(ranges[:, 0], 1)), int(np.percentile(ranges[:, 1], 99))
    num_levels = (high >> 8) - (low >> 8) + 1
    return num_levels, (
        f"16-bit images hold values of about {low:,} to {high:,}, of which the upper 8 bits are used: {num_levels} of 256 levels. "
        f"--value-range {low} {high} makes use of all"
    )


def sample_image_infos(images: ImageList, channels: int, count: int) -> list[ImageInfo]:
    """Return facts about the readable ones among `count` images at equal distances in the list, read as `channels` channels."""
    indices = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    results = [_read_image_info(images, int(index), channels) for index in indices]
    return [result for result in results if isinstance(result, ImageInfo)]


def warn_from_sample(images: ImageList, channels: int, image_size: tuple[int, int]) -> None:
    """Warn, from `NUM_SHOWN` images, about upscaled, low-contrast or gray images, for those who do not run `mapet check`.

    Args:
        images: the list; the sample are images at equal distances in it. Unreadable ones are ignored: they are reported when they are used.
        channels: to read the images with.
        image_size: height and width of the student's input, pixels.
    """
    infos = sample_image_infos(images, channels, NUM_SHOWN)
    num_levels, note = count_levels(infos)
    if num_levels < MIN_LEVELS:
        log.warning("%s", note)
    if infos and all(info.gray for info in infos):
        log.warning(f"all %d images looked at are %s ({option('channels', 1)})", len(infos), ONE_CHANNEL)
    for warning in (
        upscaling_warning(infos, image_size, f" of {len(infos)} images looked at"),
        masks_warning(images),
    ):
        if warning:
            log.warning("%s", warning)


def find_value_range(images: ImageList, channels: int) -> ImageList:
    """Return the list read by a range: if its range is to be found, the 0.1 % and 99.9 % points of each band, over `NUM_SAMPLED` images.

    Values without data do not count. Where no image that was looked at has more than 8 bits, there is no range.

    Args:
        images: the list, whose `read_options` say whether to find one.
        channels: to read the images with.
    """
    if images.read_options.value_range != ():
        return images
    samples = []
    for image in _sample_deep_images(images, channels, NUM_SAMPLED):
        values = image.stored_values().reshape(-1, image.stored_values().shape[2])
        samples.append(values[:: max(1, len(values) // NUM_VALUES)])
    value_range = None
    if samples:
        points = np.nanpercentile(np.concatenate(samples), PERCENTILES, axis=0).T.astype(float)  # (bands, 2)
        points[:, 1] = np.maximum(points[:, 1], np.nextafter(points[:, 0], np.inf))  # of a band of one value
        value_range = tuple(points.flatten().tolist())
    text = " ".join(f"{value:g}" for value in value_range) if value_range else "none, as they have 8 bits"
    log.info("range of values of %d images looked at: %s", len(samples), text)
    return images.read_as(images.read_options.model_copy(update={"value_range": value_range}))


def warn_outside_range(images: ImageList, channels: int) -> None:
    """Warn if, among `NUM_SHOWN` images, one has more than 1 % of its values outside the range that they are read with.

    Args:
        images: the list; the sample are images at equal distances in it.
        channels: to read the images with.
    """
    most_outside: tuple[float, str] | None = None
    count, sample = 0, list(_sample_deep_images(images, channels, NUM_SHOWN))
    for image in sample:
        values = image.stored_values()
        assert image.ranges is not None
        low, high = image.ranges.T
        outside = float(((values < low) | (values > high)).sum() / max(1, np.isfinite(values).sum()))
        count += outside > MAX_OUTSIDE
        if outside > MAX_OUTSIDE and (most_outside is None or outside > most_outside[0]):
            points = np.nanpercentile(values, PERCENTILES)
            most_outside = (
                outside,
                f"up to {outside:.1%} of their values, which are of about {points[0]:g} to {points[1]:g}",
            )
    if most_outside:
        value_range = " ".join(f"{value:g}" for value in images.read_options.value_range or ())
        log.warning(
            "%d of %d images looked at have more than %.0f %% of their values outside the range %s that they are read with: %s; give another "
            f"{option('value_range')}",
            count, len(sample), 100 * MAX_OUTSIDE, value_range, most_outside[1],
        )  # fmt: skip


def _sample_deep_images(images: ImageList, channels: int, count: int) -> Iterator[DecodedImage]:
    """Yield the readable images of more than 8 bits, of at most `count` at equal distances; a range to be found is set to any."""
    if images.read_options.value_range == ():
        images = images.read_as(images.read_options.model_copy(update={"value_range": (0.0, 1.0)}))
    if not images.read_options.value_range:
        return
    for index in np.unique(np.linspace(0, len(images) - 1, count).astype(int)).tolist():
        try:
            image = images.open(index, channels)
        except ImageDecodeError:  # reported when it is used
            continue
        if isinstance(image, DecodedImage) and image.ranges is not None and image.valid(image.array).any():
            yield image


def compute_dataset_stats(images: ImageList, channels: int, threads: int) -> DatasetStats:
    """Decode every image, in this number of threads, and return the statistics; a progress bar is shown.

    An image that cannot be read is not an error: it is listed in `DatasetStats.unreadable`.
    """
    with ThreadPoolExecutor(threads) as pool:
        reading = pool.map(lambda index: _read_image_info(images, index, channels), range(len(images)))
        results = list(tqdm(reading, total=len(images), desc="check", unit="img", disable=None))
    unreadable = {images.id(index): reason for index, reason in enumerate(results) if isinstance(reason, str)}
    infos = [info for info in results if isinstance(info, ImageInfo)]
    near = find_near_duplicates([info.thumbnail for info in infos]) if infos else np.zeros((0, 2), np.int64)
    [groups] = find_groups([images])
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    equal = sorted(group.tolist() for group in members if len(group) > 1)
    alike = None
    if near is not None:
        pairs = [(infos[a].row, infos[b].row) for a, b in near.tolist()]
        alike = [(a, b) for a, b in pairs if groups[a] != groups[b]]
    return DatasetStats(images, infos, unreadable, equal, alike)


def _read_image_info(images: ImageList, index: int, channels: int) -> ImageInfo | str:
    """Decode image `index` of a list as `channels` channels; return the facts about it, or a text, the reason why it cannot be read."""

    def decode(index: int) -> tuple[LazyImage, UInt8[Tensor, "C h w"]]:
        image = images.open(index, channels)
        return image, image.read()

    (outcome,) = read_each(decode, [index], images.id)
    if isinstance(outcome, ImageDecodeError):
        return str(outcome)
    image, pixels = outcome
    value_range = None
    if isinstance(image, DecodedImage) and image.bits == 16 and image.ranges is None:
        valid = image.array[image.valid(image.array)]
        low, high = np.percentile(valid, PERCENTILES) if valid.size else (0, 0)
        value_range = int(low), int(high)
    # Every 16th pixel is compared first: that is enough for most images in color.
    gray = len(pixels) == 3 and all(bool((part == part[:1]).all()) for part in (pixels[:, ::16, ::16], pixels))
    return ImageInfo(image.size, image.kind, value_range, gray, index, make_thumbnail(pixels))
