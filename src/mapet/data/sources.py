"""What a person may name as images (a folder, a list, shards, prepared images, a data set of Hugging Face), listed."""

import heapq
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from mapet.config.shared import HF_PREFIX, is_url
from mapet.data.hugging_face import list_hf_images
from mapet.data.image_list import ImageFiles, ImageList
from mapet.data.prepared import IDS, PreparedDataset
from mapet.data.readers import EXTENSIONS
from mapet.data.tar_shards import list_shards
from mapet.errors import MapetError
from mapet.files import MANIFEST


def list_images(source: str | Path) -> ImageList:
    """List the images of a folder, a text file, tar shards or a data set of Hugging Face.

    folder: searched to any depth; hidden names and what is not a regular file are left out. Symbolic links are followed,
        also out of the folder; what several of them lead to comes once, so that those which lead back end.
    folder made by `mapet prepare`: lists what it was made of.
    text file: names one image on each line, relative to the file's own folder or absolute.
    .tar files: see `tar_shards.list_shards`; several by `{000..012}`, `*`, or a folder that holds them; URLs too.
    hf:NAME: see `hugging_face.list_hf_images`.

    Raises:
        MapetError: the source is missing or unreadable, or holds no image.
    """
    text = os.fspath(source)
    if text.startswith(HF_PREFIX):
        return list_hf_images(text)
    path, manifest = Path(text), Path(text, MANIFEST)
    if is_url(text) or (re.search(r"\.(tar|tgz)(\.\w+)?$", text) and not path.is_dir()):
        return list_shards(text)
    with suppress(OSError):  # there is none; among images it may be anybody's
        if b'"format_version"' in manifest.read_bytes() or (path / IDS).is_file():
            return ImageList(PreparedDataset(path))
    if path.is_dir():
        found = _scan_folder(path)
        if not len(found) and any(path.glob("*.tar")):
            return list_shards(str(path / "*.tar"))
        if not len(found):
            endings = " ".join(sorted(EXTENSIONS))
            raise MapetError(f"no images in {path} ({found.ignored} other files); looked for names ending in {endings}")
        return found
    if path.is_file():
        return _read_list(path)
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    raise MapetError(f"{path} does not exist{where}: give a folder of images, a list of paths, .tar shards or hf:NAME")


def _scan_folder(root: Path) -> ImageList:
    found: list[tuple[bytes, int]] = []
    ignored = 0
    seen: set[tuple[int, int]] = set()
    pending = [(False, b"")]  # real folders before links, each in order of names: the same ids on every file system
    while pending:
        linked, below = heapq.heappop(pending)
        folder = os.path.join(os.fsencode(root), below)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            raise MapetError(f"no permission to list the folder {os.fsdecode(folder)}") from None
        for entry in entries:
            name, ending = os.path.join(below, entry.name), os.path.splitext(entry.name)[1].lower().decode("latin-1")
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                heapq.heappush(pending, (linked or entry.is_symlink(), name))
            elif ending in EXTENSIONS and (size := _size(entry)) is not None:
                found.append((name, size))
            else:
                ignored += 1
    found.sort()
    return ImageList(ImageFiles(root, [name for name, _ in found], [size for _, size in found], ignored=ignored))


def _size(entry: "os.DirEntry[bytes]") -> int | None:
    """Bytes of a file; None of what is no file: to open a pipe is to wait for its writer."""
    try:
        status = entry.stat()
    except OSError:  # a dangling link: reported as a bad image when it is read
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _read_list(file: Path) -> ImageList:
    data = file.read_bytes()
    if b"\0" in data[:4096]:
        raise MapetError(f"{file} is not a text file of paths; give a folder or a list with one path on each line")
    ids = [line.rstrip(b"\r") for line in data.split(b"\n") if line.strip()]
    if not ids:
        raise MapetError(f"{file} lists no images")
    root = os.fsencode(file.parent)
    sizes = []
    for number, name in enumerate(ids, 1):
        try:
            sizes.append(os.stat(os.path.join(root, name)).st_size)
        except OSError as error:
            raise MapetError(f"{file}, entry {number}: {os.fsdecode(name)}: {error.strerror}") from None
    return ImageList(ImageFiles(file.parent, ids, sizes))
