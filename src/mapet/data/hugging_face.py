"""Data sets of Hugging Face's `datasets` library: parquet, arrow and folders of images, local or of the Hub.

They are listed like any other images or, if too large for this disk, streamed: read once, in order.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np

from mapet.data.image_list import ImageList, Labels, PackedStrings
from mapet.data.readers.image import ImageDecodeError, check_byte_count, translate_errors
from mapet.errors import MapetError, first_line, install_hint, option

SAVED = ("state.json", "dataset_dict.json")
"""A folder made by `save_to_disk` has one of these."""
FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
"""The library's builder for one file with this extension."""
ASSUMED_ROWS = 10_000
"""Length of a stream that does not say it, for the fraction of unreadable images."""


class HFTable:
    """An opened data set.

    Attributes:
        source: its name, hf:...
        rows: `datasets.Dataset` or `IterableDataset` of the columns of images and labels; images are {"bytes": ..., "path": ...}
            as they are stored.
        image_column: name of the column of images.
        label_column: name of the first ClassLabel column, if there is one.
        class_names: of its classes; empty without it.
        allowed_roots: where the files lie that rows may name: the data set, the caches and the Hub; each ends in "/" or "@".
    """

    def __init__(self, source: str, streaming: bool = False) -> None:
        """Open a data set: hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT.

        Args:
            source: see `HFImageList`.
            streaming: read rows as they come instead of downloading the data set first.

        Raises:
            MapetError: `datasets` is missing, too old or cannot open it; it has no column of images, or several.
        """
        part = r"[^:\[\]]+"
        match = re.fullmatch(rf"hf:({part})(?::({part}))??(?::({part}(?:\[.*\])?))?", source)
        if match is None:
            raise MapetError(f"{source}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT")
        try:
            import datasets
            import huggingface_hub
        except ImportError as error:
            raise MapetError(f"hf:NAME needs the package `datasets`: {install_hint('datasets')} ({error})") from None
        if int(datasets.__version__.split(".")[0]) < 4:
            problem = f"found {datasets.__version__}, which may run a data set's own code"
            raise MapetError(f"{source} needs the package datasets 4 or newer, {problem}: {install_hint('datasets')}")
        name = match[1]
        try:
            rows = _load_split(datasets, name, match[2], match[3], streaming)
        except MapetError:
            raise
        except Exception as error:  # of many kinds
            hint = "check its name, configuration and split, or give a folder of its parquet files"
            raise MapetError(f"the package datasets cannot load {source} ({first_line(error)}): {hint}") from None
        kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
        images, labels = ([column for column in kinds if kinds[column] == kind] for kind in ("Image", "ClassLabel"))
        if len(images) != 1 and "image" not in images:
            found = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
            raise MapetError(f"{source}: expected one column of images, or one called 'image'; the columns are {found}")
        self.source, self.image_column = source, "image" if "image" in images else images[0]
        self.label_column = labels[0] if labels else None
        self.class_names: list[str] = list(rows.features[labels[0]].names) if labels else []
        rows = rows.with_format(None).select_columns([self.image_column, *labels[:1]])
        self.rows: Any = rows.cast_column(self.image_column, datasets.Image(decode=False))
        folders = (name, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
        paths = [resolve(folder) for folder in folders for resolve in (os.path.abspath, os.path.realpath)]
        hub = [f"hf://datasets/{name}/", f"hf://datasets/{name}@"]
        self.allowed_roots = [os.path.join(path, "") for path in paths] + hub


def _load_split(datasets: ModuleType, name: str, configuration: str | None, split: str | None, streaming: bool) -> Any:
    """Load one split of a data set.

    Args:
        datasets: the library.
        name: a folder made by `save_to_disk`, a parquet or arrow file, a folder of files, or a name on the Hub.
        configuration: of a data set on the Hub or a folder; None: the only or default one. Not used for single files and saved folders.
        split: name of a split; None: there must be one only. A range, train[:1000], is allowed except for saved folders.
        streaming: see `HFTable`.

    Returns:
        A `datasets.Dataset`, or `IterableDataset` if `streaming`.

    Raises:
        MapetError: a saved folder has no such split, or is to be streamed; there are several splits and none is chosen.
        Exception: of any kind: the library cannot load it, or knows no such split.
    """
    path = Path(name)
    if any((path / file).exists() for file in SAVED):
        if streaming:
            hint = f"omit {option('streaming', True)}"
            raise MapetError(f"a folder made by `save_to_disk` is on this disk already: {hint}")
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, dict) and split in loaded:
            loaded = loaded[split]
        elif split is not None:
            splits = f"has {', '.join(loaded)}" if isinstance(loaded, dict) else "has one, without a name"
            raise MapetError(f"there is no split {split!r}: {name} {splits}; choose that or omit it")
    elif path.is_file() and path.suffix in FORMATS:
        loaded = datasets.load_dataset(FORMATS[path.suffix], data_files=name, split=split, streaming=streaming)
    else:
        loaded = datasets.load_dataset(name, configuration, split=split, streaming=streaming)
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise MapetError(f"{name} has the splits {', '.join(loaded)}: choose one, hf:{name}:{next(iter(loaded))}")
        loaded = next(iter(loaded.values()))
    return loaded._resolve_features() if loaded.features is None else loaded  # a stream may not declare its columns


def locate_file(path: str | None, allowed_roots: list[str], where: str) -> tuple[str | None, str | None]:
    """Find the file that a row names, and make sure that it belongs to the data set.

    Args:
        path: what the row gives: an absolute path or a URL names a file; a bare name is only an id.
        allowed_roots: see `HFTable`.
        where: the row, for errors.

    Returns:
        (path or URL of the file, its path relative to its root and revision: the same when the data set moves);
        (None, path) if the row names no file.

    Raises:
        MapetError: the file lies in none of the roots.
    """
    if path is None or not ("://" in path or os.path.isabs(path)):
        return None, path
    file = path if "://" in path else os.path.normpath(path)
    is_chained = "://" in file and "::" in file  # fsspec would open the URL after the "::", which lies anywhere
    root = next((root for root in allowed_roots if file.startswith(root) and not is_chained), None)
    if root is None:
        hint = "it is not read; copy it into the data set's folder, or store its bytes in the row"
        raise MapetError(f"{where} names the file {file}, which is not of the data set: {hint}")
    relative = file.removeprefix(root)
    if root.endswith("@"):  # REVISION/path
        return file, relative.partition("/")[2]
    return file, re.sub(r"^datasets--[^/]+/snapshots/[^/]+/", "", relative)


def read_row(image: dict[str, Any] | None, allowed_roots: list[str], where: str) -> bytes:
    """Return the encoded image of a row: the bytes that it holds, or those of the file that it names.

    Args:
        image: {"bytes": ..., "path": ...}, either may be None; None: the row has no image.
        allowed_roots: see `HFTable`.
        where: the row, for errors.

    Raises:
        ImageDecodeError: there are no bytes, with the reason.
        MapetError: the file is not of the data set.
    """
    if image is None:
        raise ImageDecodeError("no image in this row")
    if image["bytes"] is not None:
        return image["bytes"]
    file, path = locate_file(image["path"], allowed_roots, where)
    if file is None:
        raise ImageDecodeError(f"no bytes in this row, and its path {path!r} names no file of the data set")
    try:
        with translate_errors(), open(file, "rb") if "://" not in file else fsspec.open(file) as stream:
            return stream.read()
    except MapetError:
        raise
    except Exception as error:  # of many kinds, by protocol
        raise ImageDecodeError(f"cannot read {file}: {first_line(error)}") from None


def ids_from_paths(paths: list[str | None]) -> PackedStrings:
    """Return the paths that rows give as ids, if every row gives a different one; else the rows' indices, 9 digits each."""
    if len(set(paths)) == len(paths) and all(path and "\0" not in path for path in paths):
        return PackedStrings.from_strings(os.fsencode(path) for path in paths if path)
    return PackedStrings.from_strings(b"%09d" % row for row in range(len(paths)))


def labels_from_column(class_names: list[str], values: np.ndarray) -> Labels | None:
    """Return labels from a ClassLabel column; None if a row has none (-1), or there are fewer than two classes.

    Args:
        class_names: of the column's feature; [] without such a column.
        values: class index of each row; -1: no label.
    """
    return None if len(class_names) < 2 or values.min(initial=0) < 0 else (class_names, values)


class HFImageList(ImageList):
    """The rows of a data set: hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT, in a table that is mapped into memory.

    NAME is a folder of parquet or arrow files, or of images, one such file, a folder made by `save_to_disk`, or a name on
    the Hub, of which `datasets` keeps a copy on disk: a full shuffle that resumes exactly needs any row at any time (for
    less disk, `HFStream`). SPLIT may be a part, train[:1000], except of a folder made by `save_to_disk`. No code of a data set is run.

    The id of an image is the path its row gives, below NAME if it is a file there, if every row gives a different one; else
    the row's index, which stays as long as the rows before it do. A ClassLabel column gives labels.
    """

    def __init__(self, source: str) -> None:
        """Open a data set and list its rows, without reading the images' bytes.

        Args:
            source: see the class.

        Raises:
            MapetError: see `HFTable`; a row names a file that is not of the data set.
        """
        self.table = table = HFTable(source)
        import pyarrow.compute as pc

        paths: list[str | None] = []
        sizes: list[int] = []
        for batch in table.rows.select_columns([table.image_column]).with_format("arrow").iter(batch_size=10_000):
            for chunk in batch.column(0).chunks:
                lengths = pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()
                for path, size in zip(pc.struct_field(chunk, "path").to_pylist(), lengths, strict=True):
                    if size is None:
                        file, path = locate_file(path, table.allowed_roots, f"{source}, row {len(paths)}")
                        if file is not None and os.path.exists(file):  # otherwise unreadable, as `read_row` finds
                            size = os.path.getsize(file)
                    paths.append(path)
                    sizes.append(-1 if size is None else size)
        labels = None
        if table.label_column is not None:
            column = table.rows.select_columns([table.label_column]).with_format("arrow")[:].column(0)  # null: no label
            labels = labels_from_column(table.class_names, np.asarray(pc.fill_null(column, -1), np.int64))
        super().__init__(source, ids_from_paths(paths), sizes, labels)

    def data(self, index: int) -> bytes:
        """Return the encoded image of a row; see `read_row`."""
        row = int(self.rows[index])
        image = self.table.rows[row][self.table.image_column]
        return read_row(image, self.table.allowed_roots, f"{self.root}, row {row}")


class StreamedImage:
    """One row of a stream.

    Attributes:
        path: what the row gives, relative to its root if it names a file.
        label: class index, -1 where there is none.
        size: bytes; -1 until they are known.
    """

    def __init__(self, image: dict[str, Any] | None, label: int | None, allowed_roots: list[str], where: str) -> None:
        """Keep a row until it is taken; raise MapetError if it names a file that is not of the data set.

        Args:
            image: {"bytes": ..., "path": ...}; None: the row has no image.
            label: class index; None: there is none.
            allowed_roots: see `HFTable`.
            where: the row, for errors.
        """
        data, path = (image["bytes"], image["path"]) if image else (None, None)
        self._image, self._allowed_roots, self._where = image, allowed_roots, where
        self.path = path if data is not None else locate_file(path, allowed_roots, where)[1]
        self.label, self.size = -1 if label is None else label, -1 if data is None else len(data)

    def take(self) -> bytes:
        """Return the image's bytes, once: they are not kept, so that a shard's images don't stay in memory.

        Raises:
            ImageDecodeError: there are none, or too many.
        """
        image, self._image = self._image, None
        data = read_row(image, self._allowed_roots, self._where)
        self.size = len(data)
        check_byte_count(self.size)
        return data


class HFStream(HFTable):
    """A data set whose rows are read once and in order.

    It stands for their list, which is not known yet, where unreadable images are named and counted (`UnreadableImages`).

    Attributes:
        num_rows: None: the data set does not say it.
    """

    def __init__(self, source: str) -> None:
        """Open a data set; see `HFTable` for `source` and errors."""
        super().__init__(source, streaming=True)
        info = (self.rows.info.splits or {}).get(str(self.rows.split))
        self.num_rows: int | None = getattr(info, "num_examples", None) or None

    def __len__(self) -> int:
        return self.num_rows or ASSUMED_ROWS

    def id(self, index: int) -> str:
        return f"row {index}"

    def read(self, first: int, position: dict[str, Any] | None) -> Iterator[StreamedImage]:
        """Yield the rows from the one with index `first` to the last.

        Args:
            first: index of the first row, which names rows in errors.
            position: what `rows.state_dict()` returned when row `first` was the next one, to resume; None: row 0.

        Raises:
            MapetError: the stream ended with an error, or a row names a file that is not of the data set.
        """
        if position is not None:
            self.rows.load_state_dict(position)
        try:
            for index, row in enumerate(self.rows, first):
                label = row[self.label_column] if self.label_column else None
                yield StreamedImage(row[self.image_column], label, self.allowed_roots, f"{self.source}, row {index}")
        except MapetError:
            raise
        except Exception as error:  # the library and its file systems have many kinds
            hint = f"resume with {option('resume', True)}; if it stops at the same row again, the data set is damaged"
            raise MapetError(f"reading {self.source} stopped ({first_line(error)}): {hint}") from None
