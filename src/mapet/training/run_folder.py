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
from mapet.errors import MapetError, first_line, install_hint, option, pluralize, shell_command
from mapet.files import create_output_dir, is_empty_dir, read_json, write_json, write_text
from mapet.run_state import CONFIG_FILE, package_versions, parent_run, pretrain_folder, record
from mapet.training.checkpoint import checkpoints

log = logging.getLogger("mapet")
C = TypeVar("C", bound=TrainerConfig)
MUTABLE_ON_RESUME = frozenset(
    {"resume", "device", "checkpoint_interval_min", "log_interval", "out", "images", "micro_batch_size"}
    | {"max_rollbacks", "fsdp", "track", "max_unreadable", "limits", "trust_teacher"}
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
        """Create the folder, or reopen it if `config.resume` is set; write config.yaml, and open train.log and metrics.jsonl.

        Options and device are recorded in run.json, and they, the versions of packages and the command line in train.log. In a resumed run,
        train.log and metrics.jsonl are appended to, and config.yaml is written again if the path of an input or output has changed. The
        metrics after the checkpoint are removed by `truncate_metrics`, which the trainer calls. TensorBoard's writer and the threads of the
        trackers start with the first metrics.

        Args:
            path: of the run; must be empty or missing unless `config.resume`. With `config.resume` it has a config.yaml, which the caller
                has compared with `config` (`resolve_resume_config`).
            config: final options, with automatic values resolved; `track` names the trackers that the metrics are sent to.
            compute: device and precision, for run.json and train.log.

        Raises:
            MapetError: without `config.resume`, `path` is a file or a folder that is not empty.
            OSError: the folder or a file in it cannot be written.
        """
        self.path, config_file = path, path / CONFIG_FILE
        not_paths = frozenset(type(config).model_fields) - PATH_OPTIONS  # `diff_configs` ignores these
        if not config.resume:
            create_output_dir(path)
        # If other options alone differ (`device`, `log_interval`, ...), config.yaml stays as the run was started.
        if not config.resume or diff_configs(build_config(type(config), read_config(config_file)), config, not_paths):
            write_config(config, config_file)
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
        """Log an uncaught error of another thread, such as TensorBoard's writer, as a warning instead of a traceback."""
        text = "thread %s failed: %s. Training continues, and all metrics are in metrics.jsonl of the run's folder; TensorBoard may lack some"
        self._hook = threading.excepthook
        threading.excepthook = lambda failure: log.warning(
            text, failure.thread and failure.thread.name, failure.exc_value
        )
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Log the error that ends the run, if there is one, to train.log; wait for trackers to receive the last metrics; close all files.

        Args:
            kind, error, trace: see `object.__exit__`; they are None if the run has ended without an error. An error is raised further.
        """
        threading.excepthook = self._hook  # the one before `__enter__`
        if error is not None:
            self._log_to_file(f"stopped: {type(error).__name__}: {error}")
        finish_trackers(self._trackers, failed=error is not None)
        log.removeHandler(self._handler)
        for file in (self._handler, self._metrics, self._tensorboard):
            if file:
                file.close()

    def _log_to_file(self, text: str) -> None:
        """Write a text to train.log that the console does not get."""
        self._handler.emit(logging.LogRecord("mapet", logging.INFO, "", 0, text, None, None))

    def truncate_metrics(self, step: int) -> None:
        """Remove the rows after a step from metrics.jsonl, and an incomplete row that a crash has left.

        Args:
            step: number of steps that are done in the checkpoint that the run is resumed from; rows up to it are kept.
        """
        self._metrics.close()
        path = self.path / "metrics.jsonl"
        rows = re.finditer(r'{"step": (\d+)\b.*}\n', path.read_text(encoding="utf-8"))
        write_text(path, "".join(row[0] for row in rows if int(row[1]) <= step))
        self._metrics = path.open("a", encoding="utf-8")

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics to metrics.jsonl (as null if NaN or Inf) and TensorBoard, and notify the trackers, which read metrics.jsonl.

        Args:
            step: number of steps that are done.
            metrics: by name.
        """
        # In the first call. TensorBoard then ignores what an earlier process wrote from this step on.
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
    """Return the config with which a run resumes: that of OUT/config.yaml, updated by present options that may differ.

    Options that may differ are those of `mutable`, and `PATH_OPTIONS` that are set both now and in config.yaml, as inputs and
    outputs may have moved. Every other option must be None now, or as in config.yaml.

    Args:
        config: as the user gave it, with `resume` and `out` set.
        command: name of the command that resumes the run, e.g. 'pretrain', for error messages.
        mutable: names of options that may differ, and whose present values are taken, None included.

    Returns:
        The updated config. If the run's folder is empty or missing, `config` itself without `resume`: a new run starts there.

    Raises:
        MapetError: the folder has no config.yaml, or an option differs that may not.
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
    # They keep the run's values, which may be automatic ones.
    not_given = {name for name, value in config if value is None or value == "auto"}
    moved = {name for name in PATH_OPTIONS - not_given if getattr(old, name, None) is not None}
    if changed := diff_configs(old, config, mutable | not_given | moved):
        hint = restart_hint(run) if command == "pretrain" else f"with new options: a new {option('out')}"
        raise MapetError(
            f"{run} was started with another config ({'; '.join(changed)}). To resume it as it was: "
            f"{command_to_resume(run, command)}; to start {hint}"
        )
    return old.model_copy(update={name: value for name, value in config if name in mutable | moved})


def restart_hint(run: Path) -> str:
    """Return how to start a new run with other options, from this run's weights if it has any, for a message.

    Args:
        run: folder of a pre-training run, or of the `mapet run` that it is part of.

    Returns:
        The end of a sentence that begins 'to start', e.g. 'with new options: a new --out'.
    """
    folder, new_out = pretrain_folder(run), f"a new {option('out')}"
    if (folder / "backbone").is_dir():
        return f"from its weights with new options: {option('init_from', str(run))}, and {new_out}"
    if checkpoints(folder / "checkpoints"):
        export = shell_command("export", "--backbone", run, "--out", "NEW")
        return f"from its weights with new options: `{export}`, {option('init_from', 'NEW')}, and {new_out}"
    return f"with new options: {new_out}"


def command_to_resume(folder: Path, command: str) -> str:
    """Return the shell command that resumes a command.

    Args:
        folder: that the command writes to. If it is part of a `mapet run`, that is resumed instead.
        command: its name, e.g. 'pretrain'.
    """
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

    `tracking/NAME.json` in the run's folder has the run's id at the tracker and the number of the last row sent. A row's number is
    [step, index among the rows of this step]: a resumed run writes rows again that were sent before, with the same numbers.
    """

    def __init__(self, name: str, run: Path, config: dict[str, Any]) -> None:
        """Set up the thread; the first `notify` starts it.

        Args:
            name: a key of `TRACKERS`, e.g. 'wandb'.
            run: the run's folder.
            config: the run's options, JSON, which the tracker shows.
        """
        super().__init__(name=name, daemon=True)
        self._run_folder, self._config, self._state_file = run, config, run / "tracking" / f"{name}.json"
        self._events: SimpleQueue[bool | None] = SimpleQueue()  # the arguments of `notify`

    def notify(self, failed: bool | None = None) -> None:
        """Tell the thread that metrics.jsonl has a new row, or that the run has ended.

        The first call starts the thread, as a resumed run has removed rows from metrics.jsonl by then.

        Args:
            failed: None: there is a new row; else the run has ended, with an error (True) or without (False).
        """
        self._events.put(failed)
        if self.ident is None:
            self.start()

    def run(self) -> None:
        """Open the run at the tracker and send the rows of metrics.jsonl until the run ends; this is the thread's body.

        `state`, kept in tracking/NAME.json, has the run's `id` at the tracker (None: a new run is created there), and `sent`, the number
        [step, index among the rows of this step] of the last row that was sent. Any error ends the thread with a warning.
        """
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
            reason = first_line(error)
            text = f"%s receives no more metrics: %s. They are in metrics.jsonl; resuming the run with {option('resume', True)} sends the rest"
            log.warning(text, self.name, reason)

    def _send_rows(self, file: IO[str], tracker_run: TrackerRun, state: dict[str, Any]) -> None:
        """Send the rows of metrics.jsonl as they are written, until the run has ended, then finish the run at the tracker.

        Args:
            file: metrics.jsonl, from its start.
            tracker_run: where the rows are sent.
            state: see `run`. Rows up to the index `state["sent"]` are skipped; after each row sent it is updated and saved.
        """
        # `row_index`: [step, index among the rows of this step]; `line`: the row's text so far.
        row_index, line, failed = [-1, 0], "", None
        while failed is None:
            failed = self._events.get()  # before reading: the last row of an ended run is in the file by now
            for part in file:
                line += part
                if not line.endswith("\n"):  # it is still being written
                    continue
                metrics, line = json.loads(line), ""
                step = metrics.pop("step")
                row_index = [step, row_index[1] + 1 if step == row_index[0] else 0]
                if row_index > state["sent"]:
                    tracker_run.log({k: math.nan if v is None else v for k, v in metrics.items()}, step=step)
                    state["sent"] = row_index
                    write_json(self._state_file, state)
        tracker_run.finish(failed)


def finish_trackers(trackers: Collection[Tracker], failed: bool) -> None:
    """Tell trackers that the run has ended, and wait until they have sent all rows, `TRACKER_TIMEOUT_S` seconds at most in all.

    A tracker that takes longer gets a warning; its thread ends with the process.

    Args:
        trackers: of the run.
        failed: whether the run has ended with an error.
    """
    deadline = time.monotonic() + TRACKER_TIMEOUT_S
    for tracker in trackers:
        tracker.notify(failed)
    for tracker in trackers:
        tracker.join(max(0.0, deadline - time.monotonic()))
        if tracker.is_alive():
            text = f"%s did not receive all metrics within %.0f s: resuming the run with {option('resume', True)} sends the rest"
            log.warning(text, tracker.name, TRACKER_TIMEOUT_S)


def check_trackers_installed(trackers: Iterable[str]) -> None:
    """Check that the libraries of trackers are installed.

    Args:
        trackers: values of the option `track`: 'wandb', 'mlflow' or 'trackio', which are also the names of their libraries.

    Raises:
        MapetError: one is not installed; the message says how to install it.
    """
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
    """Create a run of Weights & Biases, or reopen it. Its environment variables WANDB_PROJECT, WANDB_NAME and WANDB_DIR are heeded.

    Args:
        run: the run's folder; wandb's own files go to its subfolder `tracking`.
        run_id: of the run at the tracker to reopen; None: a new one.
        config: the run's options, JSON.

    Raises:
        Exception: of any kind (no login, time-out, ...); `Tracker.run` turns it into a warning.
    """
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
    """Create a run of MLflow, or reopen it; the active run of the user's own program stays as it is.

    Args:
        run: the run's folder, which gives the run's name.
        run_id: of the run at the tracker to reopen; None: a new one, in the experiment that MLFLOW_EXPERIMENT_NAME names.
        config: the run's options, JSON, which become the parameters of a new run.
    """
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
    """Create a run of Trackio, or reopen it.

    Args:
        run: the run's folder, which gives the name of a new run.
        run_id: of the run at the tracker to reopen, which is its name; None: a new one with a random suffix.
        config: the run's options, JSON.
    """
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run_id = run_id or f"{_run_name(run)}-{uuid.uuid4().hex[:6]}"
    trackio_run = trackio.init(project=project, name=run_id, config=config, resume="allow", embed=False)
    location = f"run {run_id}; trackio show --project {project}"
    return TrackerRun(run_id, location, trackio_run.log, lambda failed: trackio_run.finish())


TRACKERS = {"wandb": _open_wandb, "mlflow": _open_mlflow, "trackio": _open_trackio}
