"""Handlers of the signals that stop a command: it saves first."""

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType

from mapet.errors import Interrupted

log = logging.getLogger("mapet")

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Sent by Ctrl-C, by `kill`, by a terminal that closes, and (the last two) by schedulers before they end a job."""
SIGINT_EXIT_CODE = 128 + signal.SIGINT
"""Exit code of a process that Ctrl-C has ended, as shells report it."""
REPEAT_GRACE_S = 2.0
"""Seconds in which a repeated signal is ignored: torchrun forwards a signal that the terminal has sent to all processes already."""
WAIT_GRACE_S = 5.0
"""Seconds after a signal in which what a command waits for, such as images, may still come, so that it stops at a good place."""
STUCK_S = 9.0
"""Seconds after a signal in which the main thread may be inside code that knows no signals; then the process ends: saved work is whole."""
RESUME_HINT = [""]
"""One item, which commands replace: the command that resumes, printed if Ctrl-C comes while libraries are imported."""


@dataclass
class StopRequest:
    """What `stop_signals` yields.

    Attributes:
        signal_name: the signal that has asked the command to stop, e.g. 'SIGTERM'; '' while none has.
        received_at: when it came, seconds of time.monotonic().
    """

    signal_name: str = ""
    received_at: float = 0.0


_requests: list[StopRequest] = []
"""Those of the contexts of `stop_signals` that are open, the innermost last."""


_handled_at = [0.0]
"""When Python last called a handler of `stop_signals`, seconds of time.monotonic()."""


def check_stop_request() -> None:
    """Raise Interrupted if a signal asked to stop `WAIT_GRACE_S` ago; called by what waits, or works for long."""
    for request in _requests:
        if request.signal_name and time.monotonic() - request.received_at > WAIT_GRACE_S:
            raise Interrupted(f"stopped by {request.signal_name} while it waited for images; what was saved is intact")


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

    def handle(code: int, frame: FrameType | None) -> None:
        """Record the first signal; raise KeyboardInterrupt for one that comes after `REPEAT_GRACE_S`."""
        _handled_at[0] = time.monotonic()
        if not request.signal_name:
            request.signal_name, request.received_at = signal.Signals(code).name, time.monotonic()
            log.info("%s: %s (send it again to stop at once)", request.signal_name, action)
        elif time.monotonic() - request.received_at > REPEAT_GRACE_S:
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [each for each in _available_signals() if in_main_thread and signal.getsignal(each) is not signal.SIG_IGN]
    previous = {each: signal.signal(each, handle) for each in handled}
    _requests.append(request)
    try:
        with _end_if_stuck() if handled else nullcontext():
            yield request
    finally:
        _requests.remove(request)
        for each, handler in previous.items():
            signal.signal(each, handler)


@contextmanager
def _end_if_stuck() -> Iterator[None]:
    """End the process `STUCK_S` after a signal whose handler Python could not call: it does that in the main thread, between two steps.

    That thread may be inside a collective whose other ranks hang, or a write to a share that is away. Where the program has a wakeup
    descriptor of its own, as asyncio does, or an outer context has, there is no second one.
    """
    before = signal.set_wakeup_fd(-1)
    if before != -1:
        signal.set_wakeup_fd(before)
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    ended = threading.Event()

    def watch() -> None:
        names = {int(number): number.name for number in _available_signals()}
        while number := os.read(reading, 1)[0]:
            name, came_at = names.get(number), time.monotonic()
            if name is None or ended.wait(STUCK_S) or _handled_at[0] > came_at - 1:
                continue
            os.write(
                2,
                f"mapet: ended by {name} while it waited for something that does not answer; what was saved is intact\n".encode(),
            )
            os._exit(128 + number)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        os.write(writing, b"\0")  # closing would not end the read: child processes hold it open, too
        thread.join()
        os.close(reading)
        os.close(writing)


def _forget_wakeup() -> None:
    """Leave the signals of a child process out of the parent's pipe."""
    with suppress(ValueError):  # in a thread that is not the main one
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_wakeup)


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
