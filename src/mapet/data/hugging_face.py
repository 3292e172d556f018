"""Data sets of Hugging Face's `datasets` library: parquet, arrow and folders of images, local or of the Hub.

They are listed like any others, or, too large for this disk, read once, in order, and packed as they come.
"""

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mapet.config.data import PrepareConfig
from mapet.data import prepared
from mapet.data.image_list import ImageFiles, ImageList, ImageReader, Labels, PackedStrings
from mapet.data.prepared import OnImage, OnUnreadable, PreparedDataset, PreparedDatasetWriter
from mapet.data.readers import MAX_BYTES, ImageDecodeError, open_image
from mapet.errors import MapetError, install_hint, option
from mapet.files import read_checksummed_json, write_checksummed_json

SAVED = ("state.json", "dataset_dict.json")
"""One of these is in a folder made by `save_to_disk`."""
FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
ROWS = ".rows-{:05d}.json"
"""What is known of a shard's rows, until that of all is: [path, bytes, class] of each."""


def open_rows(source: str, streaming: bool = False) -> tuple[Any, str, str | None, list[str]]:
    """Open a data set.

    Returns:
        (the data set with images as they are stored, the column of images, that of labels, if any, where files may lie
        that its rows name: below it, in the caches, on the Hub; each with a slash at its end)
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
        hint = f"{install_hint('datasets')} brings 4 or newer"
        raise MapetError(f"datasets {datasets.__version__} may run a data set's own code: {hint}")
    name = match[1]
    try:
        table = _load(datasets, name, match[2], match[3], streaming)
    except Exception as error:  # of many kinds
        raise MapetError(f"{source}: {first_line(error)}") from None
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    columns, labels = ([name for name in kinds if kinds[name] == kind] for kind in ("Image", "ClassLabel"))
    if len(columns) != 1 and "image" not in columns:
        found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise MapetError(f"{source}: expected one column of images, or one called 'image'; the columns are {found}")
    column = "image" if "image" in columns else columns[0]
    folders = (name, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    roots = [os.path.join(path, "") for root in folders for path in (os.path.abspath(root), os.path.realpath(root))]
    roots += [f"hf://datasets/{name}/", f"hf://datasets/{name}@"]
    return table.cast_column(column, datasets.Image(decode=False)), column, labels[0] if labels else None, roots


def _load(datasets: Any, name: str, configuration: str | None, split: str | None, streaming: bool) -> Any:
    """Load one split; raises errors of many kinds."""
    path = Path(name)
    if any((path / file).exists() for file in SAVED):
        if streaming:
            hint = f"leave {option('streaming', True)} out"
            raise MapetError(f"a folder made by `save_to_disk` is on this disk already: {hint}")
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, dict) and split in loaded:
            loaded = loaded[split]
        elif split is not None:
            found = f"has {', '.join(loaded)}" if isinstance(loaded, dict) else "has one, without a name"
            raise MapetError(f"there is no split {split!r}; it {found}")
    elif path.is_file() and path.suffix in FORMATS:
        loaded = datasets.load_dataset(FORMATS[path.suffix], data_files=name, split=split, streaming=streaming)
    else:
        loaded = datasets.load_dataset(name, configuration, split=split, streaming=streaming)
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise MapetError(f"choose a split; it has {', '.join(loaded)}")
        loaded = next(iter(loaded.values()))
    return loaded._resolve_features() if loaded.features is None else loaded  # of a stream that does not declare them


def first_line(error: Exception) -> str:
    """Return the reason of an error of any kind."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def read_row(image: dict[str, Any] | None, file: str | None) -> bytes:
    """Return the bytes that a row holds, or those of the file or URL that it names.

    Raises:
        ImageDecodeError: there are none.
    """
    if image is None:
        raise ImageDecodeError("no image in this row")
    if image["bytes"] is not None:
        return image["bytes"]
    if file is None:
        raise ImageDecodeError(f"no bytes in this row, nor a file: {image['path']!r}")
    try:
        if "://" not in file:
            return Path(file).read_bytes()
        import fsspec

        with fsspec.open(file) as stream:
            return stream.read()
    except Exception as error:  # of many kinds, by protocol
        raise ImageDecodeError(first_line(error)) from None


def relative_to_root(file: str, allowed_roots: list[str], where: str) -> str:
    """The path of a file that a row names, below the root it lies in, and below its revision, so that it stays.

    Raises:
        MapetError: it lies in none.
    """
    chained = "://" in file and "::" in file  # fsspec would open the URL behind it
    root = next((root for root in allowed_roots if file.startswith(root) and not chained), None)
    if root is None:
        raise MapetError(f"{where} names the file {file}, which is not of the data set: it is not read")
    path = file.removeprefix(root)
    if root.endswith("@"):  # REVISION/path
        return path.partition("/")[2]
    return re.sub(r"^datasets--[^/]+/snapshots/[^/]+/", "", path)


def ids_of(paths: list[str | None]) -> PackedStrings:
    """Those that rows give, if every row gives another one; else their numbers."""
    if len(set(paths)) == len(paths) and all(path and "\0" not in path for path in paths):
        return PackedStrings.pack(os.fsencode(path) for path in paths if path)
    return PackedStrings.pack(b"%09d" % row for row in range(len(paths)))


def known_labels(names: list[str], values: np.ndarray) -> Labels | None:
    """None where a row has none, or there is one class only."""
    return None if len(names) < 2 or values.min(initial=0) < 0 else (list(names), values)


# ---- listed


class HFDatasetReader(ImageReader):
    """Images in a column of encoded bytes, or of paths, in a table that is mapped into memory."""

    def __init__(self, source: str, table: Any, column: str, label: str | None, allowed_roots: list[str]) -> None:
        import pyarrow.compute as pc

        paths: list[str | None] = []
        sizes: list[int] = []
        for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
            for chunk in batch.column(0).chunks:  # the images' own bytes are not touched
                lengths = pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()
                for path, size in zip(pc.struct_field(chunk, "path").to_pylist(), lengths, strict=True):
                    if size is None and path is not None and os.path.isabs(path):
                        file = os.path.normpath(path)
                        path = relative_to_root(file, allowed_roots, f"{source}, row {len(paths)}")
                        size = os.path.getsize(file) if os.path.exists(file) else None  # a bad image when it is read
                    paths.append(path)
                    sizes.append(-1 if size is None else size)
        labels = None
        if label is not None:  # -1 where a row has none
            values = pc.fill_null(table.select_columns([label]).with_format("arrow")[:].column(0), -1)
            labels = known_labels(table.features[label].names, np.asarray(values, np.int64))
        super().__init__(source, ids_of(paths), sizes, labels)
        self.table, self.column = table.with_format(None), column

    def data(self, index: int) -> bytes:
        image = self.table[index][self.column]
        path = (image or {}).get("path") or ""
        return read_row(image, os.path.normpath(path) if os.path.isabs(path) else None)


def list_hf_images(source: str) -> ImageList:
    """The rows of a data set: hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT.

    NAME is a folder of parquet or arrow files, or of images, one such file, a folder made by `save_to_disk`, or a name on
    the Hub, of which `datasets` keeps a copy on disk: a full shuffle that resumes exactly needs any row at any time (for
    less disk, `HFStream`). SPLIT may be a part: train[:1000]. No code of a data set is run.

    The id of an image is the path its row gives, below NAME if it is a file there, if every row gives another one; else the
    row's number, which stays as long as rows before it do. A ClassLabel column gives labels.

    Raises:
        MapetError: `datasets` is missing or finds fault, there are several splits and none is chosen, or no column of
            images, or several; a row names a file that is not of the data set.
    """
    return ImageList(HFDatasetReader(source, *open_rows(source)))


# ---- streamed


class StreamedImage:
    """An image as it came.

    Attributes:
        path: what the row gives, below its root.
        label: class, -1 where there is none.
        size: bytes; -1 until they are known.
    """

    def __init__(self, image: dict[str, Any] | None, label: int | None, allowed_roots: list[str], where: str) -> None:
        data, path = (image["bytes"], image["path"]) if image else (None, None)
        self._image, self.path, self._file = image, path, None
        self.label, self.size = -1 if label is None else label, -1 if data is None else len(data)
        if data is None and path is not None and ("://" in path or os.path.isabs(path)):
            self._file = path if "://" in path else os.path.normpath(path)
            self.path = relative_to_root(self._file, allowed_roots, where)

    def take(self) -> bytes:
        """The bytes, which are forgotten: a shard's images don't stay in memory.

        Raises:
            ImageDecodeError: there are none.
        """
        (image, self._image), file = (self._image, None), self._file
        data = read_row(image, file)
        self.size = len(data)
        if self.size > MAX_BYTES:
            raise ImageDecodeError(f"{self.size:,} bytes are more than {MAX_BYTES:,}")
        return data


class HFStream:
    """Rows of a data set, in order. Stands for their list, which is not known yet, where bad images are named and counted.

    Attributes:
        table: the rows, as the library gives them.
        expected: rows, where the data set says so.
        classes: names of the classes, where it has some.
    """

    def __init__(self, source: str) -> None:
        """Args: source: hf:NAME, as for `list_hf_images`."""
        rows, self._column, self._label, self._allowed_roots = open_rows(source, streaming=True)
        self.root = source
        info = (rows.info.splits or {}).get(str(rows.split))
        self.expected: int | None = getattr(info, "num_examples", None) or None
        self.classes: list[str] = list(rows.features[self._label].names) if self._label else []
        self.table = rows.select_columns([self._column, *filter(None, [self._label])])

    def __len__(self) -> int:
        return self.expected or prepared.PER_SHARD

    def id(self, index: int) -> str:
        return f"row {index}"

    def rows(self, first: int, position: dict[str, Any] | None) -> Iterator[StreamedImage]:
        """From row `first` on, whose position an earlier reading wrote down.

        Raises:
            MapetError: the stream broke off.
        """
        if position is not None:
            self.table.load_state_dict(position)
        try:
            for number, row in enumerate(self.table, first):
                label = row[self._label] if self._label else None
                yield StreamedImage(row[self._column], label, self._allowed_roots, f"{self.root}, row {number}")
        except MapetError:
            raise
        except Exception as error:  # the library and its file systems have many kinds
            hint = f"go on with {option('resume', True)}"
            raise MapetError(f"{self.root} broke off ({first_line(error)}): {hint}") from None


def write_streamed(stream: HFStream, config: PrepareConfig, on_bad: OnUnreadable, on_image: OnImage) -> PreparedDataset:
    """Prepare a stream, or resume; its originals are never on disk.

    The data set is the one that `write_prepared_dataset` makes of the downloaded data set, file by file, but for `streamed`
    in the manifest.

    Raises:
        MapetError: see `PreparedDatasetWriter`; the stream broke off, or is empty.
    """
    size, rows = prepared.PER_SHARD, list[StreamedImage]()
    writer = PreparedDatasetWriter(config, {"streamed": stream.root}, on_bad, on_image)

    def encode(row: StreamedImage) -> bytes:
        data = row.take()
        return writer.encode(open_image(data, config.channels, writer.window), lambda: data)

    def recorded(incoming: Iterator[StreamedImage]) -> Iterator[StreamedImage]:
        for row in incoming:
            rows.append(row)
            yield row

    if "num_images" not in writer.manifest:
        incoming = stream.rows(writer.num_done, writer.manifest.get("position"))
        while writer.num_done % size == 0:
            shard, rows = writer.num_done // size, []
            writer.add_shard(recorded(islice(incoming, size)), encode)
            if not rows:
                break
            write_checksummed_json(
                config.out / ROWS.format(shard), {"rows": [[row.path, row.size, row.label] for row in rows]}
            )
            writer.manifest["position"] = stream.table.state_dict()  # after the last row given out; JSON can hold it
            writer.save()
        _finish(writer, stream)
    for left in config.out.glob(ROWS.replace("{:05d}", "*")):
        left.unlink()
    return PreparedDataset(config.out)


def _finish(writer: PreparedDatasetWriter, stream: HFStream) -> None:
    """Write ids, labels and hash, now that all rows are known."""
    shards = range(-(-writer.num_done // prepared.PER_SHARD))
    rows = [
        row for s in shards for row in read_checksummed_json(writer.folder / ROWS.format(s), "rows of a shard")["rows"]
    ]
    if not rows:
        raise MapetError(f"{stream.root} has no rows")
    paths, sizes, values = zip(*rows, strict=True)
    labels = known_labels(stream.classes, np.array(values, np.int64))
    images = ImageList(ImageFiles(stream.root, ids_of(list(paths)), sizes, labels))
    del writer.manifest["position"]
    writer.manifest |= {"images_hash": images.hash, "num_images": len(images)}
    if labels is not None:
        writer.manifest["classes"] = labels[0]
    writer.describe(images.ids, labels)
