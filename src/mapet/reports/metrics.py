"""The metrics that a run recorded: their history, their final values, and warnings about the run's course."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import fmean, median, median_high
from typing import Any, NamedTuple

from mapet.reports.render import format_number, format_percent, render_macro

MIN_RECORDS = 8
"""Records that a run must have before its course is diagnosed."""
EARLY = 0.1
"""Fraction of the planned epochs in which a run may stay at the baselines: warm-up is no failure."""
FEW_STEPS = 1000
"""Below so many steps the advice for a run at a baseline is to train longer."""
MAX_BASELINE_FACTOR = 1.5
"""Token accuracies below the majority baseline times this are near it, where the most frequent of thousands of tokens is rare."""
MIN_RISE, LOSS_ROUNDING = 0.1, 0.001
"""By which fraction of its lowest value a loss must rise for a warning, and by how much at least: less may be rounding."""
MANY_CLIPPED, SLOW_LOADING = 0.5, 0.25
"""Fraction of gradients that are clipped, and of the time that training waits for images, from which on a warning is given."""
MIN_FALL, MIN_GAIN = 0.03, 0.01
"""By how much a probe's accuracy must fall, more than the noise of a small test set, or gain, for no warning."""
TOO_EASY, DOMINANT_CODE = 0.95, 0.5
"""Token accuracy, and fraction of patches with one code, from which on a warning is given."""
NEAR_BASELINE = 0.01
"""A token accuracy within 1 point of its baseline, or a loss within 1 % of it, counts as no better."""
NUM_RECENT = 5
"""Records whose mean is a metric's recent value."""


class Series(NamedTuple):
    """One metric over the steps at which it was recorded."""

    steps: list[float]
    values: list[float]


@dataclass
class History:
    """The metrics that a run has recorded so far in its metrics.jsonl.

    Attributes:
        path: of metrics.jsonl, whose lines are JSON objects (records) with "step" and metrics by name, e.g. "epoch", "loss".
        series: name of a metric -> steps and values, in order of appearance; "step" is none of them.
        last_step: step of the newest record; 0 without records.
        _offset: bytes of the file that have been read.
        _inode: the file's, by which a replaced file is recognized.
    """

    path: Path
    series: dict[str, Series] = field(default_factory=dict)
    last_step: float = 0
    _offset: int = 0
    _inode: int = 0

    @classmethod
    def read(cls, path: Path) -> "History":
        """Read a metrics.jsonl; a missing file has no records."""
        history = cls(path)
        history.update()
        return history

    def update(self) -> None:
        """Read the lines added to metrics.jsonl since the last call, and add their records; without the file do nothing.

        A last line without a newline is still being written, and is left for the next call. A file that was replaced (it has
        another inode) or truncated is read again from its start: a run that resumes drops the records after its checkpoint.
        """
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self.series, self.last_step, self._offset, self._inode = {}, 0, 0, status.st_ino
            file.seek(self._offset)
            complete_lines, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete_lines + newline)
        for line in complete_lines.split(b"\n"):
            if record := _parse_record(line):
                self.add(record)

    def add(self, record: Mapping[str, float]) -> None:
        """Add a record: its "step", and metrics by name."""
        self.last_step = record["step"]
        for name, value in record.items():
            if name != "step":
                steps, values = self.series.setdefault(name, Series([], []))
                steps.append(record["step"])
                values.append(value)

    def __getitem__(self, name: str) -> Series:
        """Return the series of a metric, empty if it was never recorded."""
        return self.series.get(name, Series([], []))

    @property
    def steps_per_epoch(self) -> float | None:
        """Return the steps of an epoch, by the newest record that has an epoch; None without one."""
        steps, epochs = self["epoch"]
        return steps[-1] / epochs[-1] if epochs and epochs[-1] else None

    def last(self, name: str) -> float:
        """Return the last value of a recorded metric."""
        return self[name].values[-1]

    def median(self, name: str) -> float:
        """Return the median of all values of a recorded metric (the upper of the two middle ones of an even number)."""
        return median_high(self[name].values)

    def mean_of_last_epoch(self, name: str) -> float:
        """Return the mean of a recorded metric over the last epoch's steps; the last value while the length of an epoch is unknown.

        Each record is a mean over the steps since the record before it, and is weighted by how many of them are in the last epoch.
        """
        steps, values = self[name]
        epoch_start = steps[-1] - (self.steps_per_epoch or 0)  # of the epoch that ends with the last record
        weights = [max(0.0, end - max(begin, epoch_start)) for begin, end in pairwise([0.0, *steps])]
        return fmean(values, weights) if any(weights) else values[-1]


def _parse_record(line: bytes) -> dict[str, float]:
    """Return the finite numbers of a line of metrics.jsonl by name, booleans as 0 or 1; texts, lists and NaN are skipped.

    Returns:
        {} if the line is no JSON object, was cut short by a crash, or has no finite "step".
    """
    try:
        values = json.loads(line).items()
        record = {name: float(value) for name, value in values if isinstance(value, (int, float)) and isfinite(value)}
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return {}
    return record if "step" in record else {}


def downsample(series: Series, max_points: int) -> Series:
    """Return a series of at most `max_points` (3 or more) points: the first, means of consecutive buckets of points, and the last.

    Buckets have equally many points, give or take one; step and value of a bucket are both means.
    """
    num_inner, num_buckets = len(series.steps) - 2, max_points - 2
    if num_inner <= num_buckets:
        return series
    edges = [1 + num_inner * i // num_buckets for i in range(num_buckets + 1)]
    steps, values = (
        [column[0], *(fmean(column[start:end]) for start, end in pairwise(edges)), column[-1]] for column in series
    )
    return Series(steps, values)


# ---- final values

PROBED = "(held-out part of the training images)"
METRIC_LABELS: dict[str, tuple[str, Callable[[History, str], float], Callable[[float], str]]] = {
    "loss": ("loss, nats if tokens are predicted (mean of the last epoch)", History.mean_of_last_epoch, format_number),
    "unigram_entropy": ("unigram baseline of the loss, nats", History.last, format_number),
    "token_accuracy": ("token accuracy (mean of the last epoch)", History.mean_of_last_epoch, format_percent),
    "majority_token_accuracy": ("majority baseline of the token accuracy", History.last, format_percent),
    "probe/logistic_balanced_accuracy": (f"linear probe, balanced accuracy {PROBED}", History.last, format_number),
    "probe/logistic_auroc": (f"linear probe, AUROC {PROBED}", History.last, format_number),
    "probe/logistic": (f"linear probe {PROBED}", History.last, format_number),
    "probe/knn_balanced_accuracy": (f"k-NN probe, balanced accuracy {PROBED}", History.last, format_number),
    "probe/knn_auroc": (f"k-NN probe, AUROC {PROBED}", History.last, format_number),
    "probe/knn": (f"k-NN probe {PROBED}", History.last, format_number),
    "images_per_second": ("images/s (median)", History.median, format_number),
    "data_time_fraction": ("fraction of time waiting for images (median)", History.median, format_percent),
    "skipped_steps": ("skipped steps", History.last, format_number),
}
"""Key of metrics.jsonl -> (label in reports, function that reduces its records to one value, function that formats that value)."""


def summarize_metrics(history: History, with_probes: bool = True) -> dict[str, str]:
    """Return label -> formatted final value (the value so far while the run trains) of each recorded metric of `METRIC_LABELS`.

    Args:
        history: of the run.
        with_probes: include probes during training; False where the run has an evaluation, so that it has one number of each probe.

    `METRIC_LABELS` has, by key of metrics.jsonl: the label, the reduction of all records to one value, and the format of the value.
    """
    return {
        label: format_value(reduce(history, name))
        for name, (label, reduce, format_value) in METRIC_LABELS.items()
        if name in history.series and (with_probes or not name.startswith("probe/"))
    }


# ---- warnings


class RunSummary(NamedTuple):
    """What a run is diagnosed from.

    Attributes:
        history: metrics recorded so far; it is indexed by name and gives (steps, values).
        config: resolved options of `pretrain` by name, e.g. "epochs", "clip_grad"; {} if its config.yaml can't be read.
        codebook_stats: "num_used_codes", "num_dead_codes", "top_code_fraction", ... of the tokenizer, measured on the patches that the
            codebook was fitted to; {} without a tokenizer.
        probe: evaluation by the `mapet run` that the pre-training is part of: "verdicts" (fields of `Verdict`, of each probe), ...; else {}.
    """

    history: History
    config: Mapping[str, Any]
    codebook_stats: Mapping[str, Any] = {}
    probe: Mapping[str, Any] = {}

    def can_diagnose(self, series: Series) -> bool:
        """Return whether a metric may be warned of: it has `MIN_RECORDS` records, and the fraction `EARLY` of the planned epochs is over.

        Without a recorded epoch, or a planned number of epochs, the records alone decide.
        """
        epochs = self.history["epoch"].values
        past_early = not epochs or epochs[-1] >= EARLY * float(self.config.get("epochs") or 0)
        return past_early and len(series.values) >= MIN_RECORDS


Finding = tuple[str, tuple[Any, ...]]
"""Name of the macro of the template diagnostics.md that renders the text of a warning, and the macro's arguments."""


def diagnose(run: RunSummary) -> list[str]:
    """Return a warning, one or two sentences with the measured values and what to try, for each problem that a run's metrics show.

    Each check yields (macro of diagnostics.md, its arguments), which are rendered here; [] for a run without a known problem.
    """
    checks = (_check_baselines, _check_stability, _check_throughput, _check_probes, _check_tokens)
    return [render_macro("diagnostics.md", macro, *values) for check in checks for macro, values in check(run)]


def advise_to_evaluate(run: RunSummary) -> str:
    """Advise how to evaluate a finished run that no probe has evaluated: because its option `probe_every` is 0, or for want of labels.

    Args:
        run: its config, metrics and probes.

    Returns:
        Sentences with the reason and the command; '' if a probe has evaluated the run, it is not finished, or it has too few records.
    """
    epochs, steps_per_epoch = float(run.config.get("epochs") or 0), run.history.steps_per_epoch
    finished = steps_per_epoch is not None and run.history.last_step >= round(epochs * steps_per_epoch)
    probed = run.probe or run.history["probe/logistic"].values
    if probed or not finished or not run.can_diagnose(run.history["loss"]):
        return ""
    return render_macro("diagnostics.md", "not_probed", run.config)


def _check_baselines(run: RunSummary) -> Iterator[Finding]:
    """Find a token accuracy at the majority baseline, and a loss at the unigram baseline.

    The majority baseline is the accuracy of always predicting the most frequent token; the unigram baseline is the entropy of the token
    frequencies, in nats. A run is at a baseline only if both the mean of its last epoch and that of its last `NUM_RECENT` records are.

    Yields:
        Macro and arguments: config; steps so far, None from `FEW_STEPS` on (the advice is then not to train longer first); mean of the
        last epoch; baseline.
    """
    history, accuracy, loss = run.history, run.history["token_accuracy"], run.history["loss"]
    majority, unigram = history["majority_token_accuracy"].values, history["unigram_entropy"].values
    few_steps = loss.steps[-1] if loss.steps and loss.steps[-1] < FEW_STEPS else None
    if majority and run.can_diagnose(accuracy):
        mean, baseline = history.mean_of_last_epoch("token_accuracy"), majority[-1]
        # below the baseline + 1 point; if the most frequent of thousands of tokens is rarer than 2 %, below 1.5 times the baseline
        if max(mean, fmean(accuracy.values[-NUM_RECENT:])) < min(
            baseline + NEAR_BASELINE, MAX_BASELINE_FACTOR * baseline
        ):
            yield "accuracy_at_baseline", (run.config, few_steps, mean, baseline)
    if unigram and run.can_diagnose(loss):
        mean, baseline = history.mean_of_last_epoch("loss"), unigram[-1]
        if min(mean, fmean(loss.values[-NUM_RECENT:])) >= (1 - NEAR_BASELINE) * baseline:
            yield "loss_at_baseline", (run.config, few_steps, mean, baseline)


def _check_stability(run: RunSummary) -> Iterator[Finding]:
    """Find a loss that rises again, skipped steps (their loss or gradient was NaN or Inf), and gradients that are mostly clipped.

    Yields:
        "loss_rises": mean loss of the last tenth of the records, lowest mean of a tenth; "skipped_steps": their number, steps so far;
        "mostly_clipped": `clip_grad`, fraction of norms above it, median norm (both of the second half of the records).
    """
    losses, norms = run.history["loss"].values, run.history["grad_norm"].values
    skipped, max_norm = run.history["skipped_steps"], run.config.get("clip_grad")
    if len(losses) >= 2 * MIN_RECORDS:  # compare means of tenths of the run: single records are noisy
        width = max(1, len(losses) // 10)
        lowest = min(fmean(losses[i : i + width]) for i in range(0, len(losses) - width + 1, width))
        latest = fmean(losses[-width:])
        if latest >= lowest + max(MIN_RISE * abs(lowest), LOSS_ROUNDING):
            yield "loss_rises", (latest, lowest)
    if skipped.values and skipped.values[-1]:
        yield "skipped_steps", (skipped.values[-1], skipped.steps[-1])
    if max_norm and len(norms) >= 2 * MIN_RECORDS:
        later_norms = norms[len(norms) // 2 :]  # the first half may be large: warm-up
        if (fraction := fmean(norm > max_norm for norm in later_norms)) >= MANY_CLIPPED:
            yield "mostly_clipped", (max_norm, fraction, median(later_norms))


def _check_throughput(run: RunSummary) -> Iterator[Finding]:
    """Find training that waits for its images a quarter of the time, or whose last quarter has half the speed of the two before it.

    Yields:
        "slow_data_loading": median fraction of the time, without the first quarter of the records; "slowdown": median images/s of the
        second and third quarter, and of the last one.
    """
    wait_fractions, speeds = run.history["data_time_fraction"].values, run.history["images_per_second"].values
    if len(wait_fractions) >= MIN_RECORDS:
        fraction = median(wait_fractions[len(wait_fractions) // 4 :])  # loaders start slowly
        if fraction >= SLOW_LOADING:
            yield "slow_data_loading", (fraction,)
    if len(speeds) >= 4 * MIN_RECORDS:
        quarter = len(speeds) // 4
        before, latest = median(speeds[quarter:-quarter]), median(speeds[-quarter:])
        if latest <= before / 2:
            yield "slowdown", (before, latest)


def _check_probes(run: RunSummary) -> Iterator[Finding]:
    """Find accuracies of the linear probe that fall or do not rise, and accuracies that are not clearly above the best control's.

    Yields:
        "probe_falls" (best accuracy during training, its step, latest accuracy); "probe_stands_still" (first and latest accuracy; the
        best gains less than 1 point); "not_ahead_of_control" (the verdict's fields, by metric).
    """
    steps, scores = run.history["probe/logistic"]
    if len(scores) >= 3:
        best, latest = max(scores), scores[-1]
        if best - latest >= MIN_FALL:
            yield "probe_falls", (best, steps[scores.index(best)], latest)
        elif max(scores[1:]) - scores[0] < MIN_GAIN:
            yield "probe_stands_still", (scores[0], latest)
    for verdict in run.probe.get("verdicts", ()):
        if not verdict["is_ahead"]:
            yield "not_ahead_of_control", (verdict,)


def _check_tokens(run: RunSummary) -> Iterator[Finding]:
    """Find tokens that are too easy to predict, many dead codes (no patch has them), and a code that most patches have.

    Yields:
        "too_easy": token accuracy, mean of the last `NUM_RECENT` records; "dead_codes": dead codes, all codes; "dominant_code": fraction
        of the patches.
    """
    accuracies, stats = run.history["token_accuracy"].values, run.codebook_stats
    if len(accuracies) >= MIN_RECORDS and (accuracy := fmean(accuracies[-NUM_RECENT:])) >= TOO_EASY:
        yield "too_easy", (accuracy,)
    num_used, num_dead = stats.get("num_used_codes") or 0, stats.get("num_dead_codes") or 0
    if num_dead > num_used / 4:  # more than a fifth of the codebook
        yield "dead_codes", (num_dead, num_used + num_dead)
    if (fraction := stats.get("top_code_fraction") or 0) >= DOMINANT_CODE:
        yield "dominant_code", (fraction,)
