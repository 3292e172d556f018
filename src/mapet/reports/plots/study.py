"""Learning curves of a study as SVG."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np

from mapet.reports.html import line_style
from mapet.reports.plots.base import one_axis

Line = list[tuple[float, float]]
"""Points of one seed."""
INK = "#010203"
"""What matplotlib draws and the page shows in its own text colour, dark or light."""


def plot_seeds(lines: Sequence[tuple[int, Line]], xlabel: str, ylabel: str, heights: tuple[float, float]) -> str:
    """Draw the lines of seeds, each with the number of its style, and their mean over the part that all have, as SVG.

    No text of the user's is drawn: matplotlib would read `$` as mathematics and warn of letters that its font lacks.
    """
    colors = dict.fromkeys(["axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mapet", **colors}):
        figure, axis = one_axis(4, 2.8)
        for i in sorted({i for i, _ in lines}):
            color, dashes = line_style(i)
            seeds = [np.array(line).T for number, line in lines if number == i]
            for x, y in seeds:
                axis.plot(x, y, color=color, linewidth=0.7, alpha=0.4)
            grid = np.unique(np.concatenate([x for x, _ in seeds]))
            grid = grid[(grid >= max(x[0] for x, _ in seeds)) & (grid <= min(x[-1] for x, _ in seeds))]
            mean = np.mean([np.interp(grid, x, y) for x, y in seeds], axis=0)
            axis.plot(grid, mean, color=color, linewidth=2, linestyle=(0, dashes), marker="." if len(grid) == 1 else "")
        low, high = heights
        pad = 0.05 * (high - low) or 0.05
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(low - pad, high + pad))
        axis.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])  # nothing that changes from call to call
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return file.getvalue()[file.getvalue().index("<svg") :].replace(INK, "currentColor")
