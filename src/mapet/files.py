"""Writing files so that nothing is lost: atomic, synced, never over something else."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

from safetensors import SafetensorError

from mapet.errors import MapetError, NewerFormatError, option, os_error_hint


def canonical_hash(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file of ours. `what` names it in errors, e.g. 'token store'."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(path.parent.glob(f"*/{path.name}"))
        hint = f"; did you mean {' or '.join(str(file.parent) for file in inside[:3])}?" if inside else ""
        raise MapetError(f"{path.parent} is not a {what}: it has no {path.name}{hint}") from None
    except (ValueError, OSError) as error:
        raise MapetError(f"{path}: not a readable {what} ({error})") from None


def read_checksummed_json(path: Path, what: str) -> dict[str, Any]:
    """What `write_checksummed_json` wrote.

    Raises:
        MapetError: it is missing, or not as it was written.
    """
    content = read_json(path, what)
    if not isinstance(content, dict) or content.pop(CHECKSUM_KEY, None) != canonical_hash(content):
        raise MapetError(f"{path}: not a readable {what} (it was changed after it was written: its seal does not fit)")
    return content


def check_format(found: Any, known: int, what: str, place: Path) -> None:
    """That this version reads a format: all up to its own (docs/formats.md).

    Args:
        found: the number in the file.
        known: the newest that this version writes.

    Raises:
        NewerFormatError: it is newer.
        ValueError: it is no such number.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"its format is {found!r}, not a number")
    if found > known:
        raise NewerFormatError(
            f"{place} was made by a newer mapet: a {what} of format {found}, while mapet {version('mapet')} reads formats up to "
            f"{known}. Update mapet, or make it again with this one"
        )


CHECKSUM_KEY = "checksum"
MANIFEST = "manifest.json"
"""What a folder of data holds: a token store, a prepared data set, features."""
RUN_FILE = "run.json"
"""What a command did to its folder (`mapet.run_state`)."""
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""Names that `atomic_write` gives."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it to disk and rename it to `path`.

    Works for files and folders. On any error the temporary is removed and `path` stays as it was. A folder takes the place of
    one that holds no more than the run.json of the command that is writing it, and keeps that.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _sync(file)
        if temporary.is_dir() and path.is_dir() and is_empty_dir(path):
            if (path / RUN_FILE).exists():
                os.replace(path / RUN_FILE, temporary / RUN_FILE)
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """safetensors wraps the system's error (disk full, ...) in one of its own: give it the file's name."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise MapetError(f"cannot write {path}: {error}{os_error_hint(int(number[1]) if number else None)}") from None


def preallocate(file: IO[bytes], size: int, path: Path) -> None:
    """Give `file` its disk space now: a hole in it would fail when the disk is full, and end the process (SIGBUS) if mapped.

    Args:
        path: what the error names.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise MapetError(f"cannot reserve {size:,} bytes for {path}: {error.strerror}") from None


def read_array(path: str | Path, mmap_mode: Literal["r", "r+"] | None = None) -> Any:
    """`np.load` of a file of ours.

    Raises:
        ValueError: whatever is wrong with it; numpy lets out what its parser of headers raises.
    """
    import numpy as np

    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{Path(path).name} is no array: {(str(error) or repr(error)).splitlines()[0]}") from None


def create_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """Create an .npy file of zeros that has its disk space; `read_array` maps it.

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
    """Write a safetensors file in place; call it inside `atomic_write`."""
    from safetensors.torch import save_file

    with translate_write_errors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def check_same_options(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises MapetError: work in `folder` was begun with other options; those that differ are named."""

    def shown(value: Any) -> str:  # of a hash its first digits
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)

    pairs = {key: (before.get(key), now.get(key)) for key in {**now, **before}}
    changed = [f"{key}: {shown(a)} -> {shown(b)}" for key, (a, b) in pairs.items() if json.dumps(a) != json.dumps(b)]
    if changed:
        raise MapetError(
            f"{folder} was begun with other images or options ({'; '.join(changed)}): use the same, or a new {option('out')}"
        )


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
        raise MapetError(f"{folder} is not a {kind} but a {manifest.get('kind')}")
    try:
        check_format(manifest.get("format_version"), version, kind, folder)
    except ValueError as error:
        raise MapetError(f"{folder}: damaged {kind} ({error})") from None
    return manifest


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def is_empty_dir(path: Path, but: str | None = None) -> bool:
    """Whether nothing is there, or nothing but a run.json, what a killed process left half-written, and a file named `but`."""
    if not path.is_dir():
        return not path.exists()
    return all(TEMPORARY.fullmatch(file.name) or file.name in (RUN_FILE, but) for file in path.iterdir())


def write_checksummed_json(path: Path, content: dict[str, Any]) -> None:
    """`write_json` with a hash of all of it, for files whose damage would go unnoticed."""
    content = json.loads(json.dumps(content))  # keys become text
    write_json(path, {**content, CHECKSUM_KEY: canonical_hash(content)})


def create_output_dir(path: Path, resume_hint: str = "", create: bool = True) -> None:
    """Create the output folder of a stage; refuse one that already holds something.

    Args:
        create: False only checks, for a stage that writes its folder `atomic_write`ally at its end.
    """
    if not is_empty_dir(path):
        found = f"{path} already exists and is not empty: nothing is overwritten. Choose another {option('out')}{resume_hint}"
        other = f"{path} is not a folder. Choose another {option('out')}"
        raise MapetError(found if path.is_dir() else other, field="out", value=path)
    if create:
        path.mkdir(parents=True, exist_ok=True)
