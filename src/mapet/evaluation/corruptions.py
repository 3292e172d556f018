"""The 15 common corruptions in 5 severities of Hendrycks & Dietterich 2019 (arXiv 1903.12261), drawn for any image size.

The paper gives parameters for two sizes: 224 px (ImageNet-C) and 32 px (CIFAR-10-C). Between the two each parameter is
interpolated on the logarithm of the image's shorter side; beyond them lengths go on in proportion and strengths stay.
Written from the definitions: figures are not those of the published image files, from which these pictures differ in
their random draws and, for frost, in the ice, which is drawn here and photographed there.
"""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import ndimage, signal
from torch import Tensor

Pixels = Float[np.ndarray, "H W C"]
Bytes = UInt8[np.ndarray, "H W C"]
SMALL, LARGE = 32, 224
"""Sides of the published sizes, pixels."""
SEVERITIES = (1, 2, 3, 4, 5)


class SeverityRange(NamedTuple):
    """A parameter at severities 1 to 5.

    Attributes:
        small, large: for 32 and 224 px.
        length: in pixels, so that it grows with images larger than 224 px and shrinks with those below 32.
    """

    small: tuple[float, ...]
    large: tuple[float, ...]
    length: bool = False

    def at(self, side: int, severity: int) -> float:
        """Interpolate for images of that shorter side, pixels."""
        a, b = self.small[severity - 1], self.large[severity - 1]
        position = math.log(side / SMALL) / math.log(LARGE / SMALL)
        if 0 <= position <= 1:
            return a ** (1 - position) * b**position if min(a, b) > 0 else a + (b - a) * position
        nearest, published = (a, SMALL) if position < 0 else (b, LARGE)
        return nearest * side / published if self.length else nearest


def _of_244(*fractions: float) -> tuple[float, ...]:
    """ImageNet-C's elastic lengths are fractions of 244 pixels, not of the 224 there are."""
    return tuple(fraction * 244 / LARGE for fraction in fractions)


class CorruptionKind(NamedTuple):
    """A function of pixels in [0, 1], random draws and parameters, and the parameters by name."""

    function: Callable[..., Pixels]
    parameters: dict[str, SeverityRange]


CORRUPTIONS: dict[str, CorruptionKind] = {}
"""By ImageNet-C's names, in its order."""


def corruption(**parameters: SeverityRange) -> Callable[[Callable[..., Pixels]], None]:
    """Register a function of pixels under its name, with the published values of its parameters."""
    return lambda function: CORRUPTIONS.update({function.__name__: CorruptionKind(function, parameters)})


def corrupt(image: Bytes, name: str, severity: int, rng: np.random.Generator) -> Bytes:
    """Make a corrupted copy.

    Args:
        image: gray or RGB; color means brightness in the HSV sense where the paper says so.
        severity: 1 to 5.
    """
    function, ranges = CORRUPTIONS[name]
    parameters = {key: values.at(min(image.shape[:2]), severity) for key, values in ranges.items()}
    changed = function(image.astype(np.float64) / 255, rng, **parameters)
    return (np.clip(changed, 0, 1) * 255).round().astype(np.uint8)


class Corruption(NamedTuple):
    """`corrupt` as the `augment` of a `ViewDataset`, which seeds the draws by the image."""

    name: str
    severity: int

    def __call__(self, image: UInt8[Tensor, "C H W"]) -> UInt8[Tensor, "C H W"]:
        rng = np.random.default_rng(np.random.randint(2**31, size=4))  # noqa: NPY002  (the generator that is seeded)
        changed = corrupt(image.movedim(0, -1).numpy(), self.name, self.severity, rng)
        return torch.from_numpy(changed).movedim(-1, 0)


@corruption(std=SeverityRange((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)))
def gaussian_noise(x: Pixels, rng: np.random.Generator, std: float) -> Pixels:
    return x + rng.normal(0, std, x.shape)


@corruption(photons=SeverityRange((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)))
def shot_noise(x: Pixels, rng: np.random.Generator, photons: float) -> Pixels:
    return rng.poisson(x * photons) / photons


@corruption(fraction=SeverityRange((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)))
def impulse_noise(x: Pixels, rng: np.random.Generator, fraction: float) -> Pixels:
    hit, white = rng.random(x.shape) < fraction, rng.random(x.shape) < 0.5
    return np.where(hit, white.astype(float), x)


@corruption(
    radius=SeverityRange((0.3, 0.4, 0.5, 1, 1.5), (3, 4, 6, 8, 10), length=True),
    soften=SeverityRange((0.4, 0.5, 0.6, 0.2, 0.1), (0.1, 0.5, 0.5, 0.5, 0.5), length=True),
)
def defocus_blur(x: Pixels, rng: np.random.Generator, radius: float, soften: float) -> Pixels:
    reach = max(1, math.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    # Coverage of the pixels by the disk: radii below a pixel blur a little.
    disk = np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1)
    disk[reach, reach] = 1
    kernel = ndimage.gaussian_filter(np.pad(disk, 2), soften)
    return _filtered(x, kernel / kernel.sum())


@corruption(
    std=SeverityRange((0.05, 0.25, 0.4, 0.25, 0.4), (0.7, 0.9, 1, 1.1, 1.5), length=True),
    reach=SeverityRange((1, 1, 1, 1, 1), (1, 2, 2, 3, 4), length=True),
    rounds=SeverityRange((1, 1, 1, 2, 2), (2, 1, 3, 2, 2)),
)
def glass_blur(x: Pixels, rng: np.random.Generator, std: float, reach: float, rounds: float) -> Pixels:
    x = ndimage.gaussian_filter(x, (std, std, 0))
    height, width = x.shape[:2]
    far = max(1, round(reach))
    grid = np.indices((height, width)).reshape(2, -1).T
    place = np.arange(height * width)
    for _ in range(max(1, round(rounds))):  # pixels change places with one nearby
        offset = rng.integers(-far, far + 1, (height * width, 2))
        other = np.clip(grid + offset, 0, [height - 1, width - 1]) @ [width, 1]
        for part in np.array_split(rng.permutation(height * width), 8):  # disjoint pairs may swap at once
            a, b = part, other[part]
            b, first = np.unique(b, return_index=True)
            a = a[first]
            free = ~np.isin(a, b)
            a, b = a[free], b[free]
            place[a], place[b] = place[b], place[a]
    return ndimage.gaussian_filter(x.reshape(height * width, -1)[place].reshape(x.shape), (std, std, 0))


@corruption(
    radius=SeverityRange((6, 6, 6, 8, 9), (10, 15, 15, 15, 20), length=True),
    std=SeverityRange((1, 1.5, 2, 2, 2.5), (3, 5, 8, 12, 15), length=True),
)
def motion_blur(x: Pixels, rng: np.random.Generator, radius: float, std: float) -> Pixels:
    return _filtered(x, _streak(radius, std, rng.uniform(-45, 45)))


@corruption(most=SeverityRange((0.05, 0.1, 0.15, 0.2, 0.25), (0.1, 0.15, 0.2, 0.24, 0.3)))
def zoom_blur(x: Pixels, rng: np.random.Generator, most: float) -> Pixels:
    factors = 1 + np.linspace(0, most, 12)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


@corruption(
    mean=SeverityRange((0.1, 0.1, 0.15, 0.25, 0.3), (0.1, 0.2, 0.55, 0.55, 0.55)),
    std=SeverityRange((0.2, 0.2, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.3, 0.3)),
    zoom=SeverityRange((1, 1, 1.75, 2.25, 1.25), (3, 2, 4, 4.5, 2.5), length=True),
    threshold=SeverityRange((0.6, 0.5, 0.55, 0.6, 0.65), (0.5, 0.5, 0.9, 0.85, 0.85)),
    radius=SeverityRange((8, 10, 10, 12, 14), (10, 12, 12, 12, 12), length=True),
    blur=SeverityRange((3, 4, 4, 6, 12), (4, 4, 8, 8, 12), length=True),
    keep=SeverityRange((0.95, 0.9, 0.9, 0.85, 0.8), (0.8, 0.7, 0.7, 0.65, 0.55)),
)
def snow(
    x: Pixels, rng: np.random.Generator, mean: float, std: float, zoom: float, threshold: float, radius: float,
    blur: float, keep: float,
) -> Pixels:  # fmt: skip
    flakes = _zoomed(rng.normal(mean, std, (*x.shape[:2], 1)), max(1.0, zoom))
    flakes[flakes < threshold] = 0
    flakes = _filtered(np.clip(flakes, 0, 1), _streak(radius, blur, rng.uniform(-135, -45)))
    pale = np.maximum(x, x.mean(-1, keepdims=True) * 1.5 + 0.5)
    return keep * x + (1 - keep) * pale + flakes + np.rot90(flakes, 2)


@corruption(
    keep=SeverityRange((1, 1, 0.9, 0.85, 0.75), (1, 0.8, 0.7, 0.65, 0.6)),
    ice=SeverityRange((0.2, 0.3, 0.4, 0.4, 0.45), (0.4, 0.6, 0.7, 0.7, 0.75)),
)
def frost(x: Pixels, rng: np.random.Generator, keep: float, ice: float) -> Pixels:
    ridges = 1 - np.abs(2 * _plasma(x.shape[:2], 1.6, rng) - 1)  # needles: where a fractal crosses its middle
    sheet = _plasma(x.shape[:2], 2.2, rng)
    crystals = np.clip(ridges**4 + 0.5 * sheet, 0, 1)[..., None]
    tint = np.array([0.82, 0.92, 1.0]) if x.shape[-1] == 3 else np.ones(x.shape[-1])
    return keep * x + ice * crystals * tint


@corruption(
    amount=SeverityRange((0.2, 0.5, 0.75, 1, 1.5), (1.5, 2, 2.5, 2.5, 3)),
    decay=SeverityRange((3, 3, 2.5, 2, 1.75), (2, 2, 1.7, 1.5, 1.4)),
)
def fog(x: Pixels, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    top = x.max()
    return (x + amount * _plasma(x.shape[:2], decay, rng)[..., None]) * top / (top + amount)


@corruption(add=SeverityRange((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)))
def brightness(x: Pixels, rng: np.random.Generator, add: float) -> Pixels:
    value = x.max(-1, keepdims=True)  # HSV's: hue and saturation stay
    brighter = np.clip(value + add, 0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


@corruption(factor=SeverityRange((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)))
def contrast(x: Pixels, rng: np.random.Generator, factor: float) -> Pixels:
    mean = x.mean((0, 1), keepdims=True)
    return mean + factor * (x - mean)


@corruption(
    shift=SeverityRange((0, 0.05, 0.08, 0.1, 0.1), _of_244(2, 2, 0.05, 0.07, 0.12)),
    smooth=SeverityRange((0.1, 0.2, 0.06, 0.04, 0.03), _of_244(0.7, 0.08, 0.01, 0.01, 0.01)),
    affine=SeverityRange((0.08, 0.07, 0.06, 0.05, 0.03), _of_244(0.1, 0.2, 0.02, 0.02, 0.02)),
)
def elastic_transform(x: Pixels, rng: np.random.Generator, shift: float, smooth: float, affine: float) -> Pixels:
    height, width = x.shape[:2]
    side = min(height, width)
    middle, reach = np.array([height, width]) // 2, side // 3  # the authors' three points
    corners = middle + np.array([[1, 1], [1, -1], [-1, -1]]) * reach
    moved = corners + rng.uniform(-affine, affine, (3, 2)) * side
    matrix = np.linalg.lstsq(np.c_[corners, np.ones(3)], moved, rcond=None)[0]
    rows, columns = np.mgrid[:height, :width].astype(float)
    draws, reach = rng.uniform(-1, 1, (2, height, width)), side * smooth
    flow = side * shift * ndimage.gaussian_filter(draws, (0, reach, reach), mode="reflect", truncate=3)
    places = np.tensordot(matrix.T, [rows, columns, np.ones_like(rows)], 1) + flow
    channels = x.transpose(2, 0, 1)
    return np.dstack([ndimage.map_coordinates(channel, places, order=1, mode="reflect") for channel in channels])


@corruption(fraction=SeverityRange((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)))
def pixelate(x: Pixels, rng: np.random.Generator, fraction: float) -> Pixels:
    height, width = x.shape[:2]
    small = max(1, int(width * fraction)), max(1, int(height * fraction))
    channels = (Image.fromarray(channel.astype(np.float32)) for channel in x.transpose(2, 0, 1))
    coarse = (channel.resize(small, Image.Resampling.BOX) for channel in channels)
    return np.dstack([np.asarray(one.resize((width, height), Image.Resampling.NEAREST)) for one in coarse])


@corruption(quality=SeverityRange((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)))
def jpeg_compression(x: Pixels, rng: np.random.Generator, quality: float) -> Pixels:
    array = (x * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "JPEG", quality=round(quality))
    return np.asarray(Image.open(buffer)).reshape(x.shape) / 255


def _filtered(x: Pixels, kernel: Float[np.ndarray, "h w"]) -> Pixels:
    """Convolved, mirrored at the edges; by FFT, for kernels may be wide."""
    rows, columns = (side // 2 for side in kernel.shape)
    mode = "reflect" if min(x.shape[:2]) > max(rows, columns) else "edge"
    padded = np.pad(x, ((rows, rows), (columns, columns), (0, 0)), mode=mode)  # type: ignore[call-overload]
    return signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def _streak(radius: float, std: float, degrees: float) -> Float[np.ndarray, "h w"]:
    """A line from the middle in one direction, fading as a Gaussian."""
    reach = max(1, round(radius))
    along, pixels = np.arange(0, reach + 0.25, 0.25), np.arange(-reach, reach + 1)
    weights = np.exp(-(along**2) / (2 * std**2))
    angle = math.radians(degrees)
    # Each point of the line is shared among the four pixels around.
    rows, columns = (np.clip(1 - np.abs(pixels[:, None] - along * f(angle)), 0, 1) for f in (math.sin, math.cos))
    kernel = rows * weights @ columns.T
    return kernel / kernel.sum()


def _zoomed(x: Pixels, factor: float) -> Pixels:
    """The middle, enlarged to the whole."""
    step, start = [1 / factor, 1 / factor, 1], [(side - 1) / 2 * (1 - 1 / factor) for side in x.shape[:2]]
    return ndimage.affine_transform(x, step, [*start, 0], order=1, mode="nearest")


def _plasma(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> Float[np.ndarray, "H W"]:
    """A fractal surface in 0..1: noise of every scale, each half as wide and `decay` times weaker (diamond-square's spectrum)."""
    surface, size, strength = np.zeros(shape), 1, 1.0
    while size < 2 * max(shape):
        coarse = rng.uniform(-1, 1, (size + 1, size + 1))
        places = np.meshgrid(*(np.linspace(0, size, side) for side in shape), indexing="ij")
        surface += strength * ndimage.map_coordinates(coarse, places, order=1)
        size, strength = size * 2, strength / decay
    surface -= surface.min()
    return surface / max(surface.max(), 1e-12)
