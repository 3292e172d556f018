"""A data set of Hugging Face that is too large for this disk: read once, in order, and packed as it comes."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from mapet.config.prepare import PrepareConfig
from mapet.data import prepared
from mapet.data.decode import open_image
from mapet.data.hugging_face import allowed_roots, first_line, ids_of, known_labels, open_rows, relative_to_root
from mapet.data.image_list import ImageFiles, ImageList
from mapet.data.prepared import PreparedDataset, PreparedDatasetWriter
from mapet.data.readers.base import MAX_BYTES, BadImage
from mapet.errors import MapetError, option
from mapet.files import read_sealed, write_sealed

ROWS = ".rows-{:05d}.json"
"""What is known of a shard's rows, until that of all is: [path, bytes, class] of each."""


@dataclass
class StreamedImage:
    """An image as it came.

    Attributes:
        path: what the row gives, below its root.
        label: class, -1 where there is none.
        size: bytes; -1 until they are known.
        data: the image's bytes, until it is packed; None: there is no image.
        file: path or URL where the bytes are, if they did not come with the row.
    """

    path: str | None
    label: int
    size: int = -1
    data: bytes | None = None
    file: str | None = None

    def take(self) -> bytes:
        """The bytes, which are forgotten: a shard's images don't stay in memory.

        Raises:
            BadImage: there are none.
        """
        data, self.data = self.data, None
        if self.file is not None:
            import fsspec

            try:
                with fsspec.open(self.file) as file:
                    data = file.read()
            except Exception as error:  # of many kinds, by protocol
                raise BadImage(first_line(error)) from None
            self.size = len(data)
        if data is None:
            raise BadImage(
                "no image in this row" if self.path is None else f"no bytes in this row, nor a file: {self.path!r}"
            )
        if len(data) > MAX_BYTES:
            raise BadImage(f"{len(data):,} bytes are more than {MAX_BYTES:,}")
        return data


class HFStream:
    """Rows of a data set, in order. Stands for their list, which is not known yet, where bad images are named and counted.

    Attributes:
        expected: rows, where the data set says so.
        classes: names of the classes, where it has some.
    """

    def __init__(self, source: str) -> None:
        """Args: source: hf:NAME, as for `list_hf_images`."""
        datasets, rows, self._column, self._label = open_rows(source, streaming=True)
        self.root = source
        self._allowed_roots = allowed_roots(source, datasets)
        info = (rows.info.splits or {}).get(str(rows.split))
        self.expected: int | None = getattr(info, "num_examples", None) or None
        self.classes: list[str] = list(rows.features[self._label].names) if self._label else []
        self._rows = rows.select_columns([self._column, *filter(None, [self._label])])

    def __len__(self) -> int:
        return self.expected or prepared.PER_SHARD

    def id(self, index: int) -> str:
        return f"row {index}"

    def position(self) -> dict[str, Any]:
        """After the last row that was given out; JSON can hold it."""
        return self._rows.state_dict()

    def rows(self, first: int, position: dict[str, Any] | None) -> Iterator[StreamedImage]:
        """From row `first` on, whose position an earlier reading wrote down.

        Raises:
            MapetError: the stream broke off.
        """
        if position is not None:
            self._rows.load_state_dict(position)
        iterator = enumerate(iter(self._rows), first)
        while True:
            try:
                number, values = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # the library and its file systems have many kinds
                raise MapetError(
                    f"{self.root} broke off ({first_line(error)}): go on with {option('resume', True)}"
                ) from None
            label = values[self._label] if self._label else None
            yield self._row(values[self._column], -1 if label is None else label, f"{self.root}, row {number}")

    def _row(self, image: dict[str, Any] | None, label: int, where: str) -> StreamedImage:
        if image is None:
            return StreamedImage(None, label)
        data, path = image["bytes"], image["path"]
        if data is not None:
            return StreamedImage(path, label, len(data), data)
        if path is None or not (os.path.isabs(path) or "://" in path):
            return StreamedImage(path, label)
        file = path if "://" in path else os.path.normpath(path)
        return StreamedImage(relative_to_root(file, self._allowed_roots, where), label, file=file)


def write_streamed(
    stream: HFStream, config: PrepareConfig, on_bad: Callable[[int, str], None], on_image: Callable[[int], None]
) -> PreparedDataset:
    """Prepare a stream, or resume; its originals are never on disk.

    The data set is the one that `write_prepared_dataset` makes of the downloaded data set, file by file, but for `streamed`
    in the manifest.

    Raises:
        MapetError: see `PreparedDatasetWriter`; the stream broke off, or is empty.
    """
    size = prepared.PER_SHARD
    with PreparedDatasetWriter(config, {"streamed": stream.root}, on_bad, on_image) as writer:

        def encode(row: StreamedImage) -> bytes:
            data = row.take()
            return writer.encode(open_image(data, config.channels, writer.window), lambda: data)

        if "num_images" not in writer.manifest:
            incoming = stream.rows(writer.num_done, writer.manifest.get("position"))
            while writer.num_done % size == 0:
                shard, rows = writer.num_done // size, list[StreamedImage]()
                writer.add_shard(_recorded(islice(incoming, size), rows), encode)
                if not rows:
                    break
                write_sealed(
                    config.out / ROWS.format(shard), {"rows": [[row.path, row.size, row.label] for row in rows]}
                )
                writer.manifest["position"] = stream.position()
                writer.save()
            _finish(writer, stream)
    for left in config.out.glob(ROWS.replace("{:05d}", "*")):
        left.unlink()
    return PreparedDataset(config.out)


def _recorded(incoming: Iterator[StreamedImage], rows: list[StreamedImage]) -> Iterator[StreamedImage]:
    """Yield rows that are also appended to `rows`."""
    for row in incoming:
        rows.append(row)
        yield row


def _finish(writer: PreparedDatasetWriter, stream: HFStream) -> None:
    """Now that all rows are known: their ids, labels and hash."""
    shards = range(-(-writer.num_done // prepared.PER_SHARD))
    rows = [row for s in shards for row in read_sealed(writer.folder / ROWS.format(s), "rows of a shard")["rows"]]
    if not rows:
        raise MapetError(f"{stream.root} has no rows")
    paths, sizes, values = zip(*rows, strict=True)
    labels = known_labels(stream.classes, np.array(values, np.int64)) if stream.classes else None
    images = ImageList(ImageFiles(stream.root, ids_of(list(paths)), sizes, labels))
    del writer.manifest["position"]
    writer.manifest |= {"images_hash": images.hash, "num_images": len(images)}
    if labels is not None:
        writer.manifest["classes"] = labels[0]
    writer.describe(images.ids, labels)
