"""Published weights files -> named tensors. No code that a file names or carries is imported or run."""

import hashlib
import io
import pickle
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

from mapet.errors import MapetError

STATE_DICT_KEYS = ("state_dict", "model", "module", "ema", "params", "teacher")
"""Keys of a training checkpoint that may hold its weights, in the order in which they are tried."""
EXPORTED_GRAPHS = (".onnx", ".pt2")
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)[2:-1]
"""Bytes near the beginning of what torch.save wrote before version 1.6."""


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a file by their names, on the CPU, in the file's own precision.

    Reads safetensors, what torch.save writes (zip and legacy; state dicts and whole modules) and TorchScript archives. The
    tensors of a module have the names that its `state_dict()` gives them; of a TorchScript archive, whose pickle doesn't tell
    them from buffers, plain tensor attributes come too. Of a training checkpoint it is the first of `STATE_DICT_KEYS` that
    holds tensors. A prefix 'module.' that all names share (DistributedDataParallel) is taken off.

    Raises:
        MapetError: no such file, damaged, of another kind, without named tensors, or one that would run code.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            raise EOFError("it is empty")
        if path.suffix in EXPORTED_GRAPHS:
            raise ValueError("it is a graph for inference: give the run or the model folder that it was exported from")
        is_safetensors = head[8:9] == b"{"  # after the length of its header
        content = load_file(path) if is_safetensors else _read_torch(path, head)
        weights = _find_state_dict(content)
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


def describe_mismatch(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Name what `load_state_dict` would refuse, three names of each kind; '' if nothing."""
    has, wanted = ({name: "x".join(map(str, t.shape)) for name, t in weights.items()} for weights in (found, expected))
    problems = {
        "missing": [name for name in wanted if name not in has],
        "unexpected": [name for name in has if name not in wanted],
        "of another shape": [f"{k} ({has[k]}, not {wanted[k]})" for k in wanted if k in has and has[k] != wanted[k]],
    }
    return "; ".join(f"{problem}: {first_names(names)}" for problem, names in problems.items() if names)


def first_names(names: Sequence[str], count: int = 3) -> str:
    """Join the first names: 'a, b, c and 4 more'."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, shapes, types and bytes, in the order of names; '' of no tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if tensors else ""


def _find_state_dict(content: object) -> dict[str, Tensor]:
    """Return the named tensors of a checkpoint or module, {} if there are none."""
    if not isinstance(content, dict):
        return {}
    if not isinstance(content, _Stub):  # a module may well have a part named 'model'
        for key in STATE_DICT_KEYS:
            if nested := _find_state_dict(content.get(key)):
                return nested
    weights = dict(_named_tensors(content))
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def _named_tensors(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if "_parameters" in content and "_modules" in content:  # an nn.Module
        excluded = content.get("_non_persistent_buffers_set", ())
        buffers = {name: buffer for name, buffer in content["_buffers"].items() if name not in excluded}
        content = {**content["_parameters"], **buffers, **content["_modules"]}
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value.detach()
        elif isinstance(value, _Stub):
            yield from _named_tensors(value, f"{prefix}{name}.")


def _read_torch(path: Path, head: bytes) -> object:
    """Read what torch.save or torch.jit.save wrote.

    `weights_only=True` reads state dicts, but neither whole modules (DALL-E's encoder), nor TorchScript (CLIP), nor what
    training runs leave beside the weights. For those torch.load gets an unpickler that makes stubs of all classes, and a copy
    of the file that holds nothing else which torch would run.

    Args:
        head: the first bytes of the file, which tell its kind.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols and of the source code of modules
        with suppress(Exception):
            return torch.load(path, map_location="cpu", weights_only=True)
        if LEGACY_MAGIC in head:  # given as a file, torch would try to unpack it as a tar archive too
            return torch.load(io.BytesIO(path.read_bytes()), "cpu", STUB_PICKLE, weights_only=False, encoding="latin1")
        if head[:2] != b"PK":
            raise ValueError("it is neither a safetensors nor a torch file")
        with tempfile.TemporaryFile() as copy:
            _copy_without_code(path, copy)
            return torch.load(copy, "cpu", STUB_PICKLE, weights_only=False, encoding="latin1")


def _copy_without_code(path: Path, copy: IO[bytes]) -> None:
    """Copy the pickle and the storages of an archive, without the code that would make it TorchScript."""
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as target:
            pickles = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
            if not pickles:
                raise ValueError("it is an archive, but not one of torch")
            root = pickles[0].removesuffix("data.pkl")
            target.writestr(f"{root}version", "3\n")
            for entry in archive.infolist():
                if entry.filename.startswith((pickles[0], f"{root}byteorder", f"{root}data/")):
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise ValueError("its tensors are compressed, which torch never does")
                    with archive.open(entry) as source, target.open(entry.filename, "w", force_zip64=True) as part:
                        shutil.copyfileobj(source, part)
    except zipfile.BadZipFile as error:
        raise EOFError(f"its archive is damaged or cut off: {error}") from None
    copy.seek(0)


class _StubType(type):
    """Class of what each global of a pickle becomes. Called, it does something harmless or refuses."""

    path: str

    def __call__(cls, *args: Any) -> Any:
        if cls.path in IGNORED_CALLS:
            return _Stub.__new__(_Stub)
        if cls.path not in REPLACED_CALLS:
            refused = f"it would run {cls.path}, which may do anything and was not done"
            raise pickle.UnpicklingError(f"{refused}; convert it to safetensors where you trust it")
        return REPLACED_CALLS[cls.path](*args)


class _Stub(dict[Any, Any], metaclass=_StubType):
    """Attributes of an object whose class is neither imported nor run."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Stub":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)


class _StubUnpickler(pickle._Unpickler):  # C's would take memory for as many memo entries as a file claims
    """Makes stubs of all globals, so that a pickle has nothing to run."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        module = {"__builtin__": "builtins"}.get(module, module)  # Python 2's, which protocol 2 writes
        return _StubType(name, (_Stub,), {"path": f"{module}.{name}"})


STUB_PICKLE = SimpleNamespace(
    __name__="stubs", Unpickler=_StubUnpickler, load=lambda file, **o: _StubUnpickler(file, **o).load()
)
"""Stands in for the module `pickle` in torch.load."""


def _rebuild_tensor(storage: torch.TypedStorage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    whole = torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    return whole.as_strided(size, stride, offset)  # raises where that leaves the storage


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
"""Functions that make values beside the tensors, in a module or the options of a training run: a stub takes their place."""
