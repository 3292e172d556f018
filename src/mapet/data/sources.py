"""List the images of any source: a folder, a text file of paths, tar shards, prepared images, a Hugging Face data set."""

import glob
import heapq
import itertools
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from mapet.config.shared import AS_STORED, HF_PREFIX, ReadOptions, is_url
from mapet.data.hugging_face import HFImageList
from mapet.data.image_list import ImageFiles, ImageList, PackedStrings, labels_from_texts, split_pages
from mapet.data.prepared import IDS, PreparedDataset
from mapet.data.readers.open import EXTENSIONS, is_image_name
from mapet.data.tar_shards import TarImageList
from mapet.errors import MapetError, option
from mapet.files import MANIFEST


def list_images(source: str | Path, options: ReadOptions = AS_STORED) -> ImageList:
    """List the images of a source, whose kind follows from what it is; they will be read as the options say.

    Args:
        source: one of these, tried in this order:
            hf:NAME: a data set of Hugging Face; see `HFImageList`.
            .tar files: see `TarImageList`; several by `{000..012}` or `*`. Every URL is taken as one.
            folder made by `mapet prepare`: lists the images that it was made from, under their old ids.
            folder: searched to any depth; one without images but with .tar files is a folder of shards. Hidden names and what is not a
                regular file are ignored. Symbolic links are followed, also out of the folder; a folder that several of them lead to
                comes once, so loops end.
            image file: the only one.
            pattern with *, ?, [...] or **: the image files that it matches, and those in the folders that it matches.
            text file: names one image on each line, relative to the file's own folder or absolute.
        options: how the files are read, e.g. the config of a command; prepared images are read already.

    Raises:
        MapetError: the source is missing or unreadable, or holds no image.
    """
    images = _list_source(source).read_as(options.read_options)
    return split_pages(images) if options.pages == "each" else images


def list_as_trained(source: str | Path, config: ReadOptions, trained: ReadOptions | None) -> ImageList:
    """List images for a tokenizer or backbone: they are read as its training images were, but for what `config` gives.

    Args:
        source, and errors beside those below: see `list_images`.
        config: of the command.
        trained: how the training images were read; None: unknown.

    Raises:
        MapetError: the images are prepared with another range of values, and `config` does not give one.
    """
    return read_as_trained(list_images(source, (trained or AS_STORED).override(config)), config, trained)


def read_as_trained(images: ImageList, config: ReadOptions, trained: ReadOptions | None) -> ImageList:
    """Return the list, read as `list_as_trained` says; see there for arguments and errors."""
    expected = (trained or AS_STORED).override(config)
    images = images.read_as(expected)
    declared = images.read_options.value_range  # prepared images have their own
    if trained is not None and trained.value_range and config.value_range is None and declared != trained.value_range:
        ranges = [
            " ".join(f"{value:g}" for value in values) if values else "none"
            for values in (declared, trained.value_range)
        ]
        problem = (
            f"{images.root} was prepared with the range of values {ranges[0]}, the model was trained with {ranges[1]}"
        )
        hint = f"prepare the images with {option('value_range')} {ranges[1]}, or give that option here to use them as they are"
        raise MapetError(f"{problem}: {hint}", field="value_range", value=declared)
    return images


def _list_source(source: str | Path) -> ImageList:
    """List the images of a source by its kind.

    Args:
        source: see `list_images`.

    Returns:
        The images, to be read as they are stored.

    Raises:
        MapetError: the source is missing or unreadable, or holds no image.
    """
    text = os.fspath(source)
    if text.startswith(HF_PREFIX):
        return HFImageList(text)
    path = Path(text)
    if is_url(text) or (re.search(r"\.(tar|tgz)(\.\w+)?$", text) and not path.is_dir()):
        return TarImageList(text)
    with suppress(OSError):  # no such file; and a folder of images may hold any other program's manifest.json
        if b'"format_version"' in (path / MANIFEST).read_bytes() or (path / IDS).is_file():
            return PreparedDataset(path)
    if path.is_dir():
        files = _scan_folder(path)
        if not len(files) and any(path.glob("*.tar")):
            return TarImageList(text, sorted(map(os.path.abspath, path.glob("*.tar"))))
        if not len(files):
            endings = " ".join(sorted(EXTENSIONS))
            volumes = (
                "; NIfTI volumes (.nii) are not read, save their slices as .npy" if any(path.rglob("*.nii*")) else ""
            )
            others = f"{files.ignored} other files{volumes}"
            raise MapetError(f"no images in {path} ({others}); looked for names ending in {endings}")
        return files
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        return ImageFiles(path.parent, [os.fsencode(path.name)], [path.stat().st_size])
    if path.is_file():
        return _read_list(path)
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    if glob.has_magic(text):
        if len(files := _match_pattern(text)):
            return files
        raise MapetError(f"{text} matches no image and no folder of images{where}: correct the pattern")
    raise MapetError(f"{path} does not exist{where}: give a folder of images, a list of paths, .tar shards or hf:NAME")


def _match_pattern(pattern: str) -> ImageFiles:
    """List the image files that a pattern matches, and those in matching folders; ids are paths below the folder before the first wildcard.

    If each image is in a folder that lies in a matching one, as CLASS in SITE/CLASS/image.jpg for SITE*, that is its class.
    """
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)
    root, found, classes = Path(*parts), dict[bytes, int](), dict[bytes, bytes]()
    for match in sorted(glob.glob(pattern, recursive=True)):
        below = os.fsencode(os.path.relpath(match, root))
        if os.path.isdir(match):
            files = _scan_folder(Path(match))
            for own, size in zip(files.ids, files.file_sizes.tolist(), strict=True):
                name = os.path.normpath(os.path.join(below, own))
                found[name], classes[name] = size, own[: max(0, own.find(b"/"))]
        elif is_image_name(match) and os.path.isfile(match):
            found.setdefault(below, os.path.getsize(match))
    ids = sorted(found)
    labels = labels_from_texts(PackedStrings.from_strings(classes.get(name, b"") for name in ids))
    return ImageFiles(root, ids, [found[name] for name in ids], labels)


def _scan_folder(root: Path) -> ImageFiles:
    """List the image files below a folder, sorted by their path below it.

    Folders are visited in an order that does not depend on the file system (real folders before links to folders, each by
    name), so a folder that can be reached in several ways always gives the same ids.

    Args:
        root: the folder.

    Returns:
        The list; names that begin with a dot are not counted.

    Raises:
        MapetError: a folder may not be listed.
    """
    files: list[tuple[bytes, int]] = []  # path below root, size
    ignored = 0
    visited: set[tuple[int, int]] = set()  # device and inode
    pending = [(False, b"")]  # heap of (whether a link leads there, path below root)
    while pending:
        linked, subfolder = heapq.heappop(pending)
        folder = os.path.join(os.fsencode(root), subfolder)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            hint = f"change its permissions, or move it out of {root}"
            raise MapetError(f"no permission to list the folder {os.fsdecode(folder)}: {hint}") from None
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            path = os.path.join(subfolder, entry.name)
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                is_folder = False
            if is_folder:
                heapq.heappush(pending, (linked or entry.is_symlink(), path))
            elif (size := _file_size(entry)) is not None and is_image_name(entry.path):
                files.append((path, size))
            else:
                ignored += 1
    files.sort()
    return ImageFiles(root, [path for path, _ in files], [size for _, size in files], ignored=ignored)


def _file_size(entry: "os.DirEntry[bytes]") -> int | None:
    """Return the bytes of a file, -1 if that is unknown, and None if it is no regular file (to open a pipe would wait)."""
    try:
        status = entry.stat()
    except OSError:  # a dangling link, or no permission: reported as unreadable when it is read
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _read_list(file: Path) -> ImageFiles:
    """List the image files that a text file names, in its order; empty lines do not count.

    The files are not opened, but each must exist: a path that is wrong would otherwise count as an unreadable image.

    Args:
        file: the text file.

    Returns:
        The list, whose ids are the lines.

    Raises:
        MapetError: it is no text file, names no image, or names one that does not exist.
    """
    data = file.read_bytes()
    if b"\0" in data:
        raise MapetError(f"{file} is not a text file of paths; give a folder or a list with one path on each line")
    ids = [line.rstrip(b"\r") for line in data.split(b"\n") if line.strip()]
    if not ids:
        raise MapetError(f"{file} lists no images: write one path on each line")
    root = os.fsencode(file.parent)
    sizes = []
    for line, path in enumerate(ids, 1):
        try:
            sizes.append(os.stat(os.path.join(root, path)).st_size)
        except OSError as error:
            hint = f"correct or remove entry {line} of {file} (paths are relative to its folder)"
            raise MapetError(f"cannot read {os.fsdecode(path)}: {error.strerror or error}: {hint}") from None
    return ImageFiles(file.parent, ids, sizes)
