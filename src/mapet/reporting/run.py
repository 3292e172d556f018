"""What a run folder tells about itself: the data of its report. Only small text files are read, and nothing missing is an error."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mapet.errors import MapetError
from mapet.recipe import read_recipe
from mapet.reporting.advice import RECORDS, Subject, warnings
from mapet.reporting.history import History

FIGURES = {
    "loss": "loss, nats",
    "token_entropy": "loss of guessing by frequency, nats",
    "token_accuracy": "token accuracy",
    "commonest_token": "always guessing the commonest word",
    "probe/linear": "linear probe while pre-training",
    "probe/knn": "k-NN while pre-training",
    "images_per_second": "images a second (median)",
    "data_wait": "share of time waiting for images (median)",
    "skipped_steps": "skipped steps",
}
"""Of metrics.jsonl -> name in the table of final figures; without a remark, the last one recorded."""
PLACES = ("images", "out", "tokenizer", "tokens", "probe_images", "resume", "device", "workers")
"""Options that say where, not what."""
LOGGED = 12
"""Warnings of train.log that are shown."""


@dataclass(frozen=True)
class Log:
    """What train.log tells.

    Attributes:
        sessions: (start, last line) of each time the run was started or resumed.
        system: device, versions and command of the last session.
        description: the run in one line, as `pretrain` wrote it.
        stopped: why it stopped, if it said so last.
    """

    sessions: list[tuple[datetime, datetime]]
    system: str = ""
    description: str = ""
    stopped: str = ""
    warnings: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Log":
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return cls([])
        sessions: list[tuple[datetime, datetime]] = []
        description = stopped = ""
        found = []
        for time, level, message in _log_lines(text):
            stopped = message.split(": ", 2)[-1] if message.startswith("stopped: ") else ""  # without the error's class
            if message in ("started with", "resumed with"):
                sessions.append((time, time))
            elif sessions:
                sessions[-1] = sessions[-1][0], time
            if level in ("WARNING", "ERROR"):
                found.append(message)
            if " parameters, " in message and " images of " in message:
                description = message
        systems = re.findall(r"^system: (.*)$", text, flags=re.M)
        return cls(sessions, systems[-1] if systems else "", description, stopped, tuple(found))

    @property
    def duration(self) -> timedelta:
        """Time that the run was at work, over all sessions."""
        return sum((end - start for start, end in self.sessions), timedelta())

    @property
    def images(self) -> int | None:
        """How many the run was trained on."""
        found = re.search(r" on ([\d,]+) images of ", self.description)
        return int(found[1].replace(",", "")) if found else None


def _log_lines(text: str) -> Iterator[tuple[datetime, str, str]]:
    for stamp, level, message in re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)$", text, flags=re.M):
        try:
            yield datetime.fromisoformat(stamp), level, message
        except ValueError:
            continue


def pretrain_folder(folder: Path) -> Path:
    """The folder of `pretrain` in one of `run`, or the folder itself."""
    inner = folder / "pretrain"
    return inner if (inner / "config.yaml").is_file() or (folder / "recipe.yaml").is_file() else folder


class RunFiles:
    """A run folder of `pretrain` or `run`, which may still be growing or not be there yet."""

    def __init__(self, given: Path) -> None:
        self.given = given
        self.history = History(Path())
        self.refresh()

    def refresh(self) -> None:
        """Read again; of the metrics only what is new."""
        self.folder = pretrain_folder(self.given)
        outer = self.folder.parent if self.folder.name == "pretrain" else self.folder
        self.around = (
            [self.folder, outer] if outer != self.folder and (outer / "recipe.yaml").is_file() else [self.folder]
        )
        try:
            self.recipe = read_recipe(self.folder / "config.yaml")
        except MapetError:
            self.recipe = {}
        self.log = Log.read(self.folder / "train.log")
        self.tokenizer = self._tokenizer()
        if self.history.path != (path := self.folder / "metrics.jsonl"):
            self.history = History(path)
        self.history.update()

    @classmethod
    def open(cls, folder: Path) -> "RunFiles":
        """Raises MapetError: it is no run."""
        files = cls(folder)
        if not folder.exists():
            raise MapetError(f"{folder} does not exist: give the folder of a run")
        if not files.recipe:
            raise MapetError(f"{folder} is not a pre-training run: it has no config.yaml")
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
        if self.log.stopped:
            return self.log.stopped if self.log.stopped.startswith("stopped") else f"stopped: {self.log.stopped}"
        return "not finished" if self.recipe else "not started"

    @property
    def subject(self) -> Subject:
        return Subject(self.history, self.recipe, _mapping(self.tokenizer.get("health")))

    def pictures(self) -> list[Path]:
        """PNG files that `run` or `inspect` left in pictures/."""
        return [path for folder in self.around for path in sorted((folder / "pictures").glob("*.png"))]

    def data(self) -> dict[str, Any]:
        """All of it for the page, but curves and pictures."""
        return {
            "name": self.name,
            "status": self.status,
            "facts": list(self._facts()),
            "recipe": {str(key): _text(value) for key, value in self.recipe.items()},
            "figures": self.figures(),
            "warnings": warnings(self.subject),
            "early": len(self.history["loss"].values) < RECORDS,
            "log": list(self.log.warnings[-LOGGED:]),
            "logged": len(self.log.warnings),
            "tokenizer": list(self._of_tokenizer()),
            "health": self._health(),
            "steps_per_epoch": self.history.steps_per_epoch,
        }

    def figures(self) -> dict[str, str]:
        """The final figures, in words and numbers."""
        found = {}
        for key, name in FIGURES.items():
            if values := self.history[key].values:
                value = sorted(values)[len(values) // 2] if "(median)" in name else values[-1]
                found[name] = number(value)
        probe = self._json("probe.json")
        for state in ("untrained", "pretrained"):
            for key, value in _mapping(probe.get(state)).items():
                if isinstance(value, (int, float)):
                    found[f"{'k-NN' if key == 'knn' else f'{key} probe'}, {state}"] = number(value)
        return found

    def _facts(self) -> Iterator[tuple[str, str]]:
        recipe, log, epochs = self.recipe, self.log, self.history["epoch"].values
        yield "status", self.status
        if log.description:
            yield "what", log.description
        if recipe:
            images = log.images or _read(Path(str(recipe.get("tokens") or "")) / "store.json").get("num_images")
            count = f"{images:,} images in " if isinstance(images, int) else ""
            yield "images", f"{count}{_text(recipe.get('images'))}"
        if epochs:
            yield (
                "epochs",
                f"{epochs[-1]:.4g} of {_text(recipe.get('epochs'))}, {self.history.records[-1]['step']:,.0f} steps",
            )
        if log.sessions:
            resumed = f", resumed {len(log.sessions) - 1} times" if len(log.sessions) > 1 else ""
            yield "started", f"{log.sessions[0][0]:%Y-%m-%d %H:%M:%S}"
            yield "duration", f"{span(log.duration.total_seconds())}{resumed}"
        system, _, command = log.system.rpartition("; ")
        if system:
            yield "system", system
            yield "command", command

    def _tokenizer(self) -> dict[str, Any]:
        named = Path(str(self.recipe.get("tokenizer") or ""))
        for folder in (named, *(around / "tokenizer" for around in self.around)):
            if folder != Path() and (content := _read(folder / "tokenizer.json")):
                return content
        return {}

    def _of_tokenizer(self) -> Iterator[tuple[str, str]]:
        """(name, value) of each fact."""
        if not (told := self.tokenizer):
            return
        teacher, health = _mapping(told.get("teacher")), _mapping(told.get("health"))
        own = teacher.get("teacher") == "pixels"
        yield (
            "teacher",
            f"{_text(teacher.get('teacher'))} ({'label-free' if own else 'what it has seen, the words inherit'})",
        )
        yield "words", _text(told.get("vocab_size"))
        yield "patches", f"{_text(told.get('grid'))} of {_text(teacher.get('student_size'))} px"
        for key in ("used_codes", "dead_codes", "perplexity", "commonest_share", "quantization_error", "patches"):
            if isinstance(value := health.get(key), (int, float)):
                yield {"patches": "measured on patches"}.get(key, key.replace("_", " ")), number(value)

    def _health(self) -> dict[str, Any]:
        """What `inspect --tokenizer` found, if its folder is beside the run's."""
        found = self._json("health/health.json") or self._json("health.json")
        measures = _mapping(found.get("measures"))
        return {
            "warnings": [str(line) for line in found.get("warnings") or []],
            "figures": [(name, text) for name, value in measures.items() if (text := _measure(value))],
        }

    def _json(self, name: str) -> dict[str, Any]:
        return next((found for folder in self.around if (found := _read(folder / name))), {})


def number(value: float) -> str:
    """'1,437', '0.8070', '34.2': as many digits as tell."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def span(seconds: float) -> str:
    """'45 s', '3 min 20 s', '5 h 12 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


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


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(part)}" for key, part in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return " x ".join(_text(part) for part in value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "automatic" if value is None else str(value)
