"""What a run folder tells about itself: the data of its report. Only small text files are read, and nothing missing is an error."""

import json
import shlex
import time
from collections.abc import Mapping
from contextlib import nullcontext
from math import inf
from pathlib import Path
from statistics import median_high
from typing import Any

from mapet.config.base import format_none, read_config
from mapet.config.pretraining import PretrainConfig
from mapet.errors import MapetError, spell_as_flags, spell_in_section
from mapet.reports.metrics import History, Subject, figures, not_judged, warnings
from mapet.reports.render import number, value_text
from mapet.run_state import CONFIG_FILE, RunState, check_is_pretraining, parent_run, pretrain_folder, try_read_state

QUIET = 3600
"""After so many seconds without a new metric a run that never said why it stopped is not taken to be running."""
STEP_THROUGH = "step_through.json"
"""Beside the figures."""
TOKENIZER_METRICS = "tokenizer_metrics.json"
"""What `inspect-tokenizer` writes."""


class RunFiles:
    """A run folder of `pretrain` or `run`, which may still be growing or not be there yet.

    Attributes:
        folder: of `pretrain`, in the `given` one perhaps.
        around: it and, if it is part of a `run`, that one's.
        recipe: options as resolved; {} before there is a run.
        probe: what `evaluate` found, as part of a `run`; else {}.
        tokenizer: its description; {} where the run has none.
    """

    def __init__(self, given: Path) -> None:
        self.given = given
        self.history = History(Path())
        self.refresh()

    def refresh(self) -> None:
        """Read again; of the metrics only what is new."""
        self.folder = pretrain_folder(self.given)
        self.parent = parent_run(self.folder)
        self.around = [self.folder, *([self.parent] if self.parent else [])]
        try:
            self.recipe = read_config(self.folder / CONFIG_FILE)
        except MapetError:
            self.recipe = {}
        unknown = RunState(command="", status="interrupted", pid=0)
        self.state = try_read_state(self.folder) or unknown
        around = try_read_state(self.parent) if self.parent else None
        self.probe: Mapping[str, Any] = (around or unknown).results.get("evaluation", {})
        self.tokenizer: Mapping[str, Any] = self.state.results.get("tokenizer", {})
        if self.history.path != (path := self.folder / "metrics.jsonl"):
            self.history = History(path)
        self.history.update()

    @classmethod
    def open(cls, folder: Path) -> "RunFiles":
        """Raises MapetError: it is no run."""
        check_is_pretraining(folder)
        files = cls(folder)
        if not files.recipe:
            raise MapetError(f"{files.folder / CONFIG_FILE} can't be read, or is empty")
        return files

    @property
    def name(self) -> str:
        """Short, to tell runs apart; what many folders are called gets the name of the one around it, too."""
        folder = self.around[-1].absolute()
        return "/".join(folder.parts[-2:]) if folder.name in ("run", "pretrain") else folder.name

    @property
    def finished(self) -> bool:
        return (self.folder / "backbone").is_dir()

    @property
    def ended_early(self) -> bool:
        """Whether it said why it stopped."""
        return not self.finished and self.state.status in ("stopped", "failed")

    @property
    def status(self) -> str:
        if self.finished:
            return "finished"
        if self.ended_early:
            return self.state.reason if self.state.status == "stopped" else f"failed: {self.state.reason}"
        if not self.recipe:
            return "not started"
        return "running" if self.state.status == "running" and self.age < QUIET else "not finished"

    @property
    def age(self) -> float:
        """Seconds since the run last wrote metrics, or its log while it has none."""
        for name in ("metrics.jsonl", "train.log"):
            if (self.folder / name).exists():
                return max(0.0, time.time() - (self.folder / name).stat().st_mtime)
        return inf

    @property
    def steps(self) -> float:
        """Steps made: those of the last record, or of a checkpoint after it."""
        records = self.history.records
        return max(self.state.counts.get("steps", 0), records[-1]["step"] if records else 0)

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last records; None while that can't be said."""
        per_epoch, speed = self.history.steps_per_epoch, self.history["images_per_second"].values[-5:]
        epochs, batch_size = (self.recipe.get(name) for name in ("epochs", "batch_size"))
        if not (per_epoch and speed and isinstance(epochs, int) and isinstance(batch_size, int)):
            return None
        return max(0.0, epochs * per_epoch - self.steps) * batch_size / max(1e-9, median_high(speed))

    def figures(self) -> list[Path]:
        """List PNG files that `report`, as part of `run`, left in figures/."""
        return [path for folder in self.around for path in sorted((folder / "figures").glob("*.png"))]

    def step_through(self) -> dict[str, Any] | None:
        """Read what `report` left beside the figures."""
        found = (_read(folder / "figures" / STEP_THROUGH) for folder in self.around)
        return next((content for content in found if "images" in content), None)

    def data(self) -> dict[str, Any]:
        """Gather all of it for the page, but curves and images."""
        subject = Subject(self.history, self.recipe, self.tokenizer.get("codebook_stats", {}), self.probe)
        with spell_as_flags(), spell_in_section("pretrain") if self.parent else nullcontext():  # as it was started
            poor = warnings(subject)
        inspected = [path for folder in self.around for path in sorted(folder.glob(f"*/{TOKENIZER_METRICS}"))]
        inspection = _read(inspected[0]) if inspected else {}
        measures = [(name, text) for name, value in inspection.get("measures", {}).items() if (text := _measure(value))]
        count, hashed = self.state.counts.get("images"), self.tokenizer.get("hash", "")
        images = f"{f'{count:,} images in ' if count else ''}{value_text(self.recipe.get('images'))}"
        tokenizer = dict(self.tokenizer.get("teacher", {}))
        tokenizer |= {name: self.tokenizer[name] for name in ("vocab_size", "quantizer") if name in self.tokenizer}
        tokenizer |= {"words (hash)": hashed[:12]} if hashed else {}
        options = with_views(self.recipe, self.state.results.get("views"))
        return {
            "name": self.name,
            "status": self.status,
            "finished": self.finished,
            "state": self.state,
            "command": shlex.join(self.state.argv),
            "steps": self.steps,
            "epochs": value_text(self.recipe.get("epochs")),
            "config": {name: _option(name, value) for name, value in options.items()},
            "metrics": self.metrics(),
            "warnings": poor,
            "early": not subject.has_begun(self.history["loss"]),
            "unjudged": not_judged(subject),
            "predicts": [*map(self.recipe.get, ("target", "objective", "patch_order", "mask_ratio")), hashed],
            "data": {"images": images, **{f"tokenizer's {name}": value_text(part) for name, part in tokenizer.items()}},
            "tokenizer": self.tokenizer,
            "inspection": {"warnings": inspection.get("warnings", []), "measures": measures},
            "steps_per_epoch": self.history.steps_per_epoch,
        }

    def metrics(self) -> dict[str, str]:
        """Return final metrics: name -> number, both as text."""
        probes = {
            f"{name}, {state}": number(value)
            for state in ("untrained", "pretrained")
            for name, value in self.probe.get(state, {}).items()
            if isinstance(value, (int, float))
        }
        return figures(self.history) | probes


def with_views(recipe: Mapping[str, Any], views: Mapping[str, Any] | None) -> dict[str, Any]:
    """The recipe with the views that were shown: those of the token store, where the run used one.

    Args:
        views: kind, min_scale and number of the store's views.
    """
    if not recipe.get("tokens") or not views:
        return dict(recipe)
    shown = f"{views['kind']}, {views['number']} of each (token store)"
    return {**recipe, "views": shown, "min_crop_scale": views["min_scale"]}


def _option(name: str, value: object) -> str:
    field = PretrainConfig.model_fields.get(name)
    return format_none(field) if value is None and field else value_text(value)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's content; {} where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _measure(value: float | Mapping[str, Any] | None) -> str:
    """A measure of tokenizer_metrics.json on one line; '' for none, or a group of several."""
    if not isinstance(value, Mapping):
        return "" if value is None else number(value)
    parts = {name.replace("_", " "): part for name, part in value.items() if isinstance(part, (int, float))}
    return ", ".join(f"{name} {number(part)}" for name, part in parts.items())
