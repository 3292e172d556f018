"""Token ids on disk: one row an image, memory-mapped, bound to the codebook and the list of images they were made of."""

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
from mapet.errors import MapetError, option
from mapet.files import (
    create_array,
    file_hash,
    read_array,
    read_checksummed_json,
    read_manifest,
    write_checksummed_json,
    write_manifest,
)

KIND, FORMAT = "token store", 1
SHARD_SIZE = 16_384
"""Images of a shard: enough that even 100 million are few files, so few that many processes have work."""
SAVE_INTERVAL_S = 5.0


@dataclass
class TokenShard:
    """Rows `first` to `first + count` of a store: `shards/00000.npy`, and in `shards/00000.json` how far they are.

    Attributes:
        num_done: finished rows; the file holds at least so many.
        unreadable: row of the store -> reason, for images that could not be read; their rows hold no tokens.
        sha256: of the file's rows, once all are done.
    """

    path: Path
    first: int
    count: int
    num_done: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def is_done(self) -> bool:
        return self.num_done == self.count

    def read_progress(self) -> None:
        """Raises ValueError: it speaks of rows that the shard does not have."""
        progress = read_checksummed_json(self.path.with_suffix(".json"), KIND)
        self.num_done, self.sha256 = progress["num_done"], progress["sha256"]
        self.unreadable = {int(row): reason for row, reason in progress["unreadable"].items()}
        rows = range(self.first, self.first + self.count)
        if not 0 <= self.num_done <= self.count or any(row not in rows for row in self.unreadable):
            raise ValueError(f"{self.path.stem}.json speaks of rows that the shard doesn't have")

    def write_progress(self) -> None:
        """Write how far it is, with a hash once it is done."""
        self.sha256 = file_hash(self.path) if self.is_done else None
        progress = {"num_done": self.num_done, "unreadable": self.unreadable, "sha256": self.sha256}
        write_checksummed_json(self.path.with_suffix(".json"), progress)


class TokenStore:
    """(n images, views, N patches) token ids; row i belongs to image i of the list the store was made of.

    `manifest.json` says of what it was made and is written once. The rows lie in shards, each with its own progress, so
    that several processes write a store together and an interrupted job resumes where it stopped, on however many.

    Attributes:
        manifest: tokenizer_hash, images_hash, num_images, num_views, view_spec, grid, vocab_size, shard_size.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.view_spec = ViewSpec(**manifest["view_spec"])
        self.num_views, self.vocab_size = int(manifest["num_views"]), int(manifest["vocab_size"])
        self.dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        rows, columns = manifest["grid"]
        self.grid: tuple[int, int] = rows, columns
        total, size = int(manifest["num_images"]), int(manifest["shard_size"])
        self.shards = [
            TokenShard(folder / "shards" / f"{index:05d}.npy", first, min(size, total - first))
            for index, first in enumerate(range(0, total, size))
        ]
        self._rows: dict[Path, np.memmap] = {}
        self._unsaved: TokenShard | None = None
        self._saved_at = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": {}}  # loader workers map the files again

    def __len__(self) -> int:
        return int(self.manifest["num_images"])

    @property
    def num_done(self) -> int:
        """Finished rows of all shards."""
        return sum(shard.num_done for shard in self.shards)

    @property
    def unreadable(self) -> dict[int, str]:
        """Row -> reason for the images that could not be read."""
        return {row: reason for shard in self.shards for row, reason in shard.unreadable.items()}

    @classmethod
    def create(
        cls, folder: Path, images: ImageList, tokenizer_hash: str, vocab_size: int, grid: tuple[int, int],
        view_spec: ViewSpec, num_views: int,
    ) -> "TokenStore":  # fmt: skip
        """Write the manifest of a store without rows. The folder must exist."""
        manifest = {
            "tokenizer_hash": tokenizer_hash, "images_hash": images.hash, "num_images": len(images), "num_views": num_views,
            "view_spec": view_spec.model_dump(mode="json"), "grid": list(grid), "vocab_size": vocab_size,
            "shard_size": SHARD_SIZE,
        }  # fmt: skip
        write_manifest(folder, KIND, FORMAT, manifest)
        (folder / "shards").mkdir(exist_ok=True)
        return cls(folder, manifest)

    @classmethod
    def open(
        cls, folder: Path, images: ImageList, tokenizer_hash: str | None = None, writable: bool = False
    ) -> "TokenStore":
        """Open a store and check that it is intact, and belongs to these images and, if given, to this tokenizer.

        Raises:
            MapetError: not a store, damaged, unfinished (unless `writable`), or made of something else; both sides are named.
        """
        manifest = read_manifest(folder, KIND, FORMAT)
        try:
            store = cls(folder, manifest)
            for shard in store.shards:
                if shard.path.with_suffix(".json").exists():
                    shard.read_progress()
                    store._map(shard)
                    if shard.sha256 not in (None, file_hash(shard.path)):
                        raise ValueError(f"{shard.path.name} has changed since it was made (its sha256 differs)")
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise MapetError(f"{folder}: damaged token store ({error}); make it again with `mapet tokenize`") from None
        if manifest["images_hash"] != images.hash:
            raise MapetError(
                f"the token store {folder} was made of another list of images: it has {manifest['num_images']} images with hash "
                f"{manifest['images_hash'][:12]}, {images.root} has {len(images)} with hash {images.hash[:12]}. "
                f"Put back what was added, removed or changed, or begin again with a new {option('out')}"
            )
        if tokenizer_hash is not None and tokenizer_hash != manifest["tokenizer_hash"]:
            raise MapetError(
                f"the token store {folder} was made with another codebook: its hash is {manifest['tokenizer_hash'][:12]}, the "
                f"tokenizer's {tokenizer_hash[:12]}. Run `mapet tokenize` again into a new folder"
            )
        if store.num_done < len(store) and not writable:
            found = f"unfinished ({store.num_done} of {len(store)} images)"
            again = f"run the same `mapet tokenize ... {option('resume', True)}` to finish it"
            raise MapetError(f"the token store {folder} is {found}: {again}")
        return store

    def write(self, shard: TokenShard, ids: Int[np.ndarray, "n V N"], unreadable: dict[int, str]) -> None:
        """Write the next rows of a shard. `unreadable` names rows of the store among them without tokens.

        Progress is saved at the end of a shard, after `SAVE_INTERVAL_S`, and by `autosave`.
        """
        if not shard.num_done:  # new: reserve its disk space
            create_array(shard.path, self.dtype, self._shape(shard))
            self.save_progress(shard)
        self._map(shard, "r+")[shard.num_done : shard.num_done + len(ids)] = ids
        shard.unreadable |= unreadable
        shard.num_done += len(ids)
        self._unsaved = shard
        if shard.is_done or time.monotonic() - self._saved_at > SAVE_INTERVAL_S:
            self.save_progress(shard)

    @contextmanager
    def autosave(self) -> Iterator[None]:
        """Save what is written at the end, even after an error."""
        try:
            yield
        finally:
            if self._unsaved is not None:
                self.save_progress(self._unsaved)

    def save_progress(self, shard: TokenShard) -> None:
        """Sync the rows, then the count of them: after a crash the count is never ahead of the rows."""
        self._map(shard, "r+").flush()
        shard.write_progress()
        self._unsaved, self._saved_at = None, time.monotonic()

    def read(self, row: int, view: int) -> Int[np.ndarray, " N"]:
        """Return the ids of one view of one image, in row-major order of the grid.

        Raises:
            MapetError: an id is not in the vocabulary: the file is damaged.
        """
        shard = self.shards[row // self.manifest["shard_size"]]
        ids = self._map(shard)[row - shard.first, view].astype(np.int64)
        if ids.max(initial=0) >= self.vocab_size:
            found = f"token {ids.max()} of a vocabulary of {self.vocab_size}"
            raise MapetError(f"{shard.path}: row {row} has {found}: damaged")
        return ids

    def _shape(self, shard: TokenShard) -> tuple[int, int, int]:
        return shard.count, self.num_views, self.grid[0] * self.grid[1]

    def _map(self, shard: TokenShard, mode: Any = "r") -> np.memmap:
        """Map the rows of a shard into memory."""
        rows = self._rows.get(shard.path)
        if rows is None or (mode == "r+" and not rows.flags.writeable):
            rows = self._rows[shard.path] = read_array(shard.path, mode)
            if rows.shape != self._shape(shard) or rows.dtype != self.dtype:
                raise ValueError(f"{shard.path.name} has rows of {rows.shape} {rows.dtype}, not {self._shape(shard)}")
        return rows
