"""A run's folder: resolved config, log, metrics, TensorBoard, checkpoints; trackers that its metrics are sent to.

Trackers (Weights & Biases, MLflow, Trackio) are sent `metrics.jsonl`, by a thread for each, so that training never waits for them.
Rows that a tracker has not received, because it was slow, the run was killed or it was only added on resuming, are sent when the
run is resumed.
"""

import importlib.util
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, NamedTuple, TypeVar

import torch

from mapet import distributed
from mapet.config.base import build_config, diff_configs, read_config, to_yaml, write_config
from mapet.config.shared import TrainerConfig
from mapet.device import ComputeContext
from mapet.errors import MapetError, install_hint, option, pluralize, shell_command
from mapet.files import create_output_dir, is_empty_dir, read_json, write_json, write_text
from mapet.run_state import CONFIG_FILE, package_versions, parent_run, pretrain_folder, record
from mapet.training.checkpoint import checkpoints

log = logging.getLogger("mapet")
C = TypeVar("C", bound=TrainerConfig)
MUTABLE_ON_RESUME = frozenset(
    {"resume", "device", "checkpoint_interval_min", "log_interval", "out", "images", "micro_batch_size"}
    | {"max_rollbacks", "fsdp", "track", "max_unreadable"}
)
"""Options that may differ on resuming, because they do not change what is learned."""
PATH_OPTIONS = frozenset({"out", "images", "tokenizer", "tokens"})
"""Options that name inputs and outputs, which may have moved before a run is resumed; checkpoints have the hashes of the inputs.
`tokenizer` and `tokens` may differ only if the run was started with them."""
STARTING_NEW_RUN = "no checkpoint in %s: starting a new run"
"""Log message of `resume` where there is nothing yet: a job that a scheduler restarts always has the same command."""
PROJECT = "mapet"
"""Default name of the project or experiment at a tracker."""
TRACKER_TIMEOUT_S = 60.0
"""How long the end of a run waits for trackers to receive the remaining rows; also wandb's own timeouts."""


class RunFolder:
    """Creates or reopens a run's folder and writes its logs; a context manager.

    config.yaml  train.log  metrics.jsonl  tensorboard/  checkpoints/step-*/  backbone/  tracking/
    """

    @classmethod
    def open(cls, config: TrainerConfig, compute: ComputeContext) -> "RunFolder | None":
        """Return the folder of a run with the option `out` on rank 0, which alone writes to it; otherwise None."""
        return cls(config.out, config, compute) if config.out and distributed.rank() == 0 else None

    def __init__(self, path: Path, config: TrainerConfig, compute: ComputeContext) -> None:
        """Create the folder, or reopen it if `resume` is set; write config.yaml and the start of train.log."""
        self.path, config_file = path, path / CONFIG_FILE
        not_paths = frozenset(type(config).model_fields) - PATH_OPTIONS
        if not config.resume:
            create_output_dir(path)
        if not config.resume or diff_configs(build_config(type(config), read_config(config_file)), config, not_paths):
            write_config(config, config_file)
        for leftover in (path / "checkpoints").glob(".*.tmp"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        record(path, config=config, device=str(compute))
        self._handler = _LogFile(path / "train.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._handler)
        versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
        system = f"{compute}; {versions}; {pluralize(torch.get_num_threads(), 'thread')}; {shlex.join(sys.argv)}"
        start = f"{'resumed' if config.resume else 'started'} with\n{to_yaml(config)}"
        self._log_to_file(f"{start}system: {system}")
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard: Any = None  # a SummaryWriter from the first metrics on
        options = config.model_dump(mode="json")
        self._trackers = [Tracker(name, path, options) for name in dict.fromkeys(config.track)]

    def __enter__(self) -> "RunFolder":
        """Let errors in the threads of TensorBoard's writer and of trackers be warnings: training continues without them."""
        text = "TensorBoard's files, or a tracker's, are incomplete: %s. All metrics are in metrics.jsonl"
        self._hook, threading.excepthook = threading.excepthook, lambda failure: log.warning(text, failure.exc_value)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Log the error, if there is one, and close all files."""
        threading.excepthook = self._hook
        if error is not None:
            self._log_to_file(f"stopped: {type(error).__name__}: {error}")
        finish_trackers(self._trackers, failed=error is not None)
        log.removeHandler(self._handler)
        for file in (self._handler, self._metrics, self._tensorboard):
            if file:
                file.close()

    def _log_to_file(self, text: str) -> None:
        """Write a line to train.log that the console does not get."""
        self._handler.emit(logging.LogRecord("mapet", logging.INFO, "", 0, text, None, None))

    def truncate_metrics(self, step: int) -> None:
        """Remove from metrics.jsonl the rows after `step`, from where the run is resumed, and a row that a crash has cut off."""
        self._metrics.close()
        path = self.path / "metrics.jsonl"
        rows = re.finditer(r'{"step": (\d+)\b.*}\n', path.read_text(encoding="utf-8"))
        write_text(path, "".join(row[0] for row in rows if int(row[1]) <= step))
        self._metrics = path.open("a", encoding="utf-8")

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics after a step to metrics.jsonl (null for NaN and Inf), TensorBoard and the trackers."""
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, **row}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.notify()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a line that can't be written (disk full) instead of printing a traceback: the console has it too."""


def resolve_resume_config(config: C, command: str, mutable: frozenset[str] = MUTABLE_ON_RESUME) -> C:
    """Return the config that the run in `config.out` was started with, updated by present options that may differ.

    Options that are None now keep the run's values. If the folder is empty or missing, return `config` without `resume`: a new
    run starts there.

    Args:
        command: that resumes the run, for error messages.
        mutable: options that may differ.

    Raises:
        MapetError: the folder holds something else, or another option differs from the run's.
    """
    assert config.out is not None
    run, path = config.out, config.out / CONFIG_FILE
    if is_empty_dir(run):
        log.warning(STARTING_NEW_RUN, run)
        return config.model_copy(update={"resume": False})
    if not path.is_file():
        raise MapetError(
            f"nothing to resume in {run}: it has no {CONFIG_FILE}. Omit {option('resume', True)} to start a new run"
        )
    old = build_config(type(config), read_config(path), path)
    not_given = {name for name, value in config if value is None}
    moved = {name for name in PATH_OPTIONS - not_given if getattr(old, name, None) is not None}
    if changed := diff_configs(old, config, mutable | not_given | moved):
        hint = restart_hint(run) if command == "pretrain" else f"with new options: a new {option('out')}"
        raise MapetError(
            f"{run} was started with another config ({'; '.join(changed)}). To resume it as it was: "
            f"{command_to_resume(run, command)}; to start {hint}"
        )
    return old.model_copy(update={name: value for name, value in config if name in mutable | moved})


def restart_hint(run: Path) -> str:
    """Return how to start a new run with other options, from this run's weights if it has any; continues 'to start'."""
    folder, new_out = pretrain_folder(run), f"a new {option('out')}"
    if (folder / "backbone").is_dir():
        return f"from its weights with new options: {option('init_from', str(run))}, and {new_out}"
    if checkpoints(folder / "checkpoints"):
        export = shell_command("export", "--backbone", run, "--out", "NEW")
        return f"from its weights with new options: `{export}`, {option('init_from', 'NEW')}, and {new_out}"
    return f"with new options: {new_out}"


def command_to_resume(folder: Path, command: str) -> str:
    """Return the shell command that resumes what `command` wrote to a folder, or the `mapet run` that the folder is part of."""
    if parent := parent_run(folder):
        command, folder = "run", parent
    return shell_command(command, folder / CONFIG_FILE, "--resume")


# ---- trackers


class TrackerRun(NamedTuple):
    """A run that was created or reopened at a tracker.

    Attributes:
        run_id: by which the tracker finds it again.
        location: URL or command that shows it to the user.
        log: takes metrics by name (NaN where metrics.jsonl has null), and the step as keyword `step`.
        finish: takes whether the run failed.
    """

    run_id: str
    location: str
    log: Callable[..., Any]
    finish: Callable[[bool], Any]


class Tracker(threading.Thread):
    """Sends the rows of a run's `metrics.jsonl` to one tracker; an error of it is a warning.

    `tracking/NAME.json` in the run's folder has the run's id at the tracker and the last row sent. Rows are numbered by
    [step, index among the rows of this step]: a resumed run writes rows again that were sent before.

    Args:
        name: a key of `TRACKERS`.
        run: the run's folder.
        config: the run's options, JSON.
    """

    def __init__(self, name: str, run: Path, config: dict[str, Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._run_folder, self._config, self._state_file = run, config, run / "tracking" / f"{name}.json"
        self._events: SimpleQueue[bool | None] = SimpleQueue()

    def notify(self, failed: bool | None = None) -> None:
        """Tell the thread that there is a new row (None), or that the run has ended and whether it failed.

        The first call starts the thread: by then a resumed run has truncated its metrics.
        """
        self._events.put(failed)
        if self.ident is None:
            self.start()

    def run(self) -> None:
        """Open the run at the tracker and send rows until the run ends; log a warning if that fails."""
        try:
            state: dict[str, Any] = {"id": None, "sent": [-1, 0]}
            if self._state_file.exists():
                state = read_json(self._state_file, "tracker's state")
            tracker_run = TRACKERS[self.name](self._run_folder, state["id"], self._config)
            state["id"] = tracker_run.run_id
            write_json(self._state_file, state)
            log.info("%s: %s", self.name, tracker_run.location)
            with (self._run_folder / "metrics.jsonl").open(encoding="utf-8") as file:
                self._send_rows(file, tracker_run, state)
        except BaseException as error:  # libraries of trackers raise anything, also SystemExit
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = (
                f"%s receives no more metrics: %s. They are in metrics.jsonl, and {option('resume', True)} sends them"
            )
            log.warning(text, self.name, reason)

    def _send_rows(self, file: IO[str], tracker_run: TrackerRun, state: dict[str, Any]) -> None:
        """Send the rows after `state["sent"]` as they are written, and keep that up to date, until the run has ended."""
        number, line, failed = [-1, 0], "", None
        while failed is None:
            failed = self._events.get()  # before reading: the last row of an ended run is in the file by now
            for part in file:
                line += part
                if not line.endswith("\n"):  # it is still being written
                    continue
                metrics, line = json.loads(line), ""
                step = metrics.pop("step")
                number = [step, number[1] + 1 if step == number[0] else 0]
                if number > state["sent"]:
                    tracker_run.log({k: math.nan if v is None else v for k, v in metrics.items()}, step=step)
                    state["sent"] = number
                    write_json(self._state_file, state)
        tracker_run.finish(failed)


def finish_trackers(trackers: Collection[Tracker], failed: bool) -> None:
    """Tell trackers that the run has ended, and wait up to `TRACKER_TIMEOUT_S` until they have sent all rows."""
    deadline = time.monotonic() + TRACKER_TIMEOUT_S
    for tracker in trackers:
        tracker.notify(failed)
    for tracker in trackers:
        tracker.join(max(0.0, deadline - time.monotonic()))
        if tracker.is_alive():
            text = f"%s did not receive all metrics within %.0f s: {option('resume', True)} sends the rest"
            log.warning(text, tracker.name, TRACKER_TIMEOUT_S)


def check_trackers_installed(trackers: Iterable[str]) -> None:
    """Raise MapetError if a tracker's library is not installed."""
    for tracker in trackers:
        if not _is_installed(tracker):
            problem = f"{option('track')} {tracker} needs the library {tracker}: {install_hint('track')}"
            raise MapetError(problem, field="track", value=tracker)


def _is_installed(module: str) -> bool:
    """Return whether a package can be imported; a mere folder of that name, which wandb leaves behind, has no origin."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _run_name(run: Path) -> str:
    """Join the last two parts of a run's folder: the last alone is 'pretrain' for every `mapet run` and `study`."""
    return "-".join(run.resolve().parts[-2:])


def _open_wandb(run: Path, run_id: str | None, config: dict[str, Any]) -> TrackerRun:
    """Create a run of Weights & Biases, or reopen the one with this id."""
    import wandb

    (run / "tracking").mkdir(exist_ok=True)
    # silent: without a login prompt; console="off": it would capture the output of the whole program
    timeouts = {"init_timeout": TRACKER_TIMEOUT_S, "finish_timeout": TRACKER_TIMEOUT_S}
    settings = wandb.Settings(silent=True, console="off", **timeouts)
    wandb.setup(settings)
    wandb_run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=os.environ.get("WANDB_NAME", _run_name(run)),
        dir=os.environ.get("WANDB_DIR", run / "tracking"), id=run_id, resume="allow", config=config, allow_val_change=True,
        settings=settings,
    )  # fmt: skip
    location = f"offline; wandb sync {Path(wandb_run.dir).parent}" if wandb_run.offline else wandb_run.url or ""
    return TrackerRun(wandb_run.id, location, wandb_run.log, lambda failed: wandb_run.finish(int(failed)))


def _open_mlflow(run: Path, run_id: str | None, config: dict[str, Any]) -> TrackerRun:
    """Create a run of MLflow, or reopen the one with this id; the program's own active run stays as it is."""
    import mlflow

    client = mlflow.MlflowClient()
    if run_id is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        run_id = client.create_run(experiment_id, run_name=_run_name(run)).info.run_id
        mlflow.log_params(config, run_id=run_id)
    client.update_run(run_id, status="RUNNING")

    status, location = {False: "FINISHED", True: "FAILED"}, f"run {run_id} in {client.tracking_uri}"
    send = partial(mlflow.log_metrics, run_id=run_id)
    return TrackerRun(run_id, location, send, lambda failed: client.set_terminated(run_id, status[failed]))


def _open_trackio(run: Path, run_id: str | None, config: dict[str, Any]) -> TrackerRun:
    """Create a run of Trackio, or reopen the one with this id, which is its name."""
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run_id = run_id or f"{_run_name(run)}-{uuid.uuid4().hex[:6]}"
    trackio_run = trackio.init(project=project, name=run_id, config=config, resume="allow", embed=False)
    location = f"run {run_id}; trackio show --project {project}"
    return TrackerRun(run_id, location, trackio_run.log, lambda failed: trackio_run.finish())


TRACKERS = {"wandb": _open_wandb, "mlflow": _open_mlflow, "trackio": _open_trackio}
