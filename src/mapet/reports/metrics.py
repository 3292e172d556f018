"""What a run wrote of its metrics, and what they say that a user should know."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite, sqrt
from pathlib import Path
from statistics import fmean, median, median_high
from typing import Any, NamedTuple

from mapet.reports.render import number, percent, render_part

RECORDS = 8
"""So many records before anything is said of a run's course."""
EARLY = 0.1
"""Share of the planned epochs that a run may take to leave the baselines."""
FEW_STEPS = 1000
"""Fewer, and what is not learned yet may only need more of them."""
NEAR = 0.01
"""So near to a baseline, an accuracy or a loss (as a share of it) has not left it."""


Record = dict[str, float]
"""A line: step, and metrics by name. Those that were not finite are left out."""


class Series(NamedTuple):
    """One metric over the steps at which it was recorded."""

    steps: list[float]
    values: list[float]

    @property
    def last(self) -> float:
        return self.values[-1]


@dataclass
class History:
    """The records of a run so far.

    Attributes:
        generation: how often the file was begun anew (a run that resumes drops what came after its checkpoint); with it
            all records before are void.
    """

    path: Path
    records: list[Record] = field(default_factory=list)
    generation: int = 0
    _offset: int = 0
    _inode: int = 0

    @classmethod
    def read(cls, path: Path) -> "History":
        history = cls(path)
        history.update()
        return history

    def update(self) -> None:
        """Read what was added; a last line without an end is left for the next time. A file that isn't there has no records."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self.generation += bool(self._inode)
                self.records, self._offset, self._inode = [], 0, status.st_ino
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        self.records += filter(None, map(_record, whole.split(b"\n")))

    def __getitem__(self, name: str) -> Series:
        """A metric's series, empty if it was never recorded."""
        found = [record for record in self.records if name in record]
        return Series([record["step"] for record in found], [record[name] for record in found])

    @property
    def names(self) -> list[str]:
        """Of all metrics, in order of appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record if name != "step"))

    @property
    def steps_per_epoch(self) -> float | None:
        """None before the first record that tells."""
        known = (record["step"] / record["epoch"] for record in reversed(self.records) if record.get("epoch"))
        return next(known, None)

    def over_last_epoch(self, name: str) -> float:
        """Mean of a recorded metric over as many steps as an epoch has: a record alone may be of a single step.

        Each record stands for the steps since the one before it.
        """
        steps, values = self[name]
        start = steps[-1] - (self.steps_per_epoch or 0)
        weights = [max(0.0, end - max(begin, start)) for begin, end in pairwise([0.0, *steps])]
        return fmean(values, weights) if any(weights) else values[-1]


def _record(line: bytes) -> Record | None:
    """None for what is no record: a line that a crash cut short."""
    try:
        numbers = {key: float(value) for key, value in json.loads(line).items() if isinstance(value, (int, float))}
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return {key: value for key, value in numbers.items() if isfinite(value)} if "step" in numbers else None


def thinned(series: Series, most: int) -> Series:
    """At most `most` points, each the mean of as many neighbors; the first and the last stay as they are."""
    inner, buckets = len(series.steps) - 2, most - 2
    if inner <= buckets:
        return series
    ends = [1 + inner * i // buckets for i in range(buckets + 1)]
    steps, values = ([column[0], *(fmean(column[a:b]) for a, b in pairwise(ends)), column[-1]] for column in series)
    return Series(steps, values)


# ---- what a run came to


def last(history: History, name: str) -> float:
    return history[name].last


def middle(history: History, name: str) -> float:
    return median_high(history[name].values)


FIGURES: dict[str, tuple[str, Callable[[History, str], float], Callable[[float], str]]] = {
    "loss": ("loss, nats for words (mean of the last epoch)", History.over_last_epoch, number),
    "unigram_entropy": ("loss of guessing by frequency, nats", last, number),
    "token_accuracy": ("token accuracy (mean of the last epoch)", History.over_last_epoch, percent),
    "majority_token_accuracy": ("always guessing the commonest word", last, percent),
    "probe/logistic": ("linear probe while pre-training (held-out part of the training images)", last, number),
    "probe/knn": ("k-NN while pre-training (the same)", last, number),
    "images_per_second": ("images a second (median)", middle, number),
    "data_time_fraction": ("share of time waiting for images (median)", middle, percent),
    "skipped_steps": ("skipped steps", last, number),
}
"""Of metrics.jsonl -> (what a report calls it, what is taken of its records, how that is written)."""


def figures(history: History) -> dict[str, str]:
    """What a run came to, or has come to so far: name -> number in words."""
    known = set(history.names)
    return {name: text(of(history, key)) for key, (name, of, text) in FIGURES.items() if key in known}


# ---- what a user should know


class Subject(NamedTuple):
    """What is judged.

    Attributes:
        recipe: options of `pretrain` as resolved.
        health: codebook_stats of visual_tokenizer.json, measured on the patches that the codebook was fitted to.
        probe: the probe of the run that it is part of.
    """

    history: History
    recipe: Mapping[str, Any]
    health: Mapping[str, Any] = {}
    probe: Mapping[str, Any] = {}

    def has_begun(self, series: Series) -> bool:
        """Whether enough of the run is over for its course to say something."""
        epochs = self.history["epoch"]
        over = not epochs.values or epochs.last >= EARLY * float(self.recipe.get("epochs") or 0)
        return over and len(series.values) >= RECORDS


def warnings(run: Subject) -> list[str]:
    """Say what is wrong or may be; empty for a run that goes well."""
    return [render_part("advice.md", rule, *told) for rule, told in _findings(run)]


def not_judged(run: Subject) -> str:
    """Say what to do where the run is over and there was no label to judge it by; else an empty text."""
    epochs = run.history["epoch"].values
    over = bool(epochs) and epochs[-1] >= float(run.recipe.get("epochs") or 0)
    if run.probe or run.history["probe/logistic"].values or not over or not run.has_begun(run.history["loss"]):
        return ""
    return render_part("advice.md", "not_judged", run.recipe)


def _findings(run: Subject) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name of each rule that holds -> what its sentence tells."""
    history = run.history
    # guessing the most frequent token, or by frequency, would do as well
    accuracy, loss = history["token_accuracy"], history["loss"]
    majority, unigram = history["majority_token_accuracy"], history["unigram_entropy"]
    few_steps = loss.steps[-1] if loss.steps and loss.steps[-1] < FEW_STEPS else None
    if run.has_begun(accuracy) and majority.values:
        now, guess = history.over_last_epoch("token_accuracy"), majority.last
        if max(now, fmean(accuracy.values[-5:])) < min(guess + NEAR, 1.5 * guess):
            yield "accuracy_at_baseline", (run.recipe, few_steps, now, guess)
    if run.has_begun(loss) and unigram.values:
        now, guess = history.over_last_epoch("loss"), unigram.last
        if min(now, fmean(loss.values[-5:])) >= (1 - NEAR) * guess:
            yield "loss_at_baseline", (run.recipe, few_steps, now, guess)
    # the loss rises, steps were skipped, or most gradients are clipped
    losses, norms, skipped = loss.values, history["gradient_norm"].values, history["skipped_steps"]
    if len(losses) >= 2 * RECORDS:
        width = max(1, len(losses) // 10)
        lowest = min(fmean(losses[i : i + width]) for i in range(0, len(losses) - width + 1, width))
        if (now := fmean(losses[-width:])) >= lowest + max(0.1 * abs(lowest), 0.001):
            yield "loss_rises", (now, lowest)
    if skipped.values and skipped.last:
        yield "skipped_steps", (skipped.last, skipped.steps[-1])
    if (limit := run.recipe.get("clip_grad")) and len(norms) >= 2 * RECORDS:
        late = norms[len(norms) // 2 :]
        if (share := fmean(norm > limit for norm in late)) >= 0.5:
            yield "mostly_clipped", (limit, share, median(late))
    # the loader is slower than the model, or the last quarter less than half as fast as what was before
    waiting, speed = history["data_time_fraction"].values, history["images_per_second"].values
    if len(waiting) >= RECORDS and (share := median(waiting[len(waiting) // 4 :])) >= 0.25:
        yield "waits_for_images", (share,)
    if len(speed) >= 4 * RECORDS:
        quarter = len(speed) // 4
        before, now = median(speed[quarter:-quarter]), median(speed[-quarter:])
        if now <= before / 2:
            yield "slower_than_it_was", (before, now)
    # the features get worse, or no better, or may be no better than those of random weights
    steps, scores = history["probe/logistic"]
    if len(scores) >= 3:
        if (best := max(scores)) - scores[-1] >= 0.03:
            yield "probe_falls", (best, steps[scores.index(best)], scores[-1])
        elif max(scores[1:]) - scores[0] < 0.01:
            yield "probe_stands_still", (scores[0], scores[-1])
    if run.probe.keys() >= {"untrained", "pretrained", "data"}:
        before, after = (run.probe[state]["logistic"] for state in ("untrained", "pretrained"))
        share, images = (before + after) / 2, run.probe["data"]["test_images"]
        if after - before < 2 * sqrt(2 * share * (1 - share) / images):  # two standard errors of the difference
            yield "probe_like_untrained", (before, after, images)
    # nearly every token is predicted, much of the codebook is never used, or a single token takes most patches
    if len(accuracy.values) >= RECORDS and (now := fmean(accuracy.values[-5:])) >= 0.95:
        yield "too_easy", (now,)
    used, dead = (run.health.get(name) or 0 for name in ("num_used_codes", "num_dead_codes"))
    if dead > used / 4:
        yield "dead_words", (dead, used + dead)
    if (share := run.health.get("top_code_fraction") or 0) >= 0.5:
        yield "one_word_for_most", (share,)
