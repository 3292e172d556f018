"""run.json: the state of a command and its folder, for readers and programs; and which folder belongs to which command.

The decorator of commands opens a `run_state` around every command whose config has an `out` folder, so that no command writes
run.json itself. Code below a command adds facts with `record(folder, ...)`, wherever in the package it is.
"""

import logging
import os
import platform
import socket
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from mapet.config.base import Config
from mapet.errors import Interrupted, MapetError, option, os_error_hint
from mapet.files import (
    RUN_FILE,
    check_format,
    check_output_path,
    create_output_dir,
    is_empty_dir,
    read_json,
    remove_temporaries,
    write_json,
)
from mapet.lock import folder_lock

log = logging.getLogger("mapet")
SCHEMA_VERSION = 1
CONFIG_FILE = "config.yaml"
"""Resolved options, in folders that can be resumed: `mapet COMMAND OUT/config.yaml --resume`."""
PACKAGES = ("mapet", "torch", "torchvision", "timm")
MAX_WARNINGS = 12
"""How many warnings are kept, the last ones; `counts["warnings"]` counts all."""


def _now() -> datetime:
    """Return the time, UTC."""
    return datetime.now(UTC)


def package_versions() -> dict[str, str]:
    """Return name -> version of `PACKAGES`, of 'python' and of the 'platform'."""
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {package: version(package) for package in PACKAGES} | system


class RunState(BaseModel):
    """Content of run.json. A session is one process; resuming starts another.

    Attributes:
        command: its name on the command line, e.g. 'fit-tokenizer'.
        status: `starting`: the process that will work here has not recorded itself yet (`RunState` is written for it by the process that
            starts it); `interrupted`: the process is gone without having written its end (`read` detects it; the file says `running`).
        reason: why it stopped or failed, on one line; empty otherwise.
        description: the run in one line.
        config: the command's options as JSON; automatic values are resolved once the command has called `record`.
        argv: command line of the last session's process.
        versions: package, 'python' or 'platform' -> version.
        device: name and precision of the device that it computes on.
        started: when the first session started, UTC.
        updated: when this file was written, UTC.
        ended: when the last session ended, UTC; None while it runs.
        seconds: duration of all sessions, up to `updated`.
        resumes: how often it was resumed.
        counts: whole numbers, e.g. images, steps, unreadable.
        hashes: sha256 of its inputs, e.g. images, tokenizer.
        results: its results, e.g. accuracy; JSON.
        warnings: the last `MAX_WARNINGS`.
    """

    schema_version: int = SCHEMA_VERSION
    command: str
    status: Literal["starting", "running", "finished", "stopped", "failed", "interrupted"] = "running"
    reason: str = ""
    description: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    argv: list[str] = Field(default_factory=lambda: list(sys.argv))
    versions: dict[str, str] = Field(default_factory=package_versions)
    device: str = ""
    started: datetime = Field(default_factory=_now)
    updated: datetime = Field(default_factory=_now)
    ended: datetime | None = None
    seconds: float = 0.0
    resumes: int = 0
    host: str = Field(default_factory=socket.gethostname)
    pid: int = Field(default_factory=os.getpid)
    counts: dict[str, int] = Field(default_factory=dict)
    hashes: dict[str, str] = Field(default_factory=dict)
    results: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        """Read the state of a command's folder.

        Raises:
            NewerFormatError: a newer mapet wrote it.
            MapetError: it is missing or damaged.
        """
        path = folder / RUN_FILE
        content = read_json(path, "folder of a mapet command")
        try:
            check_format(dict(content).get("schema_version"), SCHEMA_VERSION, "run state", path)
            state = cls.model_validate(content)
        except (ValueError, TypeError) as error:  # pydantic's is a ValueError
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            reason = ": ".join(map(str, (*first["loc"], first["msg"])))
            raise MapetError(
                f"{path}: damaged run state ({reason}): restore the file, or start in a new folder"
            ) from None
        if state.status == "running" and not state._is_alive():
            state.status, state.reason = "interrupted", f"its process {state.pid} is gone"
        return state

    def _is_alive(self) -> bool:
        """Return whether its process exists; True where that cannot be determined: on another host, on Windows."""
        try:
            if self.host == socket.gethostname() and os.name != "nt":
                os.kill(self.pid, 0)  # signal 0 only checks
        except OSError as error:  # of permission, if the process is another user's
            return not isinstance(error, ProcessLookupError)
        return True

    def end(self, error: BaseException | None) -> None:
        """Set `status`, `reason` and `ended`: finished without an error, stopped by a signal or Ctrl-C, failed by any other error.

        The reason is the error's message, after its type unless it is a `MapetError`.
        """
        self.status, reason = "failed", f"{type(error).__name__}: {error}"
        if error is None:
            self.status, reason = "finished", ""
        elif isinstance(error, KeyboardInterrupt):
            self.status, reason = "stopped", "interrupted"
        elif isinstance(error, Interrupted):
            self.status, reason = "stopped", error.what
        elif isinstance(error, MapetError):
            reason = str(error)
        self.reason = " ".join(reason.split())
        self.ended = _now()

    def write(self, folder: Path) -> None:
        """Write run.json atomically, on rank 0 only; `seconds` grow by the time since the last update."""
        now = _now()
        self.seconds = round(self.seconds + (now - self.updated).total_seconds(), 3)
        self.updated = now
        if is_first_rank():
            write_json(folder / RUN_FILE, self.model_dump(mode="json"))


def is_first_rank() -> bool:
    """Return whether this process is rank 0 of `torchrun`, or not started by it."""
    return int(os.environ.get("RANK", 0)) == 0


_active_states: dict[Path, RunState] = {}
"""Folder -> state, of the commands that are running in this process."""


def record(
    folder: Path | None, config: Config | None = None, description: str = "", device: str = "", **facts: Mapping[str, Any]
) -> None:  # fmt: skip
    """Add facts to the run.json of a folder, if a command of this process is writing it; else do nothing.

    Args:
        folder: of the command; None: nothing is recorded.
        config: the resolved config, which replaces the recorded one; None leaves it.
        description: the run in one line; '' leaves the recorded one.
        device: name and precision of the device; '' leaves the recorded one.
        facts: mappings of the names `counts`, `hashes` and `results`, which are merged into the recorded ones.
    """
    if folder is None or (state := _active_states.get(folder.absolute())) is None:
        return
    state.config = config.model_dump(mode="json") if config else state.config
    state.description, state.device = description or state.description, device or state.device
    for name, added in facts.items():
        getattr(state, name).update(added)
    state.write(folder)


def elapsed_seconds(folder: Path) -> float:
    """Return the seconds that the command which is running in a folder has taken so far, of all its sessions; 0 without one."""
    state = _active_states.get(folder.absolute())
    return 0.0 if state is None else state.seconds + (_now() - state.updated).total_seconds()


def _seconds_unrecorded(folder: Path, state: RunState) -> float:
    """Return for how long a process that was killed worked on after its last run.json: until the newest file in its folder."""
    newest = max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=0.0)
    return max(0.0, newest - state.updated.timestamp())


@contextmanager
def run_state(folder: Path, command: str, config: Config) -> Iterator[None]:
    """Keep the run.json of a command's folder: `running` now, at the end `finished`, `stopped` or `failed` with the reason.

    A resumed command keeps the earlier facts; if it had finished and now fails (other options, say), it stays finished. A command
    that fails and has written nothing leaves no folder; one that is interrupted leaves its run.json, with its options. Within
    another `run_state` of the same folder, and on ranks other than 0, nothing is done. Meanwhile the folder's lock is held.

    Args:
        folder: of the command; it need not exist.
        command: its name on the command line.
        config: its options; `resume` and `take_over` are used, if it has them.

    Yields:
        Nothing; facts are added by `record`.

    Raises:
        MapetError: the folder is not this command's (`_check_can_use`), cannot be written, or another process uses it; it stays as it is.
    """
    if folder.absolute() in _active_states or not is_first_rank():
        yield
        return
    check_output_path(folder)
    _check_can_use(folder, command, config)
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(folder, getattr(config, "take_over", False)))
            except OSError as error:
                hint = os_error_hint(error.errno)
                raise MapetError(
                    f"cannot write to {option('out')} {folder}: {error.strerror or error}{hint}",
                    field="out",
                    value=folder,
                ) from None
            _check_can_use(folder, command, config)  # again: another process may have written meanwhile
            remove_temporaries(folder)
            with _keep_run_file(folder, command, config):
                yield
    finally:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _check_can_use(folder: Path, command: str, config: Config) -> None:
    """Check that a folder is new, empty, or to be resumed and from an earlier call of this command.

    Raises:
        MapetError: it holds other files; or it is to be resumed, but its run.json is missing, damaged or of another command.
    """
    if can_start_in(folder, command):
        return
    if not getattr(config, "resume", False):
        hint = f", or resume with {option('resume', True)}" if "resume" in type(config).model_fields else ""
        create_output_dir(folder, hint, create=False)  # raises
    if not folder.is_dir() or not (folder / RUN_FILE).exists():
        create_output_dir(folder, f": it has no {RUN_FILE} of `mapet {command}`", create=False)  # raises
    if (written_by := RunState.read(folder).command) != command:
        raise MapetError(
            f"{folder} is a folder of `mapet {written_by}`, not of `mapet {command}`: choose another {option('out')}",
            field="out", value=folder,
        )  # fmt: skip


@contextmanager
def _keep_run_file(folder: Path, command: str, config: Config) -> Iterator[None]:
    """Keep run.json as `run_state` says, in a folder whose lock is held.

    Args:
        folder: of the command; it exists.
        command: its name on the command line.
        config: its options.

    Yields:
        Nothing.
    """
    key, can_start = folder.absolute(), can_start_in(folder, command)
    state, previous = RunState(command=command, config=config.model_dump(mode="json")), try_read_state(folder)
    was_finished = not can_start and previous is not None and previous.status == "finished"
    if not can_start and previous is not None and previous.command == command and previous.status != "starting":
        facts = {"started", "seconds", "counts", "hashes", "results", "description", "device"}
        state = state.model_copy(update={**previous.model_dump(include=facts), "resumes": previous.resumes + 1})
        if previous.status == "interrupted":
            state.seconds += _seconds_unrecorded(folder, previous)
    state.write(folder)
    _active_states[key] = state
    warnings = _WarningRecorder(state)
    log.addHandler(warnings)
    try:
        yield
        state.end(None)
    except BaseException as error:
        state.end(None if was_finished and isinstance(error, MapetError) else error)
        raise
    finally:
        log.removeHandler(warnings)
        del _active_states[key]
        if state.status != "failed" or not is_empty_dir(folder):
            state.write(folder)
        else:
            (folder / RUN_FILE).unlink(missing_ok=True)


def record_end(folder: Path, error: BaseException | None = None) -> None:
    """Record the end of a running command early, for a report that it writes before it returns or raises `error`."""
    if state := _active_states.get(folder.absolute()):
        state.end(error)
        state.write(folder)


class _WarningRecorder(logging.Handler):
    """Adds warnings that are logged to a state, which is written with its next facts."""

    def __init__(self, state: RunState) -> None:
        super().__init__(logging.WARNING)
        self.state = state

    def emit(self, record: logging.LogRecord) -> None:
        """Add a warning or error; only the last `MAX_WARNINGS` are kept."""
        self.state.warnings = [*self.state.warnings, record.getMessage()][-MAX_WARNINGS:]
        self.state.counts["warnings"] = self.state.counts.get("warnings", 0) + 1


# ---- which folder belongs to which command


def try_read_state(folder: Path) -> RunState | None:
    """Return the state of a folder, None if its run.json is missing, damaged or newer."""
    try:
        return RunState.read(folder)
    except MapetError:
        return None


def read_command(folder: Path) -> str:
    """Return the name of the command that wrote a folder, '' without a readable run.json."""
    state = try_read_state(folder)
    return state.command if state else ""


def can_start_in(folder: Path, command: str) -> bool:
    """Return whether `command` may start in a folder: it is missing or empty, or holds only what this command's failed start left."""
    return is_empty_dir(folder) or (is_empty_dir(folder, but=CONFIG_FILE) and read_command(folder) == command)


def pretrain_folder(folder: Path) -> Path:
    """Return the folder of `mapet pretrain` inside that of a `mapet run` or `mapet demo`; any other folder itself."""
    return folder / {"run": "pretrain", "demo": "run/pretrain"}.get(read_command(folder), "")


def parent_run(folder: Path) -> Path | None:
    """Return the folder of the `mapet run` that a command's folder is part of, which is the one to resume; None without one."""
    return folder.parent if read_command(folder.parent) == "run" else None


def find_config(folder: Path, commands: Collection[str]) -> tuple[str, Path] | None:
    """Find the config.yaml that resumes a folder or the pre-training run in it.

    Args:
        commands: commands that are looked for.

    Returns:
        The command that wrote it and its path; None if none of `commands` did.
    """
    for path in (folder, pretrain_folder(folder)):
        if (command := read_command(path)) in commands and (path / CONFIG_FILE).is_file():
            return command, path / CONFIG_FILE
    return None


def check_is_pretraining(folder: Path) -> None:
    """Check that a folder is one of `mapet pretrain`, or of a `mapet run` or `demo` whose pre-training has started; finished or not.

    Raises:
        MapetError: it does not exist, has no readable run.json, or is of another command.
    """
    if not folder.exists():
        raise MapetError(f"{folder} does not exist: give a folder of `mapet run` or `mapet pretrain`")
    if (written_by := RunState.read(pretrain_folder(folder)).command) != "pretrain":
        raise MapetError(f"{folder} is a folder of `mapet {written_by}`: give one of `mapet run` or `mapet pretrain`")


def resolve_run_path(folder: Path, options: Mapping[str, Any], name: str) -> str | None:
    """Return the path that an option of a pre-training run holds, changed so that it is valid in the present working directory.

    The tokenizer and tokens in the folder of its `mapet run` move with it, even if another run lies where they were. Other paths
    are relative to the directory that the run was started in, which `out` tells while the folder has not been moved.

    Args:
        folder: of the pre-training run.
        options: its config.yaml.
        name: the option, e.g. 'tokenizer'.

    Returns:
        The path as it is written if it exists or cannot be found; None if the option is not set.
    """
    if (value := options.get(name)) is None:
        return None
    moved_along = folder.parent / name
    if name in ("tokenizer", "tokens") and parent_run(folder) and moved_along.exists():
        return str(moved_along)
    out, run_folder = Path(str(options.get("out", ""))), folder.resolve()
    if out.parts and not out.is_absolute() and run_folder.parts[-len(out.parts) :] == out.parts:
        from_start = run_folder.parents[len(out.parts) - 1] / str(value)
        if not Path(str(value)).exists() and from_start.exists():
            return str(from_start)
    return str(value)
