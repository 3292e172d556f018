"""Read batches in worker processes, of which none hangs, dies or fails unnoticed."""

import functools
import multiprocessing
import multiprocessing.queues
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mapet.config.limits import Limits, limits, use_limits
from mapet.data.readers.read_each import POLL_S, WATCHERS
from mapet.device import WORKERS, num_workers
from mapet.errors import MapetError, first_line, option
from mapet.signals import check_stop_request, ignore_signals_in_worker

P = TypeVar("P")
B = TypeVar("B")
GRACE_S = 30.0
"""Seconds beyond `Limits.read_timeout` after which a worker without a sign of life counts as stuck: its own error comes before."""


def load(
    read: Callable[[P], B], batches: Iterable[P], pin_memory: bool = False, generator: torch.Generator | None = None
) -> "Loader[P, B]":
    """Return an iterable of `read(batch)` for each batch, in order, read by as many worker processes as `num_workers` returns.

    Args:
        read: makes a batch; it is called in the workers, and must be picklable where processes are spawned.
        batches: what `read` takes; it may be without end.
        pin_memory: copy batches to pinned memory, from which copies to a GPU are asynchronous.
        generator: of the workers' seeds; None: torch's global one.
    """
    return Loader(read, batches, pin_memory, generator)


class Loader(Generic[P, B]):
    """What `load` returns."""

    def __init__(
        self, read: Callable[[P], B], batches: Iterable[P], pin_memory: bool, generator: torch.Generator | None
    ) -> None:
        workers, self.batches = num_workers(), batches
        self.alive = multiprocessing.RawValue("d", time.monotonic())  # when any worker last showed that it can compute
        self.loader: DataLoader[B | MapetError] = DataLoader(
            _Batches(read, is_worker=workers > 0), sampler=batches, batch_size=None, num_workers=workers,
            prefetch_factor=4 if workers else None, pin_memory=pin_memory, generator=generator,
            timeout=POLL_S if workers else 0, worker_init_fn=functools.partial(_init_worker, limits(), self.alive),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[B]:
        """Yield the batches.

        Raises:
            MapetError: a worker could not read or hand over a batch, or gave no sign of life for `Limits.read_timeout` seconds.
            Interrupted: a signal to stop came some seconds ago, and no batch since.
            RuntimeError: a worker has died.
        """
        batches = iter(self.loader)
        self.alive.value = time.monotonic()
        try:
            while True:
                check_stop_request()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if not str(error).startswith("DataLoader timed out"):  # after POLL_S
                        raise
                    self._check_alive()
                    continue
                if isinstance(batch, MapetError):
                    raise batch
                yield batch
        finally:
            del batches  # which ends the workers: a traceback would keep it, and the program wait for them at its end

    def _check_alive(self) -> None:
        """Raise MapetError if no worker has shown any sign of life for too long."""
        silent = time.monotonic() - self.alive.value
        if silent > limits().read_timeout + GRACE_S:
            fix = f"set the environment variable {WORKERS} to 0, or raise {option('limits.read_timeout')}"
            raise MapetError(
                f"the processes that read images gave no sign of life for {silent:.0f} s: {fix}",
                field="limits.read_timeout", value=limits().read_timeout,
            )  # fmt: skip


class _Batches(Dataset[Any]):
    """Batches by what `read` takes; in a worker, a MapetError is a batch, too: torch would raise it with a traceback in its text."""

    def __init__(self, read: Callable[[Any], Any], is_worker: bool) -> None:
        self.read, self.is_worker = read, is_worker

    def __getitem__(self, batch: Any) -> Any:
        if not self.is_worker:
            return self.read(batch)
        try:
            return self.read(batch)
        except MapetError as error:
            return error


def _init_worker(in_force: Limits, alive: Any, _worker_id: int) -> None:
    """Set up a loader process: one thread, the limits; signals and the end of the job are left to the main process."""
    torch.set_num_threads(1)
    ignore_signals_in_worker()
    use_limits(in_force).__enter__()

    def show_life() -> None:
        alive.value = time.monotonic()

    WATCHERS.append(show_life)
    sys.excepthook = _report_error
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _send_error(queue: Any, error: Exception, batch: tuple[int, Any]) -> None:
    """Send an error instead of a batch that could not be sent; Python would drop the batch, and the main process wait for ever.

    Args:
        queue: from this worker to the main process.
        error: of a full /dev/shm, or of too many open files, for instance.
        batch: its number, and the batch.
    """
    fix = (
        f"enlarge /dev/shm (docker run --shm-size=8g, ulimit -n 65536), or set {WORKERS} to fewer processes, 0 for none"
    )
    refusal = MapetError(f"a process that reads images cannot hand over a batch ({first_line(error)}): {fix}")
    data = ForkingPickler.dumps((batch[0], refusal))
    queue._sem.acquire()  # of the items in the queue, which Python has released for the batch
    with queue._wlock:
        queue._writer.send_bytes(data)


def _report_error(error_type: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught error of a worker, unless the main process is gone, to which a thread was handing over memory."""
    if not issubclass(error_type, (EOFError, ConnectionError)):
        sys.__excepthook__(error_type, error, trace)
