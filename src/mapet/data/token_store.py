"""Token ids on disk: one row per image, memory-mapped, bound to the codebook and the list of images they were made from."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mapet import files
from mapet.data.image_list import ImageList
from mapet.data.views import ViewSpec
from mapet.errors import MapetError, describe_key_error, option

KIND, FORMAT = "token store", 1
SHARD_SIZE = 16_384
"""Images in one file: enough that even 100 million are few files, so few that many processes have work."""
SAVE_INTERVAL_S = 5.0


@dataclass
class TokenShard:
    """Some consecutive rows of a store, written in order: `shards/00000.npy`, and `shards/00000.json` with the progress.

    Attributes:
        path: of the .npy file.
        first: row of the store that is the shard's first.
        shape: images, views and patches.
        dtype: of the token ids on disk.
        writable: whether `write` may be called.
        num_done: rows that are written; the file holds at least so many.
        unreadable: row of the store -> reason, for images that could not be read; their rows hold no tokens.
        sha256: of the whole file, once all rows are written.
    """

    path: Path
    first: int
    shape: tuple[int, int, int]
    dtype: np.dtype
    writable: bool
    num_done: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    sha256: str | None = None
    _saved_at: float = field(default_factory=time.monotonic)

    @property
    def count(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    @property
    def is_done(self) -> bool:
        """Return whether all rows are written."""
        return self.num_done == self.count

    @cached_property
    def ids(self) -> Int[np.memmap, "n V N"]:
        """Map the shard's token ids into memory; ValueError if the file holds something else."""
        ids = files.read_array(self.path, "r+" if self.writable else "r")
        if ids.shape != self.shape or ids.dtype != self.dtype:
            raise ValueError(
                f"{self.path.name}: expected shape {self.shape} of {self.dtype}, found {ids.shape} of {ids.dtype}"
            )
        return ids

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers map the file again.
        return {name: value for name, value in self.__dict__.items() if name != "ids"}

    def read_progress(self) -> None:
        """Read num_done, unreadable and sha256 from disk; raise ValueError if they name rows that the shard does not have."""
        progress = files.read_checksummed_json(self.path.with_suffix(".json"), KIND)
        self.num_done, self.sha256 = progress["num_done"], progress["sha256"]
        self.unreadable = {int(row): reason for row, reason in progress["unreadable"].items()}
        rows = range(self.first, self.first + self.count)
        if not 0 <= self.num_done <= self.count or any(row not in rows for row in self.unreadable):
            raise ValueError(f"{self.path.stem}.json names rows that the shard does not have")

    def save_progress(self) -> None:
        """Write the rows to disk, then the number of them: after a crash the number is never ahead of the rows."""
        self.ids.flush()
        self.sha256 = files.file_hash(self.path) if self.is_done else None
        progress = {"num_done": self.num_done, "unreadable": self.unreadable, "sha256": self.sha256}
        files.write_checksummed_json(self.path.with_suffix(".json"), progress)
        self._saved_at = time.monotonic()

    def write(self, ids: Int[np.ndarray, "n V N"], unreadable: dict[int, str]) -> None:
        """Write the next n rows; progress is saved when the shard is done, and every `SAVE_INTERVAL_S` seconds.

        Args:
            ids: token ids; those of unreadable images do not matter.
            unreadable: row of the store -> reason, for the unreadable images among them.
        """
        if not self.num_done:  # the file is new: take its disk space now
            self.path.parent.mkdir(exist_ok=True)
            files.create_array(self.path, self.dtype, self.shape)
            self.save_progress()
        self.ids[self.num_done : self.num_done + len(ids)] = ids
        self.unreadable |= unreadable
        self.num_done += len(ids)
        if self.is_done or time.monotonic() - self._saved_at > SAVE_INTERVAL_S:
            self.save_progress()


class TokenStore:
    """(n images, views, N patches) token ids; row i belongs to image i of the list the store was made from.

    `manifest.json` says what it was made from and is written once. The rows lie in shards, each with its own progress, so
    that several processes write a store together and an interrupted job resumes where it stopped, on however many.

    Attributes:
        manifest: tokenizer_hash, images_hash, num_images, num_views, view_spec, grid, vocab_size, shard_size.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], writable: bool) -> None:
        """Set up a store from its manifest, without looking at its shards; use `create` or `open`."""
        self.folder, self.manifest = folder, manifest
        self.view_spec = ViewSpec(**manifest["view_spec"])
        self.num_views, self.vocab_size = int(manifest["num_views"]), int(manifest["vocab_size"])
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        rows, columns = manifest["grid"]
        self.grid: tuple[int, int] = rows, columns
        total, size = int(manifest["num_images"]), int(manifest["shard_size"])
        self.shards = []
        for index, first in enumerate(range(0, total, size)):
            shape = min(size, total - first), self.num_views, rows * columns
            self.shards.append(TokenShard(folder / "shards" / f"{index:05d}.npy", first, shape, self.dtype, writable))

    def __len__(self) -> int:
        return int(self.manifest["num_images"])

    @property
    def num_done(self) -> int:
        """Return the number of rows that are written, of all shards."""
        return sum(shard.num_done for shard in self.shards)

    @property
    def unreadable(self) -> dict[int, str]:
        """Return row -> reason, for the images that could not be read."""
        return {row: reason for shard in self.shards for row, reason in shard.unreadable.items()}

    @classmethod
    def create(
        cls, folder: Path, images: ImageList, tokenizer_hash: str, vocab_size: int, grid: tuple[int, int],
        view_spec: ViewSpec, num_views: int,
    ) -> "TokenStore":  # fmt: skip
        """Write the manifest of a store without rows into a folder, which must exist, and return the store, open for writing.

        Args:
            folder: of the store.
            images: the list that the rows belong to, in its order.
            tokenizer_hash: of the tokenizer that makes the tokens.
            vocab_size: V; token ids are 0 to V - 1, of 16 bits on disk if they fit, else of 32.
            grid: rows and columns of patches of each view.
            view_spec: how the views are drawn.
            num_views: stored views of each image.
        """
        manifest = {
            "tokenizer_hash": tokenizer_hash, "images_hash": images.hash, "num_images": len(images), "num_views": num_views,
            "view_spec": view_spec.model_dump(mode="json"), "grid": list(grid), "vocab_size": vocab_size,
            "shard_size": SHARD_SIZE,
        }  # fmt: skip
        files.write_manifest(folder, KIND, FORMAT, manifest)
        return cls(folder, manifest, writable=True)

    @classmethod
    def open(
        cls, folder: Path, images: ImageList, tokenizer_hash: str | None = None, writable: bool = False
    ) -> "TokenStore":
        """Open a store; check that it is intact, complete, and belongs to these images and this tokenizer.

        Args:
            folder: of the store.
            images: the list that it must have been made from (the same ids and file sizes, in the same order).
            tokenizer_hash: of the tokenizer that it must have been made with; None: any tokenizer.
            writable: to write its missing rows; it need not be complete then.

        Returns:
            The store.

        Raises:
            MapetError: it is no token store, damaged, incomplete, or of other images or another tokenizer.
        """
        manifest = files.read_manifest(folder, KIND, FORMAT)
        try:
            store = cls(folder, manifest, writable)
            for shard in store.shards:
                if shard.path.with_suffix(".json").exists():
                    shard.read_progress()
                    _ = shard.ids  # which checks shape and type
                    if shard.sha256 not in (None, files.file_hash(shard.path)):
                        raise ValueError(f"{shard.path.name} has changed since it was made (its sha256 differs)")
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            reason = describe_key_error(error)
            raise MapetError(f"{folder}: damaged token store ({reason}): make it again with `mapet tokenize`") from None
        if manifest["images_hash"] != images.hash:
            count, expected, actual = manifest["num_images"], manifest["images_hash"], images.hash
            raise MapetError(
                f"token store {folder} does not match {option('images')}: expected {count} images (hash {files.abbreviate_hash(expected)}), "
                f"found {len(images)} (hash {files.abbreviate_hash(actual)}) in {images.root}. Restore what was added, removed or changed, or run "
                "`mapet tokenize` into a new folder"
            )
        if tokenizer_hash is not None and tokenizer_hash != manifest["tokenizer_hash"]:
            hashes = [files.abbreviate_hash(value) for value in (manifest["tokenizer_hash"], tokenizer_hash)]
            raise MapetError(
                f"token store {folder} was made with another codebook: expected hash {hashes[0]}, found {hashes[1]}. Run `mapet tokenize` into a "
                "new folder"
            )
        if store.num_done < len(store) and not writable:
            progress = f"unfinished ({store.num_done} of {len(store)} images)"
            hint = f"run the same `mapet tokenize ... {option('resume', True)}` to finish it"
            raise MapetError(f"the token store {folder} is {progress}: {hint}")
        return store

    def read(self, row: int, view: int) -> Int[np.ndarray, " N"]:
        """Return the token ids of one view of one image, in row-major order of the grid.

        Raises:
            MapetError: an id is not in the vocabulary: the file is damaged.
        """
        shard = self.shards[row // self.manifest["shard_size"]]
        ids = shard.ids[row - shard.first, view].astype(np.int64)
        if ids.max(initial=0) >= self.vocab_size:
            fault = f"row {row} has token {ids.max()} of a vocabulary of {self.vocab_size}"
            raise MapetError(f"{shard.path} is damaged: {fault}; make it again with `mapet tokenize`")
        return ids
