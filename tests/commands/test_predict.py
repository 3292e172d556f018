"""`predict`: labels and probabilities in both formats, uninterrupted or killed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import mapet
from mapet.cli import main
from mapet.errors import Interrupted
from mapet.evaluation import embeddings
from mapet.evaluation.features import BackboneWrapper
from mapet.files import LOCK_FILE
from mapet.lock import Holder
from mapet.run_state import RunState
from tests.refused import refused

CPU = {"device": "cpu", "precision": "float32"}


@pytest.fixture(scope="module")
def tuned(run_dir, digits, tmp_path_factory):
    """Fine-tuned on a few digits, and calibrated on those of other writers."""
    out = tmp_path_factory.mktemp("fine-tuning") / "tuned"
    options = {"labels_per_class": 10, "epochs": 2, "batch_size": 25, "lr": 3e-3} | CPU
    mapet.finetune(backbone=run_dir, images=digits / "train", test_images=digits / "test", out=out, **options)
    return out


def rows_of(path):
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    parquet = pytest.importorskip("pyarrow.parquet")
    return parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_labels_and_probabilities_are_the_model_s(suffix, tuned, digits, tmp_path):
    """Equal to timm's from the model's folder; the accuracy of the labels is the one that fine-tuning measured."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = mapet.predict(backbone=tuned, images=digits / "test", out=tmp_path / f"predictions{suffix}", **CPU)
    rows = rows_of(out)
    results = RunState.read(tuned).results
    assert np.mean([row["label"] == row["id"].split("/")[0] for row in rows]) == pytest.approx(results["accuracy"])
    model = timm.create_model(f"local-dir:{tuned / 'model'}", pretrained=True).eval()
    config = json.loads((tuned / "model" / "config.json").read_text())
    assert (
        config["label_names"] == list("0123456789") and config["temperature"] == results["calibration"]["temperature"]
    )
    pixels = np.stack([np.asarray(Image.open(digits / "test" / row["id"])) for row in rows[:50]])
    with torch.no_grad():
        logits = model((torch.from_numpy(pixels)[:, None] / 255 - 0.5) / 0.25)
    expected = torch.softmax(logits / config["temperature"], 1)
    result = [[float(row[f"probability:{name}"]) for name in config["label_names"]] for row in rows[:50]]
    assert np.allclose(result, expected.numpy(), atol=2e-6)
    for row, chances in zip(rows, result, strict=False):
        assert float(row["probability"]) == pytest.approx(max(chances)) and not row["error"]
    assert list(tmp_path.iterdir()) == [out]


def test_two_processes_do_not_write_one_file(tuned, digits, tmp_path):
    folder = tmp_path / ".a.csv.partial"
    folder.mkdir()
    holder = Holder.from_this_process()._replace(host="elsewhere")
    (folder / LOCK_FILE).write_text(json.dumps(holder))
    options = {"backbone": tuned, "images": digits / "test", "out": tmp_path / "a.csv"} | CPU
    with refused("elsewhere", "take_over"):
        mapet.predict(**options)
    assert mapet.predict(**options, take_over=True) == tmp_path / "a.csv" and not folder.exists()


def test_held_out_probabilities_are_calibrated(tuned, digits, tmp_path):
    """On the calibration images the likelihood is maximal: T times or over 1.3 is worse."""
    mapet.predict(backbone=tuned, images=digits / "test", out=tmp_path / "p.csv", **CPU)
    chances = np.array([float(row[f"probability:{row['id'].split('/')[0]}"]) for row in rows_of(tmp_path / "p.csv")])
    calibration = RunState.read(tuned).results["calibration"]
    assert -np.log(chances.clip(1e-6)).mean() == pytest.approx(calibration["nll"], abs=1e-3)
    assert calibration["num_images"] == 360 and calibration["nll"] <= calibration["nll_before"]


@pytest.fixture
def awkward(digits, tmp_path):
    """Ids that are spreadsheet formulas, quotes, bytes that are not UTF-8, and an unreadable file."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(
        [b"=1+1.png", b"-a.png", b'b",\n.png', b"caf\xe9.png", *(b"%d.png" % i for i in range(20))]
    ):
        source = sorted((digits / "test").rglob("*.png"))[number * 7]
        shutil.copy(source, os.fsencode(folder) + b"/" + name)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_ids_of_any_kind_and_unreadable_images(suffix, tuned, awkward, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    rows = rows_of(mapet.predict(backbone=tuned, images=awkward, out=tmp_path / f"p{suffix}", **CPU))
    quote = "'" if suffix == ".csv" else ""
    ids = [row["id"] for row in rows]
    assert {f"{quote}=1+1.png", f"{quote}-a.png", 'b",\n.png', "caf\\xe9.png"} < set(ids) and len(rows) == 25
    (broken,) = (row for row in rows if row["error"])
    assert broken["id"] == "broken.png" and "not an image" in broken["error"]
    assert not broken["label"] and not broken["probability"] and not broken["probability:3"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_killed_or_interrupted_and_resumed_is_the_same_file(suffix, tuned, awkward, tmp_path, monkeypatch):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(embeddings, "inference_batch_size", lambda _: 3)
    monkeypatch.setattr(embeddings, "MAX_SHARD_IMAGES", 8)
    options = {"backbone": tuned, "images": awkward, **CPU}
    whole = mapet.predict(out=tmp_path / f"whole{suffix}", **options)
    out, logits, stops = (
        tmp_path / f"parts{suffix}",
        BackboneWrapper.logits,
        iter([*[None] * 6, "kill", *[None] * 3, "stop"]),
    )

    def stop(*arguments):
        match next(stops, None):
            case "kill":
                raise ZeroDivisionError  # as good as a kill: nothing is saved
            case "stop":
                os.kill(os.getpid(), signal.SIGTERM)
        return logits(*arguments)

    monkeypatch.setattr(BackboneWrapper, "logits", stop)
    with pytest.raises(ZeroDivisionError):
        mapet.predict(out=out, **options)
    with refused("resume=True", field="out"):
        mapet.predict(out=out, **options)
    with refused("14 of 25", kind=Interrupted):
        mapet.predict(out=out, resume=True, **options)
    assert not out.exists()
    mapet.predict(out=out, resume=True, **options)
    assert out.read_bytes() == whole.read_bytes()
    assert mapet.predict(out=out, resume=True, **options) == out  # finished
    with refused("not", field="out"):
        mapet.predict(out=out, **options)


@pytest.mark.slow
def test_really_killed(tuned, digits, tmp_path):
    options = ["--backbone", tuned, "--images", digits / "train", "--device", "cpu", "--out"]
    assert main(["predict", *map(str, options), str(tmp_path / "whole.csv")]) == 0
    argv = [
        sys.executable,
        "-m",
        "tests.crash",
        "1",
        "8",
        "0.5",
        "predict",
        *options,
        tmp_path / "parts.csv",
        "--resume",
    ]
    subprocess.run([str(arg) for arg in argv], check=True, env=os.environ | {"MAPET_WORKERS": "0"})
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_what_is_not_calibrated_says_so_and_what_cannot_predict_is_refused(tuned, run_dir, digits, tmp_path, caplog):
    copy = shutil.copytree(tuned / "model", tmp_path / "model")  # alone, as one would move it to another machine
    config = json.loads((copy / "config.json").read_text())
    del config["temperature"]
    (copy / "config.json").write_text(json.dumps(config))
    options = ["--images", str(digits / "test" / "7"), "--device", "cpu", "--out"]
    assert main(["predict", "--backbone", str(copy), *options, str(tmp_path / "p.csv")]) == 0
    (first, *_) = rows_of(tmp_path / "p.csv")
    assert {"uncalibrated_probability", "uncalibrated_probability:7"} < first.keys() and "not calibrated" in caplog.text
    with refused("mapet finetune", field="backbone"):
        mapet.predict(backbone=run_dir, images=digits / "test", out=tmp_path / "q.csv")
    with refused("q.xlsx", ".csv", ".parquet"):
        mapet.predict(backbone=tuned, images=digits / "test", out=tmp_path / "q.xlsx")
    (tmp_path / "q.csv").write_text("mine")
    with refused(field="out"):
        mapet.predict(backbone=tuned, images=digits / "test", out=tmp_path / "q.csv")
