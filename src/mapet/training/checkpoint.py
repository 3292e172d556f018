"""Checkpoints: a folder of safetensors and JSON, complete or absent."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mapet.errors import MapetError
from mapet.files import atomic, file_hash, write_tensors

log = logging.getLogger("mapet")
FILES = ("model.safetensors", "optimizer.safetensors")


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-00000000` atomically, then remove all but the newest `keep`.

    Args:
        state: JSON of everything else that the run needs to go on.
    """
    target = folder / f"step-{step:08d}"
    if target.exists():
        return target
    with atomic(target) as temporary:
        temporary.mkdir()
        write_tensors(temporary / FILES[0], model.state_dict())
        write_tensors(temporary / FILES[1], _flatten(optimizer))
        digests = {name: file_hash(temporary / name) for name in FILES}
        (temporary / "state.json").write_text(json.dumps({"step": step, "sha256": digests, **state}, indent=2))
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return [state.parent for state in sorted(folder.glob("step-*/state.json"), reverse=True)]


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Load the newest intact checkpoint of a run; a damaged one is passed over with a warning.

    Returns:
        The state that was saved with it, `step` included.

    Raises:
        MapetError: none is intact.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            state = json.loads((path / "state.json").read_text())
            for name in FILES:
                if file_hash(path / name) != state["sha256"][name]:
                    raise ValueError(f"{name} is damaged (its sha256 differs)")
            weights, moments = load_file(path / FILES[0]), load_file(path / FILES[1])
            model.load_state_dict(weights)
            if optimizer is not None:
                _restore(optimizer, moments)
            return dict(state)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            log.warning("checkpoint %s cannot be used: %s", path, str(error).splitlines()[0])
    raise MapetError(f"no usable checkpoint in {folder} ({len(found)} found): start again with a new --out")


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, values in state.items() for name, value in values.items()}


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
