"""Several processes at one job, by torch.distributed; one process that is alone tells nobody anything.

`torchrun` starts them; `joined` lets them meet. The other functions are collective calls: every process makes them, in the
same order. Without a group they return what they are given.
"""

import functools
import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor, distributed

from mapet.errors import MapetError

T = TypeVar("T")
P = ParamSpec("P")
log = logging.getLogger("mapet")
PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: the first may be evaluating, or writing to a slow disk."""


@contextmanager
def joined() -> Iterator[None]:
    """Meet the processes that `torchrun` started, and part at the end; nothing to do where they have met.

    Messages of other processes than the first are shown from warnings upwards, with the number of theirs.
    """
    if _together():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    if rank():
        log.setLevel(logging.WARNING)
        for handler in log.handlers:
            handler.setFormatter(logging.Formatter(f"[process {rank()}] %(message)s"))
    try:
        yield
    finally:
        distributed.destroy_process_group()
        gc.collect()  # what of the group lies in cycles has threads, with which Python's end is an abort now and then


def number() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if _together() else 0


def first_only(action: Callable[P, None]) -> Callable[P, None]:
    """A function that does nothing but in the first process: for what is written once."""

    @functools.wraps(action)
    def call(*arguments: P.args, **options: P.kwargs) -> None:
        if rank() == 0:
            action(*arguments, **options)

    return call


def device_number() -> int:
    """Which of this machine's devices is this process's."""
    return int(os.environ.get("LOCAL_RANK", 0))


def wait() -> None:
    """Until all have come here."""
    total(torch.zeros(1))


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same to the bit in each.

    Raises:
        MapetError: another process is gone.
    """
    if not _together():
        return tensor
    shared = _where_it_travels(tensor).clone()
    with _telling_of_lost_ones():
        distributed.all_reduce(shared)
    return shared.to(tensor.device)


def of_the_first(tensor: Tensor) -> Tensor:
    """The tensor of rank 0: for what follows from equal numbers, but whose rounding may depend on the processor."""
    if not _together():
        return tensor
    shared = _where_it_travels(tensor).clone()
    with _telling_of_lost_ones():
        distributed.broadcast(shared, 0)
    return shared.to(tensor.device)


def stacked(tensor: Tensor) -> Tensor:
    """(processes, ...) the tensors of all processes, which have one shape."""
    rows = tensor.new_zeros(number(), *tensor.shape)
    rows[rank()] = tensor
    return total(rows)


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank: small ones, for this pickles them."""
    if not _together():
        return [value]
    values: list[T | None] = [None] * number()
    with _telling_of_lost_ones():
        distributed.all_gather_object(values, value)
    return cast(list[T], values)


@contextmanager
def _telling_of_lost_ones() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise LostProcess(
            f"process {rank()} of {number()} stops, for another one is gone ({reason}); its own message says why. What was saved "
            "is whole: start all of them again with --resume"
        ) from None


class LostProcess(MapetError):
    """Another process of the job ended."""


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _where_it_travels(tensor: Tensor) -> Tensor:
    """NCCL knows tensors of GPUs alone, unless gloo is there for the others."""
    alone = distributed.get_backend() == "nccl" and tensor.device.type != "cuda"
    return tensor.to("cuda" if alone else tensor.device).contiguous()
