"""The 15 common corruptions in 5 severities of Hendrycks & Dietterich 2019 (arXiv 1903.12261), for any image size.

The paper gives parameters for two sizes: 224 px (ImageNet-C) and 32 px (CIFAR-10-C). Between the two each parameter is
interpolated on the logarithm of the image's shorter side; beyond them lengths scale with the side and strengths stay.
Written from the definitions: metrics differ from those on the published image files, which have other random draws and
photographs of ice where `frost` draws a fractal.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import ndimage, signal
from torch import Tensor

Pixels = Float[np.ndarray, "H W C"]
Bytes = UInt8[np.ndarray, "H W C"]
SMALL_SIDE, LARGE_SIDE = 32, 224
"""Sides of the published sizes, pixels."""
SEVERITIES = (1, 2, 3, 4, 5)


class SeverityRange(NamedTuple):
    """A parameter's published values at severities 1 to 5.

    Attributes:
        small: values for 32 px.
        large: values for 224 px.
        is_length: the value is in pixels, so that it scales with images above 224 px and below 32.
    """

    small: tuple[float, ...]
    large: tuple[float, ...]
    is_length: bool = False

    def interpolate(self, side: int, severity: int) -> float:
        """Return the value for images whose shorter side is `side` pixels: geometric between 32 and 224 px, linear if a value is 0."""
        small, large = self.small[severity - 1], self.large[severity - 1]
        position = math.log(side / SMALL_SIDE) / math.log(LARGE_SIDE / SMALL_SIDE)
        if 0 <= position <= 1:
            is_geometric = min(small, large) > 0
            return small ** (1 - position) * large**position if is_geometric else small + (large - small) * position
        nearest, published_side = (small, SMALL_SIDE) if position < 0 else (large, LARGE_SIDE)
        return nearest * side / published_side if self.is_length else nearest


def _scale_from_244(*fractions: float) -> tuple[float, ...]:
    """Return fractions of 224 px: ImageNet-C gives its elastic lengths as fractions of 244 px."""
    return tuple(fraction * 244 / LARGE_SIDE for fraction in fractions)


class CorruptionKind(NamedTuple):
    """One of the 15 corruptions.

    Attributes:
        function: takes pixels in [0, 1], a random generator and the parameters by name; returns pixels, which may leave [0, 1].
        parameters: the published values of each parameter.
    """

    function: Callable[..., Pixels]
    parameters: dict[str, SeverityRange]


CORRUPTIONS: dict[str, CorruptionKind] = {}
"""The corruptions by ImageNet-C's names, in its order."""


def corruption(**parameters: SeverityRange) -> Callable[[Callable[..., Pixels]], Callable[..., Pixels]]:
    """Return a decorator that adds a function to `CORRUPTIONS` under its name; see `CorruptionKind`."""

    def register(function: Callable[..., Pixels]) -> Callable[..., Pixels]:
        CORRUPTIONS[function.__name__] = CorruptionKind(function, parameters)
        return function

    return register


def corrupt(image: Bytes, name: str, severity: int, rng: np.random.Generator) -> Bytes:
    """Return a corrupted copy of a gray or RGB image.

    Args:
        name: key of `CORRUPTIONS`.
        severity: 1 to 5.
        rng: source of all random draws.
    """
    function, ranges = CORRUPTIONS[name]
    parameters = {key: values.interpolate(min(image.shape[:2]), severity) for key, values in ranges.items()}
    changed = function(image.astype(np.float64) / 255, rng, **parameters)
    return (np.clip(changed, 0, 1) * 255).round().astype(np.uint8)


class Corruption(NamedTuple):
    """`corrupt` as the `augment` of a `ViewDataset`, which seeds the global random generators with the image's key."""

    name: str
    severity: int

    def __call__(self, image: UInt8[Tensor, "C H W"]) -> UInt8[Tensor, "C H W"]:
        rng = np.random.default_rng(np.random.randint(2**31, size=4))  # noqa: NPY002  (the generator that is seeded)
        changed = corrupt(image.movedim(0, -1).numpy(), self.name, self.severity, rng)
        return torch.from_numpy(changed).movedim(-1, 0)


@corruption(std=SeverityRange((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)))
def gaussian_noise(x: Pixels, rng: np.random.Generator, std: float) -> Pixels:
    """Add Gaussian noise of standard deviation `std`."""
    return x + rng.normal(0, std, x.shape)


@corruption(photons=SeverityRange((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)))
def shot_noise(x: Pixels, rng: np.random.Generator, photons: float) -> Pixels:
    """Draw each value from a Poisson distribution, as a sensor does that counts up to `photons` photons."""
    return rng.poisson(x * photons) / photons


@corruption(fraction=SeverityRange((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)))
def impulse_noise(x: Pixels, rng: np.random.Generator, fraction: float) -> Pixels:
    """Set a fraction of the values to 0 or 1 at random (salt and pepper)."""
    is_hit, is_white = rng.random(x.shape) < fraction, rng.random(x.shape) < 0.5
    return np.where(is_hit, is_white.astype(float), x)


@corruption(
    radius=SeverityRange((0.3, 0.4, 0.5, 1, 1.5), (3, 4, 6, 8, 10), is_length=True),
    soften=SeverityRange((0.4, 0.5, 0.6, 0.2, 0.1), (0.1, 0.5, 0.5, 0.5, 0.5), is_length=True),
)
def defocus_blur(x: Pixels, rng: np.random.Generator, radius: float, soften: float) -> Pixels:
    """Convolve with a disk of `radius` pixels that a Gaussian of standard deviation `soften` pixels smooths."""
    reach = max(1, math.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    # How much of each pixel the disk covers, so that radii below a pixel blur too.
    disk = np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1)
    disk[reach, reach] = 1
    kernel = ndimage.gaussian_filter(np.pad(disk, 2), soften)
    return _convolve(x, kernel / kernel.sum())


@corruption(
    std=SeverityRange((0.05, 0.25, 0.4, 0.25, 0.4), (0.7, 0.9, 1, 1.1, 1.5), is_length=True),
    reach=SeverityRange((1, 1, 1, 1, 1), (1, 2, 2, 3, 4), is_length=True),
    rounds=SeverityRange((1, 1, 1, 2, 2), (2, 1, 3, 2, 2)),
)
def glass_blur(x: Pixels, rng: np.random.Generator, std: float, reach: float, rounds: float) -> Pixels:
    """Blur, let every pixel change places with a random one nearby, and blur again.

    Args:
        std: standard deviation of both Gaussian blurs, pixels.
        reach: largest distance of the pixels that change places, in rows and in columns.
        rounds: how often every pixel changes places.
    """
    x = ndimage.gaussian_filter(x, (std, std, 0))
    height, width = x.shape[:2]
    max_offset = max(1, round(reach))
    positions = np.indices((height, width)).reshape(2, -1).T
    source = list(range(height * width))  # of each pixel, the flat index of the pixel that it shows
    for _ in range(max(1, round(rounds))):
        offsets = rng.integers(-max_offset, max_offset + 1, positions.shape)
        partners = np.clip(positions + offsets, 0, [height - 1, width - 1]) @ [width, 1]
        for a, b in reversed(list(enumerate(partners.tolist()))):  # from the last pixel to the first, as the authors do
            source[a], source[b] = source[b], source[a]
    return ndimage.gaussian_filter(x.reshape(height * width, -1)[source].reshape(x.shape), (std, std, 0))


@corruption(
    radius=SeverityRange((6, 6, 6, 8, 9), (10, 15, 15, 15, 20), is_length=True),
    std=SeverityRange((1, 1.5, 2, 2, 2.5), (3, 5, 8, 12, 15), is_length=True),
)
def motion_blur(x: Pixels, rng: np.random.Generator, radius: float, std: float) -> Pixels:
    """Blur along a line of `radius` pixels at up to 45 degrees from the horizontal, which fades with `std` pixels."""
    return _convolve(x, _motion_kernel(radius, std, rng.uniform(-45, 45)))


@corruption(max_zoom=SeverityRange((0.05, 0.1, 0.15, 0.2, 0.25), (0.1, 0.15, 0.2, 0.24, 0.3)))
def zoom_blur(x: Pixels, rng: np.random.Generator, max_zoom: float) -> Pixels:
    """Average the image with 12 copies of it that are enlarged by up to 1 + `max_zoom`."""
    factors = 1 + np.linspace(0, max_zoom, 12)
    return (x + sum(_zoom_center(x, factor) for factor in factors)) / (len(factors) + 1)


@corruption(
    mean=SeverityRange((0.1, 0.1, 0.15, 0.25, 0.3), (0.1, 0.2, 0.55, 0.55, 0.55)),
    std=SeverityRange((0.2, 0.2, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.3, 0.3)),
    zoom=SeverityRange((1, 1, 1.75, 2.25, 1.25), (3, 2, 4, 4.5, 2.5), is_length=True),
    threshold=SeverityRange((0.6, 0.5, 0.55, 0.6, 0.65), (0.5, 0.5, 0.9, 0.85, 0.85)),
    radius=SeverityRange((8, 10, 10, 12, 14), (10, 12, 12, 12, 12), is_length=True),
    blur=SeverityRange((3, 4, 4, 6, 12), (4, 4, 8, 8, 12), is_length=True),
    keep=SeverityRange((0.95, 0.9, 0.9, 0.85, 0.8), (0.8, 0.7, 0.7, 0.65, 0.55)),
)
def snow(
    x: Pixels, rng: np.random.Generator, mean: float, std: float, zoom: float, threshold: float, radius: float,
    blur: float, keep: float,
) -> Pixels:  # fmt: skip
    """Add snowflakes to a paler image.

    Args:
        mean: mean of the noise that flakes are made of.
        std: standard deviation of that noise.
        zoom: how much flakes are enlarged.
        threshold: noise below it is no flake.
        radius: length of the streak that a falling flake leaves, pixels.
        blur: standard deviation of the Gaussian along the streak, pixels.
        keep: weight of the image; 1 - `keep` is that of its pale version.
    """
    flakes = _zoom_center(rng.normal(mean, std, (*x.shape[:2], 1)), max(1.0, zoom))
    flakes[flakes < threshold] = 0
    flakes = _convolve(np.clip(flakes, 0, 1), _motion_kernel(radius, blur, rng.uniform(-135, -45)))
    pale = np.maximum(x, x.mean(-1, keepdims=True) * 1.5 + 0.5)
    return keep * x + (1 - keep) * pale + flakes + np.rot90(flakes, 2)  # flakes fall from two sides


@corruption(
    keep=SeverityRange((1, 1, 0.9, 0.85, 0.75), (1, 0.8, 0.7, 0.65, 0.6)),
    ice=SeverityRange((0.2, 0.3, 0.4, 0.4, 0.45), (0.4, 0.6, 0.7, 0.7, 0.75)),
)
def frost(x: Pixels, rng: np.random.Generator, keep: float, ice: float) -> Pixels:
    """Lay crystals of ice over the image: needles on a sheet, bluish in RGB.

    Args:
        keep: weight of the image.
        ice: weight of the ice.
    """
    ridges = 1 - np.abs(2 * _plasma_fractal(x.shape[:2], 1.6, rng) - 1)  # needles: where a fractal crosses its middle
    sheet = _plasma_fractal(x.shape[:2], 2.2, rng)
    crystals = np.clip(ridges**4 + 0.5 * sheet, 0, 1)[..., None]
    tint = np.array([0.82, 0.92, 1.0]) if x.shape[-1] == 3 else np.ones(x.shape[-1])
    return keep * x + ice * crystals * tint


@corruption(
    amount=SeverityRange((0.2, 0.5, 0.75, 1, 1.5), (1.5, 2, 2.5, 2.5, 3)),
    decay=SeverityRange((3, 3, 2.5, 2, 1.75), (2, 2, 1.7, 1.5, 1.4)),
)
def fog(x: Pixels, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    """Add a fractal of clouds that is `amount` strong, and scale the image back to its largest value; see `_plasma_fractal`."""
    largest = x.max()
    return (x + amount * _plasma_fractal(x.shape[:2], decay, rng)[..., None]) * largest / (largest + amount)


@corruption(add=SeverityRange((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)))
def brightness(x: Pixels, rng: np.random.Generator, add: float) -> Pixels:
    """Add to the value of HSV, the largest of the channels; hue and saturation stay."""
    value = x.max(-1, keepdims=True)
    brighter = np.clip(value + add, 0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


@corruption(factor=SeverityRange((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)))
def contrast(x: Pixels, rng: np.random.Generator, factor: float) -> Pixels:
    """Scale the differences from each channel's mean by `factor`."""
    mean = x.mean((0, 1), keepdims=True)
    return mean + factor * (x - mean)


@corruption(
    shift=SeverityRange((0, 0.05, 0.08, 0.1, 0.1), _scale_from_244(2, 2, 0.05, 0.07, 0.12)),
    smooth=SeverityRange((0.1, 0.2, 0.06, 0.04, 0.03), _scale_from_244(0.7, 0.08, 0.01, 0.01, 0.01)),
    affine=SeverityRange((0.08, 0.07, 0.06, 0.05, 0.03), _scale_from_244(0.1, 0.2, 0.02, 0.02, 0.02)),
)
def elastic_transform(x: Pixels, rng: np.random.Generator, shift: float, smooth: float, affine: float) -> Pixels:
    """Warp the image: a random affine map, then a smooth random flow. All lengths are fractions of the shorter side.

    Args:
        shift: strength of the flow before it is smoothed.
        smooth: standard deviation of the Gaussian that smooths the flow.
        affine: how far each of three points may move, in rows and in columns.
    """
    height, width = x.shape[:2]
    side = min(height, width)
    points = np.array([height, width]) // 2 + np.array([[1, 1], [1, -1], [-1, -1]]) * (side // 3)  # the authors' three
    moved = points + rng.uniform(-affine, affine, (3, 2)) * side
    matrix = np.linalg.lstsq(np.c_[points, np.ones(3)], moved, rcond=None)[0]  # (row, column, 1) -> (row, column)
    noise, std = rng.uniform(-1, 1, (2, height, width)), side * smooth
    flow = side * shift * ndimage.gaussian_filter(noise, (0, std, std), mode="reflect", truncate=3)
    positions = np.tensordot(matrix[:2].T, np.mgrid[:height, :width], 1) + matrix[2][:, None, None] + flow
    channels = x.transpose(2, 0, 1)
    return np.dstack([ndimage.map_coordinates(channel, positions, order=1, mode="reflect") for channel in channels])


@corruption(fraction=SeverityRange((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)))
def pixelate(x: Pixels, rng: np.random.Generator, fraction: float) -> Pixels:
    """Shrink the sides to `fraction` by averaging, and enlarge the image again by repeating pixels."""
    height, width = x.shape[:2]
    small = max(1, int(width * fraction)), max(1, int(height * fraction))
    channels = (Image.fromarray(channel) for channel in x.astype(np.float32).transpose(2, 0, 1))
    coarse = (channel.resize(small, Image.Resampling.BOX) for channel in channels)
    return np.dstack([np.asarray(one.resize((width, height), Image.Resampling.NEAREST)) for one in coarse])


@corruption(quality=SeverityRange((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)))
def jpeg_compression(x: Pixels, rng: np.random.Generator, quality: float) -> Pixels:
    """Encode and decode the image as JPEG of that quality, 1 to 100."""
    pixels = torch.from_numpy((x * 255).round().astype(np.uint8)).movedim(-1, 0)
    return tvf.jpeg(pixels, round(quality)).movedim(0, -1).numpy() / 255


def _convolve(x: Pixels, kernel: Float[np.ndarray, "h w"]) -> Pixels:
    """Convolve each channel with a kernel of odd sides, edges mirrored; by FFT, because kernels may be wide."""
    rows, columns = (side // 2 for side in kernel.shape)
    padded = np.pad(x, ((rows, rows), (columns, columns), (0, 0)), mode="reflect")
    return signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def _motion_kernel(radius: float, std: float, degrees: float) -> Float[np.ndarray, "h w"]:
    """Return a kernel of sum 1: a line of `radius` pixels from the center in one direction, which fades as a Gaussian.

    Args:
        std: standard deviation of the Gaussian, pixels.
        degrees: the line's angle, clockwise from the row to the right.
    """
    reach = max(1, round(radius))
    points, pixels = np.arange(0, reach + 0.25, 0.25), np.arange(-reach, reach + 1)  # points of the line, 1/4 px apart
    weights = np.exp(-(points**2) / (2 * std**2))
    angle = math.radians(degrees)
    # Bilinear: each point of the line is shared among the four pixels around it.
    rows = np.clip(1 - np.abs(pixels[:, None] - points * math.sin(angle)), 0, 1)
    columns = np.clip(1 - np.abs(pixels[:, None] - points * math.cos(angle)), 0, 1)
    kernel = rows * weights @ columns.T
    return kernel / kernel.sum()


def _zoom_center(x: Pixels, factor: float) -> Pixels:
    """Enlarge the center of an image by `factor` >= 1 to the image's size, bilinearly."""
    step, start = [1 / factor, 1 / factor, 1], [(side - 1) / 2 * (1 - 1 / factor) for side in x.shape[:2]]
    return ndimage.affine_transform(x, step, [*start, 0], order=1, mode="nearest")


def _plasma_fractal(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> Float[np.ndarray, "H W"]:
    """Return a fractal surface in [0, 1] with diamond-square's spectrum: a sum of noise at every scale.

    Args:
        decay: how much weaker the noise is at each scale than at the one twice as coarse.
    """
    surface = np.zeros(shape)
    for octave in range((2 * max(shape) - 1).bit_length()):  # up to cells of less than a pixel
        noise = rng.uniform(-1, 1, (2**octave + 1, 2**octave + 1))
        surface += decay**-octave * ndimage.zoom(noise, np.divide(shape, 2**octave + 1), order=1)
    surface -= surface.min()
    return surface / max(surface.max(), 1e-12)
