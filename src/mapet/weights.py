"""Read weights files as named tensors, safely: no code that a file contains or refers to is imported or executed."""

import hashlib
import io
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mapet.config.limits import limits
from mapet.errors import MAX_REASON_CHARS, MapetError, first_line, option

STATE_DICT_KEYS = ("state_dict", "model", "module", "ema", "params", "teacher")
"""Keys of a training checkpoint that may hold its weights, in the order in which they are tried."""
MAX_NAMES = 200_000
"""Tensors and modules in a file: few bytes can make modules of modules without end."""
EXPORTED_GRAPHS = (".onnx", ".pt2")
"""Suffixes of graphs for inference, whose weights have no names that match a ViT's."""
HEAD_BYTES = 64
"""Bytes at the beginning of a file by which its format is recognized."""
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)[2:-1]
"""Bytes near the beginning of files that torch.save wrote before version 1.6."""


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a file by their names, on the CPU, in the file's own precision.

    Supported are safetensors, the files of torch.save (zip and legacy; state dicts and whole modules) and TorchScript archives.
    The tensors of a module have the names of its `state_dict()`; those of a TorchScript archive include plain tensor
    attributes, which its pickle doesn't distinguish from buffers. From a training checkpoint the first of `STATE_DICT_KEYS`
    that holds tensors is taken. A prefix 'module.' that all names share (DistributedDataParallel) is removed.

    Args:
        path: of a file; its format is recognized by its content.

    Returns:
        Name -> tensor.

    Raises:
        MapetError: no such file, damaged, of another format, without named tensors, or one that would execute code.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head:
            raise EOFError("it is empty: download or copy it again")
        _check_size(path.stat().st_size, "its size is")
        if path.suffix in EXPORTED_GRAPHS:
            raise ValueError("it is a graph for inference: give the run or the model folder that it was exported from")
        is_safetensors = head[8:9] == b"{"  # a JSON header, after 8 bytes that tell its length
        content = load_file(path) if is_safetensors else _read_torch(path, head)
        weights = _find_state_dict(content)
        _check_size(sum(tensor.nbytes for tensor in weights.values()), "its tensors take")
        if not weights:
            entries = (
                f" but {', '.join(map(str, content))[:MAX_REASON_CHARS]}"
                if isinstance(content, dict) and content
                else ""
            )
            raise ValueError(f"it holds no tensors under their names{entries}; write those you want as safetensors")
    except IsADirectoryError:
        weights_files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*/*.safetensors"))
        hint = f": did you mean {weights_files[0]}?" if weights_files else ", not a file of weights"
        raise MapetError(f"{path} is a folder{hint}") from None
    except OSError as error:
        hint = "give a file of safetensors or torch.save that exists and may be read"
        raise MapetError(f"cannot read weights from {path}: {error.strerror or error}: {hint}") from None
    except Exception as error:  # a damaged pickle may raise anything
        reason = first_line(error) if str(error).strip() else "it is damaged or cut off: download or copy it again"
        raise MapetError(f"cannot read weights from {path}: {reason}") from None
    return weights


def describe_mismatch(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describe for a message what `load_state_dict` would refuse, by three names of each kind; '' if nothing.

    Args:
        tensors: those that would be loaded.
        expected: the module's state dict.
    """
    shapes, expected_shapes = (
        {name: "x".join(map(str, t.shape)) for name, t in w.items()} for w in (tensors, expected)
    )
    differing = [name for name, shape in expected_shapes.items() if shapes.get(name, shape) != shape]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [f"{name} ({shapes[name]}, expected {expected_shapes[name]})" for name in differing],
    }
    return "; ".join(f"{problem}: {first_names(names)}" for problem, names in problems.items() if names)


def first_names(names: Sequence[str], count: int = 3) -> str:
    """Join the first `count` names for a message: 'a, b, c and 4 more'."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256, in hexadecimal, of names, shapes, dtypes and bytes, in the order of names; '' if there are no tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if tensors else ""


def _check_size(count: int, what: str) -> None:
    """Raise ValueError if a file of weights, or what is in it, takes more bytes than `limits` allow."""
    if count > limits().archive_bytes:
        allowed = f"more than the {limits().archive_bytes:,} of {option('limits.archive_bytes')}"
        raise ValueError(f"{what} {count:,} bytes, {allowed}")


def _find_state_dict(content: object, seen: set[int] | None = None) -> dict[str, Tensor]:
    """Return the named tensors of a state dict, module or training checkpoint; {} if there are none.

    Args:
        content: what a file holds; modules are `_Stub`s of their attributes.
        seen: `id` of the dicts that were looked into: one may be in many places, or in itself.
    """
    seen = set() if seen is None else seen
    if not isinstance(content, dict) or id(content) in seen:
        return {}
    seen.add(id(content))
    if not isinstance(content, _Stub):  # in a module 'model' may be the name of a submodule
        for key in STATE_DICT_KEYS:
            if nested := _find_state_dict(content.get(key), seen):
                return nested
    weights: dict[str, Tensor] = {}
    for visited, (name, tensor) in enumerate(_named_tensors(content)):
        if visited == MAX_NAMES:
            raise ValueError(f"it names more than {MAX_NAMES:,} tensors and modules")
        if tensor is not None:
            weights[name] = tensor
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def _named_tensors(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor | None]]:
    """Yield (name, tensor) of a state dict, or of a module and its submodules, as the module's `state_dict()` names them.

    A submodule comes as a name without a tensor, too, so that the caller can end modules of modules without end.

    Args:
        content: a dict of tensors, or the attributes of a module.
        prefix: of all names; ends in a dot, or ''.
    """
    if "_parameters" in content and "_modules" in content:  # an nn.Module
        excluded = content.get("_non_persistent_buffers_set", ())
        buffers = {name: buffer for name, buffer in content["_buffers"].items() if name not in excluded}
        content = {**content["_parameters"], **buffers, **content["_modules"]}
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value.detach()
        elif isinstance(value, _Stub):
            yield f"{prefix}{name}", None
            yield from _named_tensors(value, f"{prefix}{name}.")


def _read_torch(path: Path, head: bytes) -> object:
    """Read a file of torch.save or torch.jit.save; objects in it that are no tensors become stubs.

    `weights_only=True` reads state dicts, but neither whole modules (DALL-E's encoder), nor TorchScript (CLIP), nor objects
    that training runs save beside the weights. For those torch.load gets an unpickler that replaces all classes by stubs, and
    a copy of the file without anything else that torch would execute.

    Args:
        path: of the file.
        head: its first bytes.

    Raises:
        Exception: of any type, where the file is damaged, of another format or would execute code.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols and the source code of modules
        if head[:2] == b"PK":
            _check_archive(path)
        with suppress(Exception):
            return torch.load(path, map_location="cpu", weights_only=True)
        if LEGACY_MAGIC in head:  # from a path, torch would try to unpack it as a tar archive too
            return torch.load(io.BytesIO(path.read_bytes()), "cpu", STUB_PICKLE, weights_only=False, encoding="latin1")
        if head[:2] != b"PK":
            raise ValueError("it is neither a safetensors nor a torch file: give a file of weights")
        with tempfile.TemporaryFile() as copy:
            _copy_without_code(path, copy)
            return torch.load(copy, "cpu", STUB_PICKLE, weights_only=False, encoding="latin1")


def _check_archive(path: Path) -> None:
    """Check that a zip archive of torch holds no more than its file: few bytes could become very many.

    Raises:
        EOFError: the archive is damaged.
        ValueError: the pickle or tensors are compressed, which torch never does, or share their bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if re.search(r"^[^/]*/(data\.pkl$|data/)", entry.filename)]
    except zipfile.BadZipFile as error:
        raise EOFError(f"its archive is damaged or cut off: {error}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its tensors are compressed, which torch never does: save it by torch.save")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries are longer than the file, as they share bytes: save it by torch.save")


def _copy_without_code(path: Path, copy: IO[bytes]) -> None:
    """Copy the pickle and the storages of torch's zip archive, without the code by which torch.load recognizes TorchScript.

    Args:
        path: of the archive.
        copy: an empty file open for writing; it is left at its beginning.

    Raises:
        EOFError: the archive is damaged.
        ValueError: it is not one of torch.
    """
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as target:
            pickles = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
            if not pickles:
                raise ValueError("it is an archive, but not one of torch: give a file of weights")
            root = pickles[0].removesuffix("data.pkl")
            target.writestr(f"{root}version", "3\n")
            for entry in archive.infolist():
                if entry.filename.startswith((pickles[0], f"{root}byteorder", f"{root}data/")):
                    with archive.open(entry) as source, target.open(entry.filename, "w", force_zip64=True) as part:
                        shutil.copyfileobj(source, part)
    except zipfile.BadZipFile as error:
        raise EOFError(f"its archive is damaged or cut off ({first_line(error)}): download or copy it again") from None
    copy.seek(0)


class _StubType(type):
    """Metaclass of the stubs for a pickle's globals (its functions and classes).

    Attributes:
        path: of the global, 'module.name'.
    """

    path: str

    def __call__(cls, *args: Any) -> Any:
        """Return what replaces a call of the global: see `REPLACED_CALLS` and `IGNORED_CALLS`.

        Raises:
            UnpicklingError: it is neither of them.
        """
        if cls.path in IGNORED_CALLS:
            return _Stub.__new__(_Stub)
        if cls.path not in REPLACED_CALLS:
            reason = f"its pickle calls {cls.path}, which was refused, as it may execute any code"
            raise pickle.UnpicklingError(f"{reason}: convert it to safetensors where you trust it")
        return REPLACED_CALLS[cls.path](*args)


class _Stub(dict[Any, Any], metaclass=_StubType):
    """Attributes of an object whose class is neither imported nor called."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Stub":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Take the attributes; classes with slots pickle theirs as a pair (dict or None, dict)."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)


class _StubUnpickler(pickle._Unpickler):  # the one in C would allocate as many memo entries as a file claims to have
    """Unpickler that replaces all globals by stubs, so that nothing of the pickle is executed."""

    def find_class(self, module: str, name: str) -> Any:
        """Return torch's dtype of that name, or else a stub class whose `path` is 'module.name'."""
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        module = {"__builtin__": "builtins"}.get(module, module)  # Python 2's, which protocol 2 writes
        return _StubType(name, (_Stub,), {"path": f"{module}.{name}"})


STUB_PICKLE = SimpleNamespace(
    __name__="stubs", Unpickler=_StubUnpickler, load=lambda file, **o: _StubUnpickler(file, **o).load()
)
"""Replaces the module `pickle` in torch.load."""


def _rebuild_tensor(storage: torch.TypedStorage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return the view of a storage that torch's function of this name makes; offset and strides are in elements.

    Raises:
        RuntimeError: the view exceeds the storage.
    """
    values = torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    return values.as_strided(size, stride, offset)


REPLACED_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda value, *_: value,
    "torch._utils._rebuild_parameter_with_state": lambda value, *_: value,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": OrderedDict,
    "collections.defaultdict": lambda *_: OrderedDict(),
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, list, tuple, dict)},
}
"""Functions that a pickle may call -> what is called instead."""
IGNORED_CALLS = frozenset((
    "builtins.bytes", "builtins.bytearray", "builtins.complex", "builtins.slice", "builtins.range", "_codecs.encode",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath",
    "numpy.dtype", "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct",
    "torch.Size", "torch.device", "torch.serialization._get_layout",
    "torch.jit._pickle.build_intlist", "torch.jit._pickle.build_doublelist", "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_tensorlist", "torch.jit._pickle.restore_type_tag",
))  # fmt: skip
"""Functions that make values beside the tensors, in a module or the options of a training run: an empty stub replaces the value."""
