"""The page of one run or of several side by side: a template, its data as JSON, and nothing from outside."""

import base64
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mapet import distributed
from mapet.files import atomic
from mapet.reports.history import thinned
from mapet.reports.images import Picture, embedded, open_pictures
from mapet.reports.run import PLACES, RunFiles
from mapet.reports.style import look, resource, stylesheet

log = logging.getLogger("mapet")
MOST_BYTES = 4_800_000
"""A report is under 5 MB, however many runs and pictures."""
MOST_POINTS = 8_000
"""Points of one figure's curves, of all runs together."""
NAME = "report.html"
"""What a run folder's own report is called."""
PANELS = (
    {
        "title": "Loss",
        "unit": "nats, where words are predicted",
        "lines": {"loss": "loss", "token_entropy": "guessing by frequency"},
        "hint": "Nats are natural-log units: guessing evenly among K words costs ln K. Below the line of guessing by frequency, "
        "something is learned of the images.",
    },
    {
        "title": "Token accuracy",
        "unit": "of the hidden patches",
        "percent": True,
        "lines": {"token_accuracy": "word predicted", "commonest_token": "always the commonest word"},
        "hint": "The share of hidden patches whose likeliest predicted word is the true one.",
    },
    {
        "title": "Probes",
        "unit": "accuracy of frozen features",
        "lines": {"probe/linear": "linear probe", "probe/knn": "k-NN"},
        "hint": "On a small fixed sample of labelled images, held out from the probe.",
    },
    {"title": "Learning rate", "unit": "at each step", "lines": {"lr": "learning rate"}},
    {"title": "Gradient norm", "unit": "before clipping", "lines": {"gradient_norm": "norm"}},
    {"title": "Speed", "unit": "images a second", "lines": {"images_per_second": "images/s"}},
    {"title": "Data wait", "unit": "of the time", "percent": True, "lines": {"data_wait": "waiting for images"}},
    {"title": "Skipped steps", "unit": "since the start", "lines": {"skipped_steps": "skipped"}},
)
"""The panels of curves; those of figures that no run has are left out."""


OTHER_WORDS = (
    "These runs do not predict the same words from the same (their tokenizers, targets, objectives, orders or ratios differ): their "
    "losses and token accuracies cannot be compared. Probes can, and what `mapet evaluate` measures."
)


@dataclass
class Shown:
    """A run and what there is to see of it.

    Attributes:
        step_through: see the function of that name; None leaves it out.
        notes: what a reader should know about the report itself.
    """

    files: RunFiles
    pictures: list[Picture] = field(default_factory=list)
    step_through: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def kept(cls, files: RunFiles) -> "Shown":
        """With what `inspect`, as part of `run`, left in its folder."""
        return cls(files, open_pictures(files.pictures()), files.step_through())


def page(runs: Sequence[Shown], live: bool = False) -> str:
    """HTML of at most `MOST_BYTES`; a live page asks its server for the curves."""
    names = distinct([run.files.name for run in runs])
    points = max(50, MOST_POINTS // len(runs))
    told = [
        run.files.data()
        | {
            "name": name,
            "curves": {} if live else curves(run.files, points),
            "notes": run.notes,
            "steps": run.step_through,
            "pictures": [],
        }
        for run, name in zip(runs, names, strict=True)
    ]
    content = {"runs": told, "comparison": comparison(told) if len(told) > 1 else None, "live": live}
    room = MOST_BYTES - len(_filled(content))
    for own in told:
        if room < 0 and own["steps"]:
            room += len(_json(own["steps"]))
            own["steps"] = None
            own["notes"] = [*own["notes"], "The step-through of this run is left out to keep the page small."]
    for number, (run, own) in enumerate(zip(runs, told, strict=True)):
        own["pictures"], left_out = embedded(run.pictures, max(0, room) // (len(told) - number))
        room -= sum(len(_json(picture)) for picture in own["pictures"])
        if left_out:
            own["notes"] = [*own["notes"], f"Pictures left out to keep the page small: {', '.join(left_out)}."]
    return _filled(content)


def curves(files: RunFiles, points: int) -> dict[str, list[list[float]]]:
    """Figure -> [steps, values]."""
    found = {}
    for name in files.history.names:
        series = thinned(files.history[name], points)
        found[name] = [[_short(step) for step in series.steps], [_short(value) for value in series.values]]
    return found


def comparison(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tables of final figures and of the options in which runs differ, rows of [name, a text for each run], and a note on them."""
    figures = dict.fromkeys(name for run in runs for name in run["figures"])
    made_of = [run["data"] | {name: text for name, text in run["recipe"].items() if name not in PLACES} for run in runs]
    options = dict.fromkeys(name for one in made_of for name in one)
    differing = [[name, *(one.get(name, "-") for one in made_of)] for name in options]
    same = all(run["predicts"] == runs[0]["predicts"] for run in runs)
    return {
        "note": "" if same else OTHER_WORDS,
        "figures": [[name, *(run["figures"].get(name, "-") for run in runs)] for name in figures],
        "options": [row for row in differing if len(set(row[1:])) > 1],
    }


def distinct(names: Sequence[str]) -> list[str]:
    """Names of which no two are the same: further ones get a number."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _filled(content: dict[str, Any]) -> str:
    """The template with style, scripts and data; the browser is told to run no other script and, unless live, to ask nobody."""
    content |= {
        "panels": PANELS,
        "looks": [look(i) for i in range(24)],
        "made": f"{datetime.now():%Y-%m-%d %H:%M}",
        "version": version("mapet"),
    }
    runs = content["runs"]
    title = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs"
    style = stylesheet("style.css", "page.css")
    script = "\n".join(resource(name) for name in ("elements.js", "curves.js", "steps.js", "page.js"))
    connect = "'self'" if content["live"] else "'none'"
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    parts = {"title": escape(title), "policy": policy, "style": style, "script": script, "data": _json(content)}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], resource("page.html"))


def _source(text: str) -> str:
    """How a content security policy names an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that ends no script element, whatever it holds."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(value: float) -> float:
    """Six digits are more than a screen shows."""
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")


def write_run_report(folder: Path) -> None:
    """`report.html` of a run from what lies in its folder, in place of an earlier one. That it can't be written stops nothing.

    A pre-training that is part of a `mapet run` has the one report of that.
    """
    if distributed.rank() > 0:
        return
    path = folder / NAME
    try:
        files = RunFiles.open(folder)
        text = page([Shown.kept(files)])
        path = files.around[-1] / NAME
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except Exception as error:  # whatever it is: the run itself is whole
        log.warning("%s could not be written: %s", path, error or type(error).__name__)
