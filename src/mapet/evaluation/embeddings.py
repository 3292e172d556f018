"""Features of many images on disk, written in parts, so that an interrupted job goes on."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mapet.data.image_list import ImageList
from mapet.errors import MapetError
from mapet.files import atomic, check_format, read_array, read_json, reserve, write_json

MANIFEST, ROWS, IDS, PARTS = "embed.json", "features.npy", "ids.json", "features.parquet"
VERSION = 1
FileFormat = Literal["npy", "parquet"]
PART_BYTES = 32 << 20


class Embeddings:
    """One row of features an image, in the order of the list.

    npy: `features.npy` (n, ...), rows of unreadable images are NaN; `ids.json` the ids. parquet: `features.parquet/part-*`
    with the columns `id` and `features`, without the unreadable. `embed.json` says what made them, what is done, and which could not be
    read.

    Attributes:
        manifest: version, format, settings, num_images, images_hash, shape and dtype of a row, part (images in one), done, bad.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def create(
        cls,
        folder: Path,
        images: ImageList,
        format: FileFormat,
        shape: tuple[int, ...],
        dtype: str,
        settings: dict[str, Any],
    ) -> "Embeddings":
        """Reserve the space and write an empty manifest. The folder must exist.

        Args:
            settings: what the features depend on; they must be the same on resuming.
        """
        row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if format == "npy":
            np.lib.format.open_memmap(folder / ROWS, mode="w+", dtype=np.dtype(dtype), shape=(len(images), *shape))
            try:
                with open(folder / ROWS, "r+b") as file:
                    reserve(file, os.fstat(file.fileno()).st_size, folder / ROWS)
            except MapetError:
                (folder / ROWS).unlink()
                raise
            write_json(folder / IDS, [images.id(index) for index in range(len(images))])
        manifest = {
            "version": VERSION, "format": format, "settings": settings, "num_images": len(images), "images_hash": images.hash, "shape": list(shape),
            "dtype": dtype, "part": max(1, PART_BYTES // row_bytes), "done": 0, "bad": {},
        }  # fmt: skip
        write_json(folder / MANIFEST, manifest)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: Path, images: ImageList, format: FileFormat, settings: dict[str, Any]) -> "Embeddings":
        """Those that an interrupted job left.

        Raises:
            MapetError: they are of other images, another backbone or other options.
        """
        manifest = _manifest(folder)
        now = {"images_hash": images.hash, "format": format, **settings}
        before = {"images_hash": manifest["images_hash"], "format": manifest["format"], **manifest["settings"]}
        changed = [
            f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}"
            for key in now | before
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise MapetError(
                f"{folder} was begun with other options ({'; '.join(changed)}): use the same, or a new --out"
            )
        return cls(folder, manifest)

    @property
    def done(self) -> int:
        """Images whose features, or whose badness, are on disk."""
        return int(self.manifest["done"])

    @property
    def bad(self) -> dict[int, str]:
        """Index -> reason of the images that could not be read."""
        return {int(index): reason for index, reason in self.manifest["bad"].items()}

    def part_end(self, start: int) -> int:
        """Where the part that begins at image `start` ends."""
        part = int(self.manifest["part"])
        return min((start // part + 1) * part, int(self.manifest["num_images"]))

    def write(
        self,
        images: ImageList,
        rows: Float[np.ndarray, "m ..."],
        index: np.ndarray,
        bad: dict[int, str],
        end: int | None = None,
    ) -> None:
        """The next part, or as much of it as goes up to image `end`: features of images `index`; `bad` are the others of it."""
        start, end = self.done, end or self.part_end(self.done)
        if self.manifest["format"] == "npy":
            stored = read_array(self.folder / ROWS, "r+")
            stored[start:end] = np.nan
            stored[index] = rows
            stored.flush()
        else:
            self._write_parquet(images, rows, index)
        self.manifest["bad"] |= {str(number): reason for number, reason in bad.items()}
        self.manifest["done"] = end
        write_json(self.folder / MANIFEST, self.manifest)

    def _write_parquet(self, images: ImageList, rows: np.ndarray, index: np.ndarray) -> None:
        import pyarrow
        import pyarrow.parquet

        column = pyarrow.array(rows.reshape(-1))
        for length in reversed(self.manifest["shape"]):
            column = pyarrow.FixedSizeListArray.from_arrays(column, length)
        ids = pyarrow.array(
            [images.id_bytes(i).decode("utf-8", "backslashreplace") for i in index.tolist()], pyarrow.string()
        )
        table = pyarrow.table({"id": ids, "features": column})
        number, within = divmod(self.done, self.manifest["part"])
        name = f"part-{number:05d}{f'_{within:09d}' if within else ''}.parquet"  # in this order by name, too
        with atomic(self.folder / PARTS / name) as temporary:
            pyarrow.parquet.write_table(table, temporary)


def _short(value: Any) -> str:
    """Of a hash its first digits."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = read_json(folder / MANIFEST, "folder of features")
    check_format(manifest.get("version", 1), VERSION, "folder of features", folder)
    return manifest


def read_embeddings(folder: Path) -> tuple[list[str], Float[np.ndarray, "n ..."]]:
    """(ids, features) of a finished folder of either format, without the unreadable images.

    Raises:
        MapetError: not such a folder, or an unfinished one.
    """
    manifest = _manifest(folder)
    if manifest["done"] < manifest["num_images"]:
        raise MapetError(
            f"{folder} is unfinished ({manifest['done']} of {manifest['num_images']} images): `mapet embed --resume`"
        )
    if manifest["format"] == "npy":
        good = [i for i in range(manifest["num_images"]) if str(i) not in manifest["bad"]]
        ids = json.loads((folder / IDS).read_text())
        return [ids[i] for i in good], read_array(folder / ROWS)[good]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / PARTS, columns=["id", "features"])
    column = table["features"].combine_chunks()
    for _ in manifest["shape"]:
        column = column.flatten()
    return table["id"].to_pylist(), column.to_numpy(zero_copy_only=False).reshape(-1, *manifest["shape"])
