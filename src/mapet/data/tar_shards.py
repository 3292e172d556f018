"""Tar shards (WebDataset), read at random: their headers are read once, then an image is a range of bytes.

Nothing is ever unpacked: a member's name is an id and no path.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from fsspec.core import url_to_fs
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from mapet.config.shared import is_url
from mapet.data.image_list import ImageList, ImageReader, PackedStrings, number_classes
from mapet.data.readers import EXTENSIONS
from mapet.errors import MapetError
from mapet.files import atomic_write

log = logging.getLogger("mapet")
FORMAT = 1
AT_ONCE = 16
"""Distant shards whose headers are read at a time; near ones keep one thread busy, and more would scatter memory."""
HEADER, LONGEST_HEADER = 512, 1 << 20
LONGEST_LABEL = 256
TRIES = 3
"""How often a distant range is asked for, with 1 and 2 seconds between."""


class Shard(NamedTuple):
    """The images of one tar file.

    Attributes:
        names: of the members.
        offsets: (n,) where their bytes begin.
        sizes: (n,) how many there are.
        labels: the text of the `.cls` member of the same key; empty without.
        ignored: other members.
    """

    names: PackedStrings
    offsets: Int[np.ndarray, " n"]
    sizes: Int[np.ndarray, " n"]
    labels: PackedStrings
    ignored: int


class TarReader(ImageReader):
    """Images by ranges of bytes of files that fsspec can open: local ones, or URLs.

    Attributes:
        source: tells the file system.
        paths: of the shards there.
        first: (shards,) the row of each one's first image.
    """

    def __init__(self, source: str, paths: list[str], shards: list[Shard], names: PackedStrings) -> None:
        self.source, self.paths = source, paths
        self.first = np.cumsum([0, *(len(shard.names) for shard in shards[:-1])])
        self.offsets = np.concatenate([shard.offsets for shard in shards])
        sizes = np.concatenate([shard.sizes for shard in shards])
        texts = PackedStrings.concatenate([shard.labels for shard in shards])
        labels = number_classes(texts, lambda text: (len(text), text) if text.isdigit() else (0, text))
        super().__init__(source, names, sizes, labels, sum(shard.ignored for shard in shards))

    def data(self, index: int) -> bytes:
        path = self.paths[int(np.searchsorted(self.first, index, "right")) - 1]
        start, size = int(self.offsets[index]), int(self.file_sizes[index])
        for wait in range(1, TRIES + 1):
            try:
                data = _file_system(self.source, os.getpid()).cat_file(path, start, start + size)
                break
            except Exception as error:  # each file system has errors of its own
                if wait == TRIES or isinstance(error, FileNotFoundError) or not is_url(self.source):
                    # No ImageDecodeError: an image would be left out for good, for the sake of a network.
                    raise MapetError(f"cannot read {path}: {error or type(error).__name__}") from None
                time.sleep(wait)
        if len(data) != size:
            found = f"{len(data):,} of the {size:,} bytes of {os.fsdecode(self.ids[index])}"
            raise MapetError(f"{path} has {found}: it has changed, so start again")
        return data


def list_shards(source: str) -> ImageList:
    """The images of tar shards: members with an image's ending that are regular files and not hidden.

    The id of an image is its member's name, so it stays the same when shards are moved or cut anew, and is that of the file
    which was packed; `name@shard.tar` if names come in several shards. Labels are the texts of `.cls` members, if every
    image has one, else folders in the names.

    The headers are read once; what they say is kept in ~/.cache/mapet/shards and read anew if a shard's size, time or ETag
    changes. (Those files may be deleted at any time.)

    Args:
        source: path or URL of `.tar` files; `{000..012}` and `*` stand for several.

    Raises:
        MapetError: a shard is missing, compressed, damaged or cut off (naming it), or there are no images.
    """
    paths = _expand(source)
    with ThreadPoolExecutor(AT_ONCE if is_url(source) else 1) as pool:
        found = pool.map(lambda path: _index(source, path), paths)
        shards = list(tqdm(found, total=len(paths), desc="index", unit="shard", disable=None, leave=False))
    names = PackedStrings.concatenate([shard.names for shard in shards])
    if not names:
        others = f"{sum(shard.ignored for shard in shards)} other members"
        where, endings = f"the {len(paths)} shards of {source} ({others})", " ".join(sorted(EXTENSIONS))
        raise MapetError(f"no images in {where}; looked for names ending in {endings}")
    if _any_twice(names):
        files = [b"@" + os.fsencode(os.path.basename(path)) for path in paths]
        names = PackedStrings.pack(
            name + file for file, shard in zip(files, shards, strict=True) for name in shard.names
        )
        if _any_twice(names):
            raise MapetError(f"{source}: several shards of one name hold members of one name: rename the shards")
    return ImageList(TarReader(source, paths, shards, names))


def _expand(source: str) -> list[str]:
    """The paths that a pattern stands for, in order, on the file system it names."""
    fs = _file_system(source, os.getpid())
    paths: list[str] = []
    for pattern in _braces(source):
        path = url_to_fs(pattern)[1]
        found = sorted(map(str, fs.glob(path))) if "*" in path else [path]
        if not found:
            raise MapetError(f"{pattern}: no such file")
        paths += found
    for path in paths:
        if not path.partition("?")[0].endswith(".tar"):
            hint = "a URL names tar shards, uncompressed, which give an image without all before it: gunzip, zstd -d others"
            raise MapetError(f"{path} is no .tar file: {hint}")
    return paths


def _braces(source: str) -> list[str]:
    """'a{08..10}b' -> a08b, a09b, a10b; also several of them."""
    text, *rest = re.split(r"\{(\d+)\.\.(\d+)\}", source)
    parts = [[text]]
    for first, last, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        parts += [[f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)], [text]]
    return list(map("".join, itertools.product(*parts)))


@lru_cache(64)
def _file_system(source: str, process: int) -> Any:
    """The file system of a URL or path; another one for each process, for connections don't outlive a fork."""
    try:
        return url_to_fs(source)[0]
    except (ImportError, ValueError) as error:  # "Install s3fs to access S3", "Protocol not known"
        raise MapetError(f"{source}: {error}") from None


def _index(source: str, path: str) -> Shard:
    """Of one shard, from the cache if it is there."""
    try:
        fs = _file_system(source, os.getpid())
        path = path if is_url(source) else os.path.realpath(path)
        about = json.dumps([FORMAT, fs.protocol, path, fs.info(path)], default=str)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mapet" / "shards"
        kept = cache / f"{hashlib.sha256(about.encode()).hexdigest()}.safetensors"
        with suppress(OSError, SafetensorError, KeyError, IndexError):  # there is none, or it is damaged
            arrays = load_file(kept)
            parts = [(arrays[name].tobytes(), arrays[f"{name}.ends"]) for name in ("names", "labels")]
            names, labels = (PackedStrings(*part) for part in parts)
            return Shard(names, arrays["offsets"], arrays["sizes"], labels, int(arrays["ignored"][0]))
        with fs.open(path, "rb") as file:
            shard = read_headers(file, path)
    except MapetError:
        raise
    except FileNotFoundError:
        raise MapetError(f"{path}: no such file") from None
    except Exception as error:  # each file system has errors of its own
        raise MapetError(f"cannot read {path}: {error or type(error).__name__}") from None
    arrays = {"offsets": shard.offsets, "sizes": shard.sizes, "ignored": np.array([shard.ignored])}
    for name, strings in (("names", shard.names), ("labels", shard.labels)):
        arrays |= {name: np.frombuffer(strings.block, np.uint8), f"{name}.ends": strings.ends}
    try:
        with atomic_write(kept) as temporary:
            save_file(arrays, temporary)
    except OSError as error:
        log.debug("the index of %s is not kept: %s", path, error)
    return shard


def read_headers(file: Any, path: str) -> Shard:
    """The images of an open tar file, by its headers alone.

    Raises:
        MapetError: it is no tar file, is damaged or cut off, or one name comes twice.
    """
    images: dict[bytes, tuple[int, int, bytes]] = {}
    labels: dict[bytes, bytes] = {}
    ignored = 0
    try:
        tar = tarfile.open(fileobj=cast(BinaryIO, _SmallReads(file)), mode="r:")  # noqa: SIM115
        for member in _members(tar):
            name = os.fsencode(member.name.removeprefix("./"))
            folder, _, base = name.rpartition(b"/")
            key, ending = os.path.join(folder, base.split(b".")[0]), os.path.splitext(base)[1].lower()
            hidden = any(part.startswith(b".") and part != b".." for part in name.split(b"/"))
            plain = member.isreg() and not member.issparse() and not hidden
            if plain and ending.decode("latin-1") in EXTENSIONS:
                if name in images or b"\0" in name:
                    wrong = "comes twice" if name in images else "is none"
                    raise tarfile.ReadError(f"the name {member.name!r} {wrong}")
                images[name] = member.offset_data, member.size, key
            elif plain and ending == b".cls" and member.size <= LONGEST_LABEL:
                file.seek(member.offset_data)
                labels[key] = file.read(member.size).strip()
            else:
                ignored += not member.isdir()
        file.seek(tar.offset)
        end = file.read(tarfile.RECORDSIZE + HEADER)
        if len(end) < HEADER:
            raise tarfile.ReadError("it ends without an end mark: it is cut off")
        if end.strip(b"\0"):
            place = f"at byte {tar.offset:,}"
            raise tarfile.ReadError(f"no header where one should be, {place}, or something after the end")
    except (tarfile.TarError, ValueError, RecursionError, EOFError) as error:
        found = f"the shard {path} is damaged or no uncompressed tar file: {error}"
        raise MapetError(f"{found}. Make or copy it again") from None
    places = np.array([(offset, size) for offset, size, _ in images.values()], np.int64).reshape(-1, 2)
    texts = PackedStrings.pack(labels.get(key, b"") for _, _, key in images.values())
    return Shard(PackedStrings.pack(images), places[:, 0].copy(), places[:, 1].copy(), texts, ignored)


def _members(tar: Any) -> Iterator[tarfile.TarInfo]:
    """Those of a tar file in order, none kept; tarfile itself would keep 1 kB of each."""
    last = -1
    while (member := tar.next()) is not None:
        tar.members.clear()
        if member.size < 0 or member.offset <= last:  # it would turn in a circle
            raise tarfile.ReadError(f"the member {member.name!r} says it has {member.size:,} bytes")
        last = member.offset
        yield member


class _SmallReads:
    """A file of which headers are read: one that claims to be of many bytes is not believed."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)


def _any_twice(names: PackedStrings) -> bool:
    hashes = np.fromiter(map(hash, names), np.int64, len(names))  # of most lists these tell, in little memory
    return len(np.unique(hashes)) < len(names) and len(set(names)) < len(names)
