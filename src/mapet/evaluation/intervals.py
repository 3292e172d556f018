"""How sure a figure is: intervals for shares, for means over seeds, and for anything that is made of test images."""

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL = 0.05
"""Intervals cover 1 - LEVEL; corrected p below which two values are told apart."""


class Figure(NamedTuple):
    """A measured value and its 95 % interval, where one is known.

    Attributes:
        of: what the interval counts over, e.g. '1,000 images', '5 seeds'.
        choice: what was chosen to get it, e.g. 'layer 12, lr 0.1'.
    """

    value: float
    low: float | None = None
    high: float | None = None
    of: str = ""
    choice: str = ""


def wilson(correct: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, of which `correct` of `count` independent trials were seen (Wilson, 1927).

    Unlike the normal one it stays within 0..1 and is not empty at 0 and 1.
    """
    from scipy import stats

    z = float(stats.norm.ppf(1 - LEVEL / 2))
    share, weight = correct / count, z * z / count
    middle = (share + weight / 2) / (1 + weight)
    width = z / (1 + weight) * (share * (1 - share) / count + weight / (4 * count)) ** 0.5
    return max(0.0, middle - width), min(1.0, middle + width)


def share(correct: int, count: int, choice: str = "") -> Figure:
    """An accuracy over test images, with Wilson's interval."""
    return Figure(correct / count, *wilson(correct, count), f"{count:,} images", choice)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % interval by Student's t, for values taken as normal and independent.

    None in place of a width below two values: nothing is then known of the spread.
    """
    if len(values) < 2:
        return fmean(values), None
    from scipy import stats  # a second to import

    return fmean(values), float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def over_seeds(values: Sequence[float], choice: str = "", least: float = 0.0) -> Figure:
    """The mean over seeds, with Student's interval, as far as the figure can go: from `least` to 1."""
    mean, width = mean_and_interval(values)
    if width is None:
        return Figure(mean, of="1 seed", choice=choice)
    return Figure(mean, max(least, mean - width), min(1.0, mean + width), f"{len(values)} seeds", choice)


def bootstrap(
    statistic: Callable[[Float[np.ndarray, " n"]], float], count: int, draws: int = 200, choice: str = "", seed: int = 0
) -> Figure:
    """`statistic` of all test images, with the percentile interval over resampled ones (Efron, 1979).

    Args:
        statistic: takes how often each of the `count` images is drawn; all ones is the figure itself.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.multinomial(count, np.full(count, 1 / count)).astype(float)) for _ in range(draws)]
    low, high = np.nanquantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    return Figure(float(statistic(np.ones(count))), float(low), float(high), f"{count:,} images", choice)
