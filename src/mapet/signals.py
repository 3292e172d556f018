"""Signals that ask a stage to stop: it saves first."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("mapet")


class StopRequest:
    """`asked` names the signal that asked the run to stop, '' while none has."""

    asked = ""


STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Ctrl-C, the polite kill, a terminal that goes away, and what schedulers send before they take a machine."""
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
