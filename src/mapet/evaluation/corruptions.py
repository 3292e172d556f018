"""The 15 common corruptions in 5 severities of Hendrycks & Dietterich 2019 (arXiv 1903.12261), for any image size.

The paper gives parameters for two sizes: 224 px (ImageNet-C) and 32 px (CIFAR-10-C). Between the two each parameter is
interpolated on the logarithm of the image's shorter side; beyond them lengths scale with the side and strengths stay.
Written from what the authors' scripts do (hendrycks/robustness, ImageNet-C/create_c/make_imagenet_c.py and make_cifar_c.py), where
`frost` draws a fractal instead of photographs of ice; docs/robustness.md lists what differs from the published image files.
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
    """A corruption parameter's published values at severities 1 to 5.

    Attributes:
        at_32px: the five values for images of 32 px (CIFAR-10-C), severity 1 first.
        at_224px: the five values for images of 224 px (ImageNet-C).
        is_length: the value is a length in pixels, so that it scales with images above 224 px and below 32 px.
    """

    at_32px: tuple[float, ...]
    at_224px: tuple[float, ...]
    is_length: bool = False

    def interpolate(self, side: int, severity: int) -> float:
        """Return the parameter's value for an image size and a severity.

        Between 32 and 224 px the value is interpolated from `at_32px` to `at_224px` on the logarithm of `side`: geometrically, or
        linearly if one of the two values is 0. Beyond them the nearest published value holds; lengths (`is_length`) scale with `side`.

        Args:
            side: shorter side of the image, pixels.
            severity: 1 to 5.
        """
        small, large = self.at_32px[severity - 1], self.at_224px[severity - 1]
        position = math.log(side / SMALL_SIDE) / math.log(LARGE_SIDE / SMALL_SIDE)
        if 0 <= position <= 1:
            is_geometric = min(small, large) > 0
            return small ** (1 - position) * large**position if is_geometric else small + (large - small) * position
        nearest, published_side = (small, SMALL_SIDE) if position < 0 else (large, LARGE_SIDE)
        return nearest * side / published_side if self.is_length else nearest


def _scale_from_244(*fractions: float) -> tuple[float, ...]:
    """Convert fractions of 244 px, as ImageNet-C's code gives the lengths of `elastic_transform` (sic), to fractions of 224 px."""
    return tuple(fraction * 244 / LARGE_SIDE for fraction in fractions)


class CorruptionKind(NamedTuple):
    """One of the 15 corruptions.

    Attributes:
        function: takes (H, W, C) pixels in [0, 1], a random generator and the parameters by name; returns pixels of the same shape,
            which may leave [0, 1].
        parameters: name of each parameter -> its published values by severity.
    """

    function: Callable[..., Pixels]
    parameters: dict[str, SeverityRange]


CORRUPTIONS: dict[str, CorruptionKind] = {}
"""The corruptions by ImageNet-C's names, in its order."""


def corruption(**parameters: SeverityRange) -> Callable[[Callable[..., Pixels]], Callable[..., Pixels]]:
    """Return a decorator that adds a function to the table `CORRUPTIONS` under its own name, and returns it unchanged.

    Args:
        **parameters: for each keyword that the function takes after the pixels and the random generator, its published values at
            severities 1 to 5, from which `corrupt` computes the value that it passes.
    """

    def register(function: Callable[..., Pixels]) -> Callable[..., Pixels]:
        CORRUPTIONS[function.__name__] = CorruptionKind(function, parameters)
        return function

    return register


def corrupt(image: Bytes, name: str, severity: int, rng: np.random.Generator) -> Bytes:
    """Return a corrupted copy, uint8 and of the same shape, of a gray or RGB image.

    Args:
        image: (H, W, 1 or 3), uint8.
        name: corruption, a key of `CORRUPTIONS`, e.g. 'gaussian_noise'.
        severity: 1 to 5; with the image's shorter side it determines the parameters of the corruption.
        rng: source of all random draws.
    """
    function, ranges = CORRUPTIONS[name]
    parameters = {key: values.interpolate(min(image.shape[:2]), severity) for key, values in ranges.items()}
    changed = function(image.astype(np.float64) / 255, rng, **parameters)
    return (np.clip(changed, 0, 1) * 255).round().astype(np.uint8)


class Corruption(NamedTuple):
    """`corrupt` with a fixed corruption and severity, as the `augment` of a `ViewDataset`.

    Attributes:
        name: key of `CORRUPTIONS`.
        severity: 1 to 5.
    """

    name: str
    severity: int

    def __call__(self, image: UInt8[Tensor, "C H W"]) -> UInt8[Tensor, "C H W"]:
        """Return a copy of the image with corruption `self.name` at `self.severity`.

        It draws from NumPy's global generator, which `ViewDataset` seeds for each image: an image is always corrupted alike.
        """
        rng = np.random.default_rng(np.random.randint(2**31, size=4))  # noqa: NPY002  (the global generator is seeded)
        changed = corrupt(image.movedim(0, -1).numpy(), self.name, self.severity, rng)
        return torch.from_numpy(changed).movedim(-1, 0)


@corruption(std=SeverityRange(at_32px=(0.04, 0.06, 0.08, 0.09, 0.10), at_224px=(0.08, 0.12, 0.18, 0.26, 0.38)))
def gaussian_noise(x: Pixels, rng: np.random.Generator, std: float) -> Pixels:
    """Add Gaussian noise of standard deviation `std` to (H, W, C) pixels in [0, 1]; the caller, `corrupt`, clips the result."""
    return x + rng.normal(0, std, x.shape)


@corruption(photons=SeverityRange(at_32px=(500, 250, 100, 75, 50), at_224px=(60, 25, 12, 5, 3)))
def shot_noise(x: Pixels, rng: np.random.Generator, photons: float) -> Pixels:
    """Draw each value of (H, W, C) pixels in [0, 1] from a Poisson distribution, as a sensor that counts `photons` photons for white.

    Values above 1 occur; the caller, `corrupt`, clips them.
    """
    return rng.poisson(x * photons) / photons


@corruption(fraction=SeverityRange(at_32px=(0.01, 0.02, 0.03, 0.05, 0.07), at_224px=(0.03, 0.06, 0.09, 0.17, 0.27)))
def impulse_noise(x: Pixels, rng: np.random.Generator, fraction: float) -> Pixels:
    """Set a fraction of the values of (H, W, C) pixels to 0 or 1, with equal probability (salt-and-pepper noise).

    Args:
        fraction: probability that a value is replaced; each channel of a pixel is drawn on its own.
    """
    is_hit, is_white = rng.random(x.shape) < fraction, rng.random(x.shape) < 0.5
    return np.where(is_hit, is_white.astype(float), x)


@corruption(
    radius=SeverityRange(at_32px=(0.3, 0.4, 0.5, 1, 1.5), at_224px=(3, 4, 6, 8, 10), is_length=True),
    soften=SeverityRange(at_32px=(0.4, 0.5, 0.6, 0.2, 0.1), at_224px=(0.1, 0.5, 0.5, 0.5, 0.5), is_length=True),
)
def defocus_blur(x: Pixels, rng: np.random.Generator, radius: float, soften: float) -> Pixels:
    """Convolve (H, W, C) pixels with a disk that is itself blurred, as a lens out of focus does.

    Args:
        rng: unused; all corruptions take it.
        radius: of the disk, pixels: it has the pixels whose centers are within, below 1 the middle one alone.
        soften: standard deviation of the Gaussian that blurs the disk, pixels; 3 pixels wide, or 5 for a radius above 8.
    """
    reach = max(8, math.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(float)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), soften, mode="mirror", radius=1 if radius <= 8 else 2)
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


@corruption(
    std=SeverityRange(at_32px=(0.05, 0.25, 0.4, 0.25, 0.4), at_224px=(0.7, 0.9, 1, 1.1, 1.5), is_length=True),
    reach=SeverityRange(at_32px=(1, 1, 1, 1, 1), at_224px=(1, 2, 2, 3, 4), is_length=True),
    rounds=SeverityRange(at_32px=(1, 1, 1, 2, 2), at_224px=(2, 1, 3, 2, 2)),
)
def glass_blur(x: Pixels, rng: np.random.Generator, std: float, reach: float, rounds: float) -> Pixels:
    """Blur (H, W, C) pixels, replace each by a random one nearby, and blur again, as behind frosted glass.

    The authors' code means to swap two pixels, but copies one onto the other (both sides of its assignment are views of one array).

    Args:
        std: standard deviation of both Gaussian blurs, pixels; the first one's result is truncated to 8 bits.
        reach: d, rounded to at least 1: offsets are drawn from -d to d - 1; rows and columns before d + 1 and after side - d stay.
        rounds: how often every pixel is replaced; rounded to at least 1.
    """
    x = np.floor(ndimage.gaussian_filter(x, (std, std, 0), mode="nearest") * 255) / 255
    (height, width), d = x.shape[:2], max(1, round(reach))
    indices = np.arange(height * width)
    # Visited from the last pixel to the first: a later one may copy what an earlier one has copied.
    pixels = indices.reshape(height, width)[height - d : d : -1, width - d : d : -1].ravel()
    source = indices.tolist()  # for each output pixel, the flat index of the input pixel that it shows
    for _ in range(max(1, round(rounds))):
        partners = pixels + rng.integers(-d, d, (len(pixels), 2)) @ [1, width]  # offsets to the right and down
        for pixel, partner in zip(pixels.tolist(), partners.tolist(), strict=True):
            source[pixel] = source[partner]
    return ndimage.gaussian_filter(
        x.reshape(height * width, -1)[source].reshape(x.shape), (std, std, 0), mode="nearest"
    )


@corruption(
    radius=SeverityRange(at_32px=(6, 6, 6, 8, 9), at_224px=(10, 15, 15, 15, 20), is_length=True),
    std=SeverityRange(at_32px=(1, 1.5, 2, 2, 2.5), at_224px=(3, 5, 8, 12, 15), is_length=True),
)
def motion_blur(x: Pixels, rng: np.random.Generator, radius: float, std: float) -> Pixels:
    """Blur (H, W, C) pixels along a line at a random angle of up to 45 degrees from the horizontal.

    Args:
        radius: half the length of the line, pixels.
        std: standard deviation of the Gaussian by which weights fall along the line, pixels.
    """
    return _motion_blur(x, radius, std, rng.uniform(-45, 45))


@corruption(
    stop=SeverityRange(at_32px=(1.06, 1.11, 1.16, 1.21, 1.26), at_224px=(1.11, 1.16, 1.21, 1.26, 1.31)),
    step=SeverityRange(at_32px=(0.01, 0.01, 0.01, 0.01, 0.01), at_224px=(0.01, 0.01, 0.02, 0.02, 0.03)),
)
def zoom_blur(x: Pixels, rng: np.random.Generator, stop: float, step: float) -> Pixels:
    """Average (H, W, C) pixels with copies enlarged about the center.

    Args:
        rng: unused; all corruptions take it.
        stop: where the factors end, which begin at 1; rounding decides whether it is one of them, as in ImageNet-C's `np.arange`.
        step: difference of two factors.
    """
    factors = np.arange(1, stop, step)
    return (x + sum(_zoom_center(x, factor) for factor in factors)) / (len(factors) + 1)


@corruption(
    mean=SeverityRange(at_32px=(0.1, 0.1, 0.15, 0.25, 0.3), at_224px=(0.1, 0.2, 0.55, 0.55, 0.55)),
    std=SeverityRange(at_32px=(0.2, 0.2, 0.3, 0.3, 0.3), at_224px=(0.3, 0.3, 0.3, 0.3, 0.3)),
    zoom=SeverityRange(at_32px=(1, 1, 1.75, 2.25, 1.25), at_224px=(3, 2, 4, 4.5, 2.5), is_length=True),
    threshold=SeverityRange(at_32px=(0.6, 0.5, 0.55, 0.6, 0.65), at_224px=(0.5, 0.5, 0.9, 0.85, 0.85)),
    radius=SeverityRange(at_32px=(8, 10, 10, 12, 14), at_224px=(10, 12, 12, 12, 12), is_length=True),
    blur=SeverityRange(at_32px=(3, 4, 4, 6, 12), at_224px=(4, 4, 8, 8, 12), is_length=True),
    keep=SeverityRange(at_32px=(0.95, 0.9, 0.9, 0.85, 0.8), at_224px=(0.8, 0.7, 0.7, 0.65, 0.55)),
)
def snow(
    x: Pixels, rng: np.random.Generator, mean: float, std: float, zoom: float, threshold: float, radius: float,
    blur: float, keep: float,
) -> Pixels:  # fmt: skip
    """Add motion-blurred flakes to (H, W, C) pixels blended with their pale version; the caller, `corrupt`, clips the result.

    Args:
        mean: mean of the Gaussian noise that flakes are made of, one value per pixel.
        std: standard deviation of that noise.
        zoom: factor by which the noise is enlarged, at least 1: larger flakes.
        threshold: noise below it becomes 0, no flake.
        radius: half the length of the motion blur of a falling flake, pixels.
        blur: standard deviation of the Gaussian along that motion blur, pixels.
        keep: weight of the image; 1 - `keep` is the weight of its pale version.
    """
    flakes = _zoom_center(rng.normal(mean, std, (*x.shape[:2], 1)), max(1.0, zoom))
    flakes[flakes < threshold] = 0
    # One random direction within 45 degrees of the vertical, of all flakes.
    flakes = _motion_blur(np.floor(np.clip(flakes, 0, 1) * 255) / 255, radius, blur, rng.uniform(-135, -45))
    gray = x @ [[0.299], [0.587], [0.114]] if x.shape[-1] == 3 else x
    pale = np.maximum(x, gray * 1.5 + 0.5)
    return (
        keep * x + (1 - keep) * pale + flakes + np.rot90(flakes, 2)
    )  # as in ImageNet-C, flakes are added twice, rotated by 180 degrees


@corruption(
    keep=SeverityRange(at_32px=(1, 1, 0.9, 0.85, 0.75), at_224px=(1, 0.8, 0.7, 0.65, 0.6)),
    ice=SeverityRange(at_32px=(0.2, 0.3, 0.4, 0.4, 0.45), at_224px=(0.4, 0.6, 0.7, 0.7, 0.75)),
)
def frost(x: Pixels, rng: np.random.Generator, keep: float, ice: float) -> Pixels:
    """Add crystals of ice to (H, W, C) pixels: needles on a smooth sheet, both of fractal noise, bluish in RGB.

    ImageNet-C adds photographs of ice instead. The caller, `corrupt`, clips the result.

    Args:
        keep: factor of the image.
        ice: factor of the crystals that are added.
    """
    ridges = 1 - np.abs(2 * _plasma_fractal(x.shape[:2], 1.25, rng) - 1)  # needles: where a fractal crosses its middle
    sheet = _plasma_fractal(x.shape[:2], 1.5, rng)
    crystals = np.clip(ridges**4 + 0.5 * sheet, 0, 1)[..., None]
    tint = np.array([0.82, 0.92, 1.0]) if x.shape[-1] == 3 else np.ones(x.shape[-1])
    return keep * x + ice * crystals * tint


@corruption(
    amount=SeverityRange(at_32px=(0.2, 0.5, 0.75, 1, 1.5), at_224px=(1.5, 2, 2.5, 2.5, 3)),
    decay=SeverityRange(at_32px=(3, 3, 2.5, 2, 1.75), at_224px=(2, 2, 1.7, 1.5, 1.4)),
)
def fog(x: Pixels, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    """Add a fractal of clouds to (H, W, C) pixels, and scale the sum so that its largest possible value is the image's largest one.

    Args:
        amount: factor of the fractal, whose values are in [0, 1].
        decay: larger is smoother; the fractal is weaker by its square at each scale than at the one twice as coarse.
    """
    largest = x.max()
    return (x + amount * _plasma_fractal(x.shape[:2], decay, rng)[..., None]) * largest / (largest + amount)


@corruption(add=SeverityRange(at_32px=(0.05, 0.1, 0.15, 0.2, 0.3), at_224px=(0.1, 0.2, 0.3, 0.4, 0.5)))
def brightness(x: Pixels, rng: np.random.Generator, add: float) -> Pixels:
    """Add `add` to V of HSV, the largest channel, of (H, W, C) pixels in [0, 1], at most up to 1; hue and saturation stay.

    Black pixels become gray. `rng` is unused; all corruptions take it.
    """
    value = x.max(-1, keepdims=True)
    brighter = np.clip(value + add, 0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


@corruption(factor=SeverityRange(at_32px=(0.75, 0.5, 0.4, 0.3, 0.15), at_224px=(0.4, 0.3, 0.2, 0.1, 0.05)))
def contrast(x: Pixels, rng: np.random.Generator, factor: float) -> Pixels:
    """Scale the differences of (H, W, C) pixels from each channel's mean over the image by `factor`, below 1: less contrast.

    `rng` is unused; all corruptions take it.
    """
    mean = x.mean((0, 1), keepdims=True)
    return mean + factor * (x - mean)


@corruption(
    shift=SeverityRange(at_32px=(0, 0.05, 0.08, 0.1, 0.1), at_224px=_scale_from_244(2, 2, 0.05, 0.07, 0.12)),
    smooth=SeverityRange(at_32px=(0.1, 0.2, 0.06, 0.04, 0.03), at_224px=_scale_from_244(0.7, 0.08, 0.01, 0.01, 0.01)),
    affine=SeverityRange(at_32px=(0.08, 0.07, 0.06, 0.05, 0.03), at_224px=_scale_from_244(0.1, 0.2, 0.02, 0.02, 0.02)),
)
def elastic_transform(x: Pixels, rng: np.random.Generator, shift: float, smooth: float, affine: float) -> Pixels:
    """Warp (H, W, C) pixels by a random affine map, and the result by a smooth random flow, bilinearly, with mirrored edges.

    All parameters are fractions of the image's shorter side.

    Args:
        shift: largest offset of the flow in rows and in columns, before it is smoothed.
        smooth: standard deviation of the Gaussian that smooths the flow.
        affine: how far each of the three points that define the affine map may move, in rows and in columns.
    """
    side = min(x.shape[:2])
    points = np.array(x.shape[:2]) // 2 + np.array([[1, 1], [-1, 1], [-1, -1]]) * (side // 3)  # ImageNet-C's three
    moved = points + rng.uniform(-affine, affine, (3, 2)) * side
    # (row, column, 1) of the warped image -> (row, column) of the image: `points` are shown at `moved`.
    matrix = np.linalg.lstsq(np.c_[moved, np.ones(3)], points, rcond=None)[0].T
    noise, std = rng.uniform(-1, 1, (2, *x.shape[:2])), side * smooth
    flow = ndimage.gaussian_filter(noise, (0, std, std), mode="reflect", truncate=3)
    positions = np.indices(x.shape[:2]) + side * shift * flow  # (2, H, W): row and column that each output pixel shows
    warped = (ndimage.affine_transform(channel, matrix, order=1, mode="mirror") for channel in x.transpose(2, 0, 1))
    return np.dstack([ndimage.map_coordinates(channel, positions, order=1, mode="reflect") for channel in warped])


@corruption(fraction=SeverityRange(at_32px=(0.95, 0.9, 0.85, 0.75, 0.65), at_224px=(0.6, 0.5, 0.4, 0.3, 0.25)))
def pixelate(x: Pixels, rng: np.random.Generator, fraction: float) -> Pixels:
    """Shrink both sides of (H, W, C) pixels to `fraction` of them by averaging, and enlarge them back by repeating pixels.

    `rng` is unused; all corruptions take it.
    """
    height, width = x.shape[:2]
    small = max(1, int(width * fraction)), max(1, int(height * fraction))
    channels = (Image.fromarray(channel) for channel in x.astype(np.float32).transpose(2, 0, 1))
    coarse = (channel.resize(small, Image.Resampling.BOX) for channel in channels)
    return np.dstack([np.asarray(one.resize((width, height), Image.Resampling.NEAREST)) for one in coarse])


@corruption(quality=SeverityRange(at_32px=(80, 65, 58, 50, 40), at_224px=(25, 18, 15, 10, 7)))
def jpeg_compression(x: Pixels, rng: np.random.Generator, quality: float) -> Pixels:
    """Encode (H, W, 1 or 3) pixels in [0, 1] as JPEG, and decode them.

    Args:
        rng: unused; all corruptions take it.
        quality: of JPEG, 1 (worst) to 100; rounded.
    """
    pixels = torch.from_numpy((x * 255).round().astype(np.uint8)).movedim(-1, 0)
    return tvf.jpeg(pixels, round(quality)).movedim(0, -1).numpy() / 255


def _motion_blur(x: Pixels, radius: float, std: float, degrees: float) -> Pixels:
    """Blur (H, W, C) pixels along a line that starts at each pixel, as `MagickMotionBlurImage` of ImageMagick 6 and 7 does; 8-bit result.

    Args:
        radius: pixels, rounded up; the line is 2 radius long, one-sided, and has a point, rounded to the nearest pixel, each pixel.
        std: standard deviation of the Gaussian by which the weights of the points fall, pixels.
        degrees: direction of the line, clockwise from pointing right. Beyond the edge of the image are the pixels of the edge.
    """
    distances = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(distances**2) / (2 * std**2))
    angle = math.radians(degrees)
    # (points, 2): how far each point is down and to the right.
    offsets = np.ceil(np.outer(distances, [math.sin(angle), math.cos(angle)]) - 0.5).astype(int)
    (height, width), reach = x.shape[:2], len(distances)
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    starts = zip(weights / weights.sum(), *(reach + offsets).T, strict=True)
    blurred = sum(weight * padded[top : top + height, left : left + width] for weight, top, left in starts)
    return np.rint(blurred * 255) / 255


def _zoom_center(x: Pixels, factor: float) -> Pixels:
    """Enlarge a center crop of (H, W, C) pixels by `factor` >= 1, corners onto corners, and crop the result to (H, W, C).

    As `clipped_zoom` of ImageNet-C's code: the crop has ceil(side / factor) pixels a side, so that it is enlarged by a bit less.
    """
    sides = np.array(x.shape[:2])
    crop = np.ceil(sides / factor).astype(int)
    (top, left), (height, width) = (sides - crop) // 2, crop
    zoomed = ndimage.zoom(x[top : top + height, left : left + width], (factor, factor, 1), order=1)
    (top, left), (height, width) = (zoomed.shape[:2] - sides) // 2, sides
    return zoomed[top : top + height, left : left + width]


def _plasma_fractal(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> Float[np.ndarray, "H W"]:
    """Return (H, W) fractal noise by the diamond-square algorithm: a corner of a periodic square of 2^n pixels scaled to [0, 1].

    Args:
        shape: (H, W).
        decay: the noise is weaker by its square at each scale than at the scale twice as coarse, as in ImageNet-C's code.
    """
    surface, amplitude = np.zeros((1, 1)), 1.0
    while (side := len(surface)) < max(shape):  # each round doubles the resolution
        noise = amplitude * rng.uniform(-1, 1, (3, side, side))
        with_below, with_right = surface + np.roll(surface, -1, 0), surface + np.roll(surface, -1, 1)
        centers = (with_below + np.roll(with_below, -1, 1)) / 4 + noise[0]
        horizontal = (with_right + centers + np.roll(centers, 1, 0)) / 4 + noise[1]
        vertical = (with_below + centers + np.roll(centers, 1, 1)) / 4 + noise[2]
        even, odd = np.dstack([surface, horizontal]), np.dstack([vertical, centers])  # rows
        surface, amplitude = np.stack([even, odd], 1).reshape(2 * side, 2 * side), amplitude / decay**2
    surface -= surface.min()
    return surface[: shape[0], : shape[1]] / max(surface.max(), 1e-12)
