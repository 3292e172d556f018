"""The list of a dataset's images, whatever holds them: stable ids, labels where there are some, one hash over it all."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mapet.data.reader import Files, Names, Reader
from mapet.data.readers.base import MAX_BYTES, BadImage, LazyImage, Window


class ImageList(Sequence[Path]):
    """Images in a fixed order, their ids held as one block of bytes (a million: about 50 MB, shared by workers).

    The id of an image is its path below `root`, so it stays the same when the folder moves.

    Attributes:
        root: where the images are: the folder ids are relative to, shards, or the name of a data set.
        file_sizes: (n,) bytes of each file; part of `hash`, so that a replaced image is noticed.
        ignored: files of the folder that are not images by their ending.
        labels: (class names, (n,) class index of each image) that the data set gives; without, folders in the ids are classes.
    """

    def __init__(
        self,
        root: Path | str,
        ids: Iterable[bytes],
        file_sizes: Iterable[int],
        ignored: int = 0,
        reader: Reader | None = None,
        labels: tuple[list[str], np.ndarray] | None = None,
    ) -> None:
        """`ids` and `file_sizes` are kept as they are if they are `Names` and an array.

        Args:
            reader: gives image i of this list by its number; without one, ids are paths of files below `root`.
        """
        self.root = root
        self.ignored = ignored
        self._names = ids if isinstance(ids, Names) else Names.of(ids)
        count = len(self._names)
        self.file_sizes = file_sizes if isinstance(file_sizes, np.ndarray) else np.fromiter(file_sizes, np.int64, count)
        self._reader = reader or Files(Path(root))
        self._rows: np.ndarray | None = None
        self.labels = labels

    def __len__(self) -> int:
        return len(self._names)

    @property
    def ids(self) -> Names:
        return self._names

    def id_bytes(self, index: int) -> bytes:
        return self._names[index]

    def id(self, index: int) -> str:
        """Path below the root; bytes that are not UTF-8 are kept as surrogates, as `os.fsdecode` does."""
        return os.fsdecode(self.id_bytes(index))

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not isinstance(self._reader, Files):
            raise TypeError(f"the images of {self.root} are not files of their own: use open() or data()")
        return self._reader.root / self.id(index)

    def open(self, index: int, channels: int, window: Window | None = None) -> LazyImage:
        """The image, opened; see `open_image`.

        Raises:
            BadImage: with the reason.
        """
        if self.file_sizes[index] > MAX_BYTES:
            raise BadImage(f"{self.file_sizes[index]:,} bytes are more than {MAX_BYTES:,}")
        return self._reader.picture(self._row(index), self.id(index), channels, window)

    def data(self, index: int) -> bytes:
        """The image's bytes as they are stored."""
        return self._reader.data(self._row(index), self.id(index))

    def _row(self, index: int) -> int:
        return index if self._rows is None else int(self._rows[index])

    def key(self, index: int) -> int:
        """A 64-bit number made of the id alone: seeds an image's random draws wherever it stands in a list."""
        return int.from_bytes(hashlib.blake2b(self.id_bytes(index), digest_size=8).digest(), "little")

    @property
    def hash(self) -> str:
        """sha256 over ids and file sizes, in order."""
        digest = hashlib.sha256(self._names.ends.data)
        digest.update(self._names.block)
        digest.update(self.file_sizes.data)
        return digest.hexdigest()

    def subset(self, indices: Iterable[int]) -> "ImageList":
        kept = np.fromiter(indices, np.int64)
        labels = self.labels and (self.labels[0], self.labels[1][kept])
        part = ImageList(self.root, self._names.take(kept), self.file_sizes[kept], reader=self._reader, labels=labels)
        part._rows = kept if self._rows is None else self._rows[kept]
        return part

    def keys(self) -> np.ndarray:
        """(n,) `key` of every image, uint64."""
        return np.fromiter(map(self.key, range(len(self))), np.uint64, len(self))

    def classes(self) -> tuple[list[str], np.ndarray] | None:
        """(class names, (n,) class index of each image): the data set's own, else of folders if every image lies in one of
        2 or more; None without."""
        if self.labels is not None:
            return self.labels
        index: dict[bytes, int] = {}
        labels = np.empty(len(self), np.int64)
        for i, name in enumerate(self._names):
            folder, slash, _ = name.partition(b"/")
            if not slash:
                return None
            labels[i] = index.setdefault(folder, len(index))
        if len(index) < 2:
            return None
        names = sorted(index)
        place = np.argsort([index[name] for name in names])  # number of appearance -> number in order of names
        return [os.fsdecode(name) for name in names], place[labels]
