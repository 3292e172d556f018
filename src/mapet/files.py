"""Reading and writing files: atomically, synced to disk, with checksums, never over other files."""

import csv
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

from safetensors import SafetensorError

from mapet.errors import MapetError, NewerFormatError, option, os_error_hint

CHECKSUM_KEY = "checksum"
MANIFEST = "manifest.json"
"""Description of a folder of data: a token store, a prepared data set, features."""
RUN_FILE = "run.json"
"""State of a command and its folder (`mapet.run_state`)."""
LOCK_FILE = ".lock"
"""Lock of a command's folder (`mapet.lock`)."""
KMEANS_STATE = ".kmeans.safetensors"
"""State of an unfinished `fit-tokenizer`, in the folder that its tokenizer will replace."""
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""Names that `atomic_write` gives to unfinished files."""
SHA256 = re.compile("[0-9a-f]{64}")
NUM_HASH_DIGITS = 12
"""Digits of a hash that messages show."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
MAX_SUGGESTIONS = 3


def canonical_hash(value: object) -> str:
    """Return the sha256 (hexadecimal) of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 (hexadecimal) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file that describes the folder it is in.

    Args:
        path: of the file.
        what: names the folder in errors, e.g. 'token store'.

    Raises:
        MapetError: it is missing (subfolders that have such a file are suggested), or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        subfolders = [str(file.parent) for file in sorted(path.parent.glob(f"*/{path.name}"))[:MAX_SUGGESTIONS]]
        hint = f"; did you mean {' or '.join(subfolders)}?" if subfolders else f"; give the folder of a {what}"
        reason = f"it has no {path.name}" if path.parent.exists() else "it does not exist"
        raise MapetError(f"{path.parent} is not a {what}: {reason}{hint}") from None
    except (ValueError, OSError) as error:
        raise MapetError(
            f"{path}: not a readable {what} ({error}): restore the file, or make the {what} again"
        ) from None


def read_checksummed_json(path: Path, what: str) -> dict[str, Any]:
    """Return what `write_checksummed_json` wrote; `what` names its folder in errors, e.g. 'token store'.

    Raises:
        MapetError: it is missing, or was changed since.
    """
    content = read_json(path, what)
    if not isinstance(content, dict) or content.pop(CHECKSUM_KEY, None) != canonical_hash(content):
        raise MapetError(
            f"{path}: not a readable {what} (its checksum does not match: it was changed after it was written). Restore it, or make the {what} again"
        )
    return content


def check_format(format_version: object, known: int, what: str, place: Path) -> None:
    """Check that this version of mapet can read a file's format: it reads all up to its own (docs/formats.md).

    Args:
        format_version: the format number in the file.
        known: the format number that this version writes.
        what: what is read, e.g. 'token store'.
        place: its path, for the error message.

    Raises:
        NewerFormatError: the file's format is newer.
        ValueError: `format_version` is no positive integer.
    """
    if not isinstance(format_version, int) or isinstance(format_version, bool) or format_version < 1:
        raise ValueError(f"its format is {format_version!r}, expected a whole number from 1")
    if format_version > known:
        raise NewerFormatError(
            f"{place} was made by a newer mapet: a {what} of format {format_version}, while mapet {version('mapet')} reads formats up to "
            f"{known}. Update mapet, or make it again with this one"
        )


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it to disk and rename it to `path`.

    Works for files and folders. On any error the temporary is removed and `path` stays as it was. A folder replaces one that is
    empty (`is_empty_dir`), and takes over its run.json and lock, those of the command that is writing it.

    Args:
        path: of the file or folder that is written.

    Yields:
        The temporary path, which the caller writes.

    Raises:
        Whatever the context raises, or an OSError of writing, syncing or renaming.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _sync(file)
        if temporary.is_dir() and path.is_dir() and is_empty_dir(path):
            for name in (RUN_FILE, LOCK_FILE):
                if (path / name).exists():
                    os.replace(path / name, temporary / name)
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Turn an error of safetensors into a MapetError that names the file and, for one of the system (disk full, ...), what to do."""
    try:
        yield
    except SafetensorError as error:
        errno = re.search(r"os error (\d+)", str(error))
        raise MapetError(f"cannot write {path}: {error}{os_error_hint(int(errno[1]) if errno else None)}") from None


def preallocate(file: IO[bytes], size: int, path: Path) -> None:
    """Allocate the disk space of a file of `size` bytes now: writing to a mapped file on a full disk would kill the process (SIGBUS).

    Args:
        file: open for writing.
        path: names it in the error.

    Raises:
        MapetError: the disk is too full.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise MapetError(
            f"cannot reserve {size:,} bytes for {path}: {error.strerror or error}{os_error_hint(error.errno)}"
        ) from None


def read_array(path: str | Path, mmap_mode: Literal["r", "r+"] | None = None) -> Any:
    """Load an .npy file, with `mmap_mode` as a memory map ('r': read-only, 'r+': writable); arrays of Python objects are refused.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no array, whatever exception of its header parser numpy lets out.
    """
    import numpy as np

    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{Path(path).name} is no array: {(str(error) or repr(error)).splitlines()[0]}") from None


def create_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """Create an .npy file of zeros whose disk space is allocated; `read_array` maps it.

    Raises:
        MapetError: the disk is too full; the file is removed.
    """
    import numpy as np

    np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    try:
        with open(path, "r+b") as file:
            preallocate(file, os.fstat(file.fileno()).st_size, path)
    except MapetError:
        path.unlink()
        raise


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name, from any device, to a safetensors file; call it inside `atomic_write`, as it is not atomic itself.

    Args:
        path: the temporary file that `atomic_write` yields.
        tensors: name -> tensor.
        metadata: texts for the file's header; None: without.

    Raises:
        MapetError: the file cannot be written; see `translate_write_errors`.
    """
    from safetensors.torch import save_file

    with translate_write_errors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def check_same_options(folder: Path, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that work in a folder is resumed with the options that it was started with; both are JSON values.

    Raises:
        MapetError: options differ; it lists them as 'name: before -> now'.
    """
    changed = []
    for key in {**current, **recorded}:
        if json.dumps(recorded.get(key)) != json.dumps(current.get(key)):
            changed.append(f"{key}: {_format_value(recorded.get(key))} -> {_format_value(current.get(key))}")
    if changed:
        problem = f"{folder} was started with other images or options ({'; '.join(changed)})"
        raise MapetError(f"{problem}: use the same, or a new {option('out')}")


def abbreviate_hash(value: str) -> str:
    """Return the digits of a hash that messages show."""
    return value[:NUM_HASH_DIGITS]


def _format_value(value: object) -> str:
    """Return a sha256 by its first digits, anything else as text."""
    if isinstance(value, str) and SHA256.fullmatch(value):
        return f"{abbreviate_hash(value)}..."
    return str(value)


def remove_dir(path: Path) -> None:
    """Remove a folder: it is renamed to a temporary first, so that a crash leaves no half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def write_manifest(folder: Path, kind: str, version: int, content: dict[str, Any]) -> None:
    """Write FOLDER/manifest.json of a folder of data, with its kind and format version, checksummed."""
    write_checksummed_json(folder / MANIFEST, {"kind": kind, "format_version": version, **content})


def read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """Read what `write_manifest` wrote; `kind` names the data, e.g. 'token store'.

    Raises:
        NewerFormatError: its format version is above `version`.
        MapetError: it is missing, changed, or of another kind.
    """
    manifest = read_checksummed_json(folder / MANIFEST, kind)
    if manifest.get("kind") != kind:
        raise MapetError(f"{folder} is not a {kind} but holds '{manifest.get('kind')}': give the folder of a {kind}")
    try:
        check_format(manifest.get("format_version"), version, kind, folder)
    except ValueError as error:
        raise MapetError(f"{folder}: damaged {kind} ({error}): restore it, or make it again") from None
    return manifest


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, without translating line ends."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def escape_formula(cell: Any) -> Any:
    """Return the cell of a CSV file; a text that a spreadsheet would take for a formula, because of its first character, with ' before it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically, in UTF-8; rows may come from a generator. Texts that would run as formulas are escaped."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for row in chain([columns], rows):
            writer.writerow(map(escape_formula, row))


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, indented."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def is_empty_dir(path: Path, but: str | None = None) -> bool:
    """Return whether a path is missing, or a folder without files other than those of a command that has not finished, and `but`."""
    if not path.is_dir():
        return not path.exists()
    unfinished = (RUN_FILE, LOCK_FILE, KMEANS_STATE, but)
    return all(file.name in unfinished or TEMPORARY.fullmatch(file.name) for file in path.iterdir())


def check_output_path(path: Path) -> None:
    """Check that a command can write to a new file or folder of this path; `create_output_dir` checks what is in it.

    Raises:
        MapetError: it is the working folder, a mount point or a link, which cannot be replaced by the finished result.
    """
    reason = ""
    if path.is_symlink():
        reason = f"a link to {path.readlink()}: give that path itself"
    elif path.is_dir() and path.samefile(Path.cwd()):
        reason = "the working folder: give a folder in it"
    elif path.is_mount():
        reason = "a mount point: give a folder in it"
    if reason:
        raise MapetError(f"{option('out')} {path} is {reason}", field="out", value=path)


def remove_temporaries(folder: Path) -> None:
    """Remove what `atomic_write` has left for a folder and in it when its process was killed; the caller holds the folder's lock.

    Folders within it that have a lock of their own stay as they are: another process may be writing there.

    Args:
        folder: of a command.
    """
    leftovers = [
        path for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp") if TEMPORARY.fullmatch(path.name)
    ]
    for parent, folders, names in os.walk(folder):
        if LOCK_FILE in names and Path(parent) != folder:
            folders.clear()
            continue
        temporaries = [name for name in (*folders, *names) if TEMPORARY.fullmatch(name)]
        leftovers += [Path(parent, name) for name in temporaries]
        folders[:] = [name for name in folders if name not in temporaries]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_checksummed_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically with a checksum of its content, for files whose damage would otherwise go unnoticed."""
    content = json.loads(json.dumps(content))  # keys become text, as they are when it is read
    write_json(path, {**content, CHECKSUM_KEY: canonical_hash(content)})


def create_output_dir(path: Path, resume_hint: str = "", create: bool = True) -> None:
    """Create a command's output folder.

    Args:
        path: of the folder.
        resume_hint: how to resume, appended to the error message.
        create: False only checks, for a command that writes its folder by `atomic_write` at its end.

    Raises:
        MapetError: it is a file, or a folder that is not empty (`is_empty_dir`).
    """
    if not is_empty_dir(path):
        problem = f"{path} is not a folder. Choose another {option('out')}"
        if path.is_dir():
            problem = f"{path} already exists and is not empty: nothing is overwritten. Choose another {option('out')}{resume_hint}"
        raise MapetError(problem, field="out", value=path)
    if create:
        path.mkdir(parents=True, exist_ok=True)
