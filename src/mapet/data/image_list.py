"""Lists of images, whatever source they are read from: stable ids, labels where there are some, one hash over it all."""

import copy
import hashlib
import os
import unicodedata
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike
from tqdm import tqdm

from mapet.config.shared import AS_STORED, ReadOptions
from mapet.data.readers.image import ImageDecodeError, ImageFile, LazyImage, check_byte_count, translate_errors
from mapet.data.readers.open import count_pages, open_image
from mapet.device import num_workers
from mapet.errors import option

NUM_HASHED = 64
"""Images whose contents stand for all in `ImageList.content_hash`: to read all would take as long as an epoch."""
Labels = tuple[list[str], Int[np.ndarray, " n"]]
"""Names of the classes, and the class index of each image."""


SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""Names of folders, in lower case, that are parts of a split rather than classes."""


class PackedStrings(Sequence[bytes]):
    """Byte strings stored end to end: even a million of them are two objects, which forked processes share.

    Attributes:
        block: the strings, one after another.
        ends: (n + 1,) offset in `block` at which each string ends, preceded by 0.
    """

    def __init__(self, block: bytes, ends: Int[np.ndarray, " n+1"]) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def from_strings(cls, strings: Iterable[bytes]) -> "PackedStrings":
        """Pack any byte strings, which may be an iterator over millions of them."""
        block, ends = bytearray(), array("q", [0])
        for string in strings:
            block += string
            ends.append(len(block))
        return cls(bytes(block), np.array(ends, np.int64))

    @classmethod
    def from_terminated(cls, block: bytes) -> "PackedStrings":
        """Split a block of strings that each end with a zero byte and contain no other."""
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0)
        return cls(block.replace(b"\0", b""), np.append(0, ends - np.arange(len(ends))))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.block[self.ends[index] : self.ends[index + 1]]

    def __iter__(self) -> Iterator[bytes]:
        return (self.block[start:end] for start, end in pairwise(self.ends.tolist()))


def join_terminated(strings: Iterable[bytes]) -> bytes:
    """Join byte strings, each followed by a zero byte; `PackedStrings.from_terminated` splits them."""
    return b"".join(string + b"\0" for string in strings)


def labels_from_texts(texts: PackedStrings, sort_key: Callable[[bytes], Any] | None = None) -> Labels | None:
    """Turn the class name of each image into labels.

    Args:
        texts: the class name of each image, bytes in any encoding; empty: the image has none.
        sort_key: key function that orders the classes, as `sorted` takes it; None: by their bytes.

    Returns:
        (sorted names of the classes, class index of each image); None if an image has no class name, or all have the same. Bytes that
        are no UTF-8 are written as Python does, \\xe9.
    """
    # Texts that differ only in how Unicode composes their characters (NFC, NFD), as macOS and others do, are one class.
    composed = {text: _compose(text) for text in set(texts)}
    classes = sorted(set(composed.values()), key=sort_key)
    if len(classes) < 2 or b"" in classes:
        return None
    class_index = {text: classes.index(name) for text, name in composed.items()}
    indices = np.fromiter(map(class_index.__getitem__, texts), np.int64, len(texts))
    return [text.decode(errors="backslashreplace") for text in classes], indices


def _compose(text: bytes) -> bytes:
    """Return UTF-8 text in Unicode's normal form C, and other bytes unchanged."""
    try:
        return unicodedata.normalize("NFC", text.decode()).encode()
    except UnicodeDecodeError:
        return text


class ImageList(Sequence[Path]):
    """Images of a source in a fixed order, all or some of them; any can be read at any time.

    A subclass is a kind of source and reads its bytes. Lists go to loader workers: they hold no open files that a forked
    process could not use, and can be pickled. A million images take about 60 MB, which forked workers share.

    Attributes:
        root: where the images are: a folder, shards, or the name of a data set.
        ids: of the images, e.g. paths below `root`: the same when the source moves.
        file_sizes: (n,) bytes of each image; -1: unknown. A replaced image is noticed by its size, which is part of `hash`.
        labels: that the source itself gives; None: `classes` looks at the folders in the ids.
        ignored: number of files of the source that are not images by their extension.
        rows: (n,) index of each image in the whole source, of which `subset` takes a part.
        read_options: how the files are read.
        label_note: why images have no labels, or what is odd about them; '' if nothing is known.
    """

    read_options = AS_STORED
    label_note = ""

    def __init__(
        self, root: Path | str, ids: Iterable[bytes], sizes: ArrayLike, labels: Labels | None = None, ignored: int = 0
    ) -> None:
        """Keep what a subclass has listed; see the class.

        Args:
            root: where the images are: a folder, shards, or the name of a data set.
            ids: of the n images, in order, each unique; any iterable is packed.
            sizes: (n,) bytes of each image; -1: unknown.
            labels: (names of the classes, class index of each image); None: the folders in the ids are the classes.
            ignored: number of files of the source that are not images by their extension.
        """
        self.root, self.labels, self.ignored = root, labels, ignored
        self.ids = ids if isinstance(ids, PackedStrings) else PackedStrings.from_strings(ids)
        self.file_sizes = np.asarray(sizes, np.int64)
        self.rows = np.arange(len(self.ids))

    @abstractmethod
    def data(self, index: int) -> bytes:
        """Return the image's bytes as they are stored.

        Raises:
            ImageDecodeError: with the reason why the image cannot be read.
        """

    def digest(self, index: int) -> bytes:
        """Return a hash of the image's bytes, by which exact duplicates are found; b'' if it cannot be read, or they do not tell."""
        try:
            return hashlib.blake2b(self.data(index), digest_size=16).digest()
        except (OSError, ImageDecodeError):  # reported when it is used
            return b""

    def file(self, index: int) -> ImageFile:
        """Return what `open_image` is given: the image's bytes, or its path if it is a file."""
        return self.data(index)

    def open(self, index: int, channels: int, page: int | None = None) -> LazyImage:
        """Open an image as `read_options` say, to read 8-bit pixels of any box of it; see `open_image`.

        Args:
            index: of the image in this list.
            channels: C of the pixels.
            page: index of the page of its file; None: `read_options` decide.

        Raises:
            ImageDecodeError: with the reason why the image cannot be read.
            MapetError: `read_options` are of another number of channels; or the source fails as a whole, e.g. a shard cannot be read.
        """
        check_byte_count(int(self.file_sizes[index]))
        self.read_options.check_channels(channels)
        return open_image(self.file(index), channels, self.read_options, page)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        raise TypeError(f"the images of {self.root} are not files of their own: use open() or data()")

    def id(self, index: int) -> str:
        """Return the id; bytes that are not UTF-8 are kept as surrogates, as `os.fsdecode` does."""
        return os.fsdecode(self.ids[index])

    def printable_id(self, index: int) -> str:
        """Return the id as valid UTF-8 for files of other programs; other bytes are written as \\xNN."""
        return self.ids[index].decode("utf-8", "backslashreplace")

    def key(self, index: int) -> int:
        """Return a 64-bit hash of the id, which seeds the image's random draws whatever its place in the list."""
        return int.from_bytes(hashlib.blake2b(self.ids[index], digest_size=8).digest(), "little")

    def keys(self) -> Int[np.ndarray, " n"]:
        """Return the `key` of every image, uint64."""
        return np.fromiter(map(self.key, range(len(self))), np.uint64, len(self))

    @cached_property
    def hash(self) -> str:
        """Return the sha256 over ids and file sizes, in order."""
        digest = hashlib.sha256()
        for part in (self.ids.ends.data, self.ids.block, np.ascontiguousarray(self.file_sizes).data):
            digest.update(part)
        return digest.hexdigest()

    @cached_property
    def content_hash(self) -> str:
        """Return the sha256 over the bytes of `NUM_HASHED` images, spread over the list; those that cannot be read count as empty."""
        digest = hashlib.sha256()
        for index in np.unique(np.linspace(0, len(self) - 1, NUM_HASHED).round().astype(int)).tolist():
            with suppress(ImageDecodeError):
                digest.update(hashlib.sha256(self.data(index)).digest())
        return digest.hexdigest()

    def read_as(self, options: ReadOptions) -> Self:
        """Return the same list, whose images are read as the options say."""
        images = copy.copy(self)
        images.read_options = options
        return images

    def subset(self, indices: Iterable[int]) -> Self:
        """Return a list of the images at these indices of this list, in their order; with labels, it has the same classes."""
        positions = np.fromiter(indices, np.int64)
        part = copy.copy(self)
        part.__dict__.pop("hash", None)  # that of the whole list
        part.ids = PackedStrings.from_strings(self.ids[index] for index in positions)
        part.file_sizes, part.rows = self.file_sizes[positions], self.rows[positions]
        part.labels = self.labels and (self.labels[0], self.labels[1][positions])
        return part

    def classes(self) -> Labels | None:
        """Return the source's labels; if it has none, those of the folders: the first folder in an image's id is the image's class.

        None if an image is in no folder, all are in the same, or the folders are the parts of a split, such as train and test; then
        `label_note` says so.
        """
        if self.labels is not None:
            return self.labels
        folders = PackedStrings.from_strings(name[: max(0, name.find(b"/"))] for name in self.ids)
        names = set(folders)
        parts = sorted(os.fsdecode(name) for name in names)
        if len(names) > 1 and SPLITS.issuperset(name.lower() for name in parts):
            train = next((name for name in parts if name.lower().startswith("train")), parts[-1])
            hint = f"give {option('images')} {self.root}/{train} {option('test_images')} {self.root}/{parts[0]}"
            self.label_note = f"the folders {', '.join(parts)} are parts of a split, not classes: {hint}"
            return None
        if len(set(map(_compose, names))) < len(names):
            self.label_note = "folders whose names differ only in Unicode's form (NFC, NFD) are the same class"
        return labels_from_texts(folders)


class ImageFiles(ImageList):
    """Images that are files; ids are paths relative to `root`, or absolute."""

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return Path(self.root, os.fsdecode(self.ids[index]))

    file = __getitem__

    def data(self, index: int) -> bytes:
        with translate_errors():
            return self[index].read_bytes()


class ImagePages(ImageList):
    """Pages of the images of a list, each an image; ids are ID#PAGE, counted from 1, of files with several.

    Attributes:
        images: the list.
        image_rows, pages: (n,) index in the list, and of the page, by row.
    """

    def __init__(self, images: ImageList, counts: Sequence[int]) -> None:
        """Keep the list, and the number of pages of each of its images, at least 1."""
        self.images = images
        self.image_rows = np.repeat(np.arange(len(images)), counts)
        self.pages = np.concatenate([np.arange(count) for count in counts])
        ids = (
            images.ids[row] + (b"#%d" % (page + 1) if counts[row] > 1 else b"")
            for row, page in zip(self.image_rows.tolist(), self.pages.tolist(), strict=True)
        )
        labels = images.labels and (images.labels[0], images.labels[1][self.image_rows])
        super().__init__(images.root, ids, images.file_sizes[self.image_rows], labels, images.ignored)
        self.read_options = images.read_options

    def data(self, index: int) -> bytes:
        return self.images.data(int(self.image_rows[self.rows[index]]))

    def digest(self, index: int) -> bytes:
        return b""  # pages of a file are no duplicates of each other

    def open(self, index: int, channels: int, page: int | None = None) -> LazyImage:
        row = self.rows[index]
        return self.images.open(int(self.image_rows[row]), channels, int(self.pages[row]))


def split_pages(images: ImageList) -> ImageList:
    """Return a list in which each page of a file with several is an image; every file is opened once to count its pages."""

    def count(index: int) -> int:
        try:
            return count_pages(images.file(index))
        except ImageDecodeError:  # reported as unreadable when it is read
            return 1

    with ThreadPoolExecutor(num_workers() + 1) as pool:
        counted = pool.map(count, range(len(images)))
        counts = list(tqdm(counted, total=len(images), desc="pages", unit="file", disable=None, leave=False))
    return ImagePages(images, counts)
