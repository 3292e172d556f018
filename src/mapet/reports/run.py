"""What a run folder tells about itself: the data of its report. Only small text files are read, and nothing missing is an error."""

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from math import inf
from pathlib import Path
from statistics import median_high
from typing import Any

from mapet.config.base import meaning_of_none, read_recipe
from mapet.config.pretraining import PretrainConfig
from mapet.errors import MapetError, counted, spell_as_flags, spell_in_section
from mapet.reports.advice import Subject, not_judged, too_early, warnings
from mapet.reports.history import History
from mapet.run_state import RunState, check_is_pretraining, parent_run, pretrain_folder


def number(value: float) -> str:
    """'1,437', '0.8070', '34.2': as many digits as tell."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def percent(value: float) -> str:
    """'5.3%', as the terminal has it."""
    return f"{value:.1%}"


def last(history: History, name: str) -> float:
    return history[name].last


def median(history: History, name: str) -> float:
    return median_high(history[name].values)


FIGURES: dict[str, tuple[str, Callable[[History, str], float], Callable[[float], str]]] = {
    "loss": ("loss, nats for words (mean of the last epoch)", History.over_last_epoch, number),
    "token_entropy": ("loss of guessing by frequency, nats", last, number),
    "token_accuracy": ("token accuracy (mean of the last epoch)", History.over_last_epoch, percent),
    "commonest_token": ("always guessing the commonest word", last, percent),
    "probe/logistic": ("linear probe while pre-training (held-out part of the training images)", last, number),
    "probe/knn": ("k-NN while pre-training (the same)", last, number),
    "images_per_second": ("images a second (median)", median, number),
    "data_wait": ("share of time waiting for images (median)", median, percent),
    "skipped_steps": ("skipped steps", last, number),
}
"""Of metrics.jsonl -> (what a report calls it, what is taken of its records, how that is written)."""
PLACES = (
    "images",  # they are told with their number
    "out",
    "tokenizer",
    "tokens",
    "probe_images",
    "resume",
    "device",
    "micro_batch_size",
    "log_interval",
)
"""Options that say where and how fast, not what."""
CODEBOOK_LABELS = {
    "num_used_codes": ("used codes", "{}"),
    "num_dead_codes": ("dead codes", "{}"),
    "perplexity": ("perplexity", "{} of {} at most: so many tokens, used evenly, would be as varied"),
    "top_code_fraction": ("most frequent token", "{} of the patches"),
    "quantization_error": (
        "quantization error",
        "{}: squared distance of features to their code, relative to their variance",
    ),
    "num_patches": ("measured on patches", "{}"),
}
"""Of visual_tokenizer.json's codebook_stats -> (what a report calls it, how it is written)."""
QUIET = 3600
"""After so many seconds without a new figure a run that never said why it stopped is not taken to be running."""
STEP_THROUGH = "step_through.json"
"""Beside the figures."""
TOKENIZER_METRICS = "tokenizer_metrics.json"
"""What `inspect-tokenizer` writes."""


class RunFiles:
    """A run folder of `pretrain` or `run`, which may still be growing or not be there yet."""

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
            self.recipe = read_recipe(self.folder / "config.yaml")
        except MapetError:
            self.recipe = {}
        self.state = _state(self.folder)
        self.probe = _mapping(_state(self.parent).results.get("evaluation")) if self.parent else {}
        self.tokenizer = _mapping(self.state.results.get("tokenizer"))
        if self.history.path != (path := self.folder / "metrics.jsonl"):
            self.history = History(path)
        self.history.update()

    @classmethod
    def open(cls, folder: Path) -> "RunFiles":
        """Raises MapetError: it is no run."""
        check_is_pretraining(folder)
        files = cls(folder)
        if not files.recipe:
            raise MapetError(f"{files.folder / 'config.yaml'} can't be read, or is empty")
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
    def status(self) -> str:
        if self.finished:
            return "finished"
        if self.ended_early:
            return self.state.reason if self.state.status == "stopped" else f"failed: {self.state.reason}"
        if not self.recipe:
            return "not started"
        return "running" if self.state.status == "running" and self.age < QUIET else "not finished"

    @property
    def ended_early(self) -> bool:
        """Whether it said why it stopped."""
        return self.state.status in ("stopped", "failed")

    @property
    def age(self) -> float:
        """Seconds since the run last wrote figures, or its log while it has none."""
        for name in ("metrics.jsonl", "train.log"):
            try:
                return max(0.0, time.time() - (self.folder / name).stat().st_mtime)
            except OSError:
                pass
        return inf

    @property
    def steps(self) -> float | None:
        """Steps made: those of the last record, or of a checkpoint after it."""
        records = self.history.records
        made = max(self.state.counts.get("steps", 0), records[-1]["step"] if records else 0)
        return made or None

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last records; None while that can't be said."""
        epochs, batch = (self.recipe.get(name) for name in ("epochs", "batch_size"))
        per_epoch, speed = self.history.steps_per_epoch, self.history["images_per_second"].values[-5:]
        if not (isinstance(epochs, int) and isinstance(batch, int) and per_epoch and speed and self.steps):
            return None
        return max(0.0, epochs * per_epoch - self.steps) * batch / max(1e-9, median_high(speed))

    @property
    def subject(self) -> Subject:
        return Subject(self.history, self.recipe, _mapping(self.tokenizer.get("codebook_stats")), self.probe)

    @property
    def predicts(self) -> list[str]:
        """What a loss is of: runs in which this differs have losses that can't be compared."""
        return [
            _text(part)
            for part in (
                *(self.recipe.get(name) for name in ("target", "objective", "patch_order", "mask_ratio")),
                self.tokenizer.get("hash"),
                self.tokenizer.get("vocab_size"),
            )
        ]

    def figures(self) -> list[Path]:
        """List PNG files that `report`, as part of `run`, left in figures/."""
        return [path for folder in self.around for path in sorted((folder / "figures").glob("*.png"))]

    def step_through(self) -> dict[str, Any] | None:
        """Read what `report` left beside the figures."""
        found = self._json(f"figures/{STEP_THROUGH}")
        return found if "images" in found else None

    def data(self) -> dict[str, Any]:
        """Gather all of it for the page, but curves and images."""
        return {
            "name": self.name,
            "status": self.status,
            "finished": self.finished,
            "facts": list(self._facts()),
            "config": {
                key: self._option(key, value)
                for key, value in with_views(self.recipe, self.state.results.get("views")).items()
            },
            "metrics": self.metrics(),
            "warnings": self.warnings(),
            "early": too_early(self.subject),
            "unjudged": not_judged(self.subject),
            "log": self.state.warnings,
            "logged": self.state.counts.get("warnings", 0),
            "predicts": self.predicts,
            "data": self._data(),
            "tokenizer": list(self._of_tokenizer()),
            "health": self._health(),
            "steps_per_epoch": self.history.steps_per_epoch,
        }

    def warnings(self) -> list[str]:
        """In words, with options as the command that the run was started with has them."""
        with spell_as_flags(), spell_in_section("pretrain") if self.parent else nullcontext():
            return warnings(self.subject)

    def metrics(self) -> dict[str, str]:
        """Return final metrics: name -> number, both as text."""
        found = figures(self.history)
        for state in ("untrained", "pretrained"):
            for key, value in _mapping(self.probe.get(state)).items():
                if isinstance(value, (int, float)):
                    found[f"{key}, {state}"] = number(value)
        return found

    def _option(self, name: str, value: Any) -> str:
        if value is None and (field := PretrainConfig.model_fields.get(name)):
            return meaning_of_none(field)
        return _text(value)

    def _facts(self) -> Iterator[tuple[str, str]]:
        recipe, state, per_epoch = self.recipe, self.state, self.history.steps_per_epoch
        yield "status", self.status
        if state.description:
            yield "what", state.description
        if recipe:
            yield "images", self._images()
        if per_epoch and self.steps is not None:
            yield (
                "epochs",
                f"{number(round(self.steps / per_epoch, 1))} of {_text(recipe.get('epochs'))}, {self.steps:,.0f} steps",
            )
        if state.pid:
            resumed = f", resumed {counted(state.resumes, 'time')}" if state.resumes else ""
            yield "started", f"{state.started.astimezone():%Y-%m-%d %H:%M:%S}"
            yield "duration", f"{span(state.seconds)}{resumed}"
            yield "system", ", ".join([state.device, *(f"{name} {found}" for name, found in state.versions.items())])
            yield "resumed with" if state.resumes else "command", shlex.join(state.argv)

    def _images(self) -> str:
        """'1,437 images in photos'."""
        images = self.state.counts.get("images")
        count = f"{images:,} images in " if images else ""
        return f"{count}{_text(self.recipe.get('images'))}"

    def _data(self) -> dict[str, str]:
        """What a run was made of: images and words."""
        made = dict(_mapping(self.tokenizer.get("teacher")))
        made |= {name: self.tokenizer[name] for name in ("vocab_size", "quantizer") if name in self.tokenizer}
        made |= {"words (hash)": self.tokenizer["hash"][:12]} if isinstance(self.tokenizer.get("hash"), str) else {}
        return {"images": self._images()} | {f"tokenizer's {name}": _text(value) for name, value in made.items()}

    def _of_tokenizer(self) -> Iterator[tuple[str, str]]:
        """(name, value) of each fact."""
        if not (told := self.tokenizer):
            return
        teacher, health = _mapping(told.get("teacher")), _mapping(told.get("codebook_stats"))
        own = teacher.get("teacher") == "pixels"
        yield (
            "teacher",
            f"{_text(teacher.get('teacher'))} ({'label-free' if own else 'the tokens inherit its training data'})",
        )
        vocab_size = told.get("vocab_size")
        yield "codes", _text(vocab_size)
        yield "patches", f"{_size(told.get('grid'))} of {_size(teacher.get('student_size'))} px"
        for key, (name, text) in CODEBOOK_LABELS.items():
            if isinstance(value := health.get(key), (int, float)):
                yield name, text.format(percent(value) if key == "top_code_fraction" else number(value), vocab_size)

    def _health(self) -> dict[str, Any]:
        """Read what `inspect-tokenizer` found, if its folder is inside the run's."""
        paths = [path for folder in self.around for path in sorted(folder.glob(f"*/{TOKENIZER_METRICS}"))]
        found = _read(paths[0]) if paths else {}
        measures = _mapping(found.get("measures"))
        return {
            "warnings": [str(line) for line in found.get("warnings") or []],
            "measures": [(name, text) for name, value in measures.items() if (text := _measure(value))],
        }

    def _json(self, name: str) -> dict[str, Any]:
        return next((found for folder in self.around if (found := _read(folder / name))), {})


def figures(history: History) -> dict[str, str]:
    """What a run came to, or has come to so far: name -> number in words."""
    known = set(history.names)
    return {name: text(of(history, key)) for key, (name, of, text) in FIGURES.items() if key in known}


def with_views(recipe: Mapping[str, Any], views: Mapping[str, Any] | None) -> dict[str, Any]:
    """The recipe with the views that were shown: those of the token store, where the run used one.

    Args:
        views: kind, min_scale and number of the store's views.
    """
    if not recipe.get("tokens") or not views:
        return dict(recipe)
    return {
        **recipe,
        "views": f"{views['kind']}, {views['number']} of each (token store)",
        "min_crop_scale": views["min_scale"],
    }


def span(seconds: float) -> str:
    """'45 s', '3 min 20 s', '5 h 12 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _state(folder: Path) -> RunState:
    """That of a folder; one that says nothing where it is missing or damaged."""
    try:
        return RunState.read(folder)
    except MapetError:
        return RunState(command="", status="interrupted", pid=0)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(_mapping(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecursionError):
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _measure(value: Any) -> str:
    """A measure of health.json on one line; '' for what is a group of several."""
    if isinstance(value, (int, float)):
        return number(value)
    pairs = [(key, part) for key, part in _mapping(value).items() if isinstance(part, (int, float))]
    return ", ".join(f"{key.replace('_', ' ')} {number(part)}" for key, part in pairs)


def _size(value: object) -> str:
    """Write height and width as '224 x 224'."""
    return " x ".join(map(_text, value)) if isinstance(value, (list, tuple)) else _text(value)


def _text(value: object) -> str:
    """Write a value of a config or description as YAML has it, on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(part)}" for key, part in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(part) for part in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)
