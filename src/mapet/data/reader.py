"""What a list of images is made of: names in one block of memory, and something that gives an image's bytes at random."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int

from mapet.data.decode import open_image
from mapet.data.readers.base import LazyImage, Window


class Names(Sequence[bytes]):
    """Byte strings in one block: a million of them are two objects, which processes share.

    Attributes:
        block: all of them, one after another.
        ends: (n + 1,) where each ends, after a 0.
    """

    def __init__(self, block: bytes, ends: Int[np.ndarray, " n+1"]) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Names":
        parts = list(names)
        return cls(b"".join(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64))

    @classmethod
    def split(cls, block: bytes) -> "Names":
        """Names that each end with a zero byte."""
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0)
        return cls(block.replace(b"\0", b""), np.append(0, ends - np.arange(len(ends))))

    @classmethod
    def joined(cls, several: Sequence["Names"]) -> "Names":
        """All names of all of them, in order."""
        firsts = np.cumsum([0, *(len(names.block) for names in several)])
        ends = [names.ends[1:] + first for names, first in zip(several, firsts, strict=False)]
        return cls(b"".join(names.block for names in several), np.concatenate([np.zeros(1, np.int64), *ends]))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.block[self.ends[index] : self.ends[index + 1]]

    def __iter__(self) -> Iterator[bytes]:
        ends = self.ends.tolist()
        return (self.block[start:end] for start, end in pairwise(ends))

    def take(self, indices: Int[np.ndarray, " m"]) -> "Names":
        starts, ends = self.ends[indices].tolist(), self.ends[indices + 1].tolist()
        return Names.of(self.block[start:end] for start, end in zip(starts, ends, strict=True))


class Reader(ABC):
    """Gives image `row` of a data set, also called `name`, whatever the order they are asked for.

    It goes to loader workers: it holds no open files that a forked process could not use, and can be pickled.
    """

    @abstractmethod
    def data(self, row: int, name: str) -> bytes:
        """The image's bytes as they are stored.

        Raises:
            BadImage: with the reason.
        """

    def picture(self, row: int, name: str, channels: int, window: Window | None = None) -> LazyImage:
        """The image, opened; see `open_image`."""
        return open_image(self.data(row, name), channels, window)


class Files(Reader):
    """Images that are files below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def data(self, row: int, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def picture(self, row: int, name: str, channels: int, window: Window | None = None) -> LazyImage:
        return open_image(os.path.join(self.root, name), channels, window)
