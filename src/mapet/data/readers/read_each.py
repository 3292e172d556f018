"""Read images one after another, none for longer than the limits allow, whatever a decoder does: in a thread that can be left behind."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from mapet.config.limits import limits
from mapet.data.readers.image import ImageDecodeError
from mapet.errors import MapetError, option
from mapet.signals import check_stop_request

T = TypeVar("T")
R = TypeVar("R")
POLL_S = 0.5
"""Seconds between looks at a thread that reads."""
WATCHERS: list[Callable[[], None]] = [check_stop_request]
"""Called at each look, and before the first: they may raise."""


def read_each(read: Callable[[T], R], items: Sequence[T], name: Callable[[T], str] = str) -> list[R | ImageDecodeError]:
    """Return what `read` returns for each item, or the ImageDecodeError that it raises; an item that takes too long counts as one, too.

    Code of a decoder cannot be interrupted. A thread that decodes for too long is left behind, and ends when the decoder returns; until
    then it takes one processor, but nothing that it computes is used.

    Args:
        read: reads one image. It draws nothing from global generators, which a thread that is left behind would change.
        items: what `read` takes.
        name: names an item in errors.

    Raises:
        MapetError: nothing came of an image for `limits().read_timeout` seconds, while nothing was computed either.
        Exception: any other exception of `read`.
    """
    outcomes: list[R | ImageDecodeError] = []
    while len(outcomes) < len(items):
        thread = _Reader(read, items[len(outcomes) :])
        thread.start()
        _watch()
        while not thread.ended.wait(POLL_S):
            _watch()
            if excess := thread.find_excess(name):
                thread.is_abandoned = True
                outcomes += [*thread.outcomes[: excess[0]], excess[1]]
                break
        else:
            outcomes += thread.outcomes
            if thread.error is not None:
                raise thread.error
    return outcomes


def _watch() -> None:
    """Call the `WATCHERS`."""
    for watch in WATCHERS:
        watch()


class _Reader(threading.Thread, Generic[T, R]):
    """Reads items one after another.

    Attributes:
        outcomes: of the items so far.
        number: of the item that is read.
        ended: set at the end.
        error: that ended it, or None.
        is_abandoned: its outcomes are not used any more.
    """

    def __init__(self, read: Callable[[T], R], items: Sequence[T]) -> None:
        super().__init__(name="reader", daemon=True)
        self.read, self.items, self.number, self.is_abandoned = read, items, 0, False
        self.error: BaseException | None = None
        self.outcomes: list[R | ImageDecodeError] = []
        self.ended = threading.Event()
        self.clock: int | None = None
        self.started = 0.0, 0.0

    def run(self) -> None:
        if hasattr(time, "pthread_getcpuclockid"):  # not on macOS
            self.clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            for number, item in enumerate(self.items):
                self.number = number
                self.started = time.monotonic(), time.thread_time()
                try:
                    outcome: R | ImageDecodeError = self.read(item)
                except ImageDecodeError as error:
                    outcome = error
                if self.is_abandoned:
                    return
                self.outcomes.append(outcome)
        except BaseException as error:  # raised by the thread that waits
            self.error = error
        self.ended.set()

    def find_excess(self, name: Callable[[T], str]) -> tuple[int, ImageDecodeError] | None:
        """Return number and error of an item that takes too long to decode, or None; called by another thread.

        Raises:
            MapetError: nothing comes of it.
        """
        number, (wall, computed) = self.number, self.started
        elapsed = time.monotonic() - wall
        try:
            used = time.clock_gettime(self.clock) - computed if self.clock is not None else elapsed
        except OSError:  # the thread has just ended
            return None
        if not wall or number != self.number:  # not begun, or the next one now
            return None
        if used > limits().image_seconds:
            return number, ImageDecodeError(
                f"more than {limits().image_seconds:g} s to decode, see --limits.image-seconds"
            )
        if elapsed - used > limits().read_timeout:
            fix = f"check the disk or share and resume, or raise {option('limits.read_timeout')}"
            raise MapetError(
                f"nothing came of the image {name(self.items[number])!r} for {elapsed:.0f} s: {fix}",
                field="limits.read_timeout", value=limits().read_timeout,
            )  # fmt: skip
        return None
