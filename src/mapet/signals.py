"""Signals that ask a stage to stop: it saves first."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger("mapet")


class StopRequest:
    """`asked` names the signal that asked the run to stop, '' while none has."""

    asked = ""


STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Ctrl-C, the polite kill, a terminal that goes away, and what schedulers send before they take a machine."""
GO_ON = [""]
"""What a person is told to go on with, by one who is interrupted while libraries are loaded."""
AGAIN = 2.0
"""Seconds after which a second signal is meant: torchrun repeats to its processes what a terminal has sent to all."""


@contextmanager
def stop_signals(then: str = "saving after this step") -> Iterator[StopRequest]:
    """Turn the first of `STOP_SIGNALS` into a request; a second one interrupts at once. `then` says what comes first."""
    request = StopRequest()
    old = {}
    since = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal since
        if not request.asked:
            request.asked, since = signal.Signals(number).name, time.monotonic()
            log.warning("%s: %s (again to stop at once)", request.asked, then)
        elif time.monotonic() - since > AGAIN:
            raise KeyboardInterrupt

    try:
        for number in _numbers():
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
                old[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def leave_at_once_while_importing() -> None:
    """Ctrl-C while modules are imported, when there is nothing to save, ends the process then and there.

    Raised as an exception it can end in a callback of the import system or of a library, which pass over it: the program
    would go on with half a library. At any other time it is Python's KeyboardInterrupt.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        asked = frame
        while asked is not None:
            if asked.f_code.co_filename.startswith("<frozen importlib"):
                again = f". Go on with: {GO_ON[0]}" if GO_ON[0] else ""
                os.write(2, f"mapet: interrupted while loading libraries{again}\n".encode())
                os._exit(130)
            asked = asked.f_back
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is to be ignored, as nohup asks
        signal.signal(signal.SIGINT, handle)


def leave_to_main_process() -> None:
    """In a helper process: what a terminal or a service sends to all processes of a job is for the main one to act on.

    A second SIGTERM ends the helper all the same: that is how the main process gets rid of one that hangs.
    """

    def first(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in _numbers():
        signal.signal(number, first if number == signal.SIGTERM else signal.SIG_IGN)


def _numbers() -> list[signal.Signals]:
    """Of `STOP_SIGNALS`, those of this system: Windows knows two."""
    return [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
