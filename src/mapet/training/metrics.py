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
        metrics: by name, e.g. 'loss', 'images_per_second'; see `compute_and_reset`.
        losses: of each step; NaN where its update was skipped.
        images: of each step, (index in the list of images, loss) of this rank's images; the steps before a run was resumed have none.
    """

    metrics: dict[str, float]
    losses: list[float]
    images: list[tuple[Int[Tensor, " B"], Float[Tensor, " B"]]]


class MetricLogger:
    """Adds up a task's metrics over steps, micro-batches and ranks.

    A window is the steps between two calls of `compute_and_reset`.

    Attributes:
        started: `time.monotonic()` at the start of the window, plus the seconds of pauses that are not training.
    """

    def __init__(self, task: Task) -> None:
        """Start the first window, without steps.

        Args:
            task: `mean_names` and `sum_names` name the values that each of its steps reports, `num_counts` is the number of tokens, classes
                or codes that a step counts (0: none), and `summarize` turns counts into metrics.
        """
        self._task = task
        # Names of the values that are kept of each step; a row of `_steps` has the values in this order.
        self._columns = ("loss", "images", *task.mean_names, "grad_norm", *task.sum_names)
        self._num_skipped = 0  # steps since the start of the run that were skipped because of NaN or Inf
        # How often each token, class or code occurred, from the start of the run to the end of the last window, on all ranks.
        self._total_counts = torch.zeros(task.num_counts, dtype=torch.int64)
        # The same for this window on this rank; the three that follow are of this window and rank, too.
        self._counts = torch.zeros(task.num_counts, dtype=torch.int64, device=task.compute.device)
        self._steps: list[Float[Tensor, " columns"]] = []  # a row for each step
        self._images: list[tuple[Tensor, Tensor]] = []  # image indices and losses of each step
        self._waited, self.started = 0.0, time.monotonic()  # seconds spent waiting for batches

    def time_data(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and add the seconds until each is there to `_waited`, from which `data_time_fraction` is computed."""
        before = time.monotonic()
        for batch in batches:
            self._waited += time.monotonic() - before
            yield batch
            before = time.monotonic()

    def add(self, output: StepOutput, norm: Tensor, index: Tensor, num_images: int, sums: dict[str, Tensor]) -> None:
        """Add a step, without waiting for the device: values stay there until `compute_and_reset`.

        Args:
            output: of this rank's images. `loss` and `means` are multiplied already by the fraction of the step's images that this rank
                has, so that their sum over ranks is the mean over the step's images.
            norm: gradient norm (scalar), the same on all ranks.
            index: (B,), of each image in the list of images.
            num_images: number of images of this rank. If it is 0 (none could be read), `output` and `index` are those of one black
                placeholder image, which has weight 0 and is not counted.
            sums: what `Task.after_step` returned, scalars by the names in `task.sum_names`, the same on all ranks; {} if it was not
                called, which counts as zeros.
        """
        zero = torch.zeros_like(output.loss)
        values = {"loss": output.loss, "images": zero + num_images, **output.means}
        if distributed.rank() == 0:  # all values are summed over ranks later, and these are the same on each
            values |= {"grad_norm": norm, **sums}
        self._steps.append(torch.stack([values.get(name, zero).detach().float() for name in self._columns]))
        if output.counts is not None and num_images:
            self._counts += output.counts
        self._images.append((index[:num_images], output.loss_per_image[:num_images]))

    def compute_and_reset(self) -> MetricWindow:
        """Return the metrics of all ranks for the steps since the last call, and start a new window; a collective call.

        A step with a NaN or infinite value (loss, mean, gradient norm or sum) is a skipped step: the trainer made no update in it.

        Returns:
            `metrics`, `losses` and `images`, see `MetricWindow`. `losses` has the loss of each step, NaN for skipped steps. `images` is
            what `add` was given, on this rank. `metrics` has, in this order:

            loss                 mean over the steps that were not skipped; NaN if all were
            task.mean_names      the same mean of each of these values
            (task.summarize)     what this function returns for how often each token, class or code occurred: since the last
                                 call, and since the start of the run; skipped steps count, too
            task.sum_names       sum of each of these values over the steps that were not skipped
            grad_norm            mean over the steps that were not skipped
            skipped_steps        number of them since the start of the run
            images_per_second    images of all ranks, also those of skipped steps, per second since `started`
            data_time_fraction   fraction of this time that this rank waited for batches
        """
        # `steps`: (steps, columns), the values of `add` summed over ranks, in the order of `_columns`.
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
            "images_per_second": float(steps[:, self._columns.index("images")].sum()) / elapsed,
            "data_time_fraction": self._waited / elapsed,
        }
        # Column 0 of `steps` is the loss.
        window = MetricWindow(metrics, torch.where(finite, steps[:, 0], torch.nan).tolist(), self._images)
        self._counts.zero_()
        self._steps, self._images, self._waited, self.started = [], [], 0.0, time.monotonic()
        return window

    def _all_steps(self) -> Float[Tensor, "steps columns"]:
        """Return a row for each step since the last `compute_and_reset`, with the values named by `_columns`, summed over ranks.

        A collective call. The rows are float64, on the CPU; there may be none.
        """
        empty = self._counts.new_zeros(0, len(self._columns), dtype=torch.float32)
        return distributed.all_reduce(torch.stack(self._steps) if self._steps else empty).cpu().double()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to write the same metrics; a collective call.

        Returns:
            steps: (steps, columns), see `_all_steps`; counts: (K,), of the same steps, over all ranks; total_counts: (K,), from the
            start of the run up to these steps; skipped: scalar, the number of skipped steps up to these.
        """
        steps, counts = self._all_steps(), distributed.all_reduce(self._counts).cpu()
        totals = {"total_counts": self._total_counts, "skipped": torch.tensor(self._num_skipped)}
        return {"steps": steps, "counts": counts} | totals

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned, which holds sums over ranks: rank 0 takes these, other ranks take zeros.

        The steps' images are not saved, so each of these steps has none; nor is the time that these steps took, so `images_per_second` is
        too high in the first window after a run was resumed.
        """
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
        self.images = images  # gives the ids that warnings name
        self.consecutive_skipped = 0
        self._losses: deque[float] = deque(maxlen=HISTORY)  # of recent steps that were not skipped

    def update(self, window: MetricWindow, last_step: int) -> None:
        """Warn about each skipped step and each loss spike of a window, and update `consecutive_skipped`; a collective call.

        A spike is a loss more than `NUM_DEVIATIONS` standard deviations above the median of the recent losses (up to `HISTORY`), once there
        are `MIN_HISTORY` of them. The standard deviation is estimated from the median absolute deviation.

        Args:
            window: `losses` of consecutive steps, the same on all ranks, NaN for skipped steps; and `images` of this rank, an
                (image indices, losses) pair for each of these steps.
            last_step: number of the window's last step, counted from 1.
        """
        first = last_step - len(window.losses) + 1
        for step, loss, images in zip(range(first, last_step + 1), window.losses, window.images, strict=True):
            if math.isnan(loss):  # the step was skipped
                self.consecutive_skipped += 1
                text = "step %d skipped, weights unchanged: NaN or infinite loss or gradient; images with the largest losses: %s"
                log.warning(text, step, self._format_largest(*images))
                continue
            self.consecutive_skipped = 0
            median = statistics.median(self._losses) if len(self._losses) >= MIN_HISTORY else math.inf
            std = MAD_TO_STD * statistics.median([abs(past - median) for past in self._losses] or [0.0])
            if loss > median + NUM_DEVIATIONS * max(std, MIN_RELATIVE_DEVIATION * abs(median)):
                text = "loss spike at step %d: %.3f, median %.3f before; images with the largest losses: %s"
                log.warning(text, step, loss, median, self._format_largest(*images))
            self._losses.append(loss)

    def _format_largest(self, index: Int[Tensor, " B"], losses: Float[Tensor, " B"]) -> str:
        """Name the `NUM_NAMED_IMAGES` images of a step with the largest losses on all ranks, NaN and Inf first; a collective call.

        Args:
            index: of this rank's images in the list of images; empty for steps before the run was resumed.
            losses: of the same images.

        Returns:
            "'a.png' (7.1), 'b.png' (6.9), 'c.png' (6.5)", the image ids and losses, largest first; NaN is written as inf. "unknown, from
            before the run was resumed" if no rank has an image.
        """
        top = losses.float().cpu().nan_to_num(torch.inf).topk(min(NUM_NAMED_IMAGES, len(losses)))
        local = list(zip(top.values.tolist(), index[top.indices].tolist(), strict=True))
        largest = sorted(chain(*distributed.all_gather_object(local)), key=lambda pair: -pair[0])[:NUM_NAMED_IMAGES]
        named = ", ".join(f"{self.images.id(image)!r} ({loss:.3g})" for loss, image in largest)
        return named or "unknown, from before the run was resumed"

    def state_dict(self) -> dict[str, Tensor]:
        """Return `losses`, of up to `HISTORY` recent steps, oldest first, and `consecutive_skipped`; restored by `load_state_dict`."""
        losses = torch.tensor(list(self._losses), dtype=torch.float64)
        return {"losses": losses, "consecutive_skipped": torch.tensor(self.consecutive_skipped)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the recent losses and `consecutive_skipped` that `state_dict` returned."""
        self._losses = deque(state["losses"].tolist(), HISTORY)
        self.consecutive_skipped = int(state["consecutive_skipped"])


EPOCH_MEANS = ("loss", "token_accuracy")
"""Metrics whose mean over the epoch is in its line; others are those of its last steps."""


class ProgressDisplay:
    """Shows metrics beside their baselines, speed, the time left and the last scores.

    A line of the log for each epoch, and on a terminal a bar and two lines below it.
    """

    def __init__(self, task: Task, total: int, done: int = 0, file: TextIO | None = None) -> None:
        """Show the bar.

        Args:
            task: formats its metrics and scores; its command is the bar's label.
            total: steps of the run.
            done: steps done before it was resumed.
            file: where the bar goes; None: stderr. If it is not a terminal there are log lines only.
        """
        # `_first` and `_done`: steps done when the display was made, and now; `_num_shown`: steps up to the metrics shown last.
        self._task, self._total, self._first, self._done, self._num_shown = task, total, done, done, done
        common: dict[str, Any] = {"disable": None, "dynamic_ncols": True, "file": file}  # None: if it is not a terminal
        self._bar = tqdm(total=total, initial=done, desc=task.command, unit="step", smoothing=0.05, **common)
        positions = () if self._bar.disable else (1, 2)
        self.lines = [tqdm(bar_format="{desc}", position=i, leave=False, **common) for i in positions]
        # For each `log_metrics` of this epoch its metrics, and the number of "steps".
        self._windows: list[dict[str, float]] = []
        self._started, self._scores = time.monotonic(), ""  # `_scores`: text of the scores logged last

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        for bar in [*reversed(self.lines), self._bar]:
            bar.close()

    def update(self) -> None:
        """Count one more step as done, and advance the bar."""
        self._done += 1
        self._bar.update()

    def set_total(self, total: int) -> None:
        """Change the number of steps of the run."""
        self._total = self._bar.total = total
        self._bar.refresh()

    def log_metrics(self, metrics: dict[str, float], epoch_ended: bool) -> None:
        """Show the metrics on the terminal's two lines, and log a line for the epoch if it has ended.

        Only every `task.epochs_per_line`th epoch is logged, and the last one of the run.

        Args:
            metrics: of the steps since the last call; among them 'epoch' (epochs done, with a fraction), 'images_per_second',
                'data_time_fraction', and what `task.format_metrics` reads.
            epoch_ended: whether the last of these steps is the last of its epoch.
        """
        self._windows.append(metrics | {"steps": self._done - self._num_shown})
        self._num_shown = self._done
        texts = self._task.format_metrics(metrics), _format_throughput(metrics) + self._scores
        for line, text in zip(self.lines, texts, strict=False):  # no lines without a terminal
            line.set_description_str(f"  {text}")
        if epoch_ended:
            if math.ceil(metrics["epoch"]) % self._task.epochs_per_line == 0 or self._done == self._total:
                self._log_epoch(metrics)
            self._windows.clear()

    def _log_epoch(self, metrics: dict[str, float]) -> None:
        """Log an epoch's line: the means of `EPOCH_MEANS` over its steps, other metrics as given, and the time left.

        If the means are over a part of the epoch, because the run was resumed or ends within it, the line gives the number of steps.

        Args:
            metrics: of the epoch's last steps, see `log_metrics`. `_windows` has those of all its steps since the run was resumed, each
                with the number of 'steps' it is of.
        """
        num_steps = sum(window["steps"] for window in self._windows)
        steps_per_epoch = round(self._done / metrics["epoch"])
        part = f" ({num_steps} of {steps_per_epoch} steps)" if num_steps < steps_per_epoch else ""
        for name in EPOCH_MEANS:
            finite = [window for window in self._windows if math.isfinite(window.get(name, math.nan))]
            if steps := sum(window["steps"] for window in finite):
                metrics = metrics | {name: sum(window[name] * window["steps"] for window in finite) / steps}
        seconds = (time.monotonic() - self._started) / max(1, self._done - self._first) * (self._total - self._done)
        left = f", {format_duration(seconds)} left" if self._done < self._total else ""
        text = f"{self._task.format_metrics(metrics)}, {_format_throughput(metrics)}{left}"
        log.info("epoch %d%s: %s", math.ceil(metrics["epoch"]), part, text)

    def log_scores(self, epoch: int, scores: dict[str, float]) -> None:
        """Log the scores of `Task.evaluate` after an epoch, counted from 1; on a terminal they stay until the next call."""
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
