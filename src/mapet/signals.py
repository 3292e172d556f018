"""Handlers of the signals that stop a command: it saves first."""

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger("mapet")

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Sent by Ctrl-C, by `kill`, by a terminal that closes, and (the last two) by schedulers before they end a job."""
SIGINT_EXIT_CODE = 128 + signal.SIGINT
"""Exit code of a process that Ctrl-C has ended, as shells report it."""
REPEAT_GRACE_S = 2.0
"""Seconds in which a repeated signal is ignored: torchrun forwards a signal that the terminal has sent to all processes already."""
RESUME_HINT = [""]
"""One item, which commands replace: the command that resumes, printed if Ctrl-C comes while libraries are imported."""


@dataclass
class StopRequest:
    """What `stop_signals` yields.

    Attributes:
        signal_name: the signal that has asked the command to stop, e.g. 'SIGTERM'; '' while none has.
    """

    signal_name: str = ""


@contextmanager
def stop_signals(action: str = "saving after this step") -> Iterator[StopRequest]:
    """Record the first of `STOP_SIGNALS` in the request that is yielded, which the caller polls; restore the handlers at the end.

    A second signal is ignored within `REPEAT_GRACE_S` of the first, and raises KeyboardInterrupt after that. Signals that the
    process ignores (nohup) stay ignored. Outside the main thread, where Python allows no handlers, no signal is recorded.

    Args:
        action: what the command does before it stops, for the log.

    Yields:
        The request; its `signal_name` is set when a signal arrives.
    """
    request = StopRequest()
    received_at = 0.0  # seconds, of time.monotonic()

    def handle(code: int, frame: FrameType | None) -> None:
        """Record the first signal; raise KeyboardInterrupt for one that comes after `REPEAT_GRACE_S`."""
        nonlocal received_at
        if not request.signal_name:
            request.signal_name, received_at = signal.Signals(code).name, time.monotonic()
            log.info("%s: %s (send it again to stop at once)", request.signal_name, action)
        elif time.monotonic() - received_at > REPEAT_GRACE_S:
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [each for each in _available_signals() if in_main_thread and signal.getsignal(each) is not signal.SIG_IGN]
    previous = {each: signal.signal(each, handle) for each in handled}
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def exit_on_sigint_during_import() -> None:
    """Install a handler with which Ctrl-C exits at once while a module is imported, when there is nothing to save.

    A KeyboardInterrupt could be swallowed there by a callback of the import system or of a library, and the program would
    continue with half a library. At any other time the handler raises Python's KeyboardInterrupt. Where SIGINT has another
    handler, or is ignored (nohup), nothing is installed.
    """

    def handle(code: int, frame: FrameType | None) -> None:
        """End the process if an import is in the stack; else raise KeyboardInterrupt."""
        if any(f.f_code.co_filename.startswith("<frozen importlib") for f, _ in traceback.walk_stack(frame)):
            hint = f". Resume with: {RESUME_HINT[0]}" if RESUME_HINT[0] else ""
            os.write(2, f"mapet: interrupted while loading libraries{hint}\n".encode())
            os._exit(SIGINT_EXIT_CODE)
        signal.default_int_handler(code, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)


def ignore_signals_in_worker() -> None:
    """Ignore `STOP_SIGNALS` in a data-loading worker: terminals and schedulers send them to all processes, and the main one saves.

    A second SIGTERM still ends the worker: the main process ends workers that hang with it.
    """

    def restore_default(code: int, frame: FrameType | None) -> None:
        """Let the next signal of this kind end the process."""
        signal.signal(code, signal.SIG_DFL)

    for each in _available_signals():
        signal.signal(each, restore_default if each == signal.SIGTERM else signal.SIG_IGN)


def _available_signals() -> list[signal.Signals]:
    """Return those of `STOP_SIGNALS` that this system has: Windows has only SIGINT and SIGTERM."""
    return [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
