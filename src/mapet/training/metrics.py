"""Metrics of a training run, kept on the device so that steps don't wait for them; skipped steps and loss spikes; progress."""

import logging
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, TypeVar

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
"""Losses a spike is judged by."""
MIN_HISTORY, DEVIATIONS = 30, 8.0
"""How many of them there must be, and how many deviations above their median a spike lies."""
NUM_NAMED = 3
"""Images named of each spike."""


class MetricWindow(NamedTuple):
    """The steps since the last `MetricLogger.compute_and_reset`.

    Attributes:
        metrics: their means, counts and speed.
        losses: of each step; NaN where its update was left out.
        images: of each step, index and loss of this rank's images.
    """

    metrics: dict[str, float]
    losses: list[float]
    images: list[tuple[Int[Tensor, " B"], Float[Tensor, " B"]]]


class MetricLogger:
    """Metrics of a task, of all ranks, since the last `compute_and_reset`.

    Attributes:
        started: when they began; what is no time of training is added.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.skipped = 0  # since the start
        self.total_counts = torch.zeros(task.num_counts, dtype=torch.int64)  # since the start, up to the last window
        self._counts = torch.zeros(task.num_counts, dtype=torch.int64, device=task.compute.device)
        self._steps: list[Float[Tensor, " values"]] = []
        self._images: list[tuple[Tensor, Tensor]] = []
        self._waited, self.started = 0.0, time.monotonic()

    def time_data(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass the batches on, counting the time spent waiting for them."""
        before = time.monotonic()
        for batch in batches:
            self._waited += time.monotonic() - before
            yield batch
            before = time.monotonic()

    def add(
        self, output: StepOutput, norm: Tensor, image_index: Tensor, num_images: int, sums: dict[str, Tensor]
    ) -> None:
        """Add a step.

        Args:
            output: of this rank's images, weighted by their fraction of the step's.
            norm: the gradient's, the same on all ranks.
            num_images: of this rank; the output of none has weight 0 and says nothing else.
            sums: metrics to be added up, the same on all ranks.
        """
        zero, images = torch.zeros_like(output.loss), torch.full_like(output.loss, num_images)
        shared = [norm, *(sums.get(name, zero) for name in self._task.sum_names)]
        if distributed.rank():
            shared = [zero] * len(shared)
        values = [output.loss, images, *(output.means[name] for name in self._task.mean_names), *shared]
        self._steps.append(torch.stack([value.detach().float() for value in values]))
        if output.counts is not None and num_images:
            self._counts += output.counts
        self._images.append((image_index[:num_images], output.loss_per_image[:num_images]))

    def compute_and_reset(self) -> MetricWindow:
        """Return the metrics since the last call; means are over steps whose numbers were finite.

        loss and the task's means, what it makes of its counts, gradient_norm; skipped_steps: since the start, whose loss or
        gradient was not finite; data_time_fraction: fraction of time waiting for images.
        """
        task, steps, counts = self._task, self._all_steps(), distributed.all_reduce(self._counts).cpu()
        elapsed, finite = max(1e-9, time.monotonic() - self.started), steps.isfinite().all(dim=1)
        columns = ["loss", "images", *task.mean_names, "gradient_norm", *task.sum_names]
        mean = dict(zip(columns, steps[finite].mean(dim=0).tolist(), strict=True))
        total = dict(zip(columns, steps[finite].sum(dim=0).tolist(), strict=True))
        self.skipped += int((~finite).sum())
        self.total_counts += counts
        metrics = {
            **{name: mean[name] for name in ("loss", *task.mean_names)},
            **task.summarize(counts, self.total_counts),
            **{name: total[name] for name in task.sum_names},
            "gradient_norm": mean["gradient_norm"],
            "skipped_steps": self.skipped,
            "images_per_second": float(steps[:, 1].sum()) / elapsed,
            "data_time_fraction": self._waited / elapsed,
        }
        window = MetricWindow(metrics, torch.where(finite, steps[:, 0], torch.nan).tolist(), self._images)
        self._counts.zero_()
        self._steps, self._images, self._waited, self.started = [], [], 0.0, time.monotonic()
        return window

    def _all_steps(self) -> Float[Tensor, "steps values"]:
        width = 3 + len(self._task.mean_names) + len(self._task.sum_names)
        local = torch.stack(self._steps) if self._steps else self._counts.new_zeros(0, width, dtype=torch.float32)
        return distributed.all_reduce(local).cpu().double()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to write the same metrics; a collective call."""
        steps, counts = self._all_steps(), distributed.all_reduce(self._counts).cpu()
        totals = {"total_counts": self.total_counts, "skipped": torch.tensor(self.skipped)}
        return {"steps": steps, "counts": counts} | totals

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the sums of all ranks, which go on in the first."""
        self.skipped = int(state["skipped"])
        self.total_counts.copy_(state["total_counts"])
        steps, counts = state["steps"].float(), state["counts"]
        if distributed.rank() > 0:
            steps, counts = torch.zeros_like(steps), torch.zeros_like(counts)
        self._counts.copy_(counts)
        self._steps = list(steps.to(self._counts.device))
        self._images = [(torch.zeros(0, dtype=torch.int64), torch.zeros(0))] * len(self._steps)


class LossMonitor:
    """Judges the steps of a window, so that none of them waits for it: updates that were left out, and spikes.

    Attributes:
        consecutive_skipped: steps in a row, up to the last, that were left out because a number was not finite.
    """

    def __init__(self, images: ImageList) -> None:
        self.images = images
        self.consecutive_skipped = 0
        self._losses: list[float] = []

    def update(self, window: MetricWindow, last_step: int) -> None:
        """Log what is remarkable about the steps up to `last_step`; a collective call."""
        first = last_step - len(window.losses) + 1
        for step, loss, images in zip(range(first, last_step + 1), window.losses, window.images, strict=True):
            if math.isnan(loss):
                self.consecutive_skipped += 1
                text = "step %d is left out: loss or gradient not finite; largest losses: %s"
                log.warning(text, step, self._worst(*images))
                continue
            self.consecutive_skipped = 0
            usual = statistics.median(self._losses) if len(self._losses) >= MIN_HISTORY else math.inf
            sigma = 1.4826 * statistics.median([abs(x - usual) for x in self._losses] or [0.0])  # if they are normal
            if loss > usual + DEVIATIONS * max(sigma, 1e-3 * abs(usual)):
                text = "loss spike at step %d: %.3f, usually %.3f; largest losses: %s"
                log.warning(text, step, loss, usual, self._worst(*images))
            self._losses = [*self._losses, loss][-HISTORY:]

    def _worst(self, index: Tensor, losses: Tensor) -> str:
        """Name the images of the largest losses, of all ranks; those that are not finite first."""
        top = losses.float().cpu().nan_to_num(torch.inf).topk(min(NUM_NAMED, len(losses)))
        local = list(zip(top.values.tolist(), index[top.indices].tolist(), strict=True))
        worst = sorted(chain(*distributed.all_gather_object(local)), key=lambda pair: -pair[0])[:NUM_NAMED]
        named = ", ".join(f"{self.images.id(image)!r} ({loss:.3g})" for loss, image in worst)
        return named or "unknown, they were before the run was resumed"

    def state_dict(self) -> dict[str, Tensor]:
        """Return the history and the steps left out last."""
        streak = torch.tensor(self.consecutive_skipped)
        return {"losses": torch.tensor(self._losses, dtype=torch.float64), "consecutive_skipped": streak}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        self._losses, self.consecutive_skipped = state["losses"].tolist(), int(state["consecutive_skipped"])


AVERAGED = ("loss", "token_accuracy")
"""Metrics whose mean over the epoch is in its line."""


class ProgressDisplay:
    """Shows the time that is left, losses and accuracies beside their baselines, speed, the last scores.

    A line of the log for each epoch, and on a terminal a bar and two lines below it.

    Args:
        task: says how its metrics are shown.
        total, done: steps of the run, and those done before.
        file: where the bar goes; the standard error if None. What is no terminal gets the log lines alone.
    """

    def __init__(self, task: Task, total: int, done: int = 0, file: Any = None) -> None:
        self._task, self._total, self._first, self._done, self._shown = task, total, done, done, done
        common: dict[str, Any] = {"disable": None, "dynamic_ncols": True, "file": file}
        self._bar = tqdm(total=total, initial=done, desc=task.command, unit="step", smoothing=0.05, **common)
        positions = () if self._bar.disable else (1, 2)
        self.lines = [tqdm(bar_format="{desc}", position=i, leave=False, **common) for i in positions]
        self._epoch: list[dict[str, float]] = []
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
        """Show the metrics of the steps since the last ones; the line of an epoch has the means of all its steps."""
        self._epoch.append(metrics | {"steps": self._done - self._shown})
        self._shown = self._done
        texts = self._task.format_metrics(metrics), _speed(metrics) + self._scores
        for line, text in zip(self.lines, texts, strict=False):
            line.set_description_str(f"  {text}")
        if epoch_ended:
            if round(metrics["epoch"]) % self._task.epochs_per_line == 0 or self._done == self._total:
                self._log_epoch(metrics)
            self._epoch.clear()

    def _log_epoch(self, metrics: dict[str, float]) -> None:
        seen, all_steps = sum(window["steps"] for window in self._epoch), round(self._done / metrics["epoch"])
        part = f" (its last {seen} of {all_steps} steps)" if seen < all_steps else ""  # of an epoch that was resumed
        for name in [name for name in AVERAGED if name in metrics]:
            known = [window for window in self._epoch if math.isfinite(window[name])]
            if steps := sum(window["steps"] for window in known):
                metrics = metrics | {name: sum(window[name] * window["steps"] for window in known) / steps}
        seconds = (time.monotonic() - self._started) / max(1, self._done - self._first) * (self._total - self._done)
        left = f", {format_duration(seconds)} left" if self._done < self._total else ""
        text = f"{self._task.format_metrics(metrics)}, {_speed(metrics)}{left}"
        log.info("epoch %d%s: %s", round(metrics["epoch"]), part, text)

    def log_scores(self, epoch: int, scores: dict[str, float]) -> None:
        """Show scores; on a terminal they stay until the next."""
        text = f"epoch {epoch}: {self._task.format_scores(scores)}"
        self._scores = f"; {text}"
        log.info("%s", text)


def _speed(metrics: dict[str, float]) -> str:
    """Return images a second, and whether the loader keeps up."""
    return f"{metrics['images_per_second']:.0f} img/s, data wait {metrics['data_time_fraction']:.0%}"


def format_duration(seconds: float) -> str:
    """'12 s', '3 min', '5.0 h', '2.1 days'."""
    if seconds < 100 * 60:
        return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
