"""Data sets of Hugging Face's `datasets` library: parquet, arrow and folders of images, local or of the Hub."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mapet.data.image_list import ImageList, ImageReader, Labels, PackedStrings
from mapet.data.readers.base import BadImage
from mapet.errors import MapetError, how_to_install, option

SAVED = ("state.json", "dataset_dict.json")
"""One of these is in a folder made by `save_to_disk`."""
FORMATS = {".parquet": "parquet", ".arrow": "arrow"}


class HFDatasetReader(ImageReader):
    """Images in a column of encoded bytes, or of paths, in a table that is mapped into memory."""

    def __init__(self, source: str, table: Any, column: str, label: str | None, allowed_roots: list[str]) -> None:
        paths, sizes = _paths_and_sizes(table.select_columns([column]), source, allowed_roots)
        labels = None if label is None else known_labels(table.features[label].names, _values(table, label))
        super().__init__(source, ids_of(paths), sizes, labels)
        self.table, self.column = table, column

    def data(self, index: int) -> bytes:
        image = self.table[index][self.column]
        if image is None:
            raise BadImage("no image in this row")
        if image["bytes"] is not None:
            return image["bytes"]
        if not os.path.isabs(image["path"] or ""):
            raise BadImage(f"no bytes in this row, nor a file: {image['path']!r}")
        try:
            return Path(image["path"]).read_bytes()
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None


def list_hf_images(source: str) -> ImageList:
    """The rows of a data set: hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT.

    NAME is a folder of parquet or arrow files, or of images, one such file, a folder made by `save_to_disk`, or a name on
    the Hub, of which `datasets` keeps a copy on disk: a full shuffle that resumes exactly needs any row at any time (for
    less disk, `streamed`). SPLIT may be a part: train[:1000]. No code of a data set is run.

    The id of an image is the path its row gives, below NAME if it is a file there, if every row gives another one; else the
    row's number, which stays as long as rows before it do. A ClassLabel column gives labels.

    Raises:
        MapetError: `datasets` is missing or finds fault, there are several splits and none is chosen, or no column of
            images, or several; a row names a file that is not of the data set.
    """
    datasets, table, column, label = open_rows(source)
    return ImageList(HFDatasetReader(source, table.with_format(None), column, label, allowed_roots(source, datasets)))


def open_rows(source: str, streaming: bool = False) -> tuple[Any, Any, str, str | None]:
    """(the library, the data set with images as they are stored, the column of images, that of labels, if any)."""
    name, configuration, split = _parse(source)
    datasets = _library()
    try:
        table = _load(datasets, name, configuration, split, streaming)
    except MapetError as error:
        raise MapetError(f"{source}: {error}") from None
    except Exception as error:  # it has many kinds
        raise MapetError(f"{source}: {first_line(error)}") from None
    column = _column(source, {name: type(feature).__name__ for name, feature in table.features.items()})
    labels = [key for key, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    return datasets, table.cast_column(column, datasets.Image(decode=False)), column, labels[0] if labels else None


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _parse(source: str) -> tuple[str, str | None, str | None]:
    """(name, configuration, split)."""
    part = r"[^:\[\]]+"
    match = re.fullmatch(rf"hf:({part})(?::({part}))??(?::({part}(?:\[.*\])?))?", source)
    if match is None:
        raise MapetError(f"{source}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT")
    return match.groups()  # type: ignore[return-value]


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MapetError(f"hf:NAME needs the package `datasets`: {how_to_install('datasets')} ({error})") from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise MapetError(
            f"datasets {datasets.__version__} may run a data set's own code: {how_to_install('datasets')} brings 4 or newer"
        )
    return datasets


def _load(datasets: Any, name: str, configuration: str | None, split: str | None, streaming: bool) -> Any:
    path = Path(name)
    if any((path / file).exists() for file in SAVED):
        if streaming:
            raise MapetError(
                f"a folder made by `save_to_disk` is on this disk already: leave {option('streaming', True)} out"
            )
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, dict) and split in loaded:
            loaded = loaded[split]
        elif split is not None:
            raise MapetError(f"there is no split {split!r}; {_splits(loaded)}")
    elif path.is_file() and path.suffix in FORMATS:
        loaded = datasets.load_dataset(FORMATS[path.suffix], data_files=name, split=split, streaming=streaming)
    else:
        loaded = datasets.load_dataset(name, configuration, split=split, streaming=streaming)
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise MapetError(f"choose a split; {_splits(loaded)}")
        loaded = next(iter(loaded.values()))
    return loaded._resolve_features() if loaded.features is None else loaded  # of a stream that does not declare them


def _splits(loaded: Any) -> str:
    return f"it has {', '.join(loaded)}" if isinstance(loaded, dict) else "it has one, without a name"


def _column(source: str, features: dict[str, str]) -> str:
    """The one of images, or among several the one called image."""
    columns = [name for name, kind in features.items() if kind == "Image"]
    if len(columns) == 1 or "image" in columns:
        return "image" if "image" in columns else columns[0]
    raise MapetError(
        f"{source}: expected one column of images, or one called 'image'; the columns are "
        f"{', '.join(f'{name} ({kind})' for name, kind in features.items())}"
    )


def allowed_roots(source: str, datasets: Any) -> list[str]:
    """Where files may lie that the rows of a data set name, each with a slash at its end: below it, in the caches, on the Hub."""
    import huggingface_hub

    name, _, _ = _parse(source)
    folders = [name, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE]
    local = [os.path.join(folder, "") for root in folders for folder in (os.path.abspath(root), os.path.realpath(root))]
    return [*local, f"hf://datasets/{name}/", f"hf://datasets/{name}@"]


def _paths_and_sizes(images: Any, source: str, allowed_roots: list[str]) -> tuple[list[str | None], np.ndarray]:
    """What each row gives; the images' own bytes are not touched."""
    import pyarrow.compute as pc

    paths: list[str | None] = []
    sizes: list[int] = []
    for batch in images.with_format("arrow").iter(batch_size=10_000):
        for chunk in batch.column(0).chunks:
            lengths = pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()
            for path, size in zip(pc.struct_field(chunk, "path").to_pylist(), lengths, strict=True):
                if size is None and path is not None and os.path.isabs(path):
                    file = os.path.normpath(path)
                    path, size = relative_to_root(file, allowed_roots, f"{source}, row {len(paths)}"), _file_size(file)
                paths.append(path)
                sizes.append(-1 if size is None else size)
    return paths, np.array(sizes, np.int64)


def relative_to_root(file: str, allowed_roots: list[str], where: str) -> str:
    """The path of a file that a row names, below the root it lies in, and below its revision, so that it stays.

    Raises:
        MapetError: it lies in none.
    """
    root = next((root for root in allowed_roots if file.startswith(root)), None)
    if root is None:
        raise MapetError(f"{where} names the file {file}, which is not of the data set: it is not read")
    path = file.removeprefix(root)
    if root.endswith("@"):  # REVISION/path
        return path.partition("/")[2]
    return re.sub(r"^datasets--[^/]+/snapshots/[^/]+/", "", path)


def _file_size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:  # reported as a bad image when it is read
        return -1


def ids_of(paths: list[str | None]) -> PackedStrings:
    """Those that rows give, if every row gives another one; else their numbers."""
    if len(set(paths)) == len(paths) and all(path and "\0" not in path for path in paths):
        return PackedStrings.pack(os.fsencode(path) for path in paths if path)
    return PackedStrings.pack(b"%09d" % row for row in range(len(paths)))


def _values(table: Any, column: str) -> np.ndarray:
    """(n,) class of each row, -1 where it has none."""
    import pyarrow.compute as pc

    return np.asarray(pc.fill_null(table.select_columns([column]).with_format("arrow")[:].column(0), -1), np.int64)


def known_labels(names: list[str], values: np.ndarray) -> Labels | None:
    """None where a row has none, or there is one class only."""
    return None if len(names) < 2 or values.min(initial=0) < 0 else (list(names), values)
