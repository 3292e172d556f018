"""run.json: what a command did to its folder, for people and programs.

The decorator of commands opens a `run_state` around every command whose config has an `out` folder, so that no command writes
run.json itself. Code below a command adds facts with `record(folder, ...)`, wherever in the package it is.
"""

import logging
import os
import platform
import socket
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from mapet.config.base import Config
from mapet.errors import Interrupted, MapetError, option
from mapet.files import RUN_FILE, check_format, create_output_dir, is_empty_dir, read_json, write_json

log = logging.getLogger("mapet")
SCHEMA_VERSION = 1
CONFIG_FILE = "config.yaml"
"""Resolved options, in folders that can be resumed: `mapet COMMAND OUT/config.yaml --resume`."""
PACKAGES = ("mapet", "torch", "torchvision", "timm")
MAX_WARNINGS = 12
"""Warnings that are kept, the last ones; `counts["warnings"]` has their number."""


def _now() -> datetime:
    return datetime.now(UTC)


def package_versions() -> dict[str, str]:
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {package: version(package) for package in PACKAGES} | system


class RunState(BaseModel):
    """Content of run.json.

    Attributes:
        command: as it is typed, 'fit-tokenizer'.
        config: the command's options as JSON; automatic values are resolved once the command has called `record`.
        argv: the words that started the process of the last session.
        started: of the first session, UTC.
        updated: of this file; seconds count up to it.
        ended: None while it runs.
        seconds: time at work, over all sessions.
        resumes: how often it was resumed.
        status: `interrupted`: its process is gone and said nothing (`read` finds out, the file says `running`).
        reason: why it stopped or failed, on one line; empty otherwise.
        description: the run in one line.
        device: what it computes on, in words.
        counts: whole numbers, e.g. images, steps, unreadable.
        hashes: sha256 of what it was made of, e.g. images, tokenizer.
        results: what came out of it, e.g. accuracy; JSON.
        warnings: the last `MAX_WARNINGS`.
    """

    schema_version: int = SCHEMA_VERSION
    command: str
    status: Literal["running", "finished", "stopped", "failed", "interrupted"] = "running"
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
            raise MapetError(f"{path}: not a readable run state ({' '.join(str(error).split())[:200]})") from None
        if state.status == "running" and not state._is_alive():
            state.status, state.reason = "interrupted", f"its process {state.pid} is gone"
        return state

    def _is_alive(self) -> bool:
        """Whether its process is there; taken to be where that can't be found out: on another host, on Windows."""
        try:
            if self.host == socket.gethostname() and os.name != "nt":
                os.kill(self.pid, 0)
        except OSError as error:
            return not isinstance(error, ProcessLookupError)  # else it is another user's
        return True

    def end(self, error: BaseException | None) -> None:
        """Set how the command ends: well, or by an error."""
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        self.status = "finished" if error is None else "stopped" if stopped else "failed"
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(getattr(error, "what", error or ""))
        named = error is None or stopped or isinstance(error, MapetError)
        self.reason = " ".join((text if named else f"{type(error).__name__}: {text}").split())
        self.ended = _now()

    def write(self, folder: Path) -> None:
        """Write run.json atomically; of several processes the first does."""
        now = _now()
        self.seconds = round(self.seconds + (now - self.updated).total_seconds(), 3)
        self.updated = now
        if is_first_rank():
            write_json(folder / RUN_FILE, self.model_dump(mode="json"))


def is_first_rank() -> bool:
    """Whether this is the first of several processes of `torchrun`, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


_active_states: dict[Path, RunState] = {}
"""Folders that commands of this process are writing now."""


def record(
    folder: Path | None,
    config: Config | None = None,
    description: str = "",
    device: str = "",
    **facts: Mapping[str, Any],
) -> None:
    """Add facts to the run.json of a folder that a command of this process is writing.

    Nothing happens outside a command: a function that is called by itself leaves no state.

    Args:
        facts: `counts`, `hashes` and `results`; others of the same name are replaced.
    """
    if folder is None or (state := _active_states.get(folder.absolute())) is None:
        return
    state.config = config.model_dump(mode="json") if config else state.config
    state.description, state.device = description or state.description, device or state.device
    for name, added in facts.items():
        getattr(state, name).update(added)
    state.write(folder)


@contextmanager
def run_state(folder: Path, command: str, config: Config) -> Iterator[None]:
    """Keep the run.json of a command's folder: `running` now, at the end `finished`, `stopped` or `failed` with the reason.

    A folder that holds something and is not to be resumed is refused, and stays as it is. A command that is resumed
    keeps the earlier facts; if it was finished and the command fails (other options, say), it stays finished. A command that
    fails and has written nothing leaves no folder; one that is interrupted leaves its run.json, with its options.
    """
    key, free, existed = folder.absolute(), can_start_in(folder, command), folder.exists()
    resumed = getattr(config, "resume", False)
    if key not in _active_states and not (free or resumed) and is_first_rank():
        hint = f", or go on with {option('resume', True)}" if "resume" in type(config).model_fields else ""
        create_output_dir(folder, hint, create=False)  # refuses it
    if key in _active_states or not (free or resumed):
        yield
        return
    state, before = RunState(command=command, config=config.model_dump(mode="json")), try_read_state(folder)
    if not free and before is not None and before.command == command:
        kept = before.model_dump(include={"started", "seconds", "counts", "hashes", "results", "description", "device"})
        state = state.model_copy(update={**kept, "resumes": before.resumes + 1})
    state.write(folder)
    _active_states[key] = state
    warnings = _Warnings(state)
    log.addHandler(warnings)
    try:
        yield
        state.end(None)
    except BaseException as error:
        refused = not free and before is not None and before.status == "finished" and isinstance(error, MapetError)
        state.end(None if refused else error)
        raise
    finally:
        log.removeHandler(warnings)
        del _active_states[key]
        if state.status != "failed" or not is_empty_dir(folder):
            state.write(folder)
        elif is_first_rank():
            (folder / RUN_FILE).unlink(missing_ok=True)
            if not existed and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def record_end(folder: Path, error: BaseException | None = None) -> None:
    """Say now how a command ends, for a report that it writes as its last act."""
    if state := _active_states.get(folder.absolute()):
        state.end(error)
        state.write(folder)


class _Warnings(logging.Handler):
    """Keeps what is logged as a warning in a state, which is written with its next facts."""

    def __init__(self, state: RunState) -> None:
        super().__init__(logging.WARNING)
        self.state = state

    def emit(self, record: logging.LogRecord) -> None:
        """Add one."""
        self.state.warnings = [*self.state.warnings, record.getMessage()][-MAX_WARNINGS:]
        self.state.counts["warnings"] = self.state.counts.get("warnings", 0) + 1


# ---- which folder is what


def try_read_state(folder: Path) -> RunState | None:
    """The state of a folder, None where it is missing, damaged or newer."""
    try:
        return RunState.read(folder)
    except MapetError:
        return None


def read_command(folder: Path) -> str:
    """The command that wrote a folder, '' if no readable run.json tells."""
    state = try_read_state(folder)
    return state.command if state else ""


def can_start_in(folder: Path, command: str) -> bool:
    """Whether `command` may begin in a folder: it holds nothing, or the options of one that failed before it made anything."""
    return is_empty_dir(folder) or (is_empty_dir(folder, but=CONFIG_FILE) and read_command(folder) == command)


def pretrain_folder(folder: Path) -> Path:
    """The folder of `mapet pretrain` in that of a `mapet run` or `mapet demo`, or the folder itself."""
    return folder / {"run": "pretrain", "demo": "run/pretrain"}.get(read_command(folder), "")


def parent_run(folder: Path) -> Path | None:
    """The folder of the `mapet run` that a command's folder is part of: the one to resume."""
    return folder.parent if read_command(folder.parent) == "run" else None


def find_config(folder: Path, commands: Collection[str]) -> tuple[str, Path] | None:
    """The first of `commands` that wrote a folder, or one in it, and the config.yaml that resumes it."""
    for path in (folder, pretrain_folder(folder)):
        if (command := read_command(path)) in commands and (path / CONFIG_FILE).is_file():
            return command, path / CONFIG_FILE
    return None


def check_is_pretraining(folder: Path) -> None:
    """Raises MapetError: it is no folder of `mapet run` or `mapet pretrain`, finished or not."""
    if not folder.exists():
        raise MapetError(f"{folder} does not exist: give the folder of a run")
    if (written_by := RunState.read(pretrain_folder(folder)).command) != "pretrain":
        raise MapetError(f"{folder} is a folder of `mapet {written_by}`: give one of `mapet run` or `mapet pretrain`")


def resolve_run_path(folder: Path, options: Mapping[str, Any], name: str) -> str | None:
    """The path that an option of a `pretrain` run names, as it is found from here.

    The tokenizer and tokens in the folder of its `run` move with it, and another run may lie where they were. Other paths are
    relative to where the run was started, which the folder tells while it has not moved.
    """
    if (named := options.get(name)) is None:
        return None
    own, out, here = folder.parent / name, Path(str(options.get("out", ""))), folder.resolve()
    if name in ("tokenizer", "tokens") and parent_run(folder) and own.exists():
        return str(own)
    if out.parts and not out.is_absolute() and here.parts[-len(out.parts) :] == out.parts:
        from_start = here.parents[len(out.parts) - 1] / str(named)
        if not Path(str(named)).exists() and from_start.exists():
            return str(from_start)
    return str(named)
