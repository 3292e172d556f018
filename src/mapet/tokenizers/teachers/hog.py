"""Histograms of oriented gradients: a teacher that needs no training, and a control of evaluations."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mapet.config.tokenizers import HOGOptions

EPS = 1e-5
"""Added to the sum of a window's histograms before they are divided by it, as in scikit-image."""


class HOG(nn.Module):
    """Histograms of oriented gradients of a window around each patch (Dalal and Triggs 2005), and the patch's mean color.

    The histograms of a window are divided by their sum, and square roots are taken: Dalal and Triggs's L1-sqrt, which
    `skimage.feature.hog` calls block_norm 'L1-sqrt'. Nothing in it is learned, from labels or otherwise.
    """

    def __init__(self, patch_size: int, hog: HOGOptions) -> None:
        """Take the patch size, pixels, and the options of windows, cells, orientations and color."""
        super().__init__()
        self.patch_size, self.options = patch_size, hog

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        """Return F = bins x cells^2 + C features of each patch, the orientation varying slowest, those of color last (none if weighted 0)."""
        options = self.options
        cell = (options.window or options.cells * self.patch_size) // options.cells
        histograms = orientation_histograms(images, self.patch_size, options.cells, cell, options.bins)
        features = (histograms / (histograms.sum((1, 2), keepdim=True) + EPS)).sqrt().flatten(1, 2)
        if options.color:
            features = torch.cat([features, options.color * F.avg_pool2d(images, self.patch_size)], 1)
        return features


def orientation_histograms(
    images: Float[Tensor, "B C h w"], stride: int, cells: int, cell: int, bins: int
) -> Float[Tensor, "B bins cells2 rows columns"]:
    """Compute the histograms of oriented gradients of a window at each position of a grid.

    Each pixel votes with the magnitude of its gradient (differences of its two neighbors), in the channel where that is largest, for one
    of `bins` orientations of 0 to 180 degrees; a histogram is the mean over the pixels of a cell. Pixels beyond the image are those of its
    border.

    Args:
        images: pixels in [0, 1].
        stride: pixels between windows; each has the center of a square of this side (to half a pixel), and the squares tile the image
            from its upper left corner. Pixels beyond the last whole square have no window.
        cells: rows and columns of cells in a window.
        cell: pixels of a cell's side.
        bins: number of orientations.

    Returns:
        The cells^2 histograms, cells in row-major order, of each of the rows x columns squares; they are not normalized.
    """
    rows, columns = (side // stride for side in images.shape[2:])
    pad_before = (cells * cell - stride) // 2
    pad_after = cells * cell - stride - pad_before
    # One more pixel on each side, for the gradient.
    padded = F.pad(images, (pad_before + 1, pad_after + 1, pad_before + 1, pad_after + 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    magnitude, channel = torch.hypot(dx, dy).max(1, keepdim=True)
    angle = torch.atan2(dy.gather(1, channel), dx.gather(1, channel)) % math.pi
    # Rounding may make the angle pi, which is in the last bin.
    orientation = (angle * (bins / math.pi)).long().clamp_max(bins - 1)
    votes = images.new_zeros(len(images), bins, *magnitude.shape[2:]).scatter_(1, orientation, magnitude)
    # Cells begin at multiples of their side in a window, and windows at multiples of the stride: means are needed at common divisors only.
    step = math.gcd(cell, stride)
    means = F.avg_pool2d(votes, cell, step)
    starts = [index * cell // step for index in range(cells)]
    row_slices, column_slices = (
        [slice(start, start + (count - 1) * stride // step + 1, stride // step) for start in starts]
        for count in (rows, columns)
    )
    return torch.stack([means[..., y, x] for y in row_slices for x in column_slices], 2)
