"""What a person sees while a run goes on: a line an epoch, and on a terminal a bar and two lines below it."""

import logging
import time
from math import isfinite
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mapet.evaluation.online import OnlineProbe
from mapet.training.metrics import Meter

log = logging.getLogger("mapet")


class Panel:
    """Progress with the time that is left, losses and accuracies beside their baselines, speed, the last probe.

    Args:
        total, done: steps of the run, and those done before.
        file: where the bar goes; the standard error if None. What is no terminal gets the log lines alone.
    """

    def __init__(self, total: int, done: int = 0, file: Any = None) -> None:
        common: dict[str, Any] = {"disable": None, "dynamic_ncols": True, "file": file}
        self._bar = tqdm(total=total, initial=done, desc="pretrain", unit="step", smoothing=0.05, **common)
        self.lines = (
            [] if self._bar.disable else [tqdm(bar_format="{desc}", position=i, leave=False, **common) for i in (1, 2)]
        )
        self._total, self._first, self._done = total, done, done
        self._shown = done
        self._epoch: list[dict[str, float]] = []
        self._started = time.monotonic()
        self._probe = ""

    def __enter__(self) -> "Panel":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for bar in [*reversed(self.lines), self._bar]:
            bar.close()

    def advance(self) -> None:
        """A step is done."""
        self._done += 1
        self._bar.update()

    def show(self, metrics: dict[str, float], epoch_ended: bool) -> None:
        """Figures of the steps since the last ones; the line of an epoch has the means of all its steps."""
        self._epoch.append(metrics | {"steps": self._done - self._shown})
        self._shown = self._done
        if self.lines:
            self._set(0, Meter.learning(metrics))
            self._set(1, f"{Meter.speed(metrics)}{self._probe}")
        if epoch_ended:
            seen, whole = sum(window["steps"] for window in self._epoch), round(self._done / metrics["epoch"])
            part = f" (its last {seen} of {whole} steps)" if seen < whole else ""  # of an epoch that was resumed
            for name in LEARNED & metrics.keys():
                known = [window for window in self._epoch if isfinite(window[name])]
                steps = sum(window["steps"] for window in known)
                if steps:
                    metrics = metrics | {name: sum(window[name] * window["steps"] for window in known) / steps}
            self._epoch.clear()
            log.info("epoch %d%s: %s%s", round(metrics["epoch"]), part, Meter.line(metrics), self._left())

    def probed(self, epoch: int, scores: dict[str, float]) -> None:
        """Scores of a probe; on a terminal they stay until the next."""
        self._probe = f"; epoch {epoch}: {OnlineProbe.line(scores)}"
        log.info("epoch %d: %s, on images held out of the training images", epoch, OnlineProbe.line(scores))

    def _set(self, number: int, text: str) -> None:
        self.lines[number].set_description_str(f"  {text}")

    def _left(self) -> str:
        """', 3 min left', judged by the steps of this session."""
        seconds = (time.monotonic() - self._started) / max(1, self._done - self._first) * (self._total - self._done)
        if self._done == self._total:
            return ""
        size, unit = next(((size, unit) for size, unit in UNITS if seconds >= 2 * size), UNITS[-1])
        return f", {seconds / size:.0f} {unit} left"


LEARNED = {"loss", "token_accuracy"}
UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
