"""The list of a dataset's images, whatever holds them: stable ids, labels where there are some, one hash over it all."""

import hashlib
import heapq
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mapet.data.decode import EXTENSIONS, MAX_BYTES, BadImage, Picture
from mapet.data.prepared import MANIFEST, Prepared
from mapet.data.reader import Files, Names, Reader
from mapet.errors import MapetError
from mapet.recipe import HUGGING_FACE, is_url


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

    def id_bytes(self, index: int) -> bytes:
        return self._names[index]

    def id(self, index: int) -> str:
        """Path below the root; bytes that are not UTF-8 are kept as surrogates, as `os.fsdecode` does."""
        return os.fsdecode(self.id_bytes(index))

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not isinstance(self._reader, Files):
            raise TypeError(f"the images of {self.root} are not files of their own: use open() or data()")
        return self._reader.root / self.id(index)

    def open(self, index: int, channels: int) -> Picture:
        """The image, opened; see `open_image`.

        Raises:
            BadImage: with the reason.
        """
        if self.file_sizes[index] > MAX_BYTES:
            raise BadImage(f"{self.file_sizes[index]:,} bytes are more than {MAX_BYTES:,}")
        return self._reader.picture(self._row(index), self.id(index), channels)

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


def scan(source: str | Path) -> ImageList:
    """List the images of a folder, a text file, tar shards or a data set of Hugging Face.

    folder: searched to any depth; hidden names and what is not a regular file are left out. Symbolic links are followed,
        also out of the folder; what several of them lead to comes once, so that those which lead back end.
    folder made by `mapet prepare`: lists what it was made of.
    text file: names one image on each line, relative to the file's own folder or absolute.
    .tar files: see `tar_shards.list_shards`; several by `{000..012}`, `*`, or a folder that holds them; URLs too.
    hf:NAME: see `hugging_face.list_rows`.

    Raises:
        MapetError: the source is missing or unreadable, or holds no image.
    """
    text = os.fspath(source)
    if text.startswith(HUGGING_FACE):
        from mapet.data.hugging_face import list_rows  # imports what only such data sets need

        return list_rows(text)
    path = Path(text)
    if is_url(text) or (names_shards(text) and not path.is_dir()):
        from mapet.data.tar_shards import list_shards

        return list_shards(text)
    if (path / MANIFEST).is_file():
        prepared = Prepared.open(path)
        return ImageList(path, prepared.ids(), prepared.file_sizes, reader=prepared, labels=prepared.labels())
    if path.is_dir():
        found = _scan_folder(path)
        if not len(found) and any(path.glob("*.tar")):
            return scan(path / "*.tar")
        if not len(found):
            endings = " ".join(sorted(EXTENSIONS))
            raise MapetError(f"no images in {path} ({found.ignored} other files); looked for names ending in {endings}")
        return found
    if path.is_file():
        return _read_list(path)
    raise MapetError(f"{path} does not exist: give a folder of images, a text file of paths, .tar shards or hf:NAME")


def names_shards(text: str) -> bool:
    """Whether a source spells tar files, rather than a list."""
    return re.search(r"\.(tar|tgz)(\.\w+)?$", text) is not None


def _scan_folder(root: Path) -> ImageList:
    found: list[tuple[bytes, int]] = []
    ignored = 0
    seen: set[tuple[int, int]] = set()
    pending = [(False, b"")]  # real folders before links, each in order of names: the same ids on every file system
    while pending:
        linked, below = heapq.heappop(pending)
        folder = os.path.join(os.fsencode(root), below)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
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
                heapq.heappush(pending, (linked or entry.is_symlink(), name))
            elif os.path.splitext(entry.name)[1].lower().decode("latin-1") in EXTENSIONS:
                size = _size(entry)
                if size is None:
                    ignored += 1
                else:
                    found.append((name, size))
            else:
                ignored += 1
    found.sort()
    return ImageList(root, [name for name, _ in found], [size for _, size in found], ignored)


def _size(entry: "os.DirEntry[bytes]") -> int | None:
    """Bytes of a file; None of what is no file: to open a pipe is to wait for its writer."""
    try:
        status = entry.stat()
    except OSError:  # a dangling link: reported as a bad image when it is read
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else None


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
