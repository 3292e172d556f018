"""The page of one run or of several side by side."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mapet import distributed
from mapet.files import atomic
from mapet.reports.history import thinned
from mapet.reports.images import ReportImage, embed_images, open_images
from mapet.reports.render import render
from mapet.reports.run import RunFiles

log = logging.getLogger("mapet")
MOST_BYTES = 4_800_000
"""A report is under 5 MB, however many runs and images it shows."""
MOST_POINTS = 8_000
"""Points of one metric's curves, of all runs together."""
IMAGE_MARKUP = 1500
"""Bytes of HTML around an image, its caption twice, at most."""
NAME = "report.html"
"""What a run folder's own report is called."""
WHERE = {"images", "out", "tokenizer", "tokens", "probe_images"}
"""Options that say where, not what; images are told with their number."""
HOW_FAST = {"resume", "device", "micro_batch_size", "log_interval"}


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
    return render("run.html", **page_content(runs, live))


def page_content(runs: Sequence[RunView], live: bool = False) -> dict[str, Any]:
    """Gather what the page shows; where it is too much, leave out the step-through first, then shrink images."""
    views = []
    for run, name in zip(runs, distinct([run.files.name for run in runs]), strict=True):
        drawn = {"name": name, "steps": run.step_through, "steps_per_epoch": run.files.history.steps_per_epoch}
        drawn["curves"] = {} if live else curves(run.files, max(50, MOST_POINTS // len(runs)))
        views.append(run.files.data() | {"name": name, "notes": list(run.notes), "images": [], "drawn": drawn})
    content = {"runs": views, "comparison": comparison(views) if len(views) > 1 else None, "live": live}
    room = MOST_BYTES - len(render("run.html", **content))
    for view in views:
        if room < 0 and view["drawn"]["steps"]:
            room += len(json.dumps(view["drawn"]["steps"]))
            view["drawn"]["steps"] = None
            view["notes"].append("The step-through of this run is left out to keep the page small.")
    for number, (run, view) in enumerate(zip(runs, views, strict=True)):
        view["images"], left_out = embed_images(run.images, max(0, room) // (len(views) - number))
        room -= sum(len(image.src) + IMAGE_MARKUP for image in view["images"])
        if left_out:
            view["notes"].append(f"Figures left out to keep the page small: {', '.join(left_out)}.")
    return content


def curves(files: RunFiles, points: int) -> dict[str, list[list[float]]]:
    """Return metric -> [steps, values], rounded to six digits, more than a screen shows."""

    def short(value: float) -> float:
        return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")

    series = {name: thinned(files.history[name], points) for name in files.history.names}
    return {name: [[short(value) for value in column] for column in columns] for name, columns in series.items()}


def comparison(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare final metrics and the options in which runs differ: rows of [name, a text for each run]; and losses, if they can be."""

    def rows(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
        names = dict.fromkeys(name for column in columns for name in column)
        return [[name, *(column.get(name, "-") for column in columns)] for name in names]

    made_of = [
        run["data"] | {name: text for name, text in run["config"].items() if name not in WHERE | HOW_FAST}
        for run in runs
    ]
    return {
        "comparable": all(run["predicts"] == runs[0]["predicts"] for run in runs),
        "metrics": rows([run["metrics"] for run in runs]),
        "options": [row for row in rows(made_of) if len(set(row[1:])) > 1],
    }


def distinct(names: Sequence[str]) -> list[str]:
    """Tell equal names apart: further ones get a number."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


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
