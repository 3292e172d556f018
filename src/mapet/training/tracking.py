"""Trackers that a run's figures go to as well: Weights & Biases, MLflow, Trackio.

`metrics.jsonl` is what they are sent, by a thread for each: training waits for none of them, and what one has missed,
because it was slow or the run was killed or it was not asked for until now, is sent when the run goes on.
"""

import importlib.util
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mapet.errors import MapetError, how_to_install, option
from mapet.files import read_json, write_json

log = logging.getLogger("mapet")
PROJECT = "mapet"
PATIENCE = 60.0
"""Seconds that the end of a run waits for trackers to take what is left."""
Figures = dict[str, float]


class Session(NamedTuple):
    """A tracker that was reached.

    Attributes:
        run_id: what the tracker knows the run by.
        where: a person finds it there.
        send: takes (figures, step).
        finish: takes whether the run failed.
    """

    run_id: str
    where: str
    send: Callable[[Figures, int], Any]
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
            sender.tell(end=True, failed=failed)
        until = time.monotonic() + PATIENCE
        for sender in self._senders:
            sender.join(max(0.0, until - time.monotonic()))
            if sender.is_alive():
                log.warning(
                    f"%s has not taken all figures in %.0f s: {option('resume', True)} sends the rest",
                    sender.name,
                    PATIENCE,
                )


class _Sender(threading.Thread):
    """One tracker's thread; `tracking/NAME.json` in the run's folder says how far it is."""

    def __init__(self, tracker: str, run: Path, config: dict[str, Any]) -> None:
        super().__init__(name=tracker, daemon=True)
        self._run, self._config = run, config
        self._kept = run / "tracking" / f"{tracker}.json"
        self._news, self._end, self._failed = threading.Event(), False, False

    def tell(self, end: bool = False, failed: bool = False) -> None:
        self._end, self._failed = end, failed
        self._news.set()
        if self.ident is None:
            self.start()  # not before: a resumed run's file is rewound first

    def run(self) -> None:
        try:
            state: dict[str, Any] = {"id": None, "sent": [-1, 0]}
            if self._kept.exists():
                state = read_json(self._kept, "tracker's state")
            session = TRACKERS[self.name](self._run, state["id"], self._config)
            state["id"] = session.run_id
            write_json(self._kept, state)
            log.info("%s: %s", self.name, session.where)
            lines = _lines(self._run / "metrics.jsonl")
            end = False
            while not end:
                self._news.wait()
                self._news.clear()
                end = self._end  # asked before the file is read: its last line is in it
                for number, figures in iter(lambda: next(lines), None):
                    if number > state["sent"]:
                        session.send(figures, number[0])
                        state["sent"] = number
                        write_json(self._kept, state)
            session.finish(self._failed)
        except BaseException as error:  # whatever a tracker's library comes up with, also SystemExit
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning(
                f"%s gets no more figures: %s. Training goes on; they are all in metrics.jsonl, and {option('resume', True)} sends them",
                self.name, reason,
            )  # fmt: skip


def _lines(path: Path) -> Iterator[tuple[list[int], Figures] | None]:
    """([step, number of the line among those of this step], figures) of each line as it comes; None where there is no more yet.

    A run that goes on writes the same lines again from its checkpoint, so they are known by this number.
    """
    last, count = -1, 0
    with path.open(encoding="utf-8") as file:
        while True:
            start = file.tell()
            line = file.readline()
            if not line.endswith("\n"):  # none, or one that is being written
                file.seek(start)
                yield None
                continue
            content = json.loads(line)
            step = content.pop("step")
            count = count + 1 if step == last else 0
            last = step
            yield [step, count], {name: float("nan") if value is None else value for name, value in content.items()}


def require(trackers: Iterable[str]) -> None:
    """Raises MapetError: a tracker's library is not installed."""
    for tracker in trackers:
        if not _is_installed(tracker):
            raise MapetError(f"{option('track')} {tracker} needs the library {tracker}: {how_to_install('track')}")


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
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=os.environ.get("WANDB_NAME", _name(run)),
        id=run_id or uuid.uuid4().hex[:12],
        resume="allow",
        dir=os.environ.get("WANDB_DIR", run / "tracking"),
        config=config,
        allow_val_change=True,
        settings=settings,
    )
    where = f"offline; wandb sync {Path(session.dir).parent}" if session.offline else session.url or ""
    return Session(
        session.id,
        where,
        lambda figures, step: session.log(figures, step=step),
        lambda failed: session.finish(int(failed)),
    )


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

    def send(figures: Figures, step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, [Metric(name, value, now, step) for name, value in figures.items()])

    def finish(failed: bool) -> None:
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    return Session(run_id, f"run {run_id} in {client.tracking_uri}", send, finish)


def _trackio(run: Path, run_id: str | None, config: dict[str, Any]) -> Session:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run_id = run_id or f"{_name(run)}-{uuid.uuid4().hex[:6]}"  # it knows runs by their names
    session = trackio.init(project=project, name=run_id, config=config, resume="allow", embed=False)
    where = f"run {run_id}; trackio show --project {project}"
    return Session(
        run_id, where, lambda figures, step: session.log(figures, step=step), lambda failed: session.finish()
    )


TRACKERS: dict[str, Callable[[Path, str | None, dict[str, Any]], Session]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
