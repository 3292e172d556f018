"""Metrics of a training run, kept on the device so that steps don't wait for them; skipped steps and loss spikes; progress."""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, TextIO, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from mapet import distributed
from mapet.data.image_list import ImageList
from mapet.training.task import StepOutput, Task

log = logging.getLogger("mapet")
T = TypeVar("T")
HISTORY = 200
"""Number of recent losses that a new one is compared with."""
MIN_HISTORY, NUM_DEVIATIONS = 30, 8.0
"""A spike is a loss so many standard deviations above the median of at least so many recent losses."""
MIN_RELATIVE_DEVIATION = 1e-3
"""The standard deviation is taken to be at least this fraction of the median: losses that hardly vary don't make spikes."""
MAD_TO_STD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
NUM_NAMED_IMAGES = 3
"""Images with the largest losses that a warning names."""


class MetricWindow(NamedTuple):
    """The steps between two calls of `MetricLogger.compute_and_reset`.

    Attributes:
        metrics: by name; see `compute_and_reset`.
        losses: of each step; NaN where its update was skipped.
        images: of each step, index and loss of this rank's images.
    """

    metrics: dict[str, float]
    losses: list[float]
    images: list[tuple[Int[Tensor, " B"], Float[Tensor, " B"]]]


class MetricLogger:
    """Adds up a task's metrics over steps, micro-batches and ranks.

    Attributes:
        started: `time.monotonic()` of the first step since the last `compute_and_reset`, plus pauses that are not training.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._columns = ("loss", "images", *task.mean_names, "grad_norm", *task.sum_names)
        self._num_skipped = 0  # since the start of the run
        self._total_counts = torch.zeros(task.num_counts, dtype=torch.int64)  # since then, up to the last window
        self._counts = torch.zeros(task.num_counts, dtype=torch.int64, device=task.compute.device)
        self._steps: list[Float[Tensor, " columns"]] = []
        self._images: list[tuple[Tensor, Tensor]] = []
        self._waited, self.started = 0.0, time.monotonic()

    def time_data(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches and add up the time spent waiting for them, for `data_time_fraction`."""
        before = time.monotonic()
        for batch in batches:
            self._waited += time.monotonic() - before
            yield batch
            before = time.monotonic()

    def add(self, output: StepOutput, norm: Tensor, index: Tensor, num_images: int, sums: dict[str, Tensor]) -> None:
        """Add a step.

        Args:
            output: of this rank's images; loss and means are weighted by their fraction of the step's images.
            norm: of the gradient, the same on all ranks.
            index: of each image in the list of images.
            num_images: images of this rank. If it is 0, the output is that of a placeholder, of weight 0.
            sums: what `Task.after_step` returned, the same on all ranks; {} if it was not called.
        """
        zero = torch.zeros_like(output.loss)
        values = {"loss": output.loss, "images": zero + num_images, **output.means}
        if distributed.rank() == 0:  # values are added up over ranks
            values |= {"grad_norm": norm, **sums}
        self._steps.append(torch.stack([values.get(name, zero).detach().float() for name in self._columns]))
        if output.counts is not None and num_images:
            self._counts += output.counts
        self._images.append((index[:num_images], output.loss_per_image[:num_images]))

    def compute_and_reset(self) -> MetricWindow:
        """Return the metrics of all ranks since the last call; a collective call.

        They are: loss and the task's means, over steps with a finite loss and gradient; what `Task.summarize` makes of its counts;
        its sums; grad_norm, the mean; skipped_steps, since the start of the run; images_per_second; data_time_fraction, the
        fraction of time spent waiting for images.
        """
        task, steps, counts = self._task, self._all_steps(), distributed.all_reduce(self._counts).cpu()
        elapsed, finite = max(1e-9, time.monotonic() - self.started), steps.isfinite().all(dim=1)
        mean = dict(zip(self._columns, steps[finite].mean(dim=0).tolist(), strict=True))
        total = dict(zip(self._columns, steps[finite].sum(dim=0).tolist(), strict=True))
        self._num_skipped += int((~finite).sum())
        self._total_counts += counts
        metrics = {
            **{name: mean[name] for name in ("loss", *task.mean_names)},
            **task.summarize(counts, self._total_counts),
            **{name: total[name] for name in task.sum_names},
            "grad_norm": mean["grad_norm"],
            "skipped_steps": self._num_skipped,
            "images_per_second": float(steps[:, 1].sum()) / elapsed,
            "data_time_fraction": self._waited / elapsed,
        }
        window = MetricWindow(metrics, torch.where(finite, steps[:, 0], torch.nan).tolist(), self._images)
        self._counts.zero_()
        self._steps, self._images, self._waited, self.started = [], [], 0.0, time.monotonic()
        return window

    def _all_steps(self) -> Float[Tensor, "steps columns"]:
        """Return the values of each step, `_columns`, added up over ranks; a collective call."""
        empty = self._counts.new_zeros(0, len(self._columns), dtype=torch.float32)
        return distributed.all_reduce(torch.stack(self._steps) if self._steps else empty).cpu().double()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to write the same metrics; a collective call."""
        steps, counts = self._all_steps(), distributed.all_reduce(self._counts).cpu()
        totals = {"total_counts": self._total_counts, "skipped": torch.tensor(self._num_skipped)}
        return {"steps": steps, "counts": counts} | totals

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state; sums over ranks continue on rank 0."""
        self._num_skipped = int(state["skipped"])
        self._total_counts.copy_(state["total_counts"])
        steps, counts = state["steps"].float(), state["counts"]
        if distributed.rank() > 0:
            steps, counts = torch.zeros_like(steps), torch.zeros_like(counts)
        self._counts.copy_(counts)
        self._steps = list(steps.to(self._counts.device))
        self._images = [(torch.zeros(0, dtype=torch.int64), torch.zeros(0))] * len(self._steps)


class LossMonitor:
    """Warns about skipped steps and loss spikes, once per window, so that no step waits for it.

    Attributes:
        consecutive_skipped: steps in a row, up to the last, that were skipped because of a NaN or infinite loss or gradient.
    """

    def __init__(self, images: ImageList) -> None:
        self.images = images
        self.consecutive_skipped = 0
        self._losses: deque[float] = deque(maxlen=HISTORY)

    def update(self, window: MetricWindow, last_step: int) -> None:
        """Log warnings about the window's steps, of which `last_step`, counted from 1, is the last; a collective call."""
        first = last_step - len(window.losses) + 1
        for step, loss, images in zip(range(first, last_step + 1), window.losses, window.images, strict=True):
            if math.isnan(loss):
                self.consecutive_skipped += 1
                text = "step %d skipped: NaN or infinite loss or gradient; largest losses: %s"
                log.warning(text, step, self._format_largest(*images))
                continue
            self.consecutive_skipped = 0
            median = statistics.median(self._losses) if len(self._losses) >= MIN_HISTORY else math.inf
            std = MAD_TO_STD * statistics.median([abs(past - median) for past in self._losses] or [0.0])
            if loss > median + NUM_DEVIATIONS * max(std, MIN_RELATIVE_DEVIATION * abs(median)):
                text = "loss spike at step %d: %.3f, median %.3f; largest losses: %s"
                log.warning(text, step, loss, median, self._format_largest(*images))
            self._losses.append(loss)

    def _format_largest(self, index: Int[Tensor, " B"], losses: Float[Tensor, " B"]) -> str:
        """Name the images with the largest losses on all ranks, NaN and Inf first; a collective call."""
        top = losses.float().cpu().nan_to_num(torch.inf).topk(min(NUM_NAMED_IMAGES, len(losses)))
        local = list(zip(top.values.tolist(), index[top.indices].tolist(), strict=True))
        largest = sorted(chain(*distributed.all_gather_object(local)), key=lambda pair: -pair[0])[:NUM_NAMED_IMAGES]
        named = ", ".join(f"{self.images.id(image)!r} ({loss:.3g})" for loss, image in largest)
        return named or "unknown, from before the run was resumed"

    def state_dict(self) -> dict[str, Tensor]:
        """Return recent losses and the number of steps skipped last."""
        losses = torch.tensor(list(self._losses), dtype=torch.float64)
        return {"losses": losses, "consecutive_skipped": torch.tensor(self.consecutive_skipped)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state."""
        self._losses = deque(state["losses"].tolist(), HISTORY)
        self.consecutive_skipped = int(state["consecutive_skipped"])


EPOCH_MEANS = ("loss", "token_accuracy")
"""Metrics whose mean over the epoch is in its line; others are those of its last steps."""


class ProgressDisplay:
    """Shows metrics beside their baselines, speed, the time left and the last scores.

    A line of the log for each epoch, and on a terminal a bar and two lines below it.

    Args:
        task: formats its metrics and scores.
        total: steps of the run.
        done: steps done before it was resumed.
        file: where the bar goes; None: stderr. If it is not a terminal there are log lines only.
    """

    def __init__(self, task: Task, total: int, done: int = 0, file: TextIO | None = None) -> None:
        self._task, self._total, self._first, self._done, self._shown = task, total, done, done, done
        common: dict[str, Any] = {"disable": None, "dynamic_ncols": True, "file": file}
        self._bar = tqdm(total=total, initial=done, desc=task.command, unit="step", smoothing=0.05, **common)
        positions = () if self._bar.disable else (1, 2)
        self.lines = [tqdm(bar_format="{desc}", position=i, leave=False, **common) for i in positions]
        self._windows: list[dict[str, float]] = []  # of this epoch: metrics, and "steps"
        self._started, self._scores = time.monotonic(), ""

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        for bar in [*reversed(self.lines), self._bar]:
            bar.close()

    def update(self) -> None:
        """Count a step."""
        self._done += 1
        self._bar.update()

    def log_metrics(self, metrics: dict[str, float], epoch_ended: bool) -> None:
        """Show the metrics of the steps since the last call, and log those of the epoch if it has ended."""
        self._windows.append(metrics | {"steps": self._done - self._shown})
        self._shown = self._done
        texts = self._task.format_metrics(metrics), _format_throughput(metrics) + self._scores
        for line, text in zip(self.lines, texts, strict=False):  # no lines without a terminal
            line.set_description_str(f"  {text}")
        if epoch_ended:
            if round(metrics["epoch"]) % self._task.epochs_per_line == 0 or self._done == self._total:
                self._log_epoch(metrics)
            self._windows.clear()

    def _log_epoch(self, metrics: dict[str, float]) -> None:
        """Log an epoch's line: the means of `EPOCH_MEANS` over its steps, other metrics as given, and the time left.

        If the run was resumed within the epoch, the line says how many of its steps it is about.
        """
        num_steps = sum(window["steps"] for window in self._windows)
        steps_per_epoch = round(self._done / metrics["epoch"])
        part = f" (its last {num_steps} of {steps_per_epoch} steps)" if num_steps < steps_per_epoch else ""
        for name in EPOCH_MEANS:
            finite = [window for window in self._windows if math.isfinite(window.get(name, math.nan))]
            if steps := sum(window["steps"] for window in finite):
                metrics = metrics | {name: sum(window[name] * window["steps"] for window in finite) / steps}
        seconds = (time.monotonic() - self._started) / max(1, self._done - self._first) * (self._total - self._done)
        left = f", {format_duration(seconds)} left" if self._done < self._total else ""
        text = f"{self._task.format_metrics(metrics)}, {_format_throughput(metrics)}{left}"
        log.info("epoch %d%s: %s", round(metrics["epoch"]), part, text)

    def log_scores(self, epoch: int, scores: dict[str, float]) -> None:
        """Log scores; on a terminal they stay until the next."""
        text = f"epoch {epoch}: {self._task.format_scores(scores)}"
        self._scores = f"; {text}"
        log.info("%s", text)


def _format_throughput(metrics: dict[str, float]) -> str:
    """Format images per second, and the fraction of time spent waiting for them."""
    return f"{metrics['images_per_second']:.0f} img/s, data wait {metrics['data_time_fraction']:.0%}"


def format_duration(seconds: float) -> str:
    """Format a duration in the unit that fits: '12 s', '3 min', '5.0 h', '2.1 days'."""
    if seconds < 100 * 60:
        return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
