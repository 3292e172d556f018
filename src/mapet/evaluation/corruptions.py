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
from scipy import ndimage
from torch import Tensor

Pixels = Float[np.ndarray, "H W C"]
SMALL, LARGE = 32, 224
"""Sides of the published sizes, pixels."""
SEVERITIES = (1, 2, 3, 4, 5)


class Range(NamedTuple):
    """A parameter at severities 1 to 5.

    Attributes:
        small, large: for 32 and 224 px.
        length: in pixels, so that it grows with images larger than 224 px and shrinks with those below 32.
    """

    small: tuple[float, ...]
    large: tuple[float, ...]
    length: bool = False

    def at(self, side: int, severity: int) -> float:
        """Interpolated for images of that shorter side."""
        a, b = self.small[severity - 1], self.large[severity - 1]
        share = math.log(side / SMALL) / math.log(LARGE / SMALL)
        if 0 <= share <= 1:
            return a ** (1 - share) * b**share if min(a, b) > 0 else a + (b - a) * share
        nearest, published = (a, SMALL) if share < 0 else (b, LARGE)
        return nearest * side / published if self.length else nearest


def _of_244(*shares: float) -> tuple[float, ...]:
    """ImageNet-C's elastic lengths are shares of 244 pixels, not of the 224 there are."""
    return tuple(share * 244 / LARGE for share in shares)


PARAMETERS: dict[str, dict[str, Range]] = {
    "gaussian noise": {"deviation": Range((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))},
    "shot noise": {"photons": Range((500, 250, 100, 75, 50), (60, 25, 12, 5, 3))},
    "impulse noise": {"share": Range((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))},
    "defocus blur": {
        "radius": Range((0.3, 0.4, 0.5, 1, 1.5), (3, 4, 6, 8, 10), length=True),
        "soften": Range((0.4, 0.5, 0.6, 0.2, 0.1), (0.1, 0.5, 0.5, 0.5, 0.5), length=True),
    },
    "glass blur": {
        "deviation": Range((0.05, 0.25, 0.4, 0.25, 0.4), (0.7, 0.9, 1, 1.1, 1.5), length=True),
        "reach": Range((1, 1, 1, 1, 1), (1, 2, 2, 3, 4), length=True),
        "rounds": Range((1, 1, 1, 2, 2), (2, 1, 3, 2, 2)),
    },
    "motion blur": {
        "radius": Range((6, 6, 6, 8, 9), (10, 15, 15, 15, 20), length=True),
        "deviation": Range((1, 1.5, 2, 2, 2.5), (3, 5, 8, 12, 15), length=True),
    },
    "zoom blur": {"most": Range((0.05, 0.1, 0.15, 0.2, 0.25), (0.1, 0.15, 0.2, 0.24, 0.3))},
    "snow": {
        "mean": Range((0.1, 0.1, 0.15, 0.25, 0.3), (0.1, 0.2, 0.55, 0.55, 0.55)),
        "deviation": Range((0.2, 0.2, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.3, 0.3)),
        "zoom": Range((1, 1, 1.75, 2.25, 1.25), (3, 2, 4, 4.5, 2.5), length=True),
        "threshold": Range((0.6, 0.5, 0.55, 0.6, 0.65), (0.5, 0.5, 0.9, 0.85, 0.85)),
        "radius": Range((8, 10, 10, 12, 14), (10, 12, 12, 12, 12), length=True),
        "blur": Range((3, 4, 4, 6, 12), (4, 4, 8, 8, 12), length=True),
        "keep": Range((0.95, 0.9, 0.9, 0.85, 0.8), (0.8, 0.7, 0.7, 0.65, 0.55)),
    },
    "frost": {
        "keep": Range((1, 1, 0.9, 0.85, 0.75), (1, 0.8, 0.7, 0.65, 0.6)),
        "ice": Range((0.2, 0.3, 0.4, 0.4, 0.45), (0.4, 0.6, 0.7, 0.7, 0.75)),
    },
    "fog": {
        "amount": Range((0.2, 0.5, 0.75, 1, 1.5), (1.5, 2, 2.5, 2.5, 3)),
        "decay": Range((3, 3, 2.5, 2, 1.75), (2, 2, 1.7, 1.5, 1.4)),
    },
    "brightness": {"add": Range((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))},
    "contrast": {"factor": Range((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))},
    "elastic transform": {
        "shift": Range((0, 0.05, 0.08, 0.1, 0.1), _of_244(2, 2, 0.05, 0.07, 0.12)),
        "smooth": Range((0.1, 0.2, 0.06, 0.04, 0.03), _of_244(0.7, 0.08, 0.01, 0.01, 0.01)),
        "affine": Range((0.08, 0.07, 0.06, 0.05, 0.03), _of_244(0.1, 0.2, 0.02, 0.02, 0.02)),
    },
    "pixelate": {"share": Range((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))},
    "jpeg": {"quality": Range((80, 65, 58, 50, 40), (25, 18, 15, 10, 7))},
}  # fmt: skip
KINDS = tuple(PARAMETERS)


def corrupt(
    image: UInt8[np.ndarray, "H W C"], kind: str, severity: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W C"]:
    """A corrupted copy.

    Args:
        image: grey or RGB; colour means brightness in the HSV sense where the paper says so.
        severity: 1 to 5.
    """
    side = min(image.shape[:2])
    parameters = {name: values.at(side, severity) for name, values in PARAMETERS[kind].items()}
    changed = _FUNCTIONS[kind](image.astype(np.float64) / 255, rng, **parameters)
    return (np.clip(changed, 0, 1) * 255).round().astype(np.uint8)


class Corruption:
    """`corrupt` as the `augment` of a `ViewDataset`, which seeds the draws by the image."""

    def __init__(self, kind: str, severity: int) -> None:
        self.kind, self.severity = kind, severity

    def __call__(self, image: UInt8[Tensor, "C H W"]) -> UInt8[Tensor, "C H W"]:
        rng = np.random.default_rng(np.random.randint(2**31, size=4))  # noqa: NPY002  (the generator that is seeded)
        changed = corrupt(image.movedim(0, -1).numpy(), self.kind, self.severity, rng)
        return torch.from_numpy(changed).movedim(-1, 0)


def mean_corruption_error(
    errors: dict[str, list[float]], reference: dict[str, list[float]]
) -> tuple[float, dict[str, float]]:
    """mCE of the paper's section 4.1, as a share (1 is as bad as the reference), and the CE of each kind.

    CE of a kind: errors summed over severities, over the same sum of the reference; a kind in which the reference makes no
    error has none.

    Args:
        errors, reference: of each kind, at each severity, 0 to 1.
    """
    found = {kind: sum(values) / sum(reference[kind]) for kind, values in errors.items() if sum(reference[kind]) > 0}
    return float(np.mean(list(found.values()))) if found else float("nan"), found


def _gaussian_noise(x: Pixels, rng: np.random.Generator, deviation: float) -> Pixels:
    return x + rng.normal(0, deviation, x.shape)


def _shot_noise(x: Pixels, rng: np.random.Generator, photons: float) -> Pixels:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Pixels, rng: np.random.Generator, share: float) -> Pixels:
    hit, white = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(hit, white.astype(float), x)


def _defocus_blur(x: Pixels, rng: np.random.Generator, radius: float, soften: float) -> Pixels:
    reach = max(1, math.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    # Coverage of the pixels by the disk: radii below a pixel blur a little.
    disk = np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1)
    disk[reach, reach] = 1
    kernel = ndimage.gaussian_filter(np.pad(disk, 2), soften)
    return _filtered(x, kernel / kernel.sum())


def _glass_blur(x: Pixels, rng: np.random.Generator, deviation: float, reach: float, rounds: float) -> Pixels:
    x = _gaussian(x, deviation)
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
    return _gaussian(x.reshape(height * width, -1)[place].reshape(x.shape), deviation)


def _motion_blur(x: Pixels, rng: np.random.Generator, radius: float, deviation: float) -> Pixels:
    return _filtered(x, _streak(radius, deviation, rng.uniform(-45, 45)))


def _zoom_blur(x: Pixels, rng: np.random.Generator, most: float) -> Pixels:
    factors = 1 + np.linspace(0, most, 12)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(
    x: Pixels, rng: np.random.Generator, mean: float, deviation: float, zoom: float, threshold: float, radius: float,
    blur: float, keep: float,
) -> Pixels:  # fmt: skip
    flakes = _zoomed(rng.normal(mean, deviation, (*x.shape[:2], 1)), max(1.0, zoom))
    flakes[flakes < threshold] = 0
    flakes = _filtered(np.clip(flakes, 0, 1), _streak(radius, blur, rng.uniform(-135, -45)))
    pale = np.maximum(x, x.mean(-1, keepdims=True) * 1.5 + 0.5)
    return keep * x + (1 - keep) * pale + flakes + np.rot90(flakes, 2)


def _frost(x: Pixels, rng: np.random.Generator, keep: float, ice: float) -> Pixels:
    ridges = 1 - np.abs(2 * _plasma(x.shape[:2], 1.6, rng) - 1)  # needles: where a fractal crosses its middle
    sheet = _plasma(x.shape[:2], 2.2, rng)
    crystals = np.clip(ridges**4 + 0.5 * sheet, 0, 1)[..., None]
    tint = np.array([0.82, 0.92, 1.0]) if x.shape[-1] == 3 else np.ones(x.shape[-1])
    return keep * x + ice * crystals * tint


def _fog(x: Pixels, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    top = x.max()
    return (x + amount * _plasma(x.shape[:2], decay, rng)[..., None]) * top / (top + amount)


def _brightness(x: Pixels, rng: np.random.Generator, add: float) -> Pixels:
    value = x.max(-1, keepdims=True)  # HSV's: hue and saturation stay
    brighter = np.clip(value + add, 0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def _contrast(x: Pixels, rng: np.random.Generator, factor: float) -> Pixels:
    mean = x.mean((0, 1), keepdims=True)
    return mean + factor * (x - mean)


def _elastic_transform(x: Pixels, rng: np.random.Generator, shift: float, smooth: float, affine: float) -> Pixels:
    height, width = x.shape[:2]
    side = min(height, width)
    middle, reach = np.array([height, width]) // 2, side // 3  # the authors' three points
    corners = middle + np.array([[1, 1], [1, -1], [-1, -1]]) * reach
    moved = corners + rng.uniform(-affine, affine, (3, 2)) * side
    matrix = np.linalg.lstsq(np.c_[corners, np.ones(3)], moved, rcond=None)[0]
    rows, columns = np.mgrid[:height, :width].astype(float)
    flow = [
        side
        * shift
        * ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), side * smooth, mode="reflect", truncate=3)
        for _ in range(2)
    ]
    grid = np.stack([rows, columns, np.ones_like(rows)], -1) @ matrix
    places = [grid[..., 0] + flow[0], grid[..., 1] + flow[1]]
    return _each(x, lambda channel: ndimage.map_coordinates(channel, places, order=1, mode="reflect"))


def _pixelate(x: Pixels, rng: np.random.Generator, share: float) -> Pixels:
    height, width = x.shape[:2]
    small = max(1, int(width * share)), max(1, int(height * share))
    return _each(
        x,
        lambda channel: np.asarray(
            Image.fromarray(channel.astype(np.float32))
            .resize(small, Image.Resampling.BOX)
            .resize((width, height), Image.Resampling.NEAREST)
        ),
    )


def _jpeg(x: Pixels, rng: np.random.Generator, quality: float) -> Pixels:
    array = (x * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "JPEG", quality=round(quality))
    return np.asarray(Image.open(buffer)).reshape(x.shape) / 255


_FUNCTIONS: dict[str, Callable[..., Pixels]] = {
    "gaussian noise": _gaussian_noise,
    "shot noise": _shot_noise,
    "impulse noise": _impulse_noise,
    "defocus blur": _defocus_blur,
    "glass blur": _glass_blur,
    "motion blur": _motion_blur,
    "zoom blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}


def _each(x: Pixels, function: Callable[[np.ndarray], np.ndarray]) -> Pixels:
    """`function` of each channel."""
    return np.stack([function(x[..., channel]) for channel in range(x.shape[-1])], -1)


def _gaussian(x: Pixels, deviation: float) -> Pixels:
    return ndimage.gaussian_filter(x, (deviation, deviation, 0))


def _filtered(x: Pixels, kernel: Float[np.ndarray, "h w"]) -> Pixels:
    """Convolved, mirrored at the edges; by FFT, for kernels may be wide."""
    from scipy.signal import fftconvolve

    rows, columns = (side // 2 for side in kernel.shape)
    padded = np.pad(
        x,
        ((rows, rows), (columns, columns), (0, 0)),
        mode="reflect" if min(x.shape[:2]) > max(rows, columns) else "edge",
    )
    return fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def _streak(radius: float, deviation: float, degrees: float) -> Float[np.ndarray, "h w"]:
    """A line from the middle in one direction, fading as a Gaussian."""
    reach = max(1, round(radius))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    along = np.arange(0, reach + 0.25, 0.25)
    rows, columns = along * math.sin(math.radians(degrees)), along * math.cos(math.radians(degrees))
    weights = np.exp(-(along**2) / (2 * deviation**2))
    for row, column, weight in zip(rows, columns, weights, strict=True):  # shared among the four pixels around
        top, left = math.floor(row), math.floor(column)
        for y, x in ((top, left), (top + 1, left), (top, left + 1), (top + 1, left + 1)):
            if max(abs(y), abs(x)) <= reach:
                kernel[y + reach, x + reach] += weight * (1 - abs(row - y)) * (1 - abs(column - x))
    return kernel / kernel.sum()


def _zoomed(x: Pixels, factor: float) -> Pixels:
    """The middle, enlarged to the whole."""
    height, width = x.shape[:2]
    places = [(np.arange(side) - (side - 1) / 2) / factor + (side - 1) / 2 for side in (height, width)]
    grid = np.meshgrid(*places, indexing="ij")
    return _each(x, lambda channel: ndimage.map_coordinates(channel, grid, order=1, mode="nearest"))


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
