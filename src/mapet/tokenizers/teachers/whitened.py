"""Contrast-normalized, whitened patches of pixels: a teacher that needs no labels, and a control of evaluations."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mapet.config.tokenizers import WhitenedOptions
from mapet.files import write_tensors
from mapet.weights import read_weights

CONTRAST_OFFSET, ZCA_EPS = 10.0, 0.1
"""Coates and Ng 2011: added to the variance of a patch of pixels from 0 to 255 before pixels are divided by the standard deviation, and to
the eigenvalues of the patches' covariance before ZCA whitening."""
NUM_FIT_PATCHES = 50_000
"""ZCA is fitted to about so many patches, equally many of each image."""
MAX_SIDE = 12
"""Windows are shrunk to at most this many pixels a side."""
FILE = "whitening.safetensors"


class Whitened(nn.Module):
    """Pixels of a window around each patch, normalized in brightness and contrast and ZCA-whitened (Coates and Ng 2011, section 3).

    Attributes:
        mean: (F,) of the windows that it was fitted to, normalized.
        whitening: (F, F) symmetric matrix by which a normalized window minus `mean` is multiplied. Before `fit` it is the identity.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, patch_size: int, channels: int, whitened: WhitenedOptions, saved: Path | None) -> None:
        """Make the unfitted teacher, or load the one that `save` wrote.

        Args:
            patch_size: pixels.
            channels: of the images.
            whitened: its option `window`.
            saved: folder that `save` wrote to; None: `fit` follows.

        Raises:
            MapetError: the file in `saved` cannot be read.
        """
        super().__init__()
        self.patch_size, self.window = patch_size, whitened.window or 2 * patch_size
        size = channels * min(self.window, MAX_SIDE) ** 2
        tensors = read_weights(saved / FILE) if saved else {"mean": torch.zeros(size), "whitening": torch.eye(size)}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def fit(self, batches: Iterable[Float[Tensor, "B C h w"]], num_images: int) -> None:
        """Fit mean and whitening to windows of images.

        Args:
            batches: pixels in [0, 1], of `num_images` images in all.
        """
        windows = (self._windows(images).movedim(1, -1).flatten(1, 2) for images in batches)
        statistics = fit_zca(draw_patches(windows, -(-NUM_FIT_PATCHES // num_images)))
        self.mean, self.whitening = (tensor.to(self.mean) for tensor in statistics)

    def save(self, folder: Path) -> None:
        """Write mean and whitening into a new folder."""
        folder.mkdir()
        write_tensors(folder / FILE, self.state_dict())

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        """Return the F = C x side squared whitened pixels of each patch's window."""
        return ((self._windows(images).movedim(1, -1) - self.mean) @ self.whitening).movedim(-1, 1)

    def _windows(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        """Return the normalized pixels of the window around each patch; beyond the image they are those of its border."""
        rows, columns = (side // self.patch_size for side in images.shape[2:])
        before = (self.window - self.patch_size) // 2
        after = self.window - self.patch_size - before
        padded = F.pad(images, (before, after, before, after), mode="replicate")
        windows = padded.unfold(2, self.window, self.patch_size).unfold(3, self.window, self.patch_size)
        windows = windows[:, :, :rows, :columns].permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # (patches, C, window, window)
        if self.window > MAX_SIDE:
            windows = F.interpolate(windows, (MAX_SIDE, MAX_SIDE), mode="bilinear", antialias=True)
        normalized = normalize_contrast(255 * windows.flatten(1))
        return normalized.unflatten(0, (len(images), rows, columns)).movedim(-1, 1)


def normalize_contrast(patches: Float[Tensor, "*n F"]) -> Float[Tensor, "*n F"]:
    """Subtract each patch's mean, and divide by its standard deviation; `CONTRAST_OFFSET` keeps flat patches flat.

    Args:
        patches: pixels from 0 to 255, F of each patch.
    """
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    return (patches - mean) / (variance + CONTRAST_OFFSET).sqrt()


def draw_patches(batches: Iterable[Float[Tensor, "B n F"]], patches_per_image: int) -> Float[Tensor, "m F"]:
    """Return different random patches of each image, always the same ones; if an image has fewer, all of them.

    Args:
        batches: the n patches of each of B images.
        patches_per_image: how many are drawn.
    """
    generator, drawn = torch.Generator().manual_seed(0), []
    for patches in batches:
        rows = torch.rand(patches.shape[:2], generator=generator).argsort(1)[:, :patches_per_image, None]
        drawn.append(patches.gather(1, rows.to(patches.device).expand(-1, -1, patches.shape[2])).flatten(0, 1))
    return torch.cat(drawn)


def fit_zca(points: Float[Tensor, "m F"]) -> tuple[Float[Tensor, " F"], Float[Tensor, "F F"]]:
    """Return the mean of points and the symmetric matrix that whitens them (ZCA), both float32 on their device."""
    mean = points.double().cpu().mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov(points.double().cpu().T))
    whitening = vectors @ (variances + ZCA_EPS).rsqrt().diag() @ vectors.T
    return mean.float().to(points), whitening.float().to(points)
