"""Near duplicates of images, such as resized, recompressed or brightened copies, by thumbnails of 16 x 16 px."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from scipy.spatial import cKDTree
from torch import Tensor

SIDE, SAMPLES = 16, 128
"""Height and width of a thumbnail, and of the pixels that it is the mean of, at least."""
MIN_CORRELATION, MAX_DIFFERENCE = 0.995, 8.0
"""Of near duplicates: the correlation of their thumbnails' levels, and the root mean square of the levels' differences, of 255."""
NUM_AXES, NUM_FITTED = 8, 2000
"""Principal axes of thumbnails in which candidates are searched, and thumbnails that these are found from."""
MAX_CANDIDATES = 20_000_000
"""Candidates above which images are too much alike for thumbnails to tell anything."""

Thumbnail = UInt8[np.ndarray, "256"]


def make_thumbnail(pixels: UInt8[Tensor, "C H W"]) -> Thumbnail:
    """Return the mean levels of an image in a grid of 16 x 16 cells, over channels and a sample of the pixels."""
    step = max(1, min(pixels.shape[1:]) // SAMPLES)
    gray = pixels[:, ::step, ::step].float().mean(0, keepdim=True)
    return F.adaptive_avg_pool2d(gray, SIDE).flatten().round().byte().numpy()


def find_near_duplicates(thumbnails: Sequence[Thumbnail]) -> Int[np.ndarray, "pairs 2"] | None:
    """Return the indices of each two images whose thumbnails hardly differ; images of one level have none. None: too many are alike to tell.

    Correlated thumbnails lie close to each other once they are centered and scaled to unit length, and at most as far in a few of their
    principal axes, in which a tree finds the candidates.
    """
    levels = np.stack(thumbnails).astype(np.float32)
    centered = levels - levels.mean(1, keepdims=True)
    lengths = np.linalg.norm(centered, axis=1, keepdims=True)
    unit = centered / np.maximum(lengths, 1e-6)
    axes = np.linalg.svd(unit[:: -(-len(unit) // NUM_FITTED)], full_matrices=False)[2][:NUM_AXES]
    tree, radius = cKDTree(unit @ axes.T), (2 * (1 - MIN_CORRELATION)) ** 0.5
    if int(tree.count_neighbors(tree, radius)) > MAX_CANDIDATES:
        return None
    pairs = tree.query_pairs(radius, output_type="ndarray").reshape(-1, 2)
    first, second = pairs.T
    correlation = np.einsum("nd,nd->n", unit[first], unit[second])
    difference = np.sqrt(np.square(levels[first] - levels[second]).mean(1))
    found = (correlation >= MIN_CORRELATION) & (difference <= MAX_DIFFERENCE)
    return pairs[found][np.lexsort((second[found], first[found]))]
