"""A prepared data set: every image resized once, packed into a few large files that are mapped into memory."""

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import simplejpeg
import torchvision.transforms.v2.functional as tvf
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from mapet import files
from mapet.config.data import PrepareConfig
from mapet.config.shared import ReadOptions
from mapet.data.dataset import UnreadableImages
from mapet.data.hugging_face import HFStream, StreamedImage, ids_from_paths, labels_from_column
from mapet.data.image_list import ImageFiles, ImageList, PackedStrings, join_terminated
from mapet.data.readers.image import REDUCTIONS, Box, ImageDecodeError, LazyImage
from mapet.data.readers.open import open_image
from mapet.data.readers.read_each import read_each
from mapet.device import num_workers
from mapet.errors import MapetError, describe_key_error

IDS, LABELS, SHARD, SIZES = "ids.bin", "labels.npy", "images-{:05d}.bin", "nbytes-{:05d}.npy"
STREAMED_ROWS = ".rows-{:05d}.json"
"""[path, bytes, class] of each row of a streamed shard, until all rows are known."""
KIND, FORMAT = "prepared data set", 1
JPEG_QUALITY = 90
SHARD_SIZE = 10_000
"""Images in one file: about 300 MB at 256 px."""
ENCODE_BATCH = 256
"""Images that are in memory at a time while a shard is written."""
MAX_OPEN_SHARDS = 256
"""Files a process keeps mapped: systems commonly allow 1,024 open ones, and 100 million images are 10,000 files."""
Item = TypeVar("Item")


class PreparedDataset(ImageList):
    """Images of a folder made by `mapet prepare`.

    `ids.bin` holds the ids in order, each ended by a zero byte; `images-*.bin` the images one after another, as JPEG (as they
    were where they were small enough already; as arrays where JPEG can't hold them); `nbytes-*.npy` their sizes, 0 for an
    unreadable one; `labels.npy` the classes, where the source gave them otherwise than by folders; `manifest.json` the rest.

    Attributes:
        manifest: images_hash, num_images, short_side, channels, jpeg_quality, num_done, unreadable (index as text -> reason);
            value_range, bands and pages (of `read_options`); perhaps classes (names), streamed (the data set's name).
        read_options: how the files were read when they were prepared; not applied again.
    """

    def __init__(self, folder: Path) -> None:
        """Open the finished data set in a folder: read everything but the images, and check that all parts have the same number of images.

        Args:
            folder: of `mapet prepare`.

        Raises:
            MapetError: the data set is damaged, unfinished, or there is none.
        """
        self.folder, self.manifest = folder, files.read_manifest(folder, KIND, FORMAT)
        try:
            num_done, total = int(self.manifest["num_done"]), int(self.manifest.get("num_images", -1))
            if num_done != total:  # the number of images of a stream is known at its end
                progress = f"{num_done} of {total if total >= 0 else 'all'} images"
                raise MapetError(f"{folder} is unfinished ({progress}): finish it with `mapet prepare ... --resume`")
            self._unreadable = {int(index): reason for index, reason in self.manifest["unreadable"].items()}
            shards = range(-(-total // SHARD_SIZE))
            sizes = [files.read_array(folder / SIZES.format(shard)) for shard in shards]
            class_names = self.manifest.get("classes")
            labels = (class_names, files.read_array(folder / LABELS)) if class_names else None
            if labels is not None and (labels[1].shape != (total,) or labels[1].max() >= len(labels[0])):
                raise ValueError(
                    f"expected the labels of {total} images of {len(labels[0])} classes, found {labels[1].shape}"
                )
            ids = PackedStrings.from_terminated((folder / IDS).read_bytes())
            super().__init__(folder, ids, np.concatenate(sizes), labels)
            packed = sum((folder / SHARD.format(shard)).stat().st_size for shard in shards)
            self.read_options = ReadOptions(**{name: self.manifest.get(name) for name in ReadOptions.model_fields})
            if len(self.file_sizes) != total or len(self.ids) != total or packed != self.file_sizes.sum():
                raise ValueError(
                    f"expected {total} images and {self.file_sizes.sum():,} bytes in all, found {len(self.file_sizes)} images and {packed:,} bytes"
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MapetError(
                f"{folder}: damaged ({describe_key_error(error)}): make it again with `mapet prepare`"
            ) from None
        self._starts = np.concatenate([np.cumsum(part) - part for part in sizes])  # byte in its shard, by row

    @cached_property
    def _map_shard(self) -> Callable[[int], np.ndarray]:
        """Return the function from the index of a shard to its bytes, mapped into memory; it keeps the last `MAX_OPEN_SHARDS`."""
        return lru_cache(MAX_OPEN_SHARDS)(lambda shard: np.memmap(self.folder / SHARD.format(shard), np.uint8, "r"))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_map_shard"}  # workers map files again

    def read_as(self, options: ReadOptions) -> Self:
        """Return the list itself: its images are read already."""
        return self

    def open(self, index: int, channels: int, page: int | None = None) -> LazyImage:
        """Open a prepared image, which has one page, with the channels that it was prepared with."""
        return open_image(self.file(index), channels)

    def data(self, index: int) -> bytes:
        """Return the bytes of a prepared image.

        Raises:
            ImageDecodeError: its original was unreadable when the data set was made, with the reason.
        """
        row = int(self.rows[index])
        if row in self._unreadable:
            raise ImageDecodeError(self._unreadable[row])
        start = int(self._starts[row])
        return self._map_shard(row // SHARD_SIZE)[start : start + int(self.file_sizes[index])].tobytes()


def resize_and_encode(image: LazyImage, stored: Callable[[], bytes], short_side: int, channels: int) -> bytes:
    """Resize an image to a short side, and encode it as JPEG or, if it has not 1 or 3 channels, as .npy array.

    An image that is small enough is not changed: it is stored as it is or, if that has not the 8-bit values that were read of it, as
    an .npy array of them.

    Args:
        image: open, with `channels` channels.
        stored: returns the image file's bytes.
        short_side: pixels; smaller images are not enlarged.

    Raises:
        ImageDecodeError: the image cannot be read, with the reason.
    """
    height, width = image.size
    current = min(height, width)
    if current <= short_side:
        pixels = image.read()  # an unreadable one is found now
        return _encode_array(pixels) if image.windowed else stored()
    target = [max(1, round(side * min(short_side, current) / current)) for side in image.size]
    reduction = next((r for r in REDUCTIONS if min(height // target[0], width // target[1]) >= r), 1)
    box = Box(0, 0, height - height % reduction, width - width % reduction)  # so that a JPEG can be decoded reduced
    pixels = image.read(box, min_size=(target[0], target[1]))
    pixels = tvf.resize(pixels, target, tvf.InterpolationMode.BICUBIC, antialias=True)
    if channels not in (1, 3):
        return _encode_array(pixels)
    rows = pixels.movedim(0, -1).contiguous().numpy()
    return simplejpeg.encode_jpeg(rows, JPEG_QUALITY, "GRAY" if channels == 1 else "RGB", "420", fastdct=False)


def _encode_array(pixels: UInt8[Tensor, "C h w"]) -> bytes:
    """Return the bytes of an .npy file of pixels."""
    buffer = io.BytesIO()
    np.save(buffer, pixels.movedim(0, -1).contiguous().numpy())
    return buffer.getvalue()


class PreparedDatasetWriter:
    """Writes a prepared data set shard by shard; each is complete or not there, so that writing can be resumed.

    Attributes:
        manifest: of the data set, as far as it is known; `save` writes it.
        is_new: nothing of it has been written yet.
    """

    def __init__(self, config: PrepareConfig, source: dict[str, Any], unreadable: UnreadableImages, bar: tqdm) -> None:
        """Start a data set in `config.out`, or resume an unfinished one.

        Args:
            config: of the command.
            source: entries of the manifest that say what is prepared.
            unreadable: counts the images that cannot be read; those of a resumed data set at once.
            bar: shows how many images are done.

        Raises:
            MapetError: the folder holds a data set of other images or options; too many images are unreadable.
        """
        self.config, self.folder, self.unreadable, self.bar = config, config.out, unreadable, bar
        options = config.model_dump(mode="json", include={"short_side", "channels", *ReadOptions.model_fields})
        expected = source | options | {"jpeg_quality": JPEG_QUALITY}
        self.is_new = not (self.folder / files.MANIFEST).exists()
        self.manifest = expected | {"num_done": 0, "unreadable": {}}
        if not self.is_new:
            self.manifest = files.read_manifest(self.folder, KIND, FORMAT)
            files.check_same_options(self.folder, {key: self.manifest.get(key) for key in expected}, expected)
        bar.update(self.num_done)
        unreadable.add([(int(index), reason) for index, reason in self.manifest["unreadable"].items()])

    @property
    def num_done(self) -> int:
        """Return the number of images in complete shards."""
        return self.manifest["num_done"]

    def describe(self, images: ImageList) -> None:
        """Write the ids and labels of all images, and the manifest with their hash and number."""
        self.manifest |= {"images_hash": images.hash, "num_images": len(images)}
        with files.atomic_write(self.folder / IDS) as temporary:
            temporary.write_bytes(join_terminated(images.ids))
        if images.labels is not None:
            self.manifest["classes"] = images.labels[0]
            self._write_array(LABELS, images.labels[1])
        self.save()

    def encode(self, image: LazyImage, stored: Callable[[], bytes]) -> bytes:
        """Resize and encode an image; see `resize_and_encode`."""
        return resize_and_encode(image, stored, self.config.short_side, self.config.channels)

    def add_shard(self, items: Iterable[Item], encode: Callable[[Item], bytes]) -> list[Item]:
        """Encode images in threads and write them as the next shard, which counts once `save` was called.

        Args:
            items: one for each image, at most `SHARD_SIZE`: whatever `encode` takes.
            encode: returns the image's bytes or raises ImageDecodeError; called in any thread. An image that it raises for becomes an
                unreadable row of no bytes.

        Returns:
            The items, in their order; [] if the iterator was at its end, which writes an empty shard that does not count.

        Raises:
            MapetError: too many images are unreadable. The shard is not written then; the complete ones before it stay.
        """
        shard, iterator = self.num_done // SHARD_SIZE, iter(items)
        sizes: list[int] = []
        done: list[Item] = []

        def encode_or_reason(item: Item) -> bytes | str:
            """Return the encoded image, or the reason why it cannot be read."""
            (outcome,) = read_each(encode, [item])
            return str(outcome) if isinstance(outcome, ImageDecodeError) else outcome

        pool = ThreadPoolExecutor(num_workers() + 1)
        with pool, files.atomic_write(self.folder / SHARD.format(shard)) as temporary, temporary.open("wb") as file:
            while batch := list(islice(iterator, ENCODE_BATCH)):
                for result in pool.map(encode_or_reason, batch):
                    if isinstance(result, str):
                        index = self.num_done + len(sizes)
                        self.manifest["unreadable"][str(index)] = result
                        self.unreadable.add([(index, result)])
                    sizes.append(0 if isinstance(result, str) else file.write(result))
                done += batch
                self.bar.update(len(batch))
        self._write_array(SIZES.format(shard), np.array(sizes, np.int64))
        self.manifest["num_done"] += len(sizes)
        return done

    def save(self) -> None:
        """Write the manifest: what it counts is on disk."""
        files.write_manifest(self.folder, KIND, FORMAT, self.manifest)

    def _write_array(self, name: str, values: np.ndarray) -> None:
        """Write an .npy file of this name into the folder, atomically."""
        with files.atomic_write(self.folder / name) as temporary, temporary.open("wb") as file:
            np.save(file, values)


def write_prepared_dataset(
    images: ImageList | HFStream, config: PrepareConfig, unreadable: UnreadableImages, bar: tqdm
) -> PreparedDataset:
    """Resize and pack images into `config.out`, or resume that; open the finished data set.

    A stream gives the same files as the downloaded data set, but for `streamed` in the manifest.

    Args:
        images: a list, or the rows of a data set that is not on this disk.
        config, unreadable, bar: see `PreparedDatasetWriter`, and for errors.

    Returns:
        The finished data set, opened.
    """
    if isinstance(images, HFStream):
        writer = PreparedDatasetWriter(config, {"streamed": images.source}, unreadable, bar)
        if "num_images" not in writer.manifest:
            _write_stream(images, writer)
        for file in config.out.glob(STREAMED_ROWS.replace("{:05d}", "*")):
            file.unlink()
        return PreparedDataset(config.out)
    source: dict[str, Any] = {"images_hash": images.hash, "num_images": len(images)}
    if images.labels is not None:
        source["classes"] = images.labels[0]
    writer = PreparedDatasetWriter(config, source, unreadable, bar)
    if writer.is_new:
        writer.describe(images)
    while writer.num_done < len(images):
        writer.add_shard(
            range(writer.num_done, min(writer.num_done + SHARD_SIZE, len(images))),
            lambda index: writer.encode(images.open(index, config.channels), lambda: images.data(index)),
        )
        writer.save()
    return PreparedDataset(config.out)


def _write_stream(stream: HFStream, writer: PreparedDatasetWriter) -> None:
    """Write the shards that a stream still has, then the ids, labels and hash of all its rows; originals are never on disk.

    After each shard the manifest is saved with the position in the stream, and a file (`STREAMED_ROWS`) with path, size and class of the
    shard's rows: a call after an interruption resumes behind the last complete shard.

    Args:
        stream: rows are read from the writer's position on.
        writer: of a new or unfinished data set whose `num_images` is not known yet; in the end it has described all images.

    Raises:
        MapetError: the stream was interrupted or has no rows, or too many images are unreadable.
    """

    def encode(row: StreamedImage) -> bytes:
        """Return the bytes that the data set stores of a row's image."""
        data = row.take()
        return writer.encode(open_image(data, writer.config.channels, writer.config), lambda: data)

    rows_file = f"{writer.folder}/{STREAMED_ROWS}"
    rows = stream.read(writer.num_done, writer.manifest.get("position"))
    while writer.num_done % SHARD_SIZE == 0:  # after a shard that is not full the stream has ended
        shard = writer.num_done // SHARD_SIZE
        done = writer.add_shard(islice(rows, SHARD_SIZE), encode)
        if not done:
            break
        shard_rows = [[row.path, row.size, row.label] for row in done]
        files.write_checksummed_json(Path(rows_file.format(shard)), {"rows": shard_rows})
        writer.manifest["position"] = stream.rows.state_dict()  # of the next row; JSON can hold it
        writer.save()
    all_rows: list[tuple[str | None, int, int]] = []
    for shard in range(-(-writer.num_done // SHARD_SIZE)):
        all_rows += files.read_checksummed_json(Path(rows_file.format(shard)), "list of the rows of a shard")["rows"]
    if not all_rows:
        raise MapetError(f"{stream.source} has no rows: choose another data set or split")
    paths, sizes, values = zip(*all_rows, strict=True)
    labels = labels_from_column(stream.class_names, np.array(values, np.int64))
    del writer.manifest["position"]
    writer.describe(ImageFiles(stream.source, ids_from_paths(list(paths)), sizes, labels))
