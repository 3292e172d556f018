"""Token ids on disk: one row an image, memory-mapped, bound to the codebook and the list of images they were made of."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mapet.data.image_list import ImageList
from mapet.data.views import ViewSpec
from mapet.errors import MapetError
from mapet.files import read_json, reserve, write_json

MANIFEST = "store.json"
ROWS = "tokens.npy"
FORMAT = 1


class TokenStore:
    """(n images, views, N patches) token ids; row i belongs to image i of the list the store was made of.

    `store.json` is the manifest; `tokens.npy` the ids, uint16 or uint32. While it is being written `done` counts the
    finished rows, so that an interrupted job goes on where it stopped.

    Attributes:
        manifest: format, codebook_hash, images_hash, num_images, views, view_spec, grid, vocab_size, done, bad.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], rows: np.memmap) -> None:
        self.folder, self.manifest, self.rows = folder, manifest, rows

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader workers map the file again instead of receiving a copy of it.
        return _reopen, (self.folder, self.manifest)

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
    def done(self) -> int:
        return int(self.manifest["done"])

    @property
    def complete(self) -> bool:
        return self.done == len(self.rows)

    @property
    def bad(self) -> dict[int, str]:
        """Row -> reason for the images that could not be read; their rows hold no tokens."""
        return {int(row): reason for row, reason in self.manifest["bad"].items()}

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
        """Reserve the disk space and write an empty manifest. The folder must exist."""
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        shape = (len(images), num_views, grid[0] * grid[1])
        rows = np.lib.format.open_memmap(folder / ROWS, mode="w+", dtype=dtype, shape=shape)
        try:
            with open(folder / ROWS, "r+b") as file:
                reserve(file, os.fstat(file.fileno()).st_size, folder / ROWS)
        except MapetError:
            (folder / ROWS).unlink()
            raise
        manifest = {
            "format": FORMAT,
            "codebook_hash": codebook_hash,
            "images_hash": images.hash,
            "num_images": len(images),
            "views": num_views,
            "view_spec": view_spec.model_dump(mode="json"),
            "grid": list(grid),
            "vocab_size": vocab_size,
            "done": 0,
            "bad": {},
        }
        store = cls(folder, manifest, rows)
        write_json(folder / MANIFEST, manifest)
        return store

    @classmethod
    def open(
        cls, folder: Path, images: ImageList, codebook_hash: str | None = None, writable: bool = False
    ) -> "TokenStore":
        """Open a store and check that it belongs to these images and, if given, to this codebook.

        Raises:
            MapetError: not a store, damaged, unfinished (unless `writable`), or made of something else; both sides are named.
        """
        manifest = read_json(folder / MANIFEST, "token store")
        try:
            rows = np.load(folder / ROWS, mmap_mode="r+" if writable else "r", allow_pickle=False)
            shape = (manifest["num_images"], manifest["views"], manifest["grid"][0] * manifest["grid"][1])
            if manifest["format"] != FORMAT or rows.shape != shape:
                raise ValueError(f"rows of shape {rows.shape}, manifest of {shape}, format {manifest['format']}")
            store = cls(folder, manifest, rows)
            _ = store.view_spec, store.bad, store.done, store.vocab_size
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise MapetError(f"{folder}: damaged token store ({error}); make it again with `mapet tokenize`") from None
        if manifest["images_hash"] != images.hash:
            raise MapetError(
                f"the token store {folder} was made of another list of images: it has {manifest['num_images']} images with hash "
                f"{manifest['images_hash'][:12]}, {images.root} has {len(images)} with hash {images.hash[:12]}. "
                "Run `mapet tokenize` again into a new folder"
            )
        if codebook_hash is not None and manifest["codebook_hash"] != codebook_hash:
            raise MapetError(
                f"the token store {folder} was made with another codebook: its hash is {manifest['codebook_hash'][:12]}, the "
                f"tokenizer's {codebook_hash[:12]}. Run `mapet tokenize` again into a new folder"
            )
        if not (store.complete or writable):
            raise MapetError(
                f"the token store {folder} is unfinished ({store.done} of {len(rows)} images): run the same `mapet tokenize "
                "... --resume` to finish it"
            )
        return store

    def write(self, start: int, ids: Int[np.ndarray, "n V N"], bad: dict[int, str]) -> None:
        """Write rows from `start`. `bad` names rows among them without tokens."""
        self.rows[start : start + len(ids)] = ids
        self.manifest["bad"] |= {str(row): reason for row, reason in bad.items()}
        self.manifest["done"] = start + len(ids)

    def save_progress(self) -> None:
        """Sync the rows, then the count of them: after a crash the count is never ahead of the rows."""
        self.rows.flush()
        write_json(self.folder / MANIFEST, self.manifest)

    def read(self, row: int, view: int) -> Int[np.ndarray, " N"]:
        """Ids of one view of one image, in row-major order of the grid.

        Raises:
            MapetError: an id is not in the vocabulary: the file is damaged.
        """
        ids = self.rows[row, view].astype(np.int64)
        if ids.max(initial=0) >= self.vocab_size:
            raise MapetError(
                f"{self.folder / ROWS}: row {row} has token {ids.max()} of a vocabulary of {self.vocab_size}: damaged"
            )
        return ids


def _reopen(folder: Path, manifest: dict[str, Any]) -> TokenStore:
    return TokenStore(folder, manifest, np.load(folder / ROWS, mmap_mode="r", allow_pickle=False))
