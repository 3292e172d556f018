"""K-means between two rounds: what a call needs to resume bit-exactly, as one safetensors file."""

import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mapet import distributed
from mapet.errors import MapetError
from mapet.files import atomic, write_tensors

Init = Literal["random", "k-means++"]


class KMeansConfig(NamedTuple):
    """What a call of `kmeans` depends on; `points` is a digest of its points."""

    vocab_size: int
    max_iter: int
    n_init: int
    seed: int
    precision: str
    init: Init
    batch_size: int | None
    metric: str
    world_size: int
    points: str = ""


class KMeansState(NamedTuple):
    """After a round.

    Attributes:
        rounds: done, of all runs.
        error: mean squared distance of the round.
        best_error: of the best run that is done; infinite before the first.
        centroids: (K, F), less the points' mean.
        best: (K, F) those of the best run.
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
        """Return the state before the first round."""
        nowhere = torch.zeros(num_clusters, num_features, device=device)
        none = torch.zeros(num_clusters, dtype=torch.int64, device=device)
        return cls(0, torch.inf, torch.inf, nowhere, nowhere, none, none)


NUMBERS, TENSORS = KMeansState._fields[:3], KMeansState._fields[3:]


@distributed.rank_zero_only
def save_state(path: Path, config: KMeansConfig, state: KMeansState) -> None:
    """Replace `path` by the state; rank 0 does."""
    values = state._asdict()
    numbers = {name: values[name] for name in NUMBERS}
    metadata = {"config": json.dumps(config._asdict()), "numbers": json.dumps(numbers)}
    with atomic(path) as temporary:
        write_tensors(temporary, {name: values[name].clone() for name in TENSORS}, metadata)


def load_state(path: Path, config: KMeansConfig, initial: KMeansState) -> KMeansState:
    """Return the state that `path` holds, or `initial` if there is none.

    Raises:
        MapetError: it is damaged, of another call, or not the same for all ranks.
    """
    state = _read(path, config, initial.centroids.device) if path.exists() else initial
    if len(set(distributed.all_gather(torch.tensor(state.rounds)).tolist())) > 1:
        raise MapetError(f"{path} is not the same file for all processes: put it into a folder that all of them see")
    return state


def _read(path: Path, config: KMeansConfig, device: torch.device) -> KMeansState:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).to(device) for name in TENSORS}
        begun = json.loads(metadata["config"])
        state = KMeansState(**json.loads(metadata["numbers"]), **tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MapetError(f"{path}: damaged k-means checkpoint ({error}); delete it to begin again") from None
    changed = {name: value for name, value in config._asdict().items() if begun.get(name) != value}
    if changed:
        told = ["other features" if k == "points" else f"{k} = {begun.get(k)} (now {v})" for k, v in changed.items()]
        raise MapetError(
            f"{path} was begun with {', '.join(told)}: use the same settings, images and machine, or delete it to begin again"
        )
    return state
