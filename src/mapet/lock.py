"""One process a folder: a lock file that names its holder, is renewed each minute, and does not outlive the process for long."""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mapet.errors import MapetError, option
from mapet.files import LOCK_FILE

log = logging.getLogger("mapet")
RENEW_S = 60.0
"""Seconds between renewals: the lock file's time of change."""
STALE_S = 600.0
"""Seconds without renewal after which a holder on another host, whose process cannot be looked up, counts as gone."""
RETRY_S = 0.1
"""Seconds to wait for a process that has created a lock file but not written it yet."""
LOCK_MODE = 0o644
START_TIME_FIELD = 18
"""Index, behind the state, of the start time in /proc/PID/stat (field 22 of proc(5)), clock ticks since boot."""
UNREADABLE_S = 2.0
"""Seconds after which a lock file without a holder counts as left by a process that was killed while it made it."""


class Holder(NamedTuple):
    """The process that holds a lock.

    Attributes:
        host: its name.
        namespace: of process ids: two containers may have the same host name, but not the same namespace.
        pid: process id.
        started: boot of the host and time of the process's start, so that a process id that is used again is noticed; '' where unknown.
    """

    host: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def from_this_process(cls) -> "Holder":
        """Return the holder that this process is."""
        namespace = ""
        with suppress(OSError):  # Linux alone has it
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(socket.gethostname(), namespace, os.getpid(), _process_start(os.getpid()))

    def is_gone(self, age: float) -> bool:
        """Return whether the process has ended, as far as this host can know; `age`: seconds since the last renewal."""
        this_process = Holder.from_this_process()
        if (self.host, self.namespace) != (this_process.host, this_process.namespace):
            return age > STALE_S
        if self.started and this_process.started:
            return _process_start(self.pid) != self.started
        try:
            os.kill(self.pid, 0)  # signal 0 only checks
        except OSError as error:  # of permission, if the process is another user's
            return isinstance(error, ProcessLookupError)
        return False


def _process_start(pid: int) -> str:
    """Return when a process of this host started, as the id of the boot and clock ticks since; '' if it is gone or unknown."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state != "Z":  # a zombie has ended
            return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {fields[START_TIME_FIELD]}"
    return ""


_previous_holders: set[Holder] = set()
"""Holders that this process has taken a lock from: it may take the others that they hold, of folders within the first."""


@contextmanager
def folder_lock(folder: Path, take_over: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, FOLDER/.lock, until the context ends.

    Args:
        folder: it exists.
        take_over: take the lock from another process even if that is not known to be gone; it ends when it notices, within a minute.

    Raises:
        MapetError: another process holds it.
        OSError: the file cannot be written.
    """
    path, content = folder / LOCK_FILE, json.dumps(Holder.from_this_process()).encode()
    while not _try_create(path, content):
        _remove_if_stale(path, take_over)
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, content, stop), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):
            if path.read_bytes() == content:
                path.unlink()


def _try_create(path: Path, content: bytes) -> bool:
    """Create a lock file with its content; return False if there is one."""
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, LOCK_MODE), "wb") as file:
            file.write(content)
    except FileExistsError:
        return False
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


@contextmanager
def _exclusive_access(folder: Path) -> Iterator[None]:
    """Exclude other processes and threads in this context, by flock of the folder; on file systems without it they are not excluded."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_if_stale(path: Path, take_over: bool) -> None:
    """Remove a lock file whose holder is gone, or any if `take_over`; return, too, if it is gone by itself or not written yet.

    Args:
        path: of the lock file.
        take_over: see `folder_lock`.

    Raises:
        MapetError: another process holds the lock.
    """
    with _exclusive_access(
        path.parent
    ):  # so that what is removed is what was read, not the new lock of a faster process
        try:
            content, age = path.read_bytes(), time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return
        try:
            holder = Holder(*json.loads(content))
        except (ValueError, TypeError):
            if not take_over and age < UNREADABLE_S:
                return time.sleep(RETRY_S)
        else:
            if not (take_over or holder in _previous_holders or holder.is_gone(age)):
                who = f"process {holder.pid} on {holder.host}, which renewed its lock {age:.0f} s ago"
                raise MapetError(
                    f"{path.parent} is in use by {who}. Wait for it or end it; if it is gone, give {option('take_over', True)}, or delete {path}",
                    field="out", value=path.parent,
                )  # fmt: skip
            if take_over:
                _previous_holders.add(holder)
        path.unlink(missing_ok=True)


def _renew(path: Path, content: bytes, stop: threading.Event) -> None:
    """Renew a lock file each minute until `stop` is set; end this process if another one has taken the lock over."""
    while not stop.wait(RENEW_S):
        with suppress(OSError):  # while the folder is replaced, or a network file system is away
            if path.read_bytes() != content:
                log.error("another process has taken over %s: this one ends, what it has saved is intact", path.parent)
                os._exit(1)
            os.utime(path)
