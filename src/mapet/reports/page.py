"""The page of one run or of several side by side."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mapet import distributed
from mapet.files import atomic
from mapet.reports.history import thinned
from mapet.reports.images import ReportImage, embed_images, open_images
from mapet.reports.render import line_style, render
from mapet.reports.run import PLACES, RunFiles

log = logging.getLogger("mapet")
MOST_BYTES = 4_800_000
"""A report is under 5 MB, however many runs and images it shows."""
MOST_POINTS = 8_000
"""Points of one metric's curves, of all runs together."""
IMAGE_MARKUP = 1500
"""Bytes of HTML around an image, its caption twice, at most."""
NAME = "report.html"
"""What a run folder's own report is called."""
CHARTS = (
    {
        "title": "Loss",
        "unit": "nats, where tokens are predicted",
        "lines": {"loss": "loss", "token_entropy": "unigram baseline"},
        "hint": "Nats are natural-log units: guessing evenly among K tokens costs ln K. Below the unigram baseline (guessing by "
        "frequency), something is learned of the images.",
    },
    {
        "title": "Token accuracy",
        "unit": "of the masked patches",
        "percent": True,
        "lines": {"token_accuracy": "token accuracy", "commonest_token": "majority baseline"},
        "hint": "The share of masked patches whose likeliest predicted token is the true one; the baseline always predicts the most "
        "frequent token.",
    },
    {
        "title": "Probes",
        "unit": "accuracy of frozen features",
        "lines": {"probe/logistic": "linear probe", "probe/knn": "k-NN"},
        "hint": "On a small fixed sample of labelled images, held out from the probe.",
    },
    {"title": "Learning rate", "unit": "at each step", "lines": {"lr": "learning rate"}},
    {"title": "Gradient norm", "unit": "before clipping", "lines": {"gradient_norm": "norm"}},
    {"title": "Speed", "unit": "images/s", "lines": {"images_per_second": "images/s"}},
    {"title": "Data wait", "unit": "of the time", "percent": True, "lines": {"data_wait": "waiting for images"}},
    {"title": "Skipped steps", "unit": "since the start", "lines": {"skipped_steps": "skipped"}},
)
"""The charts; those of metrics that no run has are left out."""


NOT_COMPARABLE = (
    "These runs do not predict the same tokens from the same (their tokenizers, targets, objectives, orders or ratios differ): their "
    "losses and token accuracies cannot be compared. Probes can, and what `mapet evaluate` measures."
)


@dataclass
class RunView:
    """A run and what its report shows of it.

    Attributes:
        step_through: see the function of that name; None leaves it out.
        notes: what a reader should know about the report itself.
    """

    files: RunFiles
    images: list[ReportImage] = field(default_factory=list)
    step_through: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def saved(cls, files: RunFiles) -> "RunView":
        """Show what `run` left in its folder."""
        return cls(files, open_images(files.figures()), files.step_through())


def page(runs: Sequence[RunView], live: bool = False) -> str:
    """Render HTML of at most `MOST_BYTES`; a live page asks its server for the curves."""
    return _render(page_content(runs, live), live)


def page_content(runs: Sequence[RunView], live: bool = False) -> dict[str, Any]:
    """Gather what the page shows; where it is too much, leave out the step-through first, then shrink images."""
    names = distinct([run.files.name for run in runs])
    points = max(50, MOST_POINTS // len(runs))
    views = [
        run.files.data()
        | {
            "name": name,
            "curves": {} if live else curves(run.files, points),
            "notes": list(run.notes),
            "steps": run.step_through,
            "images": [],
        }
        for run, name in zip(runs, names, strict=True)
    ]
    content = {"runs": views, "comparison": comparison(views) if len(views) > 1 else None}
    room = MOST_BYTES - len(_render(content, live))
    for view in views:
        if room < 0 and view["steps"]:
            room += len(json.dumps(view["steps"]))
            view["steps"] = None
            view["notes"].append("The step-through of this run is left out to keep the page small.")
    for number, (run, view) in enumerate(zip(runs, views, strict=True)):
        view["images"], left_out = embed_images(run.images, max(0, room) // (len(views) - number))
        room -= sum(len(image.src) + IMAGE_MARKUP for image in view["images"])
        if left_out:
            view["notes"].append(f"Figures left out to keep the page small: {', '.join(left_out)}.")
    return content


def _render(content: Mapping[str, Any], live: bool) -> str:
    runs = content["runs"]
    names = [run["name"] for run in runs]
    looks = [line_style(i) for i in range(24)]
    data = {
        "runs": [{key: run[key] for key in ("name", "curves", "steps", "steps_per_epoch")} for run in runs],
        "charts": CHARTS,
        "looks": looks,
        "live": live,
        "started": bool(runs[0]["config"]),
    }
    return render(
        "run.html", live=live, data=data, **content, charts=CHARTS, looks=looks,
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs", status=runs[0]["status"] if len(runs) == 1 else ", ".join(names),
    )  # fmt: skip


def curves(files: RunFiles, points: int) -> dict[str, list[list[float]]]:
    """Return metric -> [steps, values]."""
    found = {}
    for name in files.history.names:
        series = thinned(files.history[name], points)
        found[name] = [[_short(step) for step in series.steps], [_short(value) for value in series.values]]
    return found


def comparison(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare final metrics and the options in which runs differ: rows of [name, a text for each run], and a note on them."""
    metrics = dict.fromkeys(name for run in runs for name in run["metrics"])
    made_of = [run["data"] | {name: text for name, text in run["config"].items() if name not in PLACES} for run in runs]
    options = dict.fromkeys(name for one in made_of for name in one)
    differing = [[name, *(one.get(name, "-") for one in made_of)] for name in options]
    same = all(run["predicts"] == runs[0]["predicts"] for run in runs)
    return {
        "note": "" if same else NOT_COMPARABLE,
        "metrics": [[name, *(run["metrics"].get(name, "-") for run in runs)] for name in metrics],
        "options": [row for row in differing if len(set(row[1:])) > 1],
    }


def distinct(names: Sequence[str]) -> list[str]:
    """Tell equal names apart: further ones get a number."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _short(value: float) -> float:
    """Round to six digits, more than a screen shows."""
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")


def write_run_report(folder: Path) -> None:
    """Write `report.html` of a run from what lies in its folder, in place of an earlier one; an error is a warning.

    A pre-training that is part of a `mapet run` has the one report of that.
    """
    if distributed.rank() > 0:
        return
    path = folder / NAME
    try:
        files = RunFiles.open(folder)
        text = page([RunView.saved(files)])
        path = files.around[-1] / NAME
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except Exception as error:  # whatever it is, the run itself is complete
        log.warning("%s could not be written: %s", path, error or type(error).__name__)
