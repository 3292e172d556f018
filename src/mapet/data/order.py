"""The order in which an image's patches are given and then predicted: the first c are context."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Int

OrderKind = Literal["random", "blockwise", "raster"]
SMALLEST, LARGEST = 16 / 196, 75 / 196
"""Area of a block as a share of the image, and `ASPECT` its height over its width, as BEiT draws them."""
ASPECT = 0.3


def draw_order(kind: OrderKind, grid: tuple[int, int], rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """Patch indices, row-major: every patch once.

    random: each order as likely. raster: left to right, top to bottom. blockwise: rectangles of BEiT's kind (arXiv
    2106.08254, algorithm 1) are laid one over the other until they cover the image; the last p patches are those that the
    first rectangles cover, rectangle after rectangle, in random order within each. So p patches are hidden exactly.
    """
    rows, columns = grid
    count = rows * columns
    if kind == "raster":
        return np.arange(count)
    if kind == "random":
        return rng.permutation(count)
    free = np.ones(grid, dtype=bool)
    covered: list[np.ndarray] = []
    for _ in range(count):
        if not free.any():
            break
        area = count * rng.uniform(SMALLEST, LARGEST)
        aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = np.zeros(grid, dtype=bool)
        block[top : top + height, left : left + width] = True
        covered.append(rng.permutation(np.flatnonzero(block & free)))
        free &= ~block
    covered.append(rng.permutation(np.flatnonzero(free)))
    return np.concatenate(covered)[::-1].copy()
