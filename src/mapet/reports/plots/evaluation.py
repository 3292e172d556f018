"""Figures of evaluations: nearest images, confusion matrix, learning curve."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mapet.reports.plots.base import montage, one_axis, to_picture

MAX_NUMBERED, MAX_NAMED = 20, 60
"""Classes of a confusion matrix up to which counts are written out, and names."""


def plot_neighbours(rows: Sequence[Sequence[tuple[UInt8[Tensor, "C h w"], str]]], labelled: bool) -> Figure:
    """Draw rows of (image, name): a test image, then the training images nearest to it, best first.

    Args:
        labelled: names are classes; images of the row's first class get a green frame, others a dashed red one.
    """
    tiles = [[to_picture(image) for image, _ in row] for row in rows]
    figure, axis, centres = montage(tiles, [""] * len(rows), size=0.9)
    for y, row in zip(centres, rows, strict=True):
        for x, (_, name) in enumerate(row):
            if labelled and x:
                color, style = ("tab:green", "-") if name == row[0][1] else ("tab:red", "--")
                axis.add_patch(Rectangle((x + 0.04, y - 0.46), 0.92, 0.92, fill=False, ec=color, lw=2.5, ls=style))
            axis.text(x + 0.5, y - 0.49, name[:14], fontsize=7, ha="center", va="bottom", parse_math=False)
    figure.suptitle("Test images (left) and their nearest training images by cosine similarity", fontsize=9)
    return figure


def plot_confusion(counts: Int[np.ndarray, "K K"], classes: Sequence[str]) -> Figure:
    """Draw rows of true classes over columns of predicted ones, as shares of the row; numbers where there is room."""
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = min(12.0, max(4.0, 0.45 * len(classes) + 2))
    figure, axis = one_axis(side, side)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0) if len(classes) <= MAX_NUMBERED else ():
        color = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=color)
    if len(classes) <= MAX_NAMED:
        names = [name[:16].replace("$", r"\$") for name in classes]
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="predicted class", ylabel="true class")
    accuracy = np.trace(counts) / max(1, counts.sum())
    axis.set_title(f"Linear probe: {accuracy:.1%} of {counts.sum():,} images", fontsize=10)
    return figure


def plot_learning_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the mean training loss of each epoch and, where it was measured, the accuracy on the test images."""
    figure, left = one_axis(6, 4)
    right = left.twinx()
    trained, tested = ([row for row in rows if name in row] for name in ("loss", "accuracy"))
    left.plot([row["epoch"] for row in trained], [row["loss"] for row in trained], color="tab:blue")
    left.set_xlabel("epoch")
    left.set_ylabel("training loss", color="tab:blue")
    right.plot([row["epoch"] for row in tested], [row["accuracy"] for row in tested], color="tab:orange", marker="o")
    right.set_ylabel("test accuracy", color="tab:orange")
    right.set_ylim(0, 1)
    return figure
