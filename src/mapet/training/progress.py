"""Progress of a run: a line an epoch, and on a terminal a bar and two lines below it."""

import logging
import time
from math import isfinite
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mapet.training.task import Task

log = logging.getLogger("mapet")


class ProgressDisplay:
    """Shows the time that is left, losses and accuracies beside their baselines, speed, the last scores.

    Args:
        task: says how its metrics are shown.
        total, done: steps of the run, and those done before.
        file: where the bar goes; the standard error if None. What is no terminal gets the log lines alone.
    """

    def __init__(self, task: Task[Any, Any], total: int, done: int = 0, file: Any = None) -> None:
        self._task = task
        common: dict[str, Any] = {"disable": None, "dynamic_ncols": True, "file": file}
        self._bar = tqdm(total=total, initial=done, desc=task.command, unit="step", smoothing=0.05, **common)
        self.lines = (
            [] if self._bar.disable else [tqdm(bar_format="{desc}", position=i, leave=False, **common) for i in (1, 2)]
        )
        self._total, self._first, self._done = total, done, done
        self._shown = done
        self._epoch: list[dict[str, float]] = []
        self._started = time.monotonic()
        self._scores = ""

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        if self.lines:
            self._set(0, self._task.format_metrics(metrics))
            self._set(1, f"{format_throughput(metrics)}{self._scores}")
        if epoch_ended:
            self._log_epoch(metrics)
            self._epoch.clear()

    def _log_epoch(self, metrics: dict[str, float]) -> None:
        epoch = round(metrics["epoch"])
        if epoch % self._task.epochs_per_line and self._done < self._total:
            return
        seen, all_steps = sum(window["steps"] for window in self._epoch), round(self._done / metrics["epoch"])
        part = f" (its last {seen} of {all_steps} steps)" if seen < all_steps else ""  # of an epoch that was resumed
        for name in AVERAGED & metrics.keys():
            known = [window for window in self._epoch if isfinite(window[name])]
            steps = sum(window["steps"] for window in known)
            if steps:
                metrics = metrics | {name: sum(window[name] * window["steps"] for window in known) / steps}
        text, speed = self._task.format_metrics(metrics), format_throughput(metrics)
        log.info("epoch %d%s: %s, %s%s", epoch, part, text, speed, self._eta())

    def log_scores(self, epoch: int, scores: dict[str, float]) -> None:
        """Show scores; on a terminal they stay until the next."""
        self._scores = f"; epoch {epoch}: {self._task.format_scores(scores)}"
        log.info("epoch %d: %s", epoch, self._task.format_scores(scores))

    def _set(self, number: int, text: str) -> None:
        self.lines[number].set_description_str(f"  {text}")

    def _eta(self) -> str:
        """', 3 min left', judged by the steps of this session."""
        seconds = (time.monotonic() - self._started) / max(1, self._done - self._first) * (self._total - self._done)
        if self._done == self._total:
            return ""
        size, unit = next(((size, unit) for size, unit in UNITS if seconds >= 2 * size), UNITS[-1])
        return f", {seconds / size:.0f} {unit} left"


AVERAGED = {"loss", "token_accuracy"}
UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))


def format_throughput(metrics: dict[str, float]) -> str:
    """Return images a second, and whether the loader keeps up."""
    return f"{metrics['images_per_second']:.0f} img/s, data wait {metrics['data_wait']:.0%}"
