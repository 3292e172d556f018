"""Published weights files -> names and tensors; nothing that a file says is ever run."""

import argparse
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mapet.errors import MapetError

WRAPPERS = ("state_dict", "model", "module", "ema", "params", "net")
"""Keys under which training code keeps a model's weights."""


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a weights file: safetensors, torch's state dicts (also nested, as training code saves them, and with the
    prefix 'module.'), TorchScript archives (OpenAI's CLIP) and whole pickled modules (OpenAI's dVAE).

    Pickles are read with torch's `weights_only`; where that is too narrow, by a reader that knows tensors, plain containers
    and nothing else: classes of torch modules become inert stand-ins that keep what they are given.

    Raises:
        MapetError: missing, damaged, without tensors, or with code in it.
    """
    path = Path(path)
    if not path.is_file():
        raise MapetError(f"checkpoint {path} does not exist")
    try:
        found = _unwrap(_read(path))
    except MapetError:
        raise
    except pickle.UnpicklingError as error:  # torch's advice to load it unsafely is not passed on
        reason = (
            " ".join(str(error).partition("Unsupported")[1:]).split(",")[0].split(". ")[0] or "not a pickle of weights"
        )
        raise MapetError(
            f"{path}: damaged, or names something which is code, not weights: it was not run ({reason[:150]})"
        ) from None
    except (SafetensorError, zipfile.BadZipFile) as error:
        raise MapetError(f"{path}: not a readable weights file: {_first_line(error)}") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise MapetError(f"{path}: damaged weights file: {_first_line(error)}") from None
    if not found:
        raise MapetError(f"{path}: holds no weights")
    prefix = "module."  # of torch's data-parallel wrappers
    return {name.removeprefix(prefix): t for name, t in found.items()} if _all_start(found, prefix) else found


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError("zero bytes")
    if head[8:9] == b"{":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _Reader(archive).load()
    with (
        warnings.catch_warnings(),
        torch.serialization.safe_globals([argparse.Namespace]),
    ):  # the format before torch 1.6
        warnings.simplefilter("ignore")  # of what is refused anyway
        return torch.load(path, map_location="cpu", weights_only=True)


class _Inert:
    """Stands in for an object of a class that a file names: keeps what it is given, does nothing."""

    attributes: dict[Any, Any]

    def __new__(cls, *arguments: Any) -> "_Inert":
        made = super().__new__(cls)
        made.attributes = {}
        return made

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, Mapping):
                self.attributes.update(part)


def _keep(value: Any, *others: Any) -> Any:
    return value


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *others: Any) -> Tensor:
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _keep,
    ("torch", "Size"): tuple,
    ("torch.jit._pickle", "build_intlist"): _keep,
    ("torch.jit._pickle", "build_boollist"): _keep,
    ("torch.jit._pickle", "build_doublelist"): _keep,
    ("torch.jit._pickle", "build_tensorlist"): _keep,
    ("torch.jit._pickle", "restore_type_tag"): _keep,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
STAND_INS = (
    "torch.nn.modules.",
    "__torch__.",
    "dall_e.",
    "argparse.",
    "numpy.",
    "torch.torch_version.",
    "torch.optim.",
)
"""Beginnings of names of classes whose objects may lie in a weights file, and are replaced by inert ones."""


class _Reader(pickle.Unpickler):
    """Reads data.pkl of torch's zip archives, TorchScript's too."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("a zip file, but not one of torch's")
        self.archive, self.folder = archive, names[0].removesuffix("data.pkl")
        self.storages: dict[str, Tensor] = {}
        super().__init__(archive.open(names[0]))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.".startswith(STAND_INS):
            return _Inert
        raise MapetError(
            f"{self.archive.filename}: names {module}.{name}, which is code, not weights: it was not run. Only load files "
            "that you trust, converted to safetensors"
        )

    def persistent_load(self, reference: Any) -> Tensor:
        _, kind, key, *_ = reference
        if key not in self.storages:
            dtype = kind if isinstance(kind, torch.dtype) else torch.uint8
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _unwrap(content: Any) -> dict[str, Tensor]:
    """Names and tensors of whatever was read."""
    if isinstance(content, Mapping):
        for wrapper in WRAPPERS:
            inner = content.get(wrapper)
            if isinstance(inner, Mapping | _Inert) and not any(isinstance(v, Tensor) for v in content.values()):
                return _unwrap(inner)
        return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return dict(_tensors(content)) if isinstance(content, _Inert) else {}


def _tensors(module: _Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a pickled module, or attributes of a TorchScript one, by their dotted names."""
    attributes = dict(module.attributes)
    for group in ("_parameters", "_buffers", "_modules"):
        inner = attributes.pop(group, None)
        attributes |= inner if isinstance(inner, Mapping) else {}
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Inert):
            yield from _tensors(value, f"{prefix}{name}.")


def _all_start(names: Mapping[str, Any], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
