"""Watching the losses: updates that were left out, and spikes with the images that made them."""

import logging
import statistics

import torch
from torch import Tensor

from mapet import distributed
from mapet.data.image_list import ImageList
from mapet.training.metrics import Window

log = logging.getLogger("mapet")
HISTORY = 200
"""Losses a spike is judged by, and how many of them there must be; how many deviations above their median it lies."""
LEAST, DEVIATIONS = 30, 8.0
NAMED = 3
"""Images named of each spike."""


class Watch:
    """Judges the steps between two readings of the meter, so that none of them waits for it.

    Attributes:
        streak: steps in a row, up to the last, that were left out because a number was not finite.
    """

    def __init__(self, images: ImageList) -> None:
        self.images = images
        self.streak = 0
        self._losses: list[float] = []

    def judge(self, window: Window, last_step: int) -> None:
        """Log what is remarkable about the steps up to `last_step`; a collective call."""
        first = last_step - len(window.losses) + 1
        for step, loss, (index, losses) in zip(range(first, last_step + 1), window.losses, window.images, strict=True):
            if loss != loss:
                self.streak += 1
                worst = self._worst(index, losses)
                log.warning("step %d is left out: loss or gradient not finite; largest losses: %s", step, worst)
                continue
            self.streak = 0
            if self._is_spike(loss):
                usual, worst = statistics.median(self._losses), self._worst(index, losses)
                log.warning("loss spike at step %d: %.3f, usually %.3f; largest losses: %s", step, loss, usual, worst)
            self._losses = [*self._losses, loss][-HISTORY:]

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < LEAST:
            return False
        usual = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(x - usual) for x in self._losses)  # a normal distribution's sigma
        return loss > usual + DEVIATIONS * max(deviation, 1e-3 * abs(usual))

    def _worst(self, index: Tensor, losses: Tensor) -> str:
        """The images of the largest losses, of all processes; those that are not finite first."""
        values = torch.full((NAMED,), -torch.inf)
        named = torch.zeros(NAMED, dtype=torch.int64)
        order = losses.float().cpu().nan_to_num(torch.inf).sort(descending=True)
        count = min(NAMED, len(order.values))
        values[:count], named[:count] = order.values[:count], index[order.indices[:count]]
        values, named = distributed.all_gather(values).flatten(), distributed.all_gather(named).flatten()
        best = values.sort(descending=True).indices[:NAMED].tolist()
        found = [f"{self.images.id(int(named[i]))!r} ({float(values[i]):.3g})" for i in best if values[i] > -torch.inf]
        return ", ".join(found) or "unknown, they were before the run was resumed"

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": torch.tensor(self._losses, dtype=torch.float64), "streak": torch.tensor(self.streak)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._losses, self.streak = state["losses"].tolist(), int(state["streak"])
