"""Read images of tar shards (WebDataset) in any order: the headers are read once, then an image is a range of bytes.

Nothing is ever unpacked: a member's name is an id, never a path to write to.
"""

import glob
import hashlib
import json
import logging
import operator
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Int, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from mapet.config.limits import limits
from mapet.config.shared import is_url
from mapet.data.image_list import ImageList, PackedStrings, join_terminated, labels_from_texts
from mapet.data.readers.open import EXTENSIONS
from mapet.errors import MapetError, first_line, option
from mapet.files import atomic_write

log = logging.getLogger("mapet")
FORMAT = 3
"""Version of the cached indices: another version is not found in the cache, and the headers are read again."""
NUM_INDEX_THREADS = 16
"""Distant shards whose headers are read at a time; near ones keep one thread busy, and more would scatter memory."""
BLOCK_BYTES = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 1 << 17
"""Of an extended header: long names and extended attributes, which Linux allows 64 KiB of."""
MAX_GLOBAL_HEADERS = 100
"""Entries of global headers, which tarfile applies to each member again: `git archive` writes one."""
MAX_DIGITS = 255
"""Digits in a row in a header: as many as a file name has. Before 3.11.10 and 3.12.6, Python takes the square of their number of steps."""
MAX_LABEL_BYTES = 256
NUM_TRIES = 3
"""How often a distant range is requested, with 1 and 2 seconds between."""


class ShardIndex(NamedTuple):
    """Where the images of one tar file are: arrays, as the cache stores them.

    Attributes:
        names: uint8, the members' names, each followed by a zero byte.
        offsets: (n,) byte at which each member's content begins.
        sizes: (n,) bytes of each member's content.
        labels: uint8, the text of each image's `.cls` member (empty without one), each followed by a zero byte.
        num_ignored: (1,) number of other members.
    """

    names: UInt8[np.ndarray, " bytes"]
    offsets: Int[np.ndarray, " n"]
    sizes: Int[np.ndarray, " n"]
    labels: UInt8[np.ndarray, " bytes"]
    num_ignored: Int[np.ndarray, "1"]


class TarImageList(ImageList):
    """Images of tar shards: members with an image's extension that are regular files, of whose path no part begins with a dot.

    The id of an image is its member's name, so it stays the same when shards are moved or cut differently, and is that of
    the file which was packed; `name@shard.tar` if several shards have a member of one name. Labels are the texts of `.cls`
    members, if every image has one, else folders in the names.

    The headers are read once and cached in ~/.cache/mapet/shards, which may be deleted at any time; they are read again
    when a shard's size, time or ETag changes.

    Attributes:
        source: path or URL of the shards, which selects fsspec's file system.
        paths: path of each shard, as that file system names it.
        first_rows: (shards,) row of each shard's first image.
        offsets: (n,) byte in its shard at which each image begins, by row.
    """

    def __init__(self, source: str, paths: Sequence[str] = ()) -> None:
        """List the images of shards, shard by shard in the order of the members, by their headers or the cached indices.

        Args:
            source: path or URL of `.tar` files; `{000..012}` and `*` stand for several.
            paths: of the files, if `source` is their folder.

        Raises:
            MapetError: a shard is missing, compressed, damaged or cut off (naming it); there are no images; or shards of one
                name (in several folders) hold members of one name, so that `name@shard.tar` is no unique id.
        """
        self.source, self.paths = source, list(paths) or _expand_pattern(source)
        with ThreadPoolExecutor(NUM_INDEX_THREADS if is_url(source) else 1) as pool:
            indices = pool.map(lambda path: _index_shard(source, path), self.paths)
            shards = list(tqdm(indices, total=len(self.paths), desc="index", unit="shard", disable=None, leave=False))
        ids = PackedStrings.from_terminated(b"".join(shard.names.tobytes() for shard in shards))
        num_ignored = sum(int(shard.num_ignored[0]) for shard in shards)
        if not ids:
            where = f"the {len(shards)} shards of {source} ({num_ignored} other members)"
            raise MapetError(f"no images in {where}; looked for names ending in {' '.join(sorted(EXTENSIONS))}")
        counts = [len(shard.offsets) for shard in shards]
        if _has_duplicates(ids):
            suffixes = [b"@" + os.fsencode(os.path.basename(path)) for path in self.paths]
            ids = PackedStrings.from_strings(map(operator.add, ids, np.repeat(np.array(suffixes, object), counts)))
            if _has_duplicates(ids):
                raise MapetError(
                    f"{source}: several shards of the same file name hold members of the same name: rename the shards"
                )
        self.first_rows = np.cumsum([0, *counts[:-1]])
        self.offsets = np.concatenate([shard.offsets for shard in shards])
        sizes = np.concatenate([shard.sizes for shard in shards])
        texts = PackedStrings.from_terminated(b"".join(shard.labels.tobytes() for shard in shards))
        # Numbers are sorted as numbers; a length of 0 puts other texts before them.
        num_unlabeled = sum(not text for text in texts)
        if 0 < num_unlabeled < len(texts):
            self.label_note = f"{num_unlabeled} of {len(texts):,} images have no .cls member of their name"
        labels = labels_from_texts(texts, lambda text: (len(text), text) if text.isdigit() else (0, text))
        super().__init__(source, ids, sizes, labels, num_ignored)

    def data(self, index: int) -> bytes:
        """Return the bytes of the image at `index` of this list: a range of its shard, requested up to `NUM_TRIES` times from a URL.

        Args:
            index: of the image.

        Raises:
            MapetError: the shard cannot be read, or is shorter now than its index says. (An ImageDecodeError would exclude the image for
                good because of a network failure.)
        """
        row = self.rows[index]
        path = self.paths[int(np.searchsorted(self.first_rows, row, "right")) - 1]
        start, size = int(self.offsets[row]), int(self.file_sizes[index])
        for attempt in range(1, NUM_TRIES + 1):  # a local shard, or a file that is gone, is not tried again
            try:
                data = _file_system(self.source, os.getpid()).cat_file(path, start, start + size)
                break
            except Exception as error:  # each file system has errors of its own
                if attempt == NUM_TRIES or isinstance(error, FileNotFoundError) or not is_url(self.source):
                    hint = "check the file and, of a URL, the connection, then run the command again"
                    raise MapetError(f"cannot read the shard {path}: {first_line(error)}; {hint}") from None
                time.sleep(attempt)
        if len(data) != size:
            length = f"{len(data):,} of the {size:,} bytes of image {self.id(index)!r}"
            raise MapetError(
                f"the shard {path} holds {length}: it has changed since its index was read; run the command again"
            )
        return data


def _expand_pattern(source: str) -> list[str]:
    """Return the paths of the `.tar` files that a pattern stands for.

    Args:
        source: path or URL; `{000..012}` stands for each number of the range, `*` for any characters of existing names.

    Returns:
        Paths as fsspec's file system of `source` names them, e.g. without 's3://': the ranges in order, the matches of a `*` sorted.
        Only a pattern with `*` is looked up; another file may not exist.

    Raises:
        MapetError: no file matches a `*`, or a name does not end in `.tar` (the query of a URL aside).
    """
    fs = _file_system(source, os.getpid())
    paths: list[str] = []
    parent, name = os.path.split(source)
    if os.path.exists(source):  # what is there under that very name is no pattern
        return [_check_is_tar(os.path.abspath(source))]
    is_local = not is_url(source) and os.path.isdir(parent or ".")  # the folder's name is none, either
    for pattern in _expand_braces(name if is_local else source):
        if is_local:
            path = os.path.join(
                glob.escape(os.path.abspath(parent)) if "*" in pattern else os.path.abspath(parent), pattern
            )
        else:
            path = url_to_fs(pattern)[1]
        matches = sorted(map(str, fs.glob(path))) if "*" in path else [path]
        if not matches:
            raise MapetError(f"{pattern}: no file matches this pattern; check the folder and the names in it")
        paths += matches
    return [_check_is_tar(path, is_url(source)) for path in paths]


def _check_is_tar(path: str, has_query: bool = False) -> str:
    """Return the path or, perhaps with a query, URL if it ends in .tar; raise MapetError otherwise."""
    if not (path.partition("?")[0] if has_query else path).endswith(".tar"):
        hint = "compressed shards cannot be read image by image; decompress them first (`gunzip`, `zstd -d`)"
        raise MapetError(f"{path}: expected a name ending in .tar; {hint}")
    return path


def _expand_braces(source: str) -> list[str]:
    """Return the texts that ranges in braces stand for: 'a{08..10}b' -> a08b, a09b, a10b; there may be several ranges."""
    text, *parts = re.split(
        r"\{(\d+)\.\.(\d+)\}", source
    )  # parts: first, last and following text of each range in turn
    choices = [[text]]
    for first, last, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        width = len(first)  # '08' means two digits
        choices += [[f"{value:0{width}d}" for value in range(int(first), int(last) + 1)], [text]]
    return list(map("".join, product(*choices)))


@lru_cache(64)
def _file_system(source: str, process_id: int) -> Any:
    """Return fsspec's file system of a URL or path.

    Args:
        source: path or URL.
        process_id: of this process; a key of the cache alone, so that a forked process opens connections of its own.

    Raises:
        MapetError: fsspec does not know the protocol, or needs a package for it that is not installed.
    """
    if not is_url(source):  # not even one with '::' in its name
        return LocalFileSystem()
    try:
        return url_to_fs(source)[0]
    except (ImportError, ValueError) as error:  # "Install s3fs to access S3", "Protocol not known"
        hint = "give a local path, or a URL whose protocol fsspec has an installed package for"
        raise MapetError(f"cannot open the URL or path {source}: {first_line(error)}; {hint}") from None


def _index_shard(source: str, path: str) -> ShardIndex:
    """Return the index of one shard: from the cache if it is there and intact, else from the shard's headers, which it then caches.

    The name of the cached file is a hash of path, size, time and ETag: the index of a shard that has changed is not found.

    Args:
        source: path or URL that selects fsspec's file system.
        path: the shard, as that file system names it.

    Raises:
        MapetError: the shard is missing, unreadable or damaged. (A cache that cannot be written is no error.)
    """
    try:
        fs = _file_system(source, os.getpid())
        path = path if is_url(source) else os.path.realpath(path)
        version = json.dumps([FORMAT, fs.protocol, path, fs.info(path)], default=str)  # with its time or ETag
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mapet" / "shards"
        cached = cache / f"{hashlib.sha256(version.encode()).hexdigest()}.safetensors"
        with suppress(OSError, SafetensorError, TypeError):  # there is none, or it is damaged
            return ShardIndex(**load_file(cached))
        with fs.open(path, "rb") as file:
            shard = read_headers(file, path)
    except MapetError:
        raise
    except FileNotFoundError:
        raise MapetError(f"the shard {path} does not exist; check its name, or the range in {source}") from None
    except Exception as error:  # each file system has errors of its own
        hint = "check its permissions and, of a URL, the connection"
        raise MapetError(f"cannot read the shard {path}: {first_line(error)}; {hint}") from None
    try:
        with atomic_write(cached) as temporary:
            save_file(shard._asdict(), temporary)
    except OSError as error:
        log.debug("the index of the shard %s could not be written to the cache %s: %s", path, cache, error)
    return shard


def read_headers(file: BinaryIO, path: str) -> ShardIndex:
    """Read the headers of an open tar file, and return where its images are.

    Images are regular members with an image's extension, of which no part of the path begins with a dot. A member NAME.cls, the
    text of a class in at most `MAX_LABEL_BYTES`, labels the image NAME.EXTENSION; an image without one has that of its WebDataset key,
    its path up to the first dot of the file name. Of the contents only such members are read. Other members count as ignored, folders do
    not count at all.

    Args:
        file: seekable, open for reading bytes, at its beginning; it stays open.
        path: of the shard, for errors.

    Returns:
        The images in the order of their headers; names without a leading './'. See `ShardIndex`.

    Raises:
        MapetError: the file is no uncompressed tar file, is damaged or cut off, or two images have the same name.
    """
    # name -> byte at which the content begins, bytes of it, names of its label's member, without extension, in order of preference
    images: dict[bytes, tuple[int, int, tuple[bytes, bytes]]] = {}
    labels: dict[bytes, bytes] = {}  # name of the member without extension -> text
    num_ignored = 0
    try:
        # mode "r:" refuses compressed files, of which no member could be read alone
        tar = tarfile.open(fileobj=cast(BinaryIO, _BoundedReads(file)), mode="r:")  # noqa: SIM115
        for member in _iterate_members(tar):
            name = os.fsencode(member.name.removeprefix("./"))
            folder, _, base = name.rpartition(b"/")
            stem, extension = os.path.splitext(name)
            keys, extension = (stem, os.path.join(folder, base.split(b".")[0])), extension.lower()
            is_hidden = any(part.startswith(b".") and part != b".." for part in name.split(b"/"))
            is_plain = member.isreg() and not member.issparse() and not is_hidden
            if len(images) > limits().archive_members:
                raise tarfile.ReadError(
                    f"it has more images than the {limits().archive_members:,} of {option('limits.archive_members')}"
                )
            if is_plain and extension.decode("latin-1") in EXTENSIONS:
                if name in images or b"\0" in name:
                    fault = "two members have the name" if name in images else "there is a zero byte in the name"
                    raise tarfile.ReadError(f"{fault} {member.name!r}")
                images[name] = member.offset_data, member.size, keys
            elif is_plain and extension == b".cls" and member.size <= MAX_LABEL_BYTES:
                file.seek(member.offset_data)
                labels[stem] = file.read(member.size).replace(b"\0", b"").strip()
            else:
                num_ignored += not member.isdir()
        # tarfile takes anything that is no header for the end. A true end is at least one block of zeros, filled up to a record.
        file.seek(tar.offset)
        end = file.read(tarfile.RECORDSIZE + BLOCK_BYTES)
        if len(end) < BLOCK_BYTES:
            raise tarfile.ReadError(
                f"it is cut off: expected {BLOCK_BYTES} zero bytes at its end, found {len(end)} bytes"
            )
        if end.strip(b"\0"):
            raise tarfile.ReadError(f"expected a header or zeros at byte {tar.offset:,}, found other data")
    except (tarfile.TarError, ValueError, RecursionError, EOFError) as error:
        problem = f"the shard {path} is damaged or no uncompressed tar file: {first_line(error)}"
        raise MapetError(f"{problem}. Make or copy the shard again") from None
    # offset and size of every image, as two contiguous arrays
    offsets, sizes = np.array([image[:2] for image in images.values()], np.int64).reshape(-1, 2).T.copy()
    names = np.frombuffer(join_terminated(images), np.uint8)
    texts = np.frombuffer(
        join_terminated(labels.get(stem, labels.get(key, b"")) for _, _, (stem, key) in images.values()), np.uint8
    )
    return ShardIndex(names, offsets, sizes, texts, np.array([num_ignored]))


def _iterate_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file in order, in constant memory: tarfile itself would keep 1 kB of each.

    Raises:
        tarfile.ReadError: a member has a negative size, or its header is not behind that of the member before, as in a loop
            that would never end.
    """
    last_offset = -1
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.size < 0 or member.offset <= last_offset:
            raise tarfile.ReadError(f"the header of {member.name!r} gives an impossible size, {member.size:,} bytes")
        if len(tar.pax_headers) > MAX_GLOBAL_HEADERS:
            raise tarfile.ReadError(f"its global headers have {len(tar.pax_headers):,} entries")
        last_offset = member.offset
        yield member


class _BoundedReads:
    """A file for tarfile to read headers from, which refuses to read one of more than `MAX_HEADER_BYTES`.

    tarfile would first take as much memory as a header claims to need.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes; raise tarfile.ReadError if these are too many (-1: all the rest) or would take long to parse."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header takes {size:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        data = self.file.read(size)
        if size > BLOCK_BYTES and re.search(rb"\d{%d}" % (MAX_DIGITS + 1), data):
            raise tarfile.ReadError(f"a header has more than {MAX_DIGITS} digits in a row")
        return data


def _has_duplicates(names: PackedStrings) -> bool:
    """Return whether a name comes twice; their hashes are compared first, which takes less memory than a set of the names."""
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    return len(np.unique(hashes)) < len(names) and len(set(names)) < len(names)
