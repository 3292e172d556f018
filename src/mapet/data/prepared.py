"""A prepared data set: every image resized once, packed into a few large files that are mapped into memory."""

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torchvision.transforms.v2.functional as tvf

from mapet.config.data import PrepareConfig
from mapet.data.image_list import ImageList, ImageReader, Labels, PackedStrings
from mapet.data.readers import REDUCTIONS, Box, ImageDecodeError, IntensityWindow, LazyImage
from mapet.device import num_workers
from mapet.errors import MapetError
from mapet.files import MANIFEST, atomic_write, check_same_options, read_array, read_manifest, write_manifest

IDS, LABELS, SHARD, SIZES = "ids.bin", "labels.npy", "images-{:05d}.bin", "nbytes-{:05d}.npy"
KIND, FORMAT = "prepared data set", 1
JPEG_QUALITY = 90
PER_SHARD = 10_000
"""Images in one file: about 300 MB at 256 px."""
OPEN_AT_ONCE = 256
"""Files a process keeps mapped: systems commonly allow 1,024 open ones, and 100 million images are 10,000 files."""
OnUnreadable = Callable[[int, str], None]
"""Called with (index, reason) of each unreadable image; may raise to stop."""
OnImage = Callable[[int], None]
"""Called with the number of images done since the last call."""


class PreparedDataset(ImageReader):
    """Images of a folder made by `mapet prepare`.

    `ids.bin` holds the ids in order, each ended by a zero byte; `images-*.bin` the images one after another, as JPEG (as they
    were where they were small enough already; as arrays where JPEG can't hold them); `nbytes-*.npy` their sizes, 0 for an
    unreadable one; `labels.npy` the classes, where the source gave them otherwise than by folders; `manifest.json` says the rest.

    Attributes:
        manifest: images_hash, num_images, short_side, channels, jpeg_quality, num_done, unreadable, perhaps classes
            and streamed (the data set's name), value_range (of the `IntensityWindow` that its images were read through).
    """

    def __init__(self, folder: Path) -> None:
        """Open a finished one.

        Raises:
            MapetError: damaged or unfinished.
        """
        self.folder, self.manifest = folder, read_manifest(folder, KIND, FORMAT)
        try:
            done, total = int(self.manifest["num_done"]), int(self.manifest.get("num_images", -1))
            if done != total:
                found = f"{done} of {total if total >= 0 else 'all'} images"
                raise MapetError(
                    f"{folder} is unfinished ({found}): finish it by the same `mapet prepare ... --resume`"
                )
            self._unreadable = {int(index): reason for index, reason in self.manifest["unreadable"].items()}
            shards = range(-(-total // PER_SHARD))
            sizes = [read_array(folder / SIZES.format(shard)) for shard in shards]
            labels = (self.manifest["classes"], read_array(folder / LABELS)) if "classes" in self.manifest else None
            if labels is not None and (labels[1].shape != (total,) or labels[1].max() >= len(labels[0])):
                raise ValueError(f"labels of shape {labels[1].shape}")
            super().__init__(folder, PackedStrings.split((folder / IDS).read_bytes()), np.concatenate(sizes), labels)
            packed = sum((folder / SHARD.format(shard)).stat().st_size for shard in shards)
            if len(self.file_sizes) != total or len(self.ids) != total or packed != self.file_sizes.sum():
                found = f"{len(self.file_sizes)} of {packed:,}"
                raise ValueError(f"{total} images of {self.file_sizes.sum():,} bytes, found {found}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MapetError(f"{folder}: damaged ({error}); make it again with `mapet prepare`") from None
        self._starts = np.concatenate([np.cumsum(part) - part for part in sizes])

    @cached_property
    def _map(self) -> Callable[[int], np.ndarray]:
        return lru_cache(OPEN_AT_ONCE)(lambda shard: np.memmap(self.folder / SHARD.format(shard), np.uint8, "r"))

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedDataset, (self.folder,)  # loader workers map the files again

    def open(self, index: int, channels: int, window: IntensityWindow | None = None) -> LazyImage:
        if index in self._unreadable:
            raise ImageDecodeError(self._unreadable[index])  # it was so when the set was made
        return super().open(index, channels, window)

    def data(self, index: int) -> bytes:
        start = int(self._starts[index])
        return self._map(index // PER_SHARD)[start : start + int(self.file_sizes[index])].tobytes()


def resize_and_encode(picture: LazyImage, stored: Callable[[], bytes], size: int, channels: int) -> bytes:
    """An image with its short side at `size` pixels at most, encoded; what is `stored` where that needs no change.

    Raises:
        ImageDecodeError: with the reason.
    """
    height, width = picture.size
    short = min(height, width)
    if short <= size and not picture.windowed:
        picture.read()  # bad ones are found now
        return stored()
    target = [max(1, round(side * min(size, short) / short)) for side in picture.size]
    room = next((r for r in REDUCTIONS if min(height // target[0], width // target[1]) >= r), 1)
    box = Box(0, 0, height // room * room, width // room * room)  # so that a JPEG may be decoded reduced
    pixels = picture.read(box, min_size=(target[0], target[1]))
    pixels = tvf.resize(pixels, target, tvf.InterpolationMode.BICUBIC, antialias=True)
    rows = pixels.movedim(0, -1).contiguous().numpy()
    if channels in (1, 3):
        return simplejpeg.encode_jpeg(rows, JPEG_QUALITY, "GRAY" if channels == 1 else "RGB", "420", fastdct=False)
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


class PreparedDatasetWriter:
    """A prepared data set being made: shard by shard, each whole or not there.

    Attributes:
        manifest: what is done so far.
        window: of the values of images that are more than 8 bits.
    """

    def __init__(self, config: PrepareConfig, source: dict[str, Any], on_bad: OnUnreadable, on_image: OnImage) -> None:
        """Begin one in `config.out`, or resume an unfinished one.

        Args:
            source: entries of the manifest that tell what is prepared.

        Raises:
            MapetError: the folder holds one begun with other images or options.
        """
        self.config, self.folder, self.on_bad, self.on_image = config, config.out, on_bad, on_image
        self.window = IntensityWindow(*config.value_range) if config.value_range else None
        options = config.model_dump(mode="json", include={"short_side", "channels", "value_range"})
        wanted = source | options | {"jpeg_quality": JPEG_QUALITY}
        self.is_new = not (self.folder / MANIFEST).exists()
        self.manifest = wanted | {"num_done": 0, "unreadable": {}}
        if not self.is_new:
            self.manifest = read_manifest(self.folder, KIND, FORMAT)
            check_same_options(self.folder, {key: self.manifest.get(key) for key in wanted}, wanted)
        on_image(self.num_done)
        for row, reason in self.manifest["unreadable"].items():
            on_bad(int(row), reason)

    @property
    def num_done(self) -> int:
        """Images in whole shards."""
        return self.manifest["num_done"]

    def describe(self, ids: PackedStrings, labels: Labels | None) -> None:
        """Write what is known of all images, and the manifest that counts them."""
        with atomic_write(self.folder / IDS) as temporary:
            temporary.write_bytes(b"".join(name + b"\0" for name in ids))
        if labels is not None:
            with atomic_write(self.folder / LABELS) as temporary, temporary.open("wb") as file:
                np.save(file, labels[1])
        self.save()

    def encode(self, image: LazyImage, stored: Callable[[], bytes]) -> bytes:
        """Resize and encode an image; see `resize_and_encode`."""
        return resize_and_encode(image, stored, self.config.short_side, self.config.channels)

    def add_shard(self, images: Iterable[Any], encode: Callable[[Any], bytes]) -> None:
        """Encode images, several at a time, and write them as the next shard; `save` makes it count."""
        shard, sizes, bad, images = self.num_done // PER_SHARD, list[int](), dict[str, str](), iter(images)

        def attempt(image: Any) -> bytes | str:
            try:
                return encode(image)
            except ImageDecodeError as error:
                return str(error)

        pool = ThreadPoolExecutor(num_workers() + 1)
        with pool, atomic_write(self.folder / SHARD.format(shard)) as temporary, temporary.open("wb") as file:
            while several := list(islice(images, 256)):  # a bounded number in memory
                for result in pool.map(attempt, several):
                    if isinstance(result, str):
                        index = self.num_done + len(sizes)
                        bad[str(index)] = result
                        self.on_bad(index, result)
                    sizes.append(0 if isinstance(result, str) else file.write(result))
                self.on_image(len(several))
        with atomic_write(self.folder / SIZES.format(shard)) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(sizes, np.int64))
        self.manifest["unreadable"] |= bad
        self.manifest["num_done"] += len(sizes)

    def save(self) -> None:
        """Write the manifest: what it counts is on disk."""
        write_manifest(self.folder, KIND, FORMAT, self.manifest)


def write_prepared_dataset(
    images: ImageList, config: PrepareConfig, on_bad: OnUnreadable, on_image: OnImage
) -> PreparedDataset:
    """Prepare a list of images, or resume; see `PreparedDatasetWriter`."""
    source: dict[str, Any] = {"images_hash": images.hash, "num_images": len(images)}
    if images.labels is not None:
        source["classes"] = images.labels[0]
    writer = PreparedDatasetWriter(config, source, on_bad, on_image)
    if writer.is_new:
        writer.describe(images.ids, images.labels)
    while writer.num_done < len(images):
        writer.add_shard(
            range(writer.num_done, min(writer.num_done + PER_SHARD, len(images))),
            lambda index: writer.encode(images.open(index, config.channels, writer.window), lambda: images.data(index)),
        )
        writer.save()
    return PreparedDataset(config.out)
