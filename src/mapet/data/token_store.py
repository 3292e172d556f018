"""Token ids on disk: one row an image, memory-mapped, bound to the codebook and the list of images they were made of."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mapet.data.image_list import ImageList
from mapet.data.views import ViewSpec
from mapet.errors import MapetError
from mapet.files import check_format, file_hash, read_array, read_sealed, reserve, write_sealed

MANIFEST = "store.json"
FORMAT = 2
PART_IMAGES = 16_384
"""Images of a part: enough that even 100 million are few files, so few that many processes have work."""
SAVE_INTERVAL_S = 5.0


@dataclass
class Part:
    """Rows `first` to `first + count` of a store: `parts/00000.npy`, and in `parts/00000.json` how far they are.

    Attributes:
        done: finished rows; the file holds at least so many.
        bad: row of the store -> reason, for images that could not be read; their rows hold no tokens.
        sha256: of the file's rows, once all are done.
    """

    path: Path
    first: int
    count: int
    done: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    sha256: str | None = None

    def read_progress(self) -> None:
        progress = read_sealed(self.path.with_suffix(".json"), "token store")
        self.done, self.sha256 = progress["done"], progress["sha256"]
        self.bad = {int(row): reason for row, reason in progress["bad"].items()}
        last = self.first + self.count
        if not 0 <= self.done <= self.count or any(not self.first <= row < last for row in self.bad):
            raise ValueError(f"{self.path.stem}.json speaks of rows that the part doesn't have")


class TokenStore:
    """(n images, views, N patches) token ids; row i belongs to image i of the list the store was made of.

    `store.json` says of what it was made and is written once. The rows lie in parts, each with its own progress, so
    that several processes write a store together and an interrupted job goes on where it stopped, on however many.

    Attributes:
        manifest: format, codebook_hash, images_hash, num_images, views, view_spec, grid, vocab_size, part_images.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], parts: list[Part]) -> None:
        self.folder, self.manifest, self.parts = folder, manifest, parts
        self._rows: dict[Path, np.memmap] = {}
        self._unsaved: Part | None = None
        self._saved_at = time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader workers map the files again instead of receiving a copy of them.
        return TokenStore, (self.folder, self.manifest, self.parts)

    def __len__(self) -> int:
        return int(self.manifest["num_images"])

    @property
    def view_spec(self) -> ViewSpec:
        return ViewSpec(**self.manifest["view_spec"])

    @property
    def num_views(self) -> int:
        return int(self.manifest["views"])

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.manifest["grid"]
        return height, width

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @property
    def done(self) -> int:
        """Finished rows of all parts."""
        return sum(part.done for part in self.parts)

    @property
    def complete(self) -> bool:
        return self.done == len(self)

    @property
    def bad(self) -> dict[int, str]:
        """Row -> reason for the images that could not be read."""
        return {row: reason for part in self.parts for row, reason in part.bad.items()}

    @classmethod
    def create(
        cls,
        folder: Path,
        images: ImageList,
        codebook_hash: str,
        vocab_size: int,
        grid: tuple[int, int],
        view_spec: ViewSpec,
        num_views: int,
    ) -> "TokenStore":
        """Write the manifest of a store without rows. The folder must exist."""
        manifest = {
            "format": FORMAT,
            "codebook_hash": codebook_hash,
            "images_hash": images.hash,
            "num_images": len(images),
            "views": num_views,
            "view_spec": view_spec.model_dump(mode="json"),
            "grid": list(grid),
            "vocab_size": vocab_size,
            "part_images": PART_IMAGES,
        }
        write_sealed(folder / MANIFEST, manifest)
        (folder / "parts").mkdir(exist_ok=True)
        return cls(folder, manifest, _parts(folder, manifest))

    @classmethod
    def open(
        cls, folder: Path, images: ImageList, codebook_hash: str | None = None, writable: bool = False
    ) -> "TokenStore":
        """Open a store and check that it is whole, and belongs to these images and, if given, to this codebook.

        Raises:
            MapetError: not a store, damaged, unfinished (unless `writable`), or made of something else; both sides are named.
        """
        manifest = read_sealed(folder / MANIFEST, "token store")
        try:
            check_format(manifest["format"], FORMAT, "token store", folder)
            if manifest["format"] < FORMAT:
                raise ValueError(f"format {manifest['format']} was never released")
            store = cls(folder, manifest, _parts(folder, manifest))
            _ = store.view_spec, store.vocab_size
            for part in store.parts:
                if part.path.with_suffix(".json").exists():
                    part.read_progress()
                    store._map(part)
                    if part.sha256 not in (None, file_hash(part.path)):
                        raise ValueError(f"{part.path.name} has changed since it was made (its sha256 differs)")
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise MapetError(f"{folder}: damaged token store ({error}); make it again with `mapet tokenize`") from None
        if manifest["images_hash"] != images.hash:
            raise MapetError(
                f"the token store {folder} was made of another list of images: it has {manifest['num_images']} images with hash "
                f"{manifest['images_hash'][:12]}, {images.root} has {len(images)} with hash {images.hash[:12]}. "
                "Put back what was added, removed or changed, or begin again: `mapet tokenize` into a new folder, `mapet run` with a new --out"
            )
        if codebook_hash is not None and manifest["codebook_hash"] != codebook_hash:
            raise MapetError(
                f"the token store {folder} was made with another codebook: its hash is {manifest['codebook_hash'][:12]}, the "
                f"tokenizer's {codebook_hash[:12]}. Run `mapet tokenize` again into a new folder"
            )
        if not (store.complete or writable):
            raise MapetError(
                f"the token store {folder} is unfinished ({store.done} of {len(store)} images): run the same `mapet tokenize "
                "... --resume` to finish it"
            )
        return store

    def _allocate(self, part: Part) -> None:
        """Reserve the disk space of a new part."""
        shape = (part.count, self.num_views, self.grid[0] * self.grid[1])
        np.lib.format.open_memmap(part.path, mode="w+", dtype=self.dtype, shape=shape)
        try:
            with open(part.path, "r+b") as file:
                reserve(file, os.fstat(file.fileno()).st_size, part.path)
        except MapetError:
            part.path.unlink()
            raise
        self.save_progress(part)

    def write(self, part: Part, ids: Int[np.ndarray, "n V N"], bad: dict[int, str]) -> None:
        """Write the next rows of a part. `bad` names rows of the store among them without tokens.

        Progress is saved at the end of a part, after `SAVE_INTERVAL_S`, and by `autosave`.
        """
        if not part.done:
            self._allocate(part)
        self._map(part, "r+")[part.done : part.done + len(ids)] = ids
        part.bad |= bad
        part.done += len(ids)
        self._unsaved = part
        if part.done == part.count or time.monotonic() - self._saved_at > SAVE_INTERVAL_S:
            self.save_progress(part)

    @contextmanager
    def autosave(self) -> Iterator[None]:
        """Save at the end, however it comes, what is written."""
        try:
            yield
        finally:
            if self._unsaved is not None:
                self.save_progress(self._unsaved)

    def save_progress(self, part: Part) -> None:
        """Sync the rows, then the count of them: after a crash the count is never ahead of the rows."""
        self._map(part, "r+").flush()
        part.sha256 = file_hash(part.path) if part.done == part.count else None
        write_sealed(part.path.with_suffix(".json"), {"done": part.done, "bad": part.bad, "sha256": part.sha256})
        self._unsaved, self._saved_at = None, time.monotonic()

    def read(self, row: int, view: int) -> Int[np.ndarray, " N"]:
        """Ids of one view of one image, in row-major order of the grid.

        Raises:
            MapetError: an id is not in the vocabulary: the file is damaged.
        """
        part = self.parts[row // self.manifest["part_images"]]
        ids = self._map(part)[row - part.first, view].astype(np.int64)
        if ids.max(initial=0) >= self.vocab_size:
            raise MapetError(
                f"{part.path}: row {row} has token {ids.max()} of a vocabulary of {self.vocab_size}: damaged"
            )
        return ids

    def _map(self, part: Part, mode: Any = "r") -> np.memmap:
        """The rows of a part."""
        rows = self._rows.get(part.path)
        if rows is None or (mode == "r+" and not rows.flags.writeable):
            rows = self._rows[part.path] = read_array(part.path, mode)
            shape = (part.count, self.num_views, self.grid[0] * self.grid[1])
            if rows.shape != shape or rows.dtype != self.dtype:
                raise ValueError(f"{part.path.name} has rows of {rows.shape} {rows.dtype}, not {shape}")
        return rows


def _parts(folder: Path, manifest: dict[str, Any]) -> list[Part]:
    """All parts of a store, as if none had been begun."""
    total, size = manifest["num_images"], manifest["part_images"]
    starts = range(0, total, size)
    return [
        Part(folder / "parts" / f"{number:05d}.npy", start, min(size, total - start))
        for number, start in enumerate(starts)
    ]
