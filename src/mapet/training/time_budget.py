"""A time budget for training: how many steps fit into it, by the speed that is measured."""

import logging
import math
import time

import torch

from mapet import distributed
from mapet.config.shared import TrainerConfig
from mapet.run_state import elapsed_seconds, record, try_read_state
from mapet.training.step import ConstantLRScheduler

log = logging.getLogger("mapet")
CHECK_AT = (0.05, 0.4, 0.75)
"""Fractions of the budget after which the number of steps is compared with the measured speed. The last is before the learning rate
falls, from when on it depends on the number of steps."""
MIN_MEASURED = 3
"""Steps that the speed is measured over at least."""
MIN_CHANGE = 0.02
"""Smallest relative change of the number of steps that is made."""


class TimeBudget:
    """Corrects the number of steps so that training ends in time, at most once after each fraction of `CHECK_AT`.

    A correction is recorded in run.json, `results["corrections"]`: "step" at which it was made, "total_steps" from then on, "seconds" that
    training had taken, of all sessions. Rank 0's clock decides.

    Attributes:
        seconds: that training may take, of all sessions.
        corrections: made so far, also by earlier sessions.
    """

    def __init__(self, config: TrainerConfig, step: int) -> None:
        """Start or resume a budget, with the corrections that run.json has.

        Args:
            config: of the run; `max_minutes` and `out` are not None.
            step: number of steps done.
        """
        assert config.max_minutes is not None and config.out is not None
        self.seconds, self._out = 60 * config.max_minutes, config.out
        state = try_read_state(config.out)
        self.corrections = list(state.results.get("corrections", [])) if state else []
        self._checks = CHECK_AT[len(self.corrections) :]
        # Step and time from which the speed is measured. The first step of a session is slower than others, and does not count.
        self._first_step, self._started = step + 1, math.inf

    @classmethod
    def open(cls, config: TrainerConfig, step: int) -> "TimeBudget | None":
        """Return the budget of a run with the options `max_minutes` and `out`, else None; `step` is the number of steps done."""
        return None if config.max_minutes is None or config.out is None else cls(config, step)

    def correct(self, step: int, total_steps: int) -> int | None:
        """Return another number of steps if it is time to compare, and the present one does not fit; a collective call.

        Args:
            step: number of steps that are done.
            total_steps: present number of steps of the run.
        """
        now, measured = time.monotonic(), step - self._first_step
        if step == self._first_step:
            self._started = now
        if not self._checks or measured < MIN_MEASURED or step >= ConstantLRScheduler.decay_start(total_steps):
            return None
        clock = torch.tensor([elapsed_seconds(self._out), measured / (now - self._started)], dtype=torch.float64)
        elapsed, speed = distributed.broadcast(clock).tolist()
        if elapsed < self._checks[0] * self.seconds:
            return None
        self._checks = tuple(part for part in self._checks if elapsed < part * self.seconds)
        num_steps = fit_steps(step, speed, self.seconds - elapsed)
        self._first_step, self._started = step, now
        if abs(num_steps / total_steps - 1) < MIN_CHANGE:
            return None
        self.corrections.append({"step": step, "total_steps": num_steps, "seconds": round(elapsed, 1)})
        record(self._out, results={"corrections": self.corrections})
        return num_steps


def fit_steps(step: int, speed: float, seconds: float) -> int:
    """Return how many steps a run can have: those that are done, and those that fit into the time that is left.

    At least so many that the learning rate, which falls at the end, has not begun to fall yet.

    Args:
        step: number of steps that are done.
        speed: steps per second.
        seconds: that are left.
    """
    num_steps = step + max(1, round(seconds * speed))
    while ConstantLRScheduler.decay_start(num_steps) <= step:
        num_steps += 1
    return num_steps
