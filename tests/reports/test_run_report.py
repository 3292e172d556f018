"""The report of a run: its data, its page, and the server that keeps it up to date."""

import hashlib
import http.client
import json
import os
import re
import socket
import threading
import time
from contextlib import contextmanager
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

import mapet
from mapet.reports.metrics import History, Series, downsample
from mapet.reports.model_card import read_provenance
from mapet.reports.page import (
    MAX_BYTES,
    LiveServer,
    RunView,
    compare_runs,
    embed_images,
    make_unique,
    open_images,
    page_content,
    render_page,
    write_run_report,
)
from mapet.reports.render import render_macro
from mapet.reports.run import RunFiles
from mapet.run_state import RunState
from tests.refused import refused

LOSS = "loss, nats if tokens are predicted (mean of the last epoch)"
STATS = {"num_used_codes": 60, "num_dead_codes": 4, "perplexity": 50.0, "top_code_fraction": 0.1, "num_patches": 1000}
TOKENIZER = {"teacher": {"teacher": "pixels", "student_size": [8, 8]}, "grid": [4, 4], "vocab_size": 64, "hash": "c"}
TOKENIZER |= {"codebook_stats": STATS | {"quantization_error": None}}
HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>&amp;{{data}}\u2028'\""


def record(step, **figures):
    return (
        json.dumps({"step": step, "epoch": step / 10, "loss": 3 - step / 100, "unigram_entropy": 3.4} | figures) + "\n"
    )


def write_state(folder: Path, command: str = "pretrain", **facts) -> None:
    """run.json of a run that was stopped, resumed, and is running."""
    state = RunState(
        command=command, argv=["mapet", command, "--resume"], device="cpu, float32", seconds=120, resumes=1
    )
    state = state.model_copy(
        update={"counts": {"images": 1437, "warnings": 1}, "warnings": ["unreadable image 'a.png'"]} | facts
    )
    state.write(folder)


def write_run(folder: Path, records: int = 20, **recipe) -> Path:
    """A run folder as `pretrain` leaves it, without weights."""
    folder.mkdir(parents=True)
    options = {"images": "photos", "epochs": 2, "objective": "mapet", "clip_grad": 3.0} | recipe
    (folder / "config.yaml").write_text(json.dumps(options))
    write_state(folder)
    (folder / "metrics.jsonl").write_text("".join(record(10 * (i + 1)) for i in range(records)))
    return folder


def data_of(html: str):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.S)
    return json.loads(data)


def live_status(folder: Path) -> str:
    """The line at the top of a live page."""
    return page_content([RunView.from_files(RunFiles(folder))], live=True)["status"]


def facts_of(folder: Path) -> dict[str, str]:
    """What the page says of a run at its top."""
    html = render_macro("macros.html", "facts_section", RunFiles.open(folder))
    return dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", html))


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes)."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


# ---- what is read


def test_history_is_read_piece_by_piece(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History.read(path)
    assert history.series == {}
    path.write_text(record(10) + record(20)[:15])
    history.update()
    assert history["loss"] == Series([10], [2.9])
    with path.open("a") as file:
        file.write(record(20)[15:] + '{"step": 25, "loss": null, "epoch": 2.5}\n' + "torn{\n[1]\n" + record(30))
    history.update()
    assert history["loss"] == Series([10, 20, 30], [2.9, 2.8, 2.7])
    assert history["epoch"].steps == [10, 20, 25, 30]
    assert history.steps_per_epoch == 10 and history.last_step == 30


def test_a_truncated_history_is_read_again(tmp_path):
    """A resumed run replaces the file by one that ends at its checkpoint, and may have grown past the old end since."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(record(10) + record(20, loss=9))
    history = History.read(path)
    (tmp_path / "new").write_text(record(10) + record(20, loss=1) + record(30))
    (tmp_path / "new").replace(path)
    history.update()
    assert history["loss"].values == [2.9, 1, 2.7]
    path.write_text(record(10))  # shorter, in place
    history.update()
    assert history["loss"] == Series([10], [2.9]) and history.last_step == 10


def test_final_figures_are_of_the_last_epoch(tmp_path):
    """Records at steps 3, 6 and 7 of epochs of 7 steps: the last is of one step, and counts as one of seven."""
    folder = write_run(tmp_path / "a")
    lines = [
        {"step": step, "epoch": step / 7, "loss": loss, "token_accuracy": loss / 10, "data_time_fraction": 0.034}
        for step, loss in ((3, 9.0), (6, 9.0), (7, 9.0), (10, 2.0), (13, 3.0), (14, 9.0))
    ]
    lines.append({"step": 14, "probe/logistic": 0.26})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = RunFiles.open(folder).metrics
    assert metrics[LOSS] == f"{(3 * 2 + 3 * 3 + 1 * 9) / 7:.4g}"
    assert metrics["token accuracy (mean of the last epoch)"] == "34.3%"
    assert metrics["fraction of time waiting for images (median)"] == "3.4%"
    assert read_provenance(folder).metrics["pre-training"] == metrics


def test_thinned_keeps_both_ends_and_the_mean():
    series = Series(list(range(1000)), [float(i % 2) for i in range(1000)])
    few = downsample(series, 52)
    assert len(few.steps) == 52
    assert (few.steps[0], few.steps[-1]) == (0, 999)
    assert few.values[1:-1] == pytest.approx([0.5] * 50, abs=0.05)
    assert downsample(series, 1000) is series


def test_what_a_run_says_of_itself(tmp_path):
    run, facts = RunFiles.open(write_run(tmp_path / "a")), facts_of(tmp_path / "a")
    assert facts["status"] == "running" and run.finished is False
    assert facts["images"] == "1,437 images in photos"
    assert facts["epochs"] == "20 of 2, 200 steps"
    assert facts["duration"] == "2 min, resumed 1 time"
    assert facts["resumed with"] == "mapet pretrain --resume"
    assert run.metrics[LOSS] == "1"
    assert run.state.warnings == ["unreadable image 'a.png'"] and run.summary.can_diagnose(run.history["loss"])


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        ("stopped", "stopped by SIGINT at step 7, saved", "stopped by SIGINT at step 7, saved"),
        ("failed", "no images", "failed: no images"),
        ("interrupted", "", "not finished"),
    ],
)
def test_how_a_run_stopped(status, reason, message, tmp_path):
    folder = write_run(tmp_path / "a", records=3)
    write_state(folder, status=status, reason=reason)
    run = RunFiles.open(folder)
    assert run.status == message and not run.summary.can_diagnose(run.history["loss"])


def test_a_run_that_went_quiet_is_not_taken_to_be_running(tmp_path):
    folder = write_run(tmp_path / "a")
    long_ago = time.time() - 5 * 3600
    os.utime(folder / "metrics.jsonl", (long_ago, long_ago))
    assert RunFiles.open(folder).status == "not finished"
    assert live_status(folder) == "Not finished; last metrics 5.0 h ago."


def test_a_stopped_run_counts_the_steps_of_its_checkpoint(tmp_path):
    """It stopped between two records."""
    folder = write_run(tmp_path / "a", records=3, epochs=20)
    write_state(folder, status="stopped", counts={"steps": 34})
    assert facts_of(folder)["epochs"] == "3.4 of 20, 34 steps"


def test_time_left(tmp_path):
    """10 steps an epoch of 50 images: of 20.2 epochs 17.2 are left, 8,600 images at 100 a second."""
    folder = write_run(tmp_path / "a", records=0, epochs=20.2, batch_size=50)
    assert RunFiles.open(folder).seconds_left is None
    (folder / "metrics.jsonl").write_text(
        "".join(record(10 * i, images_per_second=speed) for i, speed in ((1, 7), (2, 100), (3, 100)))
    )
    assert RunFiles.open(folder).seconds_left == pytest.approx(86)
    assert live_status(folder).endswith("ago, about 86 s left.")


def test_a_run_of_run_has_its_probe_and_figures_around_it(tmp_path):
    write_run(tmp_path / "photos" / "pretrain")
    probe = {"untrained": {"knn": 0.25}, "pretrained": {"knn": 0.5, "x": "y"}}
    write_state(tmp_path / "photos", "run", results={"evaluation": probe})
    (tmp_path / "photos" / "figures").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "figures" / "features.png")
    (tmp_path / "photos" / "figures" / "torn.png").write_bytes(b"\x89PNG no")
    for given in (tmp_path / "photos", tmp_path / "photos" / "pretrain"):
        files = RunFiles.open(given)
        assert files.name == "photos"
        assert files.metrics["knn, pretrained"] == "0.5"
        assert list(open_images(files.figures())) == ["features"]


def test_what_an_option_of_none_means(tmp_path):
    folder = write_run(tmp_path / "a", layer_scale_init=None, clip_grad=None, compile=None, other=None)
    shown = RunFiles.open(folder).options
    assert {name: shown[name] for name in ("layer_scale_init", "clip_grad", "compile", "other")} == {
        "layer_scale_init": "none", "clip_grad": "none", "compile": "auto", "other": "none",
    }  # fmt: skip


def test_lists_are_written_as_lists(tmp_path):
    folder = write_run(tmp_path / "a", mask_ratio=[0.4, 0.8], model_args={"sizes": [1, [2, 3]]})
    shown = RunFiles.open(folder).options
    assert (shown["mask_ratio"], shown["model_args"]) == ("[0.4, 0.8]", "sizes=[1, [2, 3]]")


def test_views_are_those_of_the_token_store(tmp_path):
    """The option itself has nothing to say with --tokens, and stays at its default."""
    folder = write_run(tmp_path / "pretrain", views="center", min_crop_scale=0.2, tokens="tokens")
    options = RunFiles.open(folder).config
    write_state(folder, config=options, results={"views": {"kind": "random-crop", "min_scale": 0.4, "number": 8}})
    shown = RunFiles.open(folder).options
    assert (shown["views"], shown["min_crop_scale"]) == ("random-crop, 8 of each (token store)", "0.4")
    assert read_provenance(folder).config["views"] == "random-crop, 8 of each (token store)"
    alone = write_run(tmp_path / "alone", views="center-flip")
    assert RunFiles.open(alone).options["views"] == "center-flip"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run.json", "figures/step_through.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[[[[", b'{"step": {}}\n', b"9" * 5000])
def test_damaged_files_of_a_run_break_no_report(name, content, tmp_path):
    damaged = write_run(tmp_path / "a") / name
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(content)
    data_of(render_page([RunView.from_files(RunFiles(tmp_path / "a"))], live=True))


def test_warnings_of_a_run_have_its_options(tmp_path):
    """What `pretrain` calls --clip-grad is --pretrain.clip-grad to `mapet run`."""
    (tmp_path / "whole").mkdir()
    write_state(tmp_path / "whole", "run")
    for folder, option in (("whole/pretrain", "--pretrain.clip-grad 0.01"), ("alone", "--clip-grad 0.01")):
        run = write_run(tmp_path / folder, clip_grad=0.01)
        (run / "metrics.jsonl").write_text("".join(record(10 * (i + 1), grad_norm=1.0) for i in range(20)))
        warnings = RunFiles(run).warnings
        assert any(f"larger than {option} in 100%" in sentence for sentence in warnings), warnings


def test_what_a_report_refuses(tmp_path):
    run = write_run(tmp_path / "a" / "pretrain")
    write_state(tmp_path / "a", "run")
    with refused("out", ".html"):
        mapet.report(run=run, out=tmp_path / "page")
    with refused("a/pretrain"):
        mapet.report(run=[run, tmp_path / "a"], out=tmp_path / "page.html")


def test_no_run(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for options in ({"out": tmp_path / "report.html"}, {"figures_dir": tmp_path / "figures"}):
        with refused("run.json"):
            mapet.report(run=[tmp_path / "a"], **options)
        with refused("missing"):
            mapet.report(run=[tmp_path / "missing"], **options)
    with refused("run.json"):
        mapet.report(run=[tmp_path / "a"], serve=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ["out FILE.html", "figures_dir FOLDER", "serve=True"]),
        ({"serve": True, "out": "a.html"}, ["serve=True", "out"]),
        ({"serve": True, "run": ["a", "b"]}, ["serve=True", "runs"]),
        ({"figures_dir": "a", "figures": False}, ["figures_dir", "figures=False"]),
        ({"figures_dir": "a", "run": ["a", "b"]}, ["figures_dir", "2"]),
    ],
)
def test_outputs_that_contradict_each_other(options, named):
    with refused(*named):
        mapet.report(**{"run": ["a"]} | options)


# ---- the page


def test_page_of_one_run(tmp_path):
    shown = [RunView(RunFiles.open(write_run(tmp_path / "a")))]
    content = data_of(render_page(shown))
    (run,) = content["runs"]
    assert run["curves"]["loss"][0][:2] == [10, 20]
    assert run["curves"]["loss"][1][:2] == [2.9, 2.8]
    assert page_content(shown)["comparison"] is None and content["live"] is False


def test_page_of_several_runs(tmp_path):
    runs = [write_run(tmp_path / name, objective=objective) for name, objective in (("a", "mapet"), ("b", "mim"))]
    runs.append(write_run(tmp_path / "c" / "a"))
    content = page_content([RunView(RunFiles.open(run)) for run in runs])
    assert [run["name"] for run in content["runs"]] == ["a", "b", "a (2)"]
    assert content["comparison"]["options"] == [["objective", "mapet", "mim", "mapet"]]
    assert [LOSS, "1", "1", "1"] in content["comparison"]["metrics"]


@pytest.mark.parametrize(
    ("first", "second", "objective", "comparable"),
    [
        ({"hash": "a", "vocab_size": 64}, {"hash": "a", "vocab_size": 64}, "mapet", True),
        ({"hash": "a", "vocab_size": 64}, {"hash": "b", "vocab_size": 64}, "mapet", False),
        ({"hash": "a", "vocab_size": 64}, {"vocab_size": 128}, "mapet", False),
        ({"hash": "a", "vocab_size": 64}, {"hash": "a", "vocab_size": 64}, "pim", False),
    ],
)
def test_losses_of_other_tokenizers_are_not_compared(first, second, objective, comparable, tmp_path):
    runs = []
    for name, content, task in (("a", first, "mapet"), ("b", second, objective)):
        folder = write_run(tmp_path / f"run-{name}", objective=task)
        write_state(folder, results={"tokenizer": TOKENIZER | content})
        runs.append(RunView(RunFiles.open(folder)))
    assert ("losses and token accuracies cannot be compared" in render_page(runs)) is not comparable


def test_names_are_made_unique():
    assert make_unique(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_a_run_lacking_a_figure_has_a_dash():
    runs = [
        SimpleNamespace(
            metrics={"x": "1"}, options={"lr": "1"}, prediction_task=[], inputs={"images": "9 images in a", "V": "8"}
        ),
        SimpleNamespace(
            metrics={"y": "2"}, options={}, prediction_task=[], inputs={"images": "7 images in a", "V": "8"}
        ),
    ]
    assert compare_runs(runs) == {
        "comparable": True,
        "metrics": [["x", "1", "-"], ["y", "-", "2"]],
        "options": [["images", "9 images in a", "7 images in a"], ["lr", "1", "-"]],
    }


def test_hostile_strings_stay_data(tmp_path):
    """Whatever stands in a recipe, a log or a name: the page has its own two script elements and no other markup of theirs."""
    folder = write_run(tmp_path / "x<img src=y onerror=alert(1)>", images=HOSTILE, objective=HOSTILE)
    write_state(folder, warnings=[HOSTILE], reason=HOSTILE, status="failed", description=HOSTILE)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, HOSTILE: 2, "loss": 1}) + "\n")
    html = render_page([RunView(RunFiles.open(folder), notes=[HOSTILE])])
    assert len(re.findall("<script", html)) == len(re.findall("</script", html)) == 2
    elements = Elements(html).elements
    assert not [
        (tag, name) for tag, attributes in elements for name in attributes if tag == "img" or name.startswith("on")
    ]
    assert f'<th scope="row">objective</th><td>{escape(HOSTILE)}</td>' in html and f"Note: {escape(HOSTILE)}" in html
    (run,) = data_of(html)["runs"]
    assert run["curves"][HOSTILE] == [[1], [2]]


def test_page_asks_for_nothing(tmp_path):
    html = render_page([RunView(RunFiles.open(write_run(tmp_path / "a")))])
    assert "default-src 'none'" in html and "connect-src 'none'" in html
    outside = re.findall(r"https?://[^\s\"'<]+", html)
    assert set(outside) <= {"https://github.com/leeoniya/uPlot"}  # in a comment
    assert "connect-src 'self'" in render_page([RunView.from_files(RunFiles(tmp_path / "a"))], live=True)


def test_bundled_libraries_are_as_published_and_small():
    vendor = files("mapet.reports").joinpath("vendor")
    recorded = dict(line.split()[::-1] for line in vendor.joinpath("SHA256SUMS").read_text().splitlines())
    assert {path.name for path in vendor.iterdir()} == {*recorded, "SHA256SUMS", "README.md"}
    for name, sha256 in recorded.items():
        assert hashlib.sha256(vendor.joinpath(name).read_bytes()).hexdigest() == sha256
    assert "v1.6.32" in vendor.joinpath("uPlot.iife.min.js").read_text()[:100]
    assert (
        "1.6.32" in vendor.joinpath("README.md").read_text() and "MIT License" in vendor.joinpath("LICENSE").read_text()
    )
    assert sum(len(vendor.joinpath(name).read_bytes()) for name in recorded) <= 150_000


def test_page_stays_below_its_size(tmp_path, monkeypatch):
    """Several runs with more than fits of everything; images of noise, which nothing compresses."""
    assert MAX_BYTES < 5_000_000
    monkeypatch.setattr("mapet.reports.page.MAX_BYTES", 400_000)
    noise = np.random.default_rng(0).integers(0, 256, (2, 150, 200, 3), dtype=np.uint8)
    images = {f"p{i}": Image.fromarray(pixels) for i, pixels in enumerate(noise)}
    folder = write_run(tmp_path / "a", records=3000)
    shown = [RunView(RunFiles.open(folder), images, {"images": [], "filler": "x" * 300_000}) for _ in range(3)]
    html = render_page(shown)
    assert 200_000 < len(html.encode()) <= 400_000
    runs = data_of(html)["runs"]
    assert (
        runs[0]["steps"] is None and "step-through of this run is omitted" in page_content(shown)["runs"][0]["notes"][0]
    )
    assert runs[0]["curves"]["loss"][0][-1] == 30000


def test_images_shrink_before_they_are_omitted():
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8)
    images = {name: Image.fromarray(noise) for name in "ab"}
    whole = embed_images(images, 10_000_000)
    assert [one.width for one in whole] == [200, 200]
    size = sum(len(one.src) for one in whole)
    smaller = embed_images(images, size // 2)
    assert [one.name for one in smaller] == ["a", "b"] and smaller[0].width < 200
    assert embed_images(images, 0) == []


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path, caplog, monkeypatch):
    folder = write_run(tmp_path / "a")
    write_run_report(folder)
    assert data_of((folder / "report.html").read_text())["runs"][0]["name"] == "a"
    monkeypatch.setattr("mapet.reports.page.render_page", lambda runs: 1 / 0)
    write_run_report(folder)
    assert "report.html could not be written: division by zero" in caplog.text


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with refused("report.html"):
        mapet.report(run=write_run(tmp_path / "a"), out=tmp_path / "report.html")


# ---- the live view


@contextmanager
def served(folder):
    with LiveServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path, host="localhost", token=True):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request("GET", f"{path}?token={server.token}" if token else path, headers={"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_server_sends_what_is_new(tmp_path):
    folder = tmp_path / "a"
    with served(folder) as server:

        def newest():
            answer, html = ask(server, "/")
            assert answer.status == 200 and data_of(html)["live"] is True
            status = re.search('<p id="status" role="status">(.*?)</p>', html)[1]
            return html, status, data_of(html)["runs"][0]["curves"].get("loss")

        _, status, loss = newest()
        assert loss is None and status.startswith("Waiting: no run in")
        write_run(folder, records=3)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 40, "lo')
        html, status, loss = newest()
        assert loss == [[10, 20, 30], [2.9, 2.8, 2.7]]
        assert f"{LOSS}</th><td>2.7</td>" in html and status.startswith("Running; last metrics")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('ss": 2.5}\n')
        assert newest()[2] == [[10, 20, 30, 40], [2.9, 2.8, 2.7, 2.5]]
        (folder / "new").write_text(record(10))
        (folder / "new").replace(folder / "metrics.jsonl")
        assert newest()[2] == [[10], [2.9]]
        (folder / "backbone").mkdir()
        assert newest()[1].startswith("Finished")


def test_long_histories_are_downsampled(tmp_path, monkeypatch):
    monkeypatch.setattr("mapet.reports.page.MAX_POINTS", 60)
    files = RunFiles(write_run(tmp_path / "a", records=200))
    steps, _ = page_content([RunView(files)], live=True)["runs"][0]["data"]["curves"]["loss"]
    assert len(steps) == 60 and (steps[0], steps[-1]) == (10, 2000)


@pytest.mark.parametrize(
    "host", ["example.org", "localhost.example.org", "127.0.0.1.example.org:80", "", "x@example.org"]
)
def test_other_hosts_are_refused(host, tmp_path):
    with served(write_run(tmp_path / "a")) as server:
        assert ask(server, "/", host)[0].status == 403


def test_answers_to_this_machine_alone(tmp_path):
    with served(write_run(tmp_path / "a")) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert (
            server.url == f"http://127.0.0.1:{server.server_address[1]}/?token={server.token}"
            and len(server.token) > 20
        )
        for host in ("localhost", f"localhost:{server.server_address[1]}", "127.0.0.1:8000"):
            answer, _ = ask(server, "/", host)
            assert answer.status == 200 and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert ask(server, "/../config.yaml")[0].status == 404
        assert ask(server, "/updates")[0].status == 404
        with LiveServer(tmp_path, server.server_address[1]) as other:
            assert other.server_address[1] != server.server_address[1]


@pytest.mark.parametrize("query", ["", "?token=", "?token=x", "?token=é", "?tokens=TOKEN", "?token=TOKEN&token=TOKEN"])
def test_another_user_of_this_machine_does_not_know_the_token(query, tmp_path):
    with served(write_run(tmp_path / "a")) as server:
        answer, text = ask(server, f"/{quote(query.replace('TOKEN', server.token), safe='?=&')}", token=False)
        assert answer.status == 403 and "loss" not in text


@pytest.mark.parametrize(("length", "sent"), [(3_000_000, 100), (100_000, 100_000), ("x", 10), (-5, 10)])
def test_a_body_is_dropped_and_the_answer_arrives(length, sent, tmp_path):
    """Also where less comes than is announced, or more than the system buffers: the connection would be reset before the answer."""
    with (
        served(write_run(tmp_path / "a")) as server,
        socket.create_connection(server.server_address[:2], 20) as connection,
    ):
        head = f"POST /?token={server.token} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + b"x" * sent)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.0 405 ") and b"loss" not in answer
