"""Published weights files -> named tensors. No code that a file names or carries is imported or run."""

import hashlib
import io
import pickle
import pickletools
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mapet.errors import MapetError

NESTED = ("state_dict", "model", "module", "ema", "params", "teacher")
GRAPHS = (".onnx", ".pt2")
"""Suffixes of what `mapet export` makes for inference alone."""
WAY_OUT = "convert it to safetensors where you trust it"


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Tensors of a file by their names, on the CPU, in the file's own precision.

    Reads safetensors, what torch.save writes (zip and legacy; state dicts and whole modules) and TorchScript archives. The
    tensors of a module have the names that its `state_dict()` gives them; of a TorchScript archive, whose pickle doesn't tell
    them from buffers, plain tensor attributes come too. Of a training checkpoint it is the first of `NESTED` that holds
    tensors. A prefix 'module.' that all names share (DistributedDataParallel) is taken off.

    Raises:
        MapetError: no such file, damaged, of another kind, without named tensors, or one that would run code.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if not head:
            raise EOFError("it is empty")
        if path.suffix in GRAPHS:
            raise ValueError("it is a graph for inference: give the run or the model folder that it was exported from")
        content = load_file(path) if head[8:] == b"{" else _read_torch(path)  # after the length of safetensors' header
        weights = _weights(content)
        if not weights:
            entries = f" but {', '.join(map(str, content))[:200]}" if isinstance(content, dict) and content else ""
            raise ValueError(f"it holds no tensors under their names{entries}; write those you want as safetensors")
    except IsADirectoryError:
        inside = sorted(path.glob("*.safetensors")) or sorted(path.glob("*/*.safetensors"))
        hint = f": did you mean {inside[0]}?" if inside else ", not a file of weights"
        raise MapetError(f"{path} is a folder{hint}") from None
    except OSError as error:
        raise MapetError(f"cannot read weights from {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).strip().partition("\n")[0][:300] or "it is damaged or cut off"
        raise MapetError(f"cannot read weights from {path}: {reason}") from None
    return weights


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names and bytes, in the order of names; '' of none."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if tensors else ""


def _weights(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    if not isinstance(content, _StandIn):  # a module may well have a part named 'model'
        for key in NESTED:
            if found := _weights(content.get(key)):
                return found
    weights = dict(_named_tensors(content))
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def _named_tensors(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if "_parameters" in content and "_modules" in content:  # an nn.Module
        passing = content.get("_non_persistent_buffers_set", ())
        buffers = {name: buffer for name, buffer in content["_buffers"].items() if name not in passing}
        content = {**content["_parameters"], **buffers, **content["_modules"]}
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value.detach()
        elif isinstance(value, _StandIn):
            yield from _named_tensors(value, f"{prefix}{name}.")


def _read_torch(path: Path) -> Any:
    # torch's own restricted unpickler where it is enough; it refuses modules and TorchScript without running anything.
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols that it may not understand
        return torch.load(path, map_location="cpu", weights_only=True)
    with path.open("rb") as file:
        return _read_zip(file) if file.peek(2)[:2] == b"PK" else _read_legacy(file)


def _read_zip(file: IO[bytes]) -> Any:
    """torch.save's and TorchScript's archives: NAME/data.pkl, and the bytes of storage KEY in NAME/data/KEY."""
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise EOFError("its archive is damaged or cut off") from None
    with archive:
        names = archive.namelist()
        root = next((name.removesuffix("data.pkl") for name in names if name.partition("/")[2] == "data.pkl"), None)
        if root is None:
            raise ValueError("it is an archive, but not one of torch")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder").decode() != sys.byteorder:
            raise ValueError("it was written on a machine of the other byte order")
        storages: dict[str, Tensor] = {}

        def storage(key: str, size: int) -> Tensor:
            if key not in storages:
                entry = archive.getinfo(f"{root}data/{key}")
                if entry.file_size < size:
                    raise EOFError(f"storage {key} has {entry.file_size:,} of {size:,} bytes")
                storages[key] = torch.empty(size, dtype=torch.uint8)
                with archive.open(entry) as data:
                    _fill(storages[key], data)
            return storages[key]

        return _unpickled(io.BytesIO(archive.read(f"{root}data.pkl")), storage)


def _unpickled(file: IO[bytes], storage: Callable[[str, int], Tensor]) -> Any:
    """The next pickle of the file. Its memo may not be numbered further than it is long: the memory for it is taken at once."""
    start = file.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
            raise pickle.UnpicklingError("its pickle is damaged")
    file.seek(start)
    return _Unpickler(file, storage).load()


def _read_legacy(file: IO[bytes]) -> Any:
    """torch.save before 1.6: magic number, version, system, object and storage keys, a pickle each; then the storages."""
    storages: dict[str, Tensor] = {}
    most = Path(file.name).stat().st_size

    def storage(key: str, size: int) -> Tensor:
        if size > most:
            raise EOFError(f"storage {key} has more bytes than the file")
        return storages.setdefault(key, torch.empty(size, dtype=torch.uint8))  # filled below

    def load() -> Any:
        return _unpickled(file, storage)

    magic = None
    with suppress(Exception):
        magic = load()
    if magic != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is neither a safetensors nor a torch file")
    load(), load()
    content, keys = load(), load()
    if set(keys) != set(storages):
        raise EOFError("its list of storages is damaged")
    for key in keys:
        file.read(8)  # the number of elements, known from the pickle
        _fill(storages[key], file)
    return content


def _fill(storage: Tensor, file: IO[bytes]) -> None:
    rest = storage.numpy().data
    while len(rest):
        read = file.readinto(rest)  # type: ignore[attr-defined]
        if not read:
            raise EOFError("it is cut off")
        rest = rest[read:]


class _Global(type):
    """What each global of a pickle becomes: a class that keeps state. Called, it is something harmless or refuses."""

    def __call__(cls, *args: Any) -> Any:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name not in CALLS:
            raise pickle.UnpicklingError(f"it would run {name}, which may do anything and was not done; {WAY_OUT}")
        return CALLS[name](*args)


class _StandIn(dict[Any, Any], metaclass=_Global):
    """An object of a class that is neither imported nor run: its attributes, as a dictionary."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __new__(cls, *args: Any, **kwargs: Any) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)  # raises where that leaves the storage


def _first(value: Any, *_: Any) -> Any:
    return value


def _ignored(*_: Any) -> _StandIn:
    return _StandIn.__new__(_StandIn)


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": OrderedDict,
    "collections.defaultdict": lambda *_: OrderedDict(),
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, list, tuple, dict)},
    # Values beside the tensors, in a module or the arguments of a training run.
    **dict.fromkeys(
        [
            *(f"builtins.{kind}" for kind in ("bytes", "bytearray", "complex", "slice", "range")),
            "_codecs.encode",
            "torch.Size",
            "torch.device",
            "torch.serialization._get_layout",
            *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")),
            "torch.jit._pickle.restore_type_tag",
            "numpy.dtype",
            *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
            *(f"pathlib.{kind}Path" for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")),
        ],
        _ignored,
    ),
}
STORAGES = {
    "UntypedStorage": torch.uint8,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class _Unpickler(pickle.Unpickler):
    """Makes stand-ins of every global, so that a pickle has nothing to run.

    Args:
        storage: the bytes of storage (key, size in bytes), as uint8.
    """

    def __init__(self, file: IO[bytes], storage: Callable[[str, int], Tensor]) -> None:
        super().__init__(file, encoding="latin1")
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        module = {"__builtin__": "builtins"}.get(module, module)  # Python 2's, which protocol 2 writes
        return _Global(name, (_StandIn,), {"__module__": module, "__qualname__": name})

    def persistent_load(self, saved: Any) -> Any:
        match saved:
            case ("module", kind, *_):  # legacy files put the source code of module classes here
                return kind
            case ("storage", torch.dtype() as dtype, str(key), _, int(count), *view):
                storage = self.storage(key, count * dtype.itemsize).view(dtype)
                if view and view[0] is not None:
                    _, start, length = view[0]
                    return storage[start : start + length]
                return storage
        raise pickle.UnpicklingError("it has something else than storages beside its pickle")
