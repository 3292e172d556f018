"""Trackers get what metrics.jsonl holds, each metric once, and can't stop or slow a run."""

import json
import logging
import math
import sqlite3
import threading
import time

import pytest

import mapet
from mapet import distributed
from mapet.errors import Interrupted
from mapet.training import run_folder as tracking
from mapet.training.run_folder import Tracker, TrackerRun, finish_trackers
from tests.commands.test_pipeline import StopAt
from tests.conftest import PRETRAIN
from tests.refused import fails, refused

ROWS = [{"step": 5, "loss": 2.5, "lr": 0.1}, {"step": 10, "loss": None}, {"step": 10, "probe/knn": 0.25}]


class Fake:
    """A tracker that records calls, and fails or waits at given steps."""

    def __init__(self, monkeypatch, name="wandb"):
        self.seen, self.configs, self.ids, self.ends = [], [], [], []
        self.fail_at: int | None = None
        self.may_go = threading.Event()
        self.may_go.set()
        monkeypatch.setitem(tracking.TRACKERS, name, self.start)
        monkeypatch.setattr(tracking, "_is_installed", lambda name: True)

    def start(self, run, run_id, config):
        self.may_go.wait(60)
        self.configs.append(config)
        self.ids.append(run_id)
        return TrackerRun(run_id or "new", "here", self.send, self.ends.append)

    def send(self, figures, step):
        if step == self.fail_at:
            raise ConnectionError("no network\nat all")
        self.seen.append({"step": step, **figures})


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def as_sent(rows):
    """Null is NaN there, which equals nothing: None in its place."""
    return [
        {name: None if value is None or math.isnan(value) else value for name, value in row.items()} for row in rows
    ]


def append(folder, rows):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def track(folder, rows=(), names=("wandb",), failed=False):
    trackers = [Tracker(name, folder, {"lr": 0.1, "model_args": {"depth": 2}}) for name in names]
    for row in rows:
        append(folder, [row])
        for tracker in trackers:
            tracker.notify()
    finish_trackers(trackers, failed)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "mapet")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_stopped_run_resumes_in_the_same_tracker_run(
    few_digits, tokenizer_dir, tokens_dir, tmp_path, monkeypatch, warnings
):
    fake = Fake(monkeypatch)
    options = {"images": few_digits, "tokenizer": tokenizer_dir, "tokens": tokens_dir, "out": tmp_path / "run"}
    options |= PRETRAIN | {"log_interval": 1, "track": ["wandb", "wandb"]}
    with monkeypatch.context() as patch:
        StopAt(patch, 4)
        with pytest.raises(Interrupted):
            mapet.pretrain(**options)
    assert [row["step"] for row in fake.seen] == [1, 2, 3, 4]
    mapet.pretrain(**options, resume=True)
    assert fake.seen == rows_of(options["out"]) and len(fake.seen) == 6
    assert fake.ids == [None, "new"] and fake.ends == [True, False]
    assert fake.configs[0]["epochs"] == 2 and fake.configs[0]["lr"] == 1e-3
    other = Fake(monkeypatch, "mlflow")
    mapet.pretrain(**options | {"track": ["mlflow"]}, resume=True)  # only this is left to send
    assert other.seen == fake.seen and len(fake.ids) == 2
    assert not warnings()


def test_after_a_kill_nothing_is_sent_twice_or_lost(monkeypatch, tmp_path):
    """The tracker was ahead of the checkpoint, or behind it."""
    fake = Fake(monkeypatch)
    track(tmp_path, ROWS)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")  # truncated to the checkpoint of step 5
    more = {"step": 15, "loss": 1.0}
    track(tmp_path, [*ROWS[1:], more])
    assert as_sent(fake.seen) == [*ROWS, more]
    append(tmp_path, [{"step": 20, "loss": 0.9}])  # killed before this was sent
    track(tmp_path, [{"step": 25, "loss": 0.8}])
    assert [row["step"] for row in fake.seen] == [5, 10, 10, 15, 20, 25]


def test_one_that_fails_is_one_warning(monkeypatch, tmp_path, warnings):
    fake, other = Fake(monkeypatch), Fake(monkeypatch, "mlflow")
    fake.fail_at = 10
    track(tmp_path, ROWS, ("wandb", "mlflow"))
    assert len(fake.seen) == 1 and as_sent(other.seen) == ROWS
    assert len(warnings()) == 1 and "wandb receives no more metrics: no network." in warnings()[0]
    fake.fail_at = None
    track(tmp_path)
    assert as_sent(fake.seen) == ROWS


def test_one_that_hangs_slows_nothing(monkeypatch, tmp_path, warnings):
    fake = Fake(monkeypatch)
    fake.may_go.clear()
    monkeypatch.setattr(tracking, "TRACKER_TIMEOUT_S", 0.2)
    started = time.monotonic()
    track(tmp_path, ROWS)
    assert time.monotonic() - started < 5
    fake.may_go.set()
    assert len(warnings()) == 1 and "wandb did not receive all metrics" in warnings()[0]


def test_the_first_process_alone_tracks(few_digits, tokenizer_dir, tokens_dir, tmp_path, monkeypatch):
    from mapet.config.pretraining import PretrainConfig
    from mapet.device import ComputeContext
    from mapet.training.run_folder import RunFolder

    fake = Fake(monkeypatch)
    config = PretrainConfig(images="a", tokenizer=tokenizer_dir, out=tmp_path / "run", track=["wandb"])
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert RunFolder.open(config, ComputeContext.from_options("cpu", "float32")) is None
    assert not fake.configs and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["pretrain", "run"])
def test_a_missing_tracker_is_an_error_before_anything_is_written(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_is_installed", lambda name: False)
    option = ["--pretrain.track"] if command == "run" else ["--tokenizer", "none", "--track"]
    argv = [command, "--images", "none", "--out", tmp_path / "out", *option, "wandb"]
    fails(capsys, *argv, named=[f"{option[-1]} wandb", "pip install '.[track]'"])


def test_a_folder_of_that_name_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "empty_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with refused("empty_folder"):
        tracking.check_trackers_installed(["empty_folder"])


# ---- the real ones, offline


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}", "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_NAME", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def read_wandb(folder):
    """Of its offline files: a log of LevelDB's kind, each record a protocol buffer."""
    from wandb.proto import wandb_internal_pb2

    rows, runs = [], []
    for path in sorted(folder.glob("tracking/wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            at += max(0, 32768 - at % 32768) if 32768 - at % 32768 < 7 else 0
            if kind in (1, 4):  # a whole one, or the last part of one
                record = wandb_internal_pb2.Record.FromString(whole)
                whole = b""
                if record.WhichOneof("record_type") == "history":
                    items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
                    step = items.pop("_step")
                    figures = {name: value for name, value in items.items() if not name.startswith("_")}
                    rows.append({"step": step} | {n: None if v != v else v for n, v in figures.items()})
                elif record.WhichOneof("record_type") == "run":
                    config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                    runs.append((record.run.project, record.run.display_name, record.run.run_id, config))
    return rows, {run[:3] for run in runs}, runs[0][3]


def read_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("mapet").experiment_id])
    rows = {}
    for name in runs[0].data.metrics:
        for point in client.get_metric_history(runs[0].info.run_id, name):
            value = None if math.isnan(point.value) else point.value
            assert rows.setdefault(point.step, {"step": point.step}).setdefault(name, value) == value
    params = {name: json.loads(value.replace("'", '"')) for name, value in runs[0].data.params.items()}
    assert runs[0].info.status == "FINISHED"
    result = {("mapet", run.info.run_name, run.info.run_id) for run in runs}
    return [rows[step] for step in sorted(rows)], result, params


def read_trackio(folder):
    (path,) = (folder.parent.parent / "trackio").glob("mapet*.db")
    with sqlite3.connect(path) as database:
        rows = [
            {"step": step} | {name: None if value in ("NaN", None) else value for name, value in json.loads(figures).items()}
            for step, figures in database.execute("select step, metrics from metrics order by id")
        ]  # fmt: skip
        names = {
            ("mapet", name.rpartition("-")[0], name) for (name,) in database.execute("select run_name from metrics")
        }
        (config,) = database.execute("select config from configs").fetchone()
    return rows, names, json.loads(config)


@pytest.mark.filterwarnings("ignore")  # of their own libraries
@pytest.mark.parametrize(("name", "read"), [("wandb", read_wandb), ("mlflow", read_mlflow), ("trackio", read_trackio)])
def test_the_real_ones(name, read, offline, tmp_path, warnings):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[track]'")
    run = tmp_path / "photos" / "pretrain"
    run.mkdir(parents=True)
    track(run, ROWS, [name], failed=True)
    (run / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    more = {"step": 15, "loss": 1.5}
    track(run, [*ROWS[1:], more], [name])
    rows, runs, config = read(run)
    together = {}
    for row in rows:
        together.setdefault(row["step"], {}).update(row)
    assert [together[step] for step in (5, 10, 15)] == [ROWS[0], ROWS[1] | ROWS[2], more]
    assert sum(len(row) - 1 for row in rows) == 5  # each metric once
    assert [run[:2] for run in runs] == [("mapet", "photos-pretrain")]
    assert config["lr"] == 0.1 and config["model_args"] == {"depth": 2}
    assert not warnings()


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_is_not_there(offline, tmp_path, monkeypatch, warnings):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install '.[track]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    track(tmp_path, ROWS, ["mlflow"])
    assert len(warnings()) == 1 and "mlflow receives no more metrics" in warnings()[0]
