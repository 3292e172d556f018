"""A run's folder: resolved config, log, metrics, TensorBoard, checkpoints; trackers that its metrics go to as well.

Trackers (Weights & Biases, MLflow, Trackio) are sent `metrics.jsonl`, by a thread for each: training waits for none of them, and
what one has missed, because it was slow or the run was killed or it was not asked for until now, is sent when the run goes on.
"""

import importlib.util
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from importlib.metadata import version
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
from mapet.run_state import CONFIG_FILE, PACKAGES, parent_run, pretrain_folder, record
from mapet.training.checkpoint import checkpoints

log = logging.getLogger("mapet")
C = TypeVar("C", bound=TrainerConfig)
MUTABLE_ON_RESUME = frozenset(
    {"resume", "device", "checkpoint_interval_min", "log_interval", "out", "images", "micro_batch_size"}
    | {"max_rollbacks", "fsdp", "track", "max_unreadable"}
)
"""Options that can't change what is learned, so they may differ on resuming."""
PATH_OPTIONS = frozenset({"out", "images", "tokenizer", "tokens"})
"""Of those, where things are, which may have moved; the checkpoint knows their hashes. It has the tokenizer and tokens if the run began
with them."""
NOTHING_TO_RESUME = "nothing to resume in %s: a new run begins there"
"""A job that may be sent anew at any moment has one command."""
PROJECT = "mapet"
PATIENCE = 60.0
"""Seconds that the end of a run waits for trackers to take what is left."""
Metrics = dict[str, float]


class RunFolder:
    """Creates or reopens the folder and writes to its logs; a context manager.

    config.yaml  train.log  metrics.jsonl  tensorboard/  checkpoints/step-*/  backbone/  tracking/
    """

    @classmethod
    def open(cls, config: TrainerConfig, compute: ComputeContext) -> "RunFolder | None":
        """Return the folder of a run that has one, in the first process, which alone writes to it."""
        return cls(config.out, config, compute) if config.out and distributed.rank() == 0 else None

    def __init__(self, path: Path, config: TrainerConfig, compute: ComputeContext) -> None:
        self.path, recipe, fixed = path, path / "config.yaml", frozenset(type(config).model_fields) - PATH_OPTIONS
        if not config.resume:
            create_output_dir(path)
        if not config.resume or diff_configs(build_config(type(config), read_config(recipe)), config, fixed):
            write_config(config, recipe)  # of a new run, or it, or what it is made of, has moved
        for left in (path / "checkpoints").glob(".*.tmp"):  # of a process that was killed as it wrote
            shutil.rmtree(left, ignore_errors=True)
        record(path, config=config, device=str(compute))
        self._handler = _LogFile(path / "train.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._handler)
        versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        system = f"{versions}, Python {platform.python_version()}, {platform.platform()}, {pluralize(torch.get_num_threads(), 'thread')}"
        begun = f"{'resumed' if config.resume else 'started'} with\n{to_yaml(config)}"
        self._log_file_only(f"{begun}system: {compute}; {system}; {shlex.join(sys.argv)}")
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: Any = None
        self._tracking = Tracking(path, config.track, config.model_dump(mode="json"))

    def __enter__(self) -> "RunFolder":
        # TensorBoard and trackers write from threads of their own; that they can't is no reason to stop, nor for a traceback.
        text = "TensorBoard's files, or a tracker's, are not complete: %s"
        self._hook, threading.excepthook = threading.excepthook, lambda failure: log.warning(text, failure.exc_value)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        threading.excepthook = self._hook
        if error is not None:
            self._log_file_only(f"stopped: {type(error).__name__}: {error}")
        self._tracking.close(failed=error is not None)
        log.removeHandler(self._handler)
        for file in (self._handler, self._metrics, self._board):
            if file:
                file.close()

    def _log_file_only(self, text: str) -> None:
        self._handler.emit(logging.LogRecord("mapet", logging.INFO, "", 0, text, None, None))

    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics after `step`: the run goes on from there."""
        self._metrics.close()
        path = self.path / "metrics.jsonl"
        lines = re.finditer(
            r'{"step": (\d+)\b.*}\n', path.read_text(encoding="utf-8")
        )  # a crash may cut the last one short
        write_text(path, "".join(line[0] for line in lines if int(line[1]) <= step))
        self._metrics = path.open("a", encoding="utf-8")

    def log_metrics(self, step: int, metrics: Metrics) -> None:
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


def resolve_resume_config(config: C, stage: str, may_change: frozenset[str] = MUTABLE_ON_RESUME) -> C:
    """The recipe a run was started with, its automatic values resolved then, and now's choices that can't matter.

    Where there is nothing yet, the run starts: a job that may be sent anew at any moment has one command.

    Raises:
        MapetError: there is something else, or an option that is given now differs from the run's.
    """
    assert config.out is not None
    run, path = config.out, config.out / "config.yaml"
    if is_empty_dir(run):
        log.warning(NOTHING_TO_RESUME, run)
        return config.model_copy(update={"resume": False})
    if not path.is_file():
        raise MapetError(
            f"nothing to resume in {run}: it has no config.yaml. Leave out {option('resume', True)} to start"
        )
    old = build_config(type(config), read_config(path), path)
    automatic = {name for name, value in config if value is None}
    moved = {name for name in PATH_OPTIONS - automatic if getattr(old, name, None) is not None}
    if changed := diff_configs(old, config, may_change | automatic | moved):
        restart = restart_hint(run) if stage == "pretrain" else f"with new options: a new {option('out')}"
        raise MapetError(
            f"{run} was started with another recipe ({'; '.join(changed)}). To go on as it was: "
            f"{command_to_resume(run, stage)}; to start {restart}"
        )
    return old.model_copy(update={name: value for name, value in config if name in may_change | moved})


def restart_hint(run: Path) -> str:
    """How to start with new options where there may be weights to start from."""
    folder, new_out = pretrain_folder(run), f"a new {option('out')}"
    if (folder / "backbone").is_dir():
        return f"from its weights with new options: {option('init_from', str(run))}, and {new_out}"
    if checkpoints(folder / "checkpoints"):
        export = shell_command("export", "--backbone", run, "--out", "NEW")
        return f"from its weights with new options: `{export}`, {option('init_from', 'NEW')}, and {new_out}"
    return f"with new options: {new_out}"


def command_to_resume(folder: Path, stage: str) -> str:
    """What a person types to go on with an interrupted run."""
    outer = parent_run(folder)
    command, folder = ("run", outer) if outer else (stage, folder)
    return shell_command(command, folder / CONFIG_FILE, "--resume")


# ---- trackers


class Session(NamedTuple):
    """A tracker that was reached.

    Attributes:
        run_id: what the tracker knows the run by.
        where: a person finds it there.
        send: takes (metrics, step=).
        finish: takes whether the run failed.
    """

    run_id: str
    where: str
    send: Callable[..., Any]
    finish: Callable[[bool], Any]


class Tracking:
    """Sends a run's `metrics.jsonl` to trackers. What goes wrong with one is a warning, and the others go on."""

    def __init__(self, run: Path, trackers: Iterable[str], config: dict[str, Any]) -> None:
        self._senders = [_Sender(tracker, run, config) for tracker in dict.fromkeys(trackers)]

    def tell(self) -> None:
        """There is a new line."""
        for sender in self._senders:
            sender.tell()

    def close(self, failed: bool) -> None:
        """There will be none; waits for what is left, but not for long."""
        for sender in self._senders:
            sender.tell(failed)
        until = time.monotonic() + PATIENCE
        for sender in self._senders:
            sender.join(max(0.0, until - time.monotonic()))
            if sender.is_alive():
                rest = f"{option('resume', True)} sends the rest"
                log.warning("%s has not taken all figures in %.0f s: %s", sender.name, PATIENCE, rest)


class _Sender(threading.Thread):
    """One tracker's thread; `tracking/NAME.json` in the run's folder says how far it is."""

    def __init__(self, tracker: str, run: Path, config: dict[str, Any]) -> None:
        super().__init__(name=tracker, daemon=True)
        self._run, self._config, self._state_file = run, config, run / "tracking" / f"{tracker}.json"
        self._news: SimpleQueue[bool | None] = SimpleQueue()

    def tell(self, failed: bool | None = None) -> None:
        """There is a new line, or the run has ended."""
        self._news.put(failed)
        if self.ident is None:
            self.start()  # not before: a resumed run's file is rewound first

    def run(self) -> None:
        try:
            state: dict[str, Any] = {"id": None, "sent": [-1, 0]}
            if self._state_file.exists():
                state = read_json(self._state_file, "tracker's state")
            session = TRACKERS[self.name](self._run, state["id"], self._config)
            state["id"] = session.run_id
            write_json(self._state_file, state)
            log.info("%s: %s", self.name, session.where)
            with (self._run / "metrics.jsonl").open(encoding="utf-8") as file:
                self._send(file, session, state)
        except BaseException as error:  # whatever a tracker's library comes up with, also SystemExit
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rest = f"Training goes on; they are all in metrics.jsonl, and {option('resume', True)} sends them"
            log.warning("%s gets no more figures: %s. %s", self.name, reason, rest)

    def _send(self, file: IO[str], session: Session, state: dict[str, Any]) -> None:
        """Send each line as it comes, but those that the tracker has, until the run has ended.

        A run that goes on writes the same lines again from its checkpoint, so they are known by [step, number among those of
        this step].
        """
        number, text, failed = [-1, 0], "", None
        while failed is None:
            failed = self._news.get()  # before the file is read: its last line is in it
            for part in file:
                text += part
                if not text.endswith("\n"):  # it is being written
                    continue
                metrics, text = json.loads(text), ""
                step = metrics.pop("step")
                number = [step, number[1] + 1 if step == number[0] else 0]
                if number > state["sent"]:
                    session.send({name: math.nan if v is None else v for name, v in metrics.items()}, step=step)
                    state["sent"] = number
                    write_json(self._state_file, state)
        session.finish(failed)


def require(trackers: Iterable[str]) -> None:
    """Raises MapetError: a tracker's library is not installed."""
    for tracker in trackers:
        if not _is_installed(tracker):
            raise MapetError(f"{option('track')} {tracker} needs the library {tracker}: {install_hint('track')}")


def _is_installed(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None  # a folder of that name has none; wandb leaves one


def _name(run: Path) -> str:
    """The last two parts of a run's folder: of `mapet run` and `study` the last is always 'pretrain'."""
    return "-".join(run.resolve().parts[-2:])


def _wandb(run: Path, run_id: str | None, config: dict[str, Any]) -> Session:
    import wandb

    (run / "tracking").mkdir(exist_ok=True)
    # silent: it asks for no password either; console: it would take the output of the whole program.
    settings = wandb.Settings(silent=True, console="off", init_timeout=PATIENCE, finish_timeout=PATIENCE)
    wandb.setup(settings)
    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=os.environ.get("WANDB_NAME", _name(run)),
        dir=os.environ.get("WANDB_DIR", run / "tracking"), id=run_id or uuid.uuid4().hex[:12], resume="allow",
        config=config, allow_val_change=True, settings=settings,
    )  # fmt: skip
    where = f"offline; wandb sync {Path(session.dir).parent}" if session.offline else session.url or ""
    return Session(session.id, where, session.log, lambda failed: session.finish(int(failed)))


def _mlflow(run: Path, run_id: str | None, config: dict[str, Any]) -> Session:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient()  # no fluent API: its active run is the program's
    if run_id is None:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else client.create_experiment(project)
        run_id = str(client.create_run(number, run_name=_name(run)).info.run_id)
        client.log_batch(run_id, params=[Param(name, str(value)[:6000]) for name, value in config.items()])
    else:
        client.update_run(run_id, status="RUNNING")

    def send(metrics: Metrics, step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, [Metric(name, value, now, step) for name, value in metrics.items()])

    end = {True: "FAILED", False: "FINISHED"}
    where = f"run {run_id} in {client.tracking_uri}"
    return Session(run_id, where, send, lambda failed: client.set_terminated(run_id, end[failed]))


def _trackio(run: Path, run_id: str | None, config: dict[str, Any]) -> Session:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run_id = run_id or f"{_name(run)}-{uuid.uuid4().hex[:6]}"  # it knows runs by their names
    session = trackio.init(project=project, name=run_id, config=config, resume="allow", embed=False)
    where = f"run {run_id}; trackio show --project {project}"
    return Session(run_id, where, session.log, lambda failed: session.finish())


TRACKERS = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
