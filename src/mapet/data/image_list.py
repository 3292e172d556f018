"""Readers of image sources, and lists of their images: stable ids, labels where there are some, one hash over it all."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mapet.data.readers import MAX_BYTES, ImageDecodeError, IntensityWindow, LazyImage, open_image

Labels = tuple[list[str], Int[np.ndarray, " n"]]
"""Names of the classes, and the class index of each image."""


class PackedStrings(Sequence[bytes]):
    """Byte strings in one block: a million of them are two objects, which processes share.

    Attributes:
        block: all of them, one after another.
        ends: (n + 1,) where each ends, after a 0.
    """

    def __init__(self, block: bytes, ends: Int[np.ndarray, " n+1"]) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def pack(cls, strings: Iterable[bytes]) -> "PackedStrings":
        parts = list(strings)
        return cls(b"".join(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64))

    @classmethod
    def split(cls, block: bytes) -> "PackedStrings":
        """Unpack strings that each end with a zero byte."""
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0)
        return cls(block.replace(b"\0", b""), np.append(0, ends - np.arange(len(ends))))

    @classmethod
    def concatenate(cls, several: Sequence["PackedStrings"]) -> "PackedStrings":
        lengths = np.concatenate([np.diff(strings.ends) for strings in several])
        return cls(b"".join(strings.block for strings in several), np.append(0, np.cumsum(lengths)))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.block[self.ends[index] : self.ends[index + 1]]

    def __iter__(self) -> Iterator[bytes]:
        return (self.block[start:end] for start, end in pairwise(self.ends.tolist()))


def number_classes(texts: PackedStrings, key: Callable[[bytes], Any] | None = None) -> Labels | None:
    """Return the classes, each image's given by a text, in the order of `key`; None if one has none, or all the same."""
    classes = sorted(set(texts), key=key)
    if len(classes) < 2 or b"" in classes:
        return None
    index = {text: number for number, text in enumerate(classes)}
    return [os.fsdecode(text) for text in classes], np.fromiter(map(index.__getitem__, texts), np.int64, len(texts))


class ImageReader(ABC):
    """Images of a source, numbered; any can be read at any time.

    It goes to loader workers: it holds no open files that a forked process could not use, and can be pickled.

    Attributes:
        root: where the images are: a folder, shards, or the name of a data set.
        ids: of the images, e.g. paths below `root`: the same when the source moves.
        file_sizes: (n,) bytes of each image; -1: unknown.
        labels: that the source gives; without, folders in the ids are classes.
        ignored: number of files of the source that are not images by their extension.
    """

    def __init__(
        self, root: Path | str, ids: Iterable[bytes], sizes: Any, labels: Labels | None = None, ignored: int = 0
    ) -> None:
        self.root, self.labels, self.ignored = root, labels, ignored
        self.ids = ids if isinstance(ids, PackedStrings) else PackedStrings.pack(ids)
        self.file_sizes = np.asarray(sizes, np.int64)

    @abstractmethod
    def data(self, index: int) -> bytes:
        """Return the image's bytes as they are stored.

        Raises:
            ImageDecodeError: with the reason.
        """

    def open(self, index: int, channels: int, window: IntensityWindow | None = None) -> LazyImage:
        """Open the image; see `open_image`."""
        return open_image(self.data(index), channels, window)


class ImageFiles(ImageReader):
    """Images that are files; ids are paths below `root`."""

    def path(self, index: int) -> Path:
        return Path(self.root, os.fsdecode(self.ids[index]))

    def data(self, index: int) -> bytes:
        return self.path(index).read_bytes()

    def open(self, index: int, channels: int, window: IntensityWindow | None = None) -> LazyImage:
        return open_image(self.path(index), channels, window)


class ImageList(Sequence[Path]):
    """Images of a reader in a fixed order, all or some of them (a million: about 50 MB, shared by workers).

    Args:
        reader: of the images; its attributes `root` and `ignored` are the list's, too.
        indices: of the images in the reader; None: all.

    Attributes:
        ids, file_sizes, labels: as of a reader. A replaced image is noticed by its size, which is part of `hash`.
    """

    def __init__(self, reader: ImageReader, indices: Int[np.ndarray, " n"] | None = None) -> None:
        self.reader, self.root, self.ignored = reader, reader.root, reader.ignored
        self.ids, self.file_sizes, self.labels = reader.ids, reader.file_sizes, reader.labels
        self._indices: Any = range(len(self.ids)) if indices is None else indices
        if indices is not None:
            self.ids = PackedStrings.pack(reader.ids[index] for index in indices)
            self.file_sizes = self.file_sizes[indices]
            self.labels = self.labels and (self.labels[0], self.labels[1][indices])

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, index: int) -> str:
        """Return the id; bytes that are not UTF-8 are kept as surrogates, as `os.fsdecode` does."""
        return os.fsdecode(self.ids[index])

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not isinstance(self.reader, ImageFiles):
            raise TypeError(f"the images of {self.root} are not files of their own: use open() or data()")
        return self.reader.path(self._indices[index])

    def open(self, index: int, channels: int, window: IntensityWindow | None = None) -> LazyImage:
        """Open an image; see `open_image`.

        Raises:
            ImageDecodeError: with the reason.
        """
        if self.file_sizes[index] > MAX_BYTES:
            raise ImageDecodeError(f"{self.file_sizes[index]:,} bytes are more than {MAX_BYTES:,}")
        return self.reader.open(int(self._indices[index]), channels, window)

    def data(self, index: int) -> bytes:
        """Return the image's bytes as they are stored."""
        return self.reader.data(int(self._indices[index]))

    def key(self, index: int) -> int:
        """Return a 64-bit hash of the id: it seeds an image's random draws wherever it stands in a list."""
        return int.from_bytes(hashlib.blake2b(self.ids[index], digest_size=8).digest(), "little")

    def keys(self) -> Int[np.ndarray, " n"]:
        """Return the `key` of every image, uint64."""
        return np.fromiter(map(self.key, range(len(self))), np.uint64, len(self))

    @cached_property
    def hash(self) -> str:
        """sha256 over ids and file sizes, in order."""
        digest = hashlib.sha256()
        for part in (self.ids.ends.data, self.ids.block, np.ascontiguousarray(self.file_sizes).data):
            digest.update(part)
        return digest.hexdigest()

    def subset(self, indices: Iterable[int]) -> "ImageList":
        """Return a list of some of the images."""
        return ImageList(self.reader, np.fromiter((self._indices[index] for index in indices), np.int64))

    def classes(self) -> Labels | None:
        """Return the source's labels, else the first folders in the ids if every image is in one of 2 or more; None without."""
        if self.labels is not None:
            return self.labels
        return number_classes(PackedStrings.pack(name[: max(0, name.find(b"/"))] for name in self.ids))
