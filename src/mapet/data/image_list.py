"""The list of a dataset's images: stable ids, labels where folders give them, one hash over it all."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from mapet.data.decode import EXTENSIONS, Picture, open_image
from mapet.data.prepared import MANIFEST, Prepared
from mapet.errors import MapetError


class ImageList(Sequence[Path]):
    """Paths of images in a fixed order, held as one block of bytes (a million paths: about 50 MB, shared by workers).

    The id of an image is its path below `root`, so it stays the same when the folder moves.

    Attributes:
        root: the folder ids are relative to.
        file_sizes: (n,) bytes of each file; part of `hash`, so that a replaced image is noticed.
        ignored: files of the folder that are not images by their ending.
    """

    def __init__(
        self,
        root: Path,
        ids: Iterable[bytes],
        file_sizes: Iterable[int],
        ignored: int = 0,
        prepared: Prepared | None = None,
    ) -> None:
        encoded = list(ids)
        self.root = root
        self.ignored = ignored
        self._prepared, self._rows = prepared, np.arange(len(encoded)) if prepared else None
        self.file_sizes = np.fromiter(file_sizes, np.int64, len(encoded))
        self._block = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def id_bytes(self, index: int) -> bytes:
        return self._block[self._ends[index] : self._ends[index + 1]]

    def id(self, index: int) -> str:
        """Path below the root; bytes that are not UTF-8 are kept as surrogates, as `os.fsdecode` does."""
        return os.fsdecode(self.id_bytes(index))

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.root / self.id(index)

    def open(self, index: int, channels: int) -> Picture:
        """The image, opened; see `open_image`."""
        if self._prepared is not None and self._rows is not None:
            return self._prepared.picture(int(self._rows[index]), channels)
        return open_image(os.path.join(self.root, self.id(index)), channels)

    def data(self, index: int) -> bytes:
        """The image's bytes as they are stored."""
        if self._prepared is not None and self._rows is not None:
            return self._prepared.data(int(self._rows[index]))
        return self[index].read_bytes()

    def key(self, index: int) -> int:
        """A 64-bit number made of the id alone: seeds an image's random draws wherever it stands in a list."""
        return int.from_bytes(hashlib.blake2b(self.id_bytes(index), digest_size=8).digest(), "little")

    @property
    def hash(self) -> str:
        """sha256 over ids and file sizes, in order."""
        digest = hashlib.sha256(self._ends.tobytes())
        digest.update(self._block)
        digest.update(self.file_sizes.tobytes())
        return digest.hexdigest()

    def subset(self, indices: Iterable[int]) -> "ImageList":
        kept = np.fromiter(indices, np.int64)
        starts, ends = self._ends[kept].tolist(), self._ends[kept + 1].tolist()
        ids = [self._block[start:end] for start, end in zip(starts, ends, strict=True)]
        part = ImageList(self.root, ids, self.file_sizes[kept], prepared=self._prepared)
        part._rows = None if self._rows is None else self._rows[kept]
        return part

    def keys(self) -> np.ndarray:
        """(n,) `key` of every image, uint64."""
        return np.fromiter(map(self.key, range(len(self))), np.uint64, len(self))

    def classes(self) -> tuple[list[str], np.ndarray] | None:
        """(class names, (n,) class index of each image) where every image lies in one of 2 or more folders, else None."""
        index: dict[bytes, int] = {}
        labels = np.empty(len(self), np.int64)
        for i, (start, end) in enumerate(pairwise(self._ends.tolist())):
            slash = self._block.find(b"/", start, end)
            if slash < 0:
                return None
            labels[i] = index.setdefault(self._block[start:slash], len(index))
        if len(index) < 2:
            return None
        names = sorted(index)
        place = np.argsort([index[name] for name in names])  # number of appearance -> number in order of names
        return [os.fsdecode(name) for name in names], place[labels]


def scan(images: Path) -> ImageList:
    """List the images of a folder (searched to any depth, links followed once, hidden names left out) or of a text file.

    A folder made by `mapet prepare` lists what it was made of. A text file names one image on each line, relative to the
    file's own folder or absolute.

    Raises:
        MapetError: the path is missing or unreadable, or holds no image.
    """
    if (images / MANIFEST).is_file():
        prepared = Prepared.open(images)
        return ImageList(images, prepared.ids(), prepared.file_sizes, prepared=prepared)
    if images.is_dir():
        found = _scan_folder(images)
        if not len(found):
            endings = " ".join(sorted(EXTENSIONS))
            raise MapetError(
                f"no images in {images} ({found.ignored} other files); looked for names ending in {endings}"
            )
        return found
    if images.is_file():
        return _read_list(images)
    raise MapetError(f"{images} does not exist: give a folder of images or a text file of paths")


def _scan_folder(root: Path) -> ImageList:
    found: list[tuple[bytes, int]] = []
    ignored = 0
    seen: set[tuple[int, int]] = set()
    pending = [b""]
    while pending:
        below = pending.pop()
        folder = os.path.join(os.fsencode(root), below)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a symbolic link that leads back
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            raise MapetError(f"no permission to list the folder {os.fsdecode(folder)}") from None
        for entry in entries:
            name = os.path.join(below, entry.name)
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                pending.append(name)
            elif os.path.splitext(entry.name)[1].lower().decode("latin-1") in EXTENSIONS:
                found.append((name, _size(entry)))
            else:
                ignored += 1
    found.sort()
    return ImageList(root, [name for name, _ in found], [size for _, size in found], ignored)


def _size(entry: "os.DirEntry[bytes]") -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a dangling link: reported as a bad image when it is read
        return -1


def _read_list(file: Path) -> ImageList:
    data = file.read_bytes()
    if b"\0" in data[:4096]:
        raise MapetError(f"{file} is not a text file of paths; give a folder or a list with one path on each line")
    ids = [line.rstrip(b"\r") for line in data.split(b"\n") if line.strip()]
    if not ids:
        raise MapetError(f"{file} lists no images")
    root = os.fsencode(file.parent)
    sizes = []
    for number, name in enumerate(ids, 1):
        try:
            sizes.append(os.stat(os.path.join(root, name)).st_size)
        except OSError as error:
            raise MapetError(f"{file}, entry {number}: {os.fsdecode(name)}: {error.strerror}") from None
    return ImageList(file.parent, ids, sizes)
