"""Images and patches as matplotlib draws them; grids of axes; montages."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mapet.files import atomic

HIDDEN = 0.88
"""Grey of a patch that is not shown."""


def to_picture(image: UInt8[Tensor, "C H W"]) -> Float[np.ndarray, "H W 3"]:
    """Convert to values in 0..1: the first three channels, or grey."""
    channels = image if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    return channels[:3].permute(1, 2, 0).float().numpy() / 255


def patchify(images: UInt8[Tensor, "B C H W"], grid: tuple[int, int]) -> UInt8[Tensor, "B N C h w"]:
    """Cut images into patches in row-major order."""
    batch, channels, height, width = images.shape
    h, w = height // grid[0], width // grid[1]
    patches = images.view(batch, channels, grid[0], h, grid[1], w)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels, h, w)


def unpatchify(patches: Float[Tensor, "N C h w"], grid: tuple[int, int]) -> Float[Tensor, "C H W"]:
    """Lay patches together again."""
    _, channels, h, w = patches.shape
    return patches.view(*grid, channels, h, w).permute(2, 0, 3, 1, 4).reshape(channels, grid[0] * h, grid[1] * w)


def one_axis(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure of one axis; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def grid_of_axes(names: Sequence[str], columns: int, size: float = 1.5) -> tuple[Figure, Shaped[np.ndarray, "R C"]]:
    """Make named rows of square axes without ticks: an array of `Axes`."""
    figure = Figure(figsize=(max(5.0, size * columns + 1), size * len(names) + 0.6), layout="constrained")
    axes = figure.subplots(len(names), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, name in zip(axes, names, strict=True):
        row[0].set_ylabel(name)
    return figure, axes


def show(axis: Axes, picture: Float[np.ndarray, "H W 3"]) -> None:
    """Draw pixels as they are."""
    axis.imshow(picture, interpolation="nearest")


def montage(
    tiles: Sequence[Sequence[Float[np.ndarray, "h w 3"]]], names: Sequence[str], size: float
) -> tuple[Figure, Axes, list[float]]:
    """Draw rows of named tiles, each 1 x 1 on one axis (matplotlib takes seconds for an axis per tile), with room above.

    Returns:
        the figure, its axis, and the y of each row's centre.
    """
    columns, step = max(map(len, tiles)), 1.2
    figure, axis = one_axis(size * columns + 1, size * step * len(tiles) + 0.6)
    centres = [step * row + 0.7 for row in range(len(tiles))]
    for y, row in zip(centres, tiles, strict=True):
        for x, tile in enumerate(row):
            axis.imshow(tile, interpolation="nearest", extent=(x + 0.04, x + 0.96, y + 0.46, y - 0.46))
    axis.set(xlim=(0, columns), ylim=(step * len(tiles) + 0.2, 0), aspect="equal", xticks=[], frame_on=False)
    axis.set_yticks(centres, names, fontsize=7)
    axis.tick_params(length=0)
    return figure, axis, centres


def save_figure(figure: Figure, path: Path) -> None:
    """Write PNG atomically."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
