"""torch.distributed collectives that return their input unchanged when no process group is initialized.

`torchrun` starts the processes and `process_group` connects them. Every rank calls a collective, in the same order.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mapet.errors import MapetError, first_line, option

T = TypeVar("T")
log = logging.getLogger("mapet")
_collectives_disabled = False
TIMEOUT = timedelta(hours=2)
"""Longest wait for the other ranks: rank 0 may be evaluating, or writing to a slow disk."""


@contextmanager
def process_group() -> Iterator[None]:
    """Initialize torch's default process group from torchrun's environment variables, and destroy it when the context ends.

    Does nothing if a group is initialized already. Ranks other than 0 log warnings and errors only, prefixed by their rank.
    """
    if is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    if rank():
        log.setLevel(logging.WARNING)
        for handler in log.handlers:
            handler.setFormatter(logging.Formatter(f"[rank {rank()}] %(message)s"))
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()  # the group's threads, kept by reference cycles, can abort the interpreter's exit


@contextmanager
def disable_collectives() -> Iterator[None]:
    """Make this module behave as in a single process until the context ends, for work that one rank does while the others wait.

    Within the context collectives return their input unchanged, `world_size()` is 1 and `rank()` is 0. Contexts may be nested.
    """
    global _collectives_disabled
    previous, _collectives_disabled = _collectives_disabled, True
    try:
        yield
    finally:
        _collectives_disabled = previous


def is_initialized() -> bool:
    """Return whether there is a process group, and collectives are not disabled."""
    return not _collectives_disabled and dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0; 0 without a process group."""
    return dist.get_rank() if is_initialized() else 0


def barrier() -> None:
    """Wait until all ranks have called this."""
    all_reduce(torch.zeros(1))


def all_reduce(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, bit-identical on each of them; `tensor` itself is not changed.

    Raises:
        MapetError: another rank has died. This holds for every collective of this module.
    """
    return _apply_collective(tensor, dist.all_reduce)


def broadcast(tensor: Tensor) -> Tensor:
    """Return rank 0's tensor on every rank: processors of different kinds may round the same computation differently."""
    return _apply_collective(tensor, lambda shared: dist.broadcast(shared, 0))


def all_gather(tensor: Tensor) -> Tensor:
    """All-gather equally shaped tensors into (world_size, ...), ordered by rank.

    It is the sum over ranks of a tensor that is zero except for the rank's own row.
    """
    rows = tensor.new_zeros(world_size(), *tensor.shape)
    rows[rank()] = tensor
    return all_reduce(rows)


def check_same(value: int, path: Path) -> None:
    """Check that all ranks have read the same value from a path.

    Args:
        value: what this rank has read, e.g. a number of files or the step of a checkpoint.
        path: file or folder that the value comes from, named by the error.

    Raises:
        MapetError: the values differ, so the path is not on a file system that all ranks share.
    """
    values = all_gather(torch.tensor(value)).tolist()
    if len(set(values)) > 1:
        raise MapetError(
            f"{path} differs between ranks (by rank, they read {values} from it): put it on a file system that all ranks share"
        )


def all_gather_object(value: T) -> list[T]:
    """Return the values of all ranks, ordered by rank. They are pickled for the transfer, so they should be small."""
    if not is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    with translate_comm_errors():
        dist.all_gather_object(values, value)
    return cast(list[T], values)


def _apply_collective(tensor: Tensor, operation: Callable[[Tensor], object]) -> Tensor:
    """Apply a collective to a copy of the tensor, on a device that the backend can communicate from.

    Args:
        tensor: on any device; it is not changed, and it is returned itself if there is no process group.
        operation: a collective of torch.distributed that works in place.

    Returns:
        the result, on the device of `tensor`.
    """
    if not is_initialized():
        return tensor
    gpu_only = dist.get_backend() == "nccl" and tensor.device.type != "cuda"
    shared = tensor.to("cuda" if gpu_only else tensor.device).contiguous().clone()
    with translate_comm_errors():
        operation(shared)
    return shared.to(tensor.device)


@contextmanager
def translate_comm_errors() -> Iterator[None]:
    """Translate the RuntimeError of a collective that has lost another rank into a MapetError; other errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise MapetError(
            f"rank {rank()} of {world_size()}: lost another rank ({first_line(error)}); see that rank's own message. The last checkpoint is "
            f"intact: restart all ranks with {option('resume', True)}"
        ) from None
