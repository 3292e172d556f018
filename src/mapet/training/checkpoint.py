"""Checkpoints: a folder of safetensors and JSON, complete or absent."""

import errno
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mapet.errors import MadeByNewer, MapetError, option
from mapet.files import atomic, check_format, file_hash, read_sealed, write_sealed, write_tensors
from mapet.training.sharding import distribute_like, full_state_dict, full_tensor, load_full_state_dict

log = logging.getLogger("mapet")
STATE = "trainer_state.json"
FORMAT = 1


def save_checkpoint(
    folder: Path, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> None:
    """Write `folder/step-00000000` atomically, read it back, and only then remove all but the newest `keep`.

    Args:
        parts: named tensors of each file, see `checkpoint_tensors`.
        state: JSON of everything else that the run needs to go on.

    Raises:
        MapetError: the disk is full, or does not hold what was written; the checkpoints before are intact.
    """
    target, before = folder / f"step-{step:08d}", checkpoints(folder)
    if target.exists():
        return
    try:
        with atomic(target) as temporary:
            temporary.mkdir()
            digests = {}
            for name, tensors in parts.items():
                file = temporary / f"{name}.safetensors"
                write_tensors(file, tensors)
                _verify(file, tensors)
                digests[file.name] = file_hash(file)
            write_sealed(temporary / STATE, {"format_version": FORMAT, "step": step, "sha256": digests, **state})
    except (OSError, MapetError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        size = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
        raise MapetError(
            f"cannot write checkpoint {target}: {error}. It takes {size:,} bytes, the disk has {shutil.disk_usage(folder).free:,} "
            f"free; {f'the last one, {before[0].name}, is intact' if before else 'there is none before it'}. Make room and go "
            f"on with {option('resume', True)}"
        ) from None
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def _verify(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises MapetError: the file does not hold the tensors, bit for bit (NaN equals itself)."""
    written = load_file(path)
    for name, tensor in tensors.items():
        found, expected = (t.contiguous().flatten().view(torch.uint8) for t in (written[name], tensor.cpu()))
        if not found.equal(expected):
            raise MapetError(f"{path.name} does not hold what was written, '{name}' differs: is the disk failing?")


def checkpoint_tensors(model: nn.Module, optimizer: Optimizer, **others: Any) -> dict[str, dict[str, Tensor]]:
    """The parts of a checkpoint, to be saved by the first process; a collective call.

    Args:
        others: whatever else has a state dict; they are one part.
    """
    steps = optimizer.state_dict()["state"].items()
    moments = {f"{i}.{name}": full_tensor(torch.as_tensor(v)) for i, values in steps for name, v in values.items()}
    progress = {f"{name}.{key}": value for name, other in others.items() for key, value in other.state_dict().items()}
    return {"model": full_state_dict(model), "optimizer": moments} | ({"metrics_state": progress} if progress else {})


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return [state.parent for state in sorted(folder.glob(f"step-*/{STATE}"), reverse=True)]


def check_fingerprints(folder: Path, now: Mapping[str, str]) -> None:
    """Raise MapetError if the newest readable checkpoint in `folder` is of another tokenizer, or other images, than there are now."""
    state: dict[str, Any] = {}
    for path in checkpoints(folder):
        with suppress(MapetError):
            state = state or read_sealed(path / STATE, "checkpoint")
    for name, digest in now.items():
        if state.get(name, digest) != digest:
            raise MapetError(
                f"{folder.parent} was trained with other {name.removesuffix('_hash')} than are found now: their hash was "
                f"{state[name][:12]}, now it is {digest[:12]}. Has the run, or what it was made of, been moved or changed? Put "
                "back what there was"
            )


def checkpoint_step(path: Path) -> int:
    """Of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer | None = None, **others: Any
) -> dict[str, Any]:
    """Load the newest intact checkpoint of a run; a damaged one is passed over with a warning.

    Args:
        folder: of checkpoints, or one of them.

    Returns:
        The state that was saved with it, `step` included.

    Raises:
        MapetError: none is intact, or one was made by a newer version.
    """
    found = [folder] if (folder / STATE).exists() else checkpoints(folder)
    for path in found:
        try:
            state, parts = _read(path)
            load_full_state_dict(model, parts["model"])
            if optimizer is not None:
                _restore(optimizer, parts["optimizer"])
            if "metrics_state" in parts:  # absent in what version 0.1 wrote
                for name, other in others.items():
                    progress, prefix = parts["metrics_state"].items(), f"{name}."
                    other.load_state_dict({k.removeprefix(prefix): v for k, v in progress if k.startswith(prefix)})
            return state
        except MadeByNewer:  # the one before would silently lose what the newer version learned
            raise
        except (MapetError, OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            log.warning("checkpoint %s cannot be used: %s", path, str(error).splitlines()[0])
    raise MapetError(f"no usable checkpoint in {folder} ({len(found)} found): start again with a new {option('out')}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Raises ValueError and its like: a file is damaged."""
    state = read_sealed(path / STATE, "checkpoint")
    check_format(state.get("format_version"), FORMAT, "checkpoint", path)
    if state["step"] != checkpoint_step(path):
        raise ValueError(f"{STATE} says step {state['step']}")
    for name, digest in state["sha256"].items():
        if file_hash(path / name) != digest:
            raise ValueError(f"{name} is damaged (its sha256 differs)")
    return state, {name.removesuffix(".safetensors"): load_file(path / name) for name in state["sha256"]}


def _restore(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = distribute_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
