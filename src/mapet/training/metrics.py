"""Metrics of a training run, kept on the device so that steps don't wait for them; skipped steps and loss spikes."""

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapet import distributed
from mapet.data.image_list import ImageList
from mapet.training.task import StepOutput

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
    """Metrics of all ranks since the last `compute_and_reset`.

    Args:
        mean_names, sum_names: of `StepOutput.means` and of what `Task.after_step` returns.
        num_counts: K of `StepOutput.counts`, 0 for none.
    """

    def __init__(
        self, mean_names: Sequence[str], sum_names: Sequence[str], num_counts: int, device: torch.device
    ) -> None:
        self._mean_names, self._sum_names = mean_names, sum_names
        self.total_counts = torch.zeros(num_counts, dtype=torch.int64)  # since the start, up to the last window
        self.skipped = 0  # since the start
        self._counts = torch.zeros(num_counts, dtype=torch.int64, device=device)
        self._steps: list[Float[Tensor, " values"]] = []
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._steps.clear()
        self._counts.zero_()
        self._images: list[tuple[Tensor, Tensor]] = []
        self._waited = 0.0
        self._started = time.monotonic()

    def time_data(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass the batches on, counting the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(iterator, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time spent within out of the training time."""
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before

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
        shared = [norm, *(sums.get(name, zero) for name in self._sum_names)]
        if distributed.rank():
            shared = [zero] * len(shared)
        values = [output.loss, images, *(output.means[name] for name in self._mean_names), *shared]
        self._steps.append(torch.stack([value.detach().float() for value in values]))
        if output.counts is not None and num_images:
            self._counts += output.counts
        self._images.append((image_index[:num_images], output.loss_per_image[:num_images]))

    def compute_and_reset(self, summarize: Callable[[Tensor, Tensor], dict[str, float]]) -> MetricWindow:
        """Return the metrics since the last call; means are over steps whose numbers were finite.

        loss and the task's means, `summarize(counts, counts since the start)`, gradient_norm; skipped_steps: since the start,
        whose loss or gradient was not finite; data_wait: fraction of time waiting for images.
        """
        steps = self._all_steps()
        elapsed = max(1e-9, time.monotonic() - self._started)
        finite = steps.isfinite().all(dim=1)
        loss, _, *values = steps[finite].mean(dim=0).tolist()
        self.skipped += int((~finite).sum())
        counts = distributed.all_reduce(self._counts).cpu()
        self.total_counts += counts
        num_means = len(self._mean_names)
        totals = steps[finite].sum(dim=0)[3 + num_means :].tolist()
        metrics = {
            "loss": loss,
            **dict(zip(self._mean_names, values, strict=False)),
            **summarize(counts, self.total_counts),
            **dict(zip(self._sum_names, totals, strict=True)),
            "gradient_norm": values[num_means],
            "skipped_steps": self.skipped,
            "images_per_second": float(steps[:, 1].sum()) / elapsed,
            "data_wait": self._waited / elapsed,
        }
        losses = torch.where(finite, steps[:, 0], torch.nan).tolist()
        window = MetricWindow(metrics, losses, self._images)
        self._reset()
        return window

    def _all_steps(self) -> Float[Tensor, "steps values"]:
        width = 3 + len(self._mean_names) + len(self._sum_names)
        local = torch.stack(self._steps) if self._steps else torch.zeros(0, width, device=self._device)
        return distributed.all_reduce(local).cpu().double()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to write the same metrics; a collective call."""
        steps, counts = self._all_steps(), distributed.all_reduce(self._counts).cpu()
        state = {"steps": steps, "counts": counts, "total_counts": self.total_counts}
        return state | {"skipped": torch.tensor(self.skipped)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the sums of all ranks, which go on in the first."""
        self.skipped = int(state["skipped"])
        self.total_counts.copy_(state["total_counts"])
        steps, counts = state["steps"].float(), state["counts"]
        if distributed.rank() > 0:
            steps, counts = torch.zeros_like(steps), torch.zeros_like(counts)
        self._counts.copy_(counts)
        self._steps = list(steps.to(self._device))
        self._images = [(torch.zeros(0, dtype=torch.int64), torch.zeros(0))] * len(steps)


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
        for step, loss, (index, losses) in zip(range(first, last_step + 1), window.losses, window.images, strict=True):
            if loss != loss:
                self.consecutive_skipped += 1
                worst = self._worst(index, losses)
                log.warning("step %d is left out: loss or gradient not finite; largest losses: %s", step, worst)
                continue
            self.consecutive_skipped = 0
            if self._is_spike(loss):
                usual, worst = statistics.median(self._losses), self._worst(index, losses)
                log.warning("loss spike at step %d: %.3f, usually %.3f; largest losses: %s", step, loss, usual, worst)
            self._losses = [*self._losses, loss][-HISTORY:]

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < MIN_HISTORY:
            return False
        usual = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(x - usual) for x in self._losses)  # a normal distribution's sigma
        return loss > usual + DEVIATIONS * max(deviation, 1e-3 * abs(usual))

    def _worst(self, index: Tensor, losses: Tensor) -> str:
        """Name the images of the largest losses, of all ranks; those that are not finite first."""
        values = torch.full((NUM_NAMED,), -torch.inf)
        named = torch.zeros(NUM_NAMED, dtype=torch.int64)
        order = losses.float().cpu().nan_to_num(torch.inf).sort(descending=True)
        count = min(NUM_NAMED, len(order.values))
        values[:count], named[:count] = order.values[:count], index[order.indices[:count]]
        values, named = distributed.all_gather(values).flatten(), distributed.all_gather(named).flatten()
        best = values.sort(descending=True).indices[:NUM_NAMED].tolist()
        worst = [f"{self.images.id(int(named[i]))!r} ({float(values[i]):.3g})" for i in best if values[i] > -torch.inf]
        return ", ".join(worst) or "unknown, they were before the run was resumed"

    def state_dict(self) -> dict[str, Tensor]:
        """Return the history and the steps left out last."""
        streak = torch.tensor(self.consecutive_skipped)
        return {"losses": torch.tensor(self._losses, dtype=torch.float64), "consecutive_skipped": streak}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        self._losses, self.consecutive_skipped = state["losses"].tolist(), int(state["consecutive_skipped"])
