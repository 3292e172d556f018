"""The content of a run folder, as its report shows it. Only small text files are read, and a missing one is no error."""

import json
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
from mapet.reports.metrics import History, RunSummary, advise_to_evaluate, diagnose, summarize_metrics
from mapet.reports.render import format_number, format_value
from mapet.run_state import CONFIG_FILE, RunState, check_is_pretraining, parent_run, pretrain_folder, try_read_state

STALE_AFTER_S = 3600
"""Seconds without a new metric after which a run that recorded no end is not shown as running."""
STEP_THROUGH = "step_through.json"
"""File beside the figures, with the data of the step-through."""
TOKENIZER_METRICS = "tokenizer_metrics.json"
TOKENIZER_REPORT = "tokenizer_report.md"
"""Files that `inspect-tokenizer` writes."""


class RunFiles:
    """The folder of a `pretrain` or `run`, which may still grow or not exist yet.

    Attributes:
        given: the folder that the user named.
        folder: that of `pretrain`, which is `given` or in it.
        parent: the folder of the `run` that the pre-training is part of, or None.
        folders: `folder` and `parent`, where there is one.
        config: the resolved options of `pretrain`; {} before it has started.
        state: its run.json; one without facts where it is missing or damaged.
        probe: the evaluation by the parent `run`, else {}.
        tokenizer: the tokenizer's description; {} where the run has none.
        history: the metrics recorded so far.
    """

    def __init__(self, given: Path) -> None:
        self.given = given
        self.history = History(Path())
        self.refresh()

    def refresh(self) -> None:
        """Read all files again, but only the new records of the metrics."""
        self.folder = pretrain_folder(self.given)
        self.parent = parent_run(self.folder)
        self.folders = [self.folder, self.parent] if self.parent else [self.folder]
        try:
            self.config = read_config(self.folder / CONFIG_FILE)
        except MapetError:
            self.config = {}
        unknown = RunState(command="", status="interrupted", pid=0)
        self.state = try_read_state(self.folder) or unknown
        parent_state = self.parent and try_read_state(self.parent)
        self.probe: Mapping[str, Any] = (parent_state or unknown).results.get("evaluation", {})
        self.tokenizer: Mapping[str, Any] = self.state.results.get("tokenizer", {})
        metrics_path = self.folder / "metrics.jsonl"
        if self.history.path != metrics_path:
            self.history = History(metrics_path)
        self.history.update()

    @classmethod
    def open(cls, folder: Path) -> "RunFiles":
        """Read the folder of a run that has started.

        Raises:
            MapetError: it is not the folder of a run, or its config can't be read.
        """
        check_is_pretraining(folder)
        files = cls(folder)
        if not files.config:
            raise MapetError(
                f"{files.folder / CONFIG_FILE} is empty or not readable YAML: restore it, or give another run's folder"
            )
        return files

    @property
    def name(self) -> str:
        """Return the folder's name, with that of the folder around it if it is one that many runs share."""
        folder = self.folders[-1].absolute()
        return "/".join(folder.parts[-2:]) if folder.name in ("run", "pretrain") else folder.name

    @property
    def finished(self) -> bool:
        """Whether pre-training has saved its backbone."""
        return (self.folder / "backbone").is_dir()

    @property
    def ended_early(self) -> bool:
        """Whether the run stopped or failed, and recorded why."""
        return not self.finished and self.state.status in ("stopped", "failed")

    @property
    def status(self) -> str:
        """Return 'finished', 'not started', 'running', 'not finished' (its process is gone), or the reason why it ended early."""
        if self.finished:
            return "finished"
        if self.ended_early:
            return self.state.reason if self.state.status == "stopped" else f"failed: {self.state.reason}"
        if not self.config:
            return "not started"
        return "running" if self.state.status == "running" and self.age < STALE_AFTER_S else "not finished"

    @property
    def age(self) -> float:
        """Return the seconds since the run last wrote metrics, or its log if it has no metrics; inf without either."""
        for name in ("metrics.jsonl", "train.log"):
            if (self.folder / name).exists():
                return max(0.0, time.time() - (self.folder / name).stat().st_mtime)
        return inf

    @property
    def steps(self) -> float:
        """Return the steps so far: those of the last record, or of a checkpoint after it."""
        return max(self.state.counts.get("steps", 0), self.history.last_step)

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds to the end at the median speed of the last five records; None while that is unknown."""
        steps_per_epoch, speeds = self.history.steps_per_epoch, self.history["images_per_second"].values[-5:]
        epochs, batch_size = self.config.get("epochs"), self.config.get("batch_size")
        if not (steps_per_epoch and speeds and isinstance(epochs, int) and isinstance(batch_size, int)):
            return None
        return max(0.0, epochs * steps_per_epoch - self.steps) * batch_size / max(1e-9, median_high(speeds))

    @property
    def options(self) -> dict[str, str]:
        """Return the resolved options, as text by name."""
        options = with_store_views(self.config, self.state.results.get("views"))
        return {name: _format_option(name, value) for name, value in options.items()}

    @property
    def inputs(self) -> dict[str, str]:
        """Return the images ("images") and the parts of the tokenizer ("tokenizer's ..."), as text by name."""
        count, source = self.state.counts.get("images"), format_value(self.config.get("images"))
        tokenizer = {name: self.tokenizer[name] for name in ("vocab_size", "quantizer") if name in self.tokenizer}
        tokenizer = {**self.tokenizer.get("teacher", {}), **tokenizer}
        if "hash" in self.tokenizer:
            tokenizer["hash"] = self.tokenizer["hash"][:12]
        texts = {f"tokenizer's {name}": format_value(value) for name, value in tokenizer.items()}
        return {"images": f"{count:,} images in {source}" if count else source, **texts}

    @property
    def prediction_task(self) -> list[object]:
        """Return what is predicted and from what: runs of equal tasks have comparable losses."""
        options = ("target", "objective", "patch_order", "mask_ratio")
        return [*map(self.config.get, options), self.tokenizer.get("hash")]

    @property
    def metrics(self) -> dict[str, str]:
        """Return the final metrics of pre-training and the probe scores of the parent `run`: label -> value, both as text."""
        scores = {
            f"{name}, {state}": format_number(value)
            for state in ("untrained", "pretrained")
            for name, value in self.probe.get(state, {}).items()
            if isinstance(value, (int, float))
        }
        return summarize_metrics(self.history) | scores

    @property
    def summary(self) -> RunSummary:
        """Return what the run is diagnosed from."""
        return RunSummary(self.history, self.config, self.tokenizer.get("codebook_stats", {}), self.probe)

    @property
    def warnings(self) -> list[str]:
        """Return sentences about what is wrong; they spell options as the command line of the command that was started does."""
        with spell_as_flags(), spell_in_section("pretrain") if self.parent else nullcontext():
            return diagnose(self.summary)

    @property
    def advice(self) -> str:
        return advise_to_evaluate(self.summary)

    @property
    def inspection(self) -> dict[str, Any]:
        """Return what `inspect-tokenizer` found ("warnings", "measures"), if it wrote into a subfolder of the run; else {}."""
        paths = [path for folder in self.folders for path in sorted(folder.glob(f"*/{TOKENIZER_METRICS}"))]
        return _read_json_object(paths[0]) if paths else {}

    def figures(self) -> list[Path]:
        """List the PNG files that `report`, as part of `run`, wrote into figures/."""
        return [path for folder in self.folders for path in sorted((folder / "figures").glob("*.png"))]

    def step_through(self) -> dict[str, Any] | None:
        """Read the data of the step-through that `report` wrote beside the figures; None without it."""
        contents = (_read_json_object(folder / "figures" / STEP_THROUGH) for folder in self.folders)
        return next((content for content in contents if "images" in content), None)


def with_store_views(config: Mapping[str, Any], views: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a run's options with the views that it trained on: those of the token store, where it used one.

    Args:
        views: "kind", "min_scale" and "number" (of each image) of the store's views, as in run.json.
    """
    if not config.get("tokens") or not views:
        return dict(config)
    text = f"{views['kind']}, {views['number']} of each (token store)"
    return {**config, "views": text, "min_crop_scale": views["min_scale"]}


def _format_option(name: str, value: object) -> str:
    """Format an option's value; None as what it means for that option of `pretrain`."""
    field = PretrainConfig.model_fields.get(name)
    return format_none(field) if value is None and field else format_value(value)


def _read_json_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; {} where it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
