"""K-means between two rounds: what a config needs to go on to the bit, as one safetensors file."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mapet import distributed
from mapet.errors import MapetError
from mapet.files import atomic, write_tensors


class KMeansState(NamedTuple):
    """After a round.

    Attributes:
        rounds: done, of all restarts.
        error: mean squared distance of the round.
        best_error: of the best restart that is done; infinite before the first.
        centroids: (K, F), less the points' mean.
        best: (K, F) those of the best restart.
        visits: (K,) points that have moved each centroid, in mini-batches.
        idle: (K,) points that went by since each won its last.
    """

    rounds: int
    error: float
    best_error: float
    centroids: Tensor
    best: Tensor
    visits: Tensor
    idle: Tensor

    @classmethod
    def initial(cls, num_clusters: int, num_features: int, device: torch.device) -> "KMeansState":
        """Before the first round."""
        nowhere = torch.zeros(num_clusters, num_features, device=device)
        none = torch.zeros(num_clusters, dtype=torch.int64, device=device)
        return cls(0, torch.inf, torch.inf, nowhere, nowhere, none, none)


NUMBERS, TENSORS = KMeansState._fields[:3], KMeansState._fields[3:]


def save_state(path: Path, config: dict[str, Any], state: KMeansState) -> None:
    """Replace `path` by the state of `config`: its settings, and the hash of its points. Rank 0 does."""
    if distributed.rank() == 0:
        values = state._asdict()
        metadata = {"config": json.dumps(config), "numbers": json.dumps({name: values[name] for name in NUMBERS})}
        with atomic(path) as temporary:
            write_tensors(temporary, {name: values[name].clone() for name in TENSORS}, metadata)


def load_state(path: Path, config: dict[str, Any], initial: KMeansState) -> KMeansState:
    """The state that `path` holds, or `initial` if there is none.

    Raises:
        MapetError: it is damaged, of another config, or not the same for all processes.
    """
    state = _read(path, config, initial) if path.exists() else initial
    if len(set(distributed.all_gather(torch.tensor(state.rounds)).tolist())) > 1:
        raise MapetError(f"{path} is not the same file for all processes: put it into a folder that all of them see")
    return state


def _read(path: Path, config: dict[str, Any], initial: KMeansState) -> KMeansState:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).to(initial.centroids.device) for name in TENSORS}
        begun, numbers = json.loads(metadata["config"]), json.loads(metadata["numbers"])
        state = KMeansState(**numbers, **tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MapetError(f"{path}: damaged k-means checkpoint ({error}); delete it to begin again") from None
    other = [
        "other features" if name == "points" else f"{name} = {begun.get(name)} (now {value})"
        for name, value in config.items()
        if begun.get(name) != value
    ]
    if other:
        raise MapetError(
            f"{path} was begun with {', '.join(other)}: use the same settings, images and machine, or delete it to begin again"
        )
    return state
