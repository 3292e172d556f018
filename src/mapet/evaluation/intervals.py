"""Confidence intervals of metrics: of proportions, of means over seeds, and of anything computed from test images."""

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL = 0.05
"""Intervals cover 1 - LEVEL; corrected p below which two values are told apart."""


class MetricValue(NamedTuple):
    """A metric and its 95 % interval, where one is known.

    Attributes:
        over: what the interval counts over, e.g. '1,000 images', '5 seeds'.
        selected: hyperparameters chosen to get it, e.g. 'layer 12, lr 0.1'.
    """

    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    over: str = ""
    selected: str = ""


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval (1927) of a proportion; it stays within 0..1 and is not empty at 0 and 1."""
    from scipy import stats

    low, high = stats.binomtest(correct, count).proportion_ci(1 - LEVEL, method="wilson")
    return float(low), float(high)


def accuracy_with_ci(correct: int, count: int, selected: str = "") -> MetricValue:
    """Make an accuracy over test images, with Wilson's interval."""
    return MetricValue(correct / count, *wilson(correct, count), f"{count:,} images", selected)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Compute the mean and half the width of its 95 % interval by Student's t, for normal, independent values.

    The width is None below two values: nothing is then known of the spread.
    """
    if len(values) < 2:
        return fmean(values), None
    from scipy import stats  # a second to import

    return fmean(values), float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def over_seeds(values: Sequence[float], least: float = 0.0) -> MetricValue:
    """Average over seeds, with Student's interval cut off at the metric's range, `least` to 1."""
    mean, width = mean_and_interval(values)
    if width is None:
        return MetricValue(mean, over="1 seed")
    return MetricValue(mean, max(least, mean - width), min(1.0, mean + width), f"{len(values)} seeds")


def bootstrap(
    statistic: Callable[[Float[np.ndarray, " n"]], float], count: int, draws: int = 200, selected: str = ""
) -> MetricValue:
    """Compute a statistic of all test images, with the percentile interval over resampled ones (Efron, 1979).

    Args:
        statistic: takes how often each of the `count` images is drawn; all ones is the metric itself.
    """
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.multinomial(count, np.full(count, 1 / count)).astype(float)) for _ in range(draws)]
    low, high = np.nanquantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    return MetricValue(float(statistic(np.ones(count))), float(low), float(high), f"{count:,} images", selected)
