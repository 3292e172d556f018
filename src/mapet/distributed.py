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

from mapet.errors import MapetError, option

T = TypeVar("T")
log = logging.getLogger("mapet")
_alone = False
TIMEOUT = timedelta(hours=2)
"""Longest wait for the other ranks: the first may be evaluating, or writing to a slow disk."""


@contextmanager
def process_group() -> Iterator[None]:
    """Initialize torch's default process group and destroy it at the end; does nothing where there is one.

    Ranks other than the first log from warnings upwards, with their rank.
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
def alone() -> Iterator[None]:
    """Let this rank work while the others wait: collectives return their input unchanged."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def is_initialized() -> bool:
    """Return whether there is a process group."""
    return not _alone and dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if is_initialized() else 1


def rank() -> int:
    """Return this process's rank, from 0."""
    return dist.get_rank() if is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks."""
    all_reduce(torch.zeros(1))


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks; the result is the same to the bit in each.

    Raises:
        MapetError: another rank is gone, here and in all other collectives.
    """
    return _collective(tensor, dist.all_reduce)


def broadcast(tensor: Tensor) -> Tensor:
    """Return rank 0's tensor, where equal inputs may be rounded differently by different processors."""
    return _collective(tensor, lambda shared: dist.broadcast(shared, 0))


def all_gather(tensor: Tensor) -> Tensor:
    """All-gather equally shaped tensors into (world_size, ...)."""
    rows = tensor.new_zeros(world_size(), *tensor.shape)
    rows[rank()] = tensor
    return all_reduce(rows)


def check_same(value: int, path: Path) -> None:
    """Raise MapetError if the ranks have read different values from a path that all should see."""
    values = all_gather(torch.tensor(value)).tolist()
    if len(set(values)) > 1:
        raise MapetError(
            f"{path} is not the same for all processes ({values}): put it into a folder that all of them see"
        )


def all_gather_object(value: T) -> list[T]:
    """Gather small values of all ranks, which are pickled on the way, by rank."""
    if not is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    with translate_comm_errors():
        dist.all_gather_object(values, value)
    return cast(list[T], values)


def _collective(tensor: Tensor, operation: Callable[[Tensor], object]) -> Tensor:
    """Apply an in-place operation to a copy on a device that the backend can communicate from."""
    if not is_initialized():
        return tensor
    gpu_only = dist.get_backend() == "nccl" and tensor.device.type != "cuda"
    shared = tensor.to("cuda" if gpu_only else tensor.device).contiguous().clone()
    with translate_comm_errors():
        operation(shared)
    return shared.to(tensor.device)


@contextmanager
def translate_comm_errors() -> Iterator[None]:
    """Turn the RuntimeError of a collective whose peer is gone into a MapetError."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise MapetError(
            f"rank {rank()} of {world_size()}: lost another rank ({reason}); see its own message. The last checkpoint is "
            f"intact: restart all ranks with {option('resume', True)}"
        ) from None
