"""A pre-training run's folder: resolved recipe, log, metrics, TensorBoard, checkpoints, backbone."""

import json
import logging
import math
import platform
import shlex
import shutil
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import torchvision

from mapet import distributed
from mapet.config.base import build, differences, read_recipe, to_yaml, write_recipe
from mapet.config.shared import TrainerConfig
from mapet.device import Compute
from mapet.errors import Interrupted, MapetError, counted, option, shell_command
from mapet.files import atomic, is_free, new_folder
from mapet.run_state import CONFIG_FILE, parent_run, pretrain_folder, record
from mapet.training.checkpoint import checkpoints
from mapet.training.tracking import Tracking

log = logging.getLogger("mapet")
C = TypeVar("C", bound=TrainerConfig)
MUTABLE_ON_RESUME = frozenset(
    {"resume", "device", "workers", "checkpoint_interval_min", "keep_checkpoints", "log_interval", "out", "images"}
    | {"micro_batch_size", "max_skipped_steps", "max_rollbacks", "fsdp", "track", "max_unreadable"}
)
"""Options that can't change what is learned, so they may differ on resuming."""
PATH_OPTIONS = frozenset({"out", "images", "tokenizer", "tokens"})
"""Of those, where things are, which may have moved; the checkpoint knows their hashes. It has the tokenizer and tokens if the run began
with them."""


class RunFolder:
    """Creates or reopens the folder and writes to its logs; a context manager. Of several processes the first does.

    config.yaml  train.log  metrics.jsonl  tensorboard/  checkpoints/step-*/  backbone/  tracking/
    """

    def __init__(self, config: TrainerConfig, compute: Compute, stage: str = "pretrain") -> None:
        assert config.out is not None
        self.path: Path = config.out
        self.checkpoints = self.path / "checkpoints"
        self._open(config, compute, stage)

    @distributed.rank_zero_only
    def _open(self, config: TrainerConfig, compute: Compute, stage: str) -> None:
        if not config.resume:
            new_folder(self.path, resume_hint=f", or go on with {option('resume', True)}")
            write_recipe(config, self.path / "config.yaml")
        elif differences(
            build(type(config), read_recipe(self.path / "config.yaml")),
            config,
            frozenset(config.model_fields) - PATH_OPTIONS,
        ):
            write_recipe(config, self.path / "config.yaml")  # it, or what it is made of, has moved
        for left in self.checkpoints.glob(".*.tmp"):  # of a process that was killed as it wrote
            shutil.rmtree(left, ignore_errors=True)
        record(self.path, config=config, device=str(compute))
        self._handler = _LogFile(self.path / "train.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._handler)
        self._log_file_only(
            f"{'resumed' if config.resume else 'started'} with\n{to_yaml(config)}system: {system_information(compute)}"
        )
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: Any = None
        self._tracking = Tracking(self.path, config.track, config.model_dump(mode="json"))

    def __enter__(self) -> "RunFolder":
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        threading.excepthook = self._hook
        self._close(error)

    @distributed.rank_zero_only
    def _close(self, error: BaseException | None) -> None:
        if error is not None:
            self._log_file_only(f"stopped: {type(error).__name__}: {error}")
        self._tracking.close(failed=error is not None)
        log.removeHandler(self._handler)
        self._handler.close()
        self._metrics.close()
        if self._board:
            self._board.close()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard and trackers write from threads of their own; that they can't is no reason to stop, nor for a traceback.
        log.warning("TensorBoard's files, or a tracker's, are not complete: %s", failure.exc_value)

    def _log_file_only(self, text: str) -> None:
        self._handler.emit(logging.LogRecord("mapet", logging.INFO, "", 0, text, None, None))

    @distributed.rank_zero_only
    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics after `step`: the run goes on from there."""
        self._metrics.close()
        path = self.path / "metrics.jsonl"
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with atomic(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._metrics = path.open("a", encoding="utf-8")

    @distributed.rank_zero_only
    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl (null for what is not finite), and the same in TensorBoard and the trackers."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, **numbers}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._tracking.tell()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A log that can't be written (disk full) is no reason for a traceback: the console has the line too."""


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a crash


def resolve_resume_config(config: C, stage: str = "pretrain", may_change: frozenset[str] = MUTABLE_ON_RESUME) -> C:
    """The recipe a run was started with, its automatic values resolved then, and now's choices that can't matter.

    Where there is nothing yet, the run starts: a job that may be sent anew at any moment has one command.

    Raises:
        MapetError: there is something else, or an option that is given now differs from the run's.
    """
    assert config.out is not None
    path = config.out / "config.yaml"
    if is_free(path.parent):
        log.warning(NOTHING_TO_RESUME, path.parent)
        return config.model_copy(update={"resume": False})
    if not path.is_file():
        raise MapetError(
            f"nothing to resume in {path.parent}: it has no config.yaml. Leave out {option('resume', True)} to start"
        )
    old = build(type(config), read_recipe(path), path)
    automatic = {name for name, value in config if value is None}
    moved = {name for name in PATH_OPTIONS - automatic if getattr(old, name, None) is not None}
    changed = differences(old, config, may_change | automatic | moved)
    if changed:
        restart = restart_hint(path.parent) if stage == "pretrain" else f"with new options: a new {option('out')}"
        raise MapetError(
            f"{path.parent} was started with another recipe ({'; '.join(changed)}). To go on as it was: "
            f"{command_to_resume(path.parent, stage)}; to start {restart}"
        )
    return old.model_copy(update={name: value for name, value in config if name in may_change | moved})


NOTHING_TO_RESUME = "nothing to resume in %s: a new run begins there"
"""A job that may be sent anew at any moment has one command."""


def restart_hint(run: Path) -> str:
    """How to start with new options where there may be weights to start from."""
    folder, new_out = pretrain_folder(run), f"a new {option('out')}"
    if (folder / "backbone").is_dir():
        return f"from its weights with new options: {option('init_from', str(run))}, and {new_out}"
    if checkpoints(folder / "checkpoints"):
        export = shell_command("export", "--backbone", run, "--out", "NEW")
        return f"from its weights with new options: `{export}`, {option('init_from', 'NEW')}, and {new_out}"
    return f"with new options: {new_out}"


def command_to_resume(folder: Path, stage: str = "pretrain") -> str:
    """What a person types to go on with an interrupted run."""
    outer = parent_run(folder)
    command, folder = ("run", outer) if outer else (stage, folder)
    return shell_command(command, folder / CONFIG_FILE, "--resume")


def interrupted_error(by: str, step: int, total_steps: int, folder: Path, stage: str = "pretrain") -> Interrupted:
    """What is raised when a run has saved, for the signal `by`."""
    return Interrupted(f"stopped by {by} at step {step} of {total_steps}, saved", command_to_resume(folder, stage))


def system_information(compute: Compute) -> str:
    versions = f"mapet {version('mapet')}, torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    place = f"Python {platform.python_version()}, {platform.platform()}, {counted(torch.get_num_threads(), 'thread')}"
    return f"{compute}; {versions}, {place}; {shlex.join(sys.argv)}"
