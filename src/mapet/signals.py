"""Signals that ask a command to stop: it saves first."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger("mapet")

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Ctrl-C, `kill`, a terminal that closes, and what schedulers send before they take a machine back."""
REPEAT_GRACE_S = 2.0
"""Seconds in which a repeated signal is ignored: torchrun sends its processes again what a terminal has sent to all."""
RESUME_HINT = [""]
"""The command that resumes, shown to a user who interrupts while libraries are loaded."""


@dataclass
class StopRequest:
    """Name of the signal that asked the command to stop, '' while none has."""

    signal_name: str = ""


@contextmanager
def stop_signals(then: str = "saving after this step") -> Iterator[StopRequest]:
    """Turn the first of `STOP_SIGNALS` into a request to stop.

    A second one is ignored within `REPEAT_GRACE_S`, and raises KeyboardInterrupt after that. Signals that the process
    ignores (nohup) stay ignored; outside the main thread the caller handles them.

    Args:
        then: what the command does before it stops, for the log.
    """
    request = StopRequest()
    received = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if not request.signal_name:
            request.signal_name, received = signal.Signals(number).name, time.monotonic()
            log.info("%s: %s (again to stop at once)", request.signal_name, then)
        elif time.monotonic() - received > REPEAT_GRACE_S:
            raise KeyboardInterrupt

    numbers = _available_signals() if threading.current_thread() is threading.main_thread() else []
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_on_sigint_during_import() -> None:
    """Let Ctrl-C end the process at once while modules are imported, when there is nothing to save.

    As an exception it can be swallowed by a callback of the import system or of a library, and the program would go on with
    half a library. At any other time it is Python's KeyboardInterrupt.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        caller = frame
        while caller is not None:
            if caller.f_code.co_filename.startswith("<frozen importlib"):
                hint = f". Go on with: {RESUME_HINT[0]}" if RESUME_HINT[0] else ""
                os.write(2, f"mapet: interrupted while loading libraries{hint}\n".encode())
                os._exit(130)
            caller = caller.f_back
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored (nohup)
        signal.signal(signal.SIGINT, handle)


def ignore_signals_in_worker() -> None:
    """Leave what a terminal or a service sends to all processes of a job to the main process.

    A second SIGTERM still ends the worker: that is how the main process gets rid of one that hangs.
    """

    def die_next_time(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in _available_signals():
        signal.signal(number, die_next_time if number == signal.SIGTERM else signal.SIG_IGN)


def _available_signals() -> list[signal.Signals]:
    """List those of `STOP_SIGNALS` that this system has: Windows knows two."""
    return [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
