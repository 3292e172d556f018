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
from mapet.reports.metrics import NUM_RECENT, History, RunSummary, advise_to_evaluate, diagnose, summarize_metrics
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
    """The files in the folder of a `mapet pretrain` or `run`, which may still grow or not exist yet.

    Attributes:
        user_folder: the folder that the user named: of `pretrain`, `run` or `demo`.
        folder: of `pretrain`: `given`, or the folder in it.
        parent: folder of the `run` that the pre-training is part of, or None.
        folders: `folder`, then `parent` if there is one.
        config: resolved options of `pretrain` (its config.yaml) by name; {} before it has started, or if the file can't be read.
        state: content of the run.json of `pretrain`; an empty `RunState` (interrupted, pid 0) if it is missing or damaged.
        probe: evaluation by the parent `run`: "untrained" and "pretrained" (each probe -> accuracy), "controls" (name -> the same),
            "verdicts" (fields of `Verdict`), "data"; {} without one.
        verdict: fields of the `RunVerdict` of the parent `run`; {} without one.
        tokenizer: the tokenizer's description: "teacher", "vocab_size", "hash", "codebook_stats", ...; {} if run.json has none.
        history: metrics recorded so far.
    """

    def __init__(self, user_folder: Path) -> None:
        self.user_folder = user_folder
        self.history = History(Path())
        self.refresh()

    def refresh(self) -> None:
        """Read all files again, and set the attributes; of metrics.jsonl only the lines added since the last call are read."""
        self.folder = pretrain_folder(self.user_folder)
        self.parent = parent_run(self.folder)
        self.folders = [self.folder, self.parent] if self.parent else [self.folder]
        try:
            self.config = read_config(self.folder / CONFIG_FILE)
        except MapetError:
            self.config = {}
        unknown = RunState(command="", status="interrupted", pid=0)
        self.state = try_read_state(self.folder) or unknown
        parent_state = self.parent and try_read_state(self.parent)
        self.verdict: Mapping[str, Any] = (parent_state or unknown).results.get("verdict", {})
        self.probe: Mapping[str, Any] = (parent_state or unknown).results.get("evaluation", {})
        self.tokenizer: Mapping[str, Any] = self.state.results.get("tokenizer", {})
        metrics_path = self.folder / "metrics.jsonl"
        if self.history.path != metrics_path:
            self.history = History(metrics_path)
        self.history.update()

    @classmethod
    def open(cls, folder: Path) -> "RunFiles":
        """Read the folder of a pre-training run that has started.

        Args:
            folder: of `mapet pretrain`, `run` or `demo`.

        Raises:
            MapetError: it is another folder, or the config.yaml of the pre-training can't be read.
        """
        check_is_pretraining(folder)
        files = cls(folder)
        if not files.config:
            path = files.folder / CONFIG_FILE
            raise MapetError(f"{path} is missing, empty or not valid YAML: restore it, or give another run's folder")
        return files

    @property
    def name(self) -> str:
        """Return the name of the run's folder (the parent run's, if any); 'run' and 'pretrain' get the parent folder's name: 'x/run'."""
        folder = self.folders[-1].absolute()
        return "/".join(folder.parts[-2:]) if folder.name in ("run", "pretrain") else folder.name

    @property
    def finished(self) -> bool:
        """Return whether pre-training has saved its backbone."""
        return (self.folder / "backbone").is_dir()

    @property
    def ended_early(self) -> bool:
        """Return whether the run stopped or failed, and recorded why."""
        return not self.finished and self.state.status in ("stopped", "failed")

    @property
    def status(self) -> str:
        """Return the run's status as text.

        It is 'finished', 'not started', 'running', 'not finished' (its process is gone, or it has written nothing for
        `STALE_AFTER_S`), the reason why it was stopped, or 'failed: ' and the reason.
        """
        if self.finished:
            return "finished"
        if self.ended_early:
            return self.state.reason if self.state.status == "stopped" else f"failed: {self.state.reason}"
        if not self.config:
            return "not started"
        return "running" if self.state.status == "running" and self.age < STALE_AFTER_S else "not finished"

    @property
    def age(self) -> float:
        """Return the seconds since metrics.jsonl was last written, or train.log if there are no metrics; inf without either."""
        for name in ("metrics.jsonl", "train.log"):
            if (self.folder / name).exists():
                return max(0.0, time.time() - (self.folder / name).stat().st_mtime)
        return inf

    @property
    def steps(self) -> float:
        """Return the number of steps so far: that of the last record of metrics, or of a checkpoint after it (in run.json)."""
        return max(self.state.counts.get("steps", 0), self.history.last_step)

    @property
    def seconds_left(self) -> float | None:
        """Return the estimated seconds to the planned end, at the median speed of the last `NUM_RECENT` records.

        None without a record of an epoch and a speed (images/s), or without a number of epochs and a batch size in the config.
        """
        steps_per_epoch, speeds = self.history.steps_per_epoch, self.history["images_per_second"].values[-NUM_RECENT:]
        epochs, batch_size = self.config.get("epochs"), self.config.get("batch_size")
        if not (steps_per_epoch and speeds and isinstance(epochs, int | float) and isinstance(batch_size, int)):
            return None
        return max(0.0, epochs * steps_per_epoch - self.steps) * batch_size / max(1e-9, median_high(speeds))

    @property
    def options(self) -> dict[str, str]:
        """Return the resolved options of `pretrain`, name -> text; with the views that it trained on, those of the token store if any."""
        options = with_store_views(self.config, self.state.results.get("views"))
        return {name: _format_option(name, value) for name, value in options.items()}

    @property
    def inputs(self) -> dict[str, str]:
        """Return what the run was trained from, name -> text.

        Returns:
            "images": '1,437 images in FOLDER' (the number, if run.json has it); "tokenizer's NAME": each property of the teacher, the
            vocab_size, the quantizer and 12 digits of the hash, if the tokenizer's description has them.
        """
        count, source = self.state.counts.get("images"), format_value(self.config.get("images"))
        tokenizer = {name: self.tokenizer[name] for name in ("vocab_size", "quantizer") if name in self.tokenizer}
        tokenizer = {**self.tokenizer.get("teacher", {}), **tokenizer}
        if "hash" in self.tokenizer:
            tokenizer["hash"] = self.tokenizer["hash"][:12]
        texts = {f"tokenizer's {name}": format_value(value) for name, value in tokenizer.items()}
        return {"images": f"{count:,} images in {source}" if count else source, **texts}

    @property
    def prediction_task(self) -> list[object]:
        """Return target, objective, patch order, mask ratio and hash of the tokenizer: runs with equal ones have comparable losses."""
        options = ("target", "objective", "patch_order", "mask_ratio")
        return [*map(self.config.get, options), self.tokenizer.get("hash")]

    @property
    def metrics(self) -> dict[str, str]:
        """Return label -> text of the final metrics of pre-training, and of the accuracies that the parent `run` measured.

        The latter are labeled 'PROBE, untrained' (random weights), 'PROBE, pretrained' and 'PROBE, NAME (control)'.
        """
        by_model = {state: self.probe.get(state, {}) for state in ("untrained", "pretrained")}
        by_model |= {f"{name} (control)": scores for name, scores in self.probe.get("controls", {}).items()}
        scores = {
            f"{name}, {model}": format_number(value)
            for model, values in by_model.items()
            for name, value in values.items()
            if isinstance(value, (int, float))
        }
        return summarize_metrics(self.history, with_probes=not self.probe) | scores

    @property
    def summary(self) -> RunSummary:
        """Return what the run is diagnosed from."""
        return RunSummary(self.history, self.config, self.tokenizer.get("codebook_stats", {}), self.probe)

    @property
    def warnings(self) -> list[str]:
        """Return a warning for each problem that the metrics show.

        They spell options as flags of the command that the user has started: `--lr` for `pretrain`, `--pretrain.lr` for `run`.
        """
        with spell_as_flags(), spell_in_section("pretrain") if self.parent else nullcontext():
            return diagnose(self.summary)

    @property
    def advice(self) -> str:
        return advise_to_evaluate(self.summary)

    @property
    def inspection(self) -> dict[str, Any]:
        """Return tokenizer_metrics.json: "warnings" and "metrics" of `inspect-tokenizer`, if it wrote into a subfolder of the run.

        {} without one; of several subfolders the first by name, those of the pre-training's folder before those of the parent run.
        """
        paths = [path for folder in self.folders for path in sorted(folder.glob(f"*/{TOKENIZER_METRICS}"))]
        return _read_json_object(paths[0]) if paths else {}

    def figures(self) -> list[Path]:
        """List the PNG files in figures/ of the pre-training's and of the parent run's folder, which `mapet run` writes; by name."""
        return [path for folder in self.folders for path in sorted((folder / "figures").glob("*.png"))]

    def step_through(self) -> dict[str, Any] | None:
        """Read figures/step_through.json, the data of the viewer of single predictions that `mapet run` writes; None without it."""
        contents = (_read_json_object(folder / "figures" / STEP_THROUGH) for folder in self.folders)
        return next((content for content in contents if "images" in content), None)


def with_store_views(config: Mapping[str, Any], views: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a run's options with "views" and "min_crop_scale" as they were in training.

    A run that reads its tokens from a token store (option `tokens`: tokens on disk) trains on the views that these were computed from,
    whatever its own options are; of any other run, the options are returned unchanged (as a copy).

    Args:
        config: resolved options of `pretrain`.
        views: "kind", "min_scale" and "number" (views of each image) of the token store, as in run.json; None if it has none.
    """
    if not config.get("tokens") or not views:
        return dict(config)
    text = f"{views['kind']}, {views['number']} of each (token store)"
    return {**config, "views": text, "min_crop_scale": views["min_scale"]}


def _format_option(name: str, value: object) -> str:
    """Format the value of an option of `pretrain` as text; None is 'auto' or 'none', according to the option's help."""
    field = PretrainConfig.model_fields.get(name)
    return format_none(field) if value is None and field else format_value(value)


def _read_json_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; {} where it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
