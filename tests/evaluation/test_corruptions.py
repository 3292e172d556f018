"""Corruptions: every kind does its own kind of harm, more with severity, at any size; mCE by hand."""

import itertools

import numpy as np
import pytest
import torch

from mapet.data.dataset import ViewDataset
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec
from mapet.evaluation.corruptions import CORRUPTIONS, Corruption, corrupt
from mapet.evaluation.eval_context import MetricValue, ProtocolResult
from mapet.evaluation.protocols import add_mce

UNEVEN = {"elastic_transform", "glass_blur", "pixelate", "frost", "snow", "fog"}
"""Kinds of several parameters, of which the published tables do not raise all at every step."""


def resized(photo, side):
    top = photo[100 : 100 + 224, 100 : 100 + 224]
    return np.ascontiguousarray(top[:: 224 // side, :: 224 // side])


@pytest.mark.parametrize("kind", list(CORRUPTIONS))
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (112, 1)])
def test_harm_grows_with_severity(kind, side, channels, photos):
    image = resized(photos[0], side)[..., :channels]
    draw = [corrupt(image, kind, severity, np.random.default_rng(3)) for severity in range(1, 6)]
    assert all(corrupted.shape == image.shape and corrupted.dtype == np.uint8 for corrupted in draw)
    harm = [float(np.sqrt(((corrupted.astype(float) - image) ** 2).mean())) for corrupted in draw]
    assert harm[0] > 0.5, harm
    if kind in UNEVEN:
        assert max(harm[2:]) > 0.6 * harm[0], harm
    else:
        assert all(b > 0.97 * a for a, b in itertools.pairwise(harm)) and harm[4] > 1.2 * harm[0], harm
    again = corrupt(image, kind, 5, np.random.default_rng(3))
    assert np.array_equal(again, draw[4])


def test_what_the_kinds_are(photos):
    """Each by what defines it."""
    image = resized(photos[1], 112)
    rng = np.random.default_rng

    def noise(kind, severity):
        gray = np.full((200, 200, 3), 128, np.uint8)
        return corrupt(gray, kind, severity, rng(0)).astype(float) / 255

    side, severity = 200, 2
    deviation = CORRUPTIONS["gaussian_noise"].parameters["std"].interpolate(side, severity)
    assert noise("gaussian_noise", severity).std() == pytest.approx(deviation, rel=0.02)
    photons = CORRUPTIONS["shot_noise"].parameters["photons"].interpolate(side, severity)
    assert noise("shot_noise", severity).std() == pytest.approx((0.502 / photons) ** 0.5, rel=0.02)
    hit = noise("impulse_noise", severity)
    share = CORRUPTIONS["impulse_noise"].parameters["fraction"].interpolate(side, severity)
    assert np.isin(hit, [0.0, 1.0]).mean() == pytest.approx(share, rel=0.05)

    def detail(corrupted):
        return np.abs(np.diff(corrupted.astype(float), axis=0)).mean()

    for kind in ("defocus_blur", "motion_blur", "zoom_blur", "glass_blur"):
        blurred = corrupt(image, kind, 4, rng(0))
        assert detail(blurred) < 0.8 * detail(image), kind
        assert abs(blurred.mean() - image.mean()) < 4, kind  # blur takes no light away
    assert corrupt(image, "contrast", 3, rng(0)).std() < 0.5 * image.std()
    bright = corrupt(image, "brightness", 3, rng(0))
    assert (bright.max(-1) >= image.max(-1)).all()
    for kind in ("snow", "frost"):
        assert corrupt(image, kind, 3, rng(0)).mean() > image.mean() + 10
    coarse = corrupt(image, "pixelate", 5, rng(0))
    assert (np.diff(coarse[:, :, 0].astype(int), axis=1) == 0).mean() > 0.3
    assert corrupt(image, "fog", 3, rng(0)).std() < image.std()


def test_parameters_are_the_published_ones_at_their_sizes_and_between():
    deviation, radius = (
        CORRUPTIONS["gaussian_noise"].parameters["std"],
        CORRUPTIONS["defocus_blur"].parameters["radius"],
    )
    assert (deviation.interpolate(32, 5), deviation.interpolate(224, 5)) == pytest.approx((0.10, 0.38))
    middle = round((32 * 224) ** 0.5)
    assert deviation.interpolate(middle, 5) == pytest.approx((0.10 * 0.38) ** 0.5, rel=0.01)
    assert deviation.interpolate(448, 5) == deviation.interpolate(224, 5)  # a strength stays
    assert radius.interpolate(448, 3) == 12 and radius.interpolate(16, 5) == 0.75  # a length goes with the image


def clipped_zoom(x, factor):
    """The central ceil(side / factor) square, its corners put on those of round(crop * factor) pixels, linear between; its center."""
    side = len(x)
    crop = int(np.ceil(side / factor))
    top, size = (side - crop) // 2, round(crop * factor)
    places, margin = np.linspace(0, crop - 1, size), (size - side) // 2
    x = x[top : top + crop, top : top + crop]
    for axis in (0, 1):
        x = np.apply_along_axis(lambda line: np.interp(places, np.arange(crop), line)[margin : margin + side], axis, x)
    return x


SIDES = [(32, 1), (32, 4), (224, 3)]
"""Published size and severity."""


@pytest.mark.parametrize(("side", "severity"), SIDES)
def test_zoom_blur_is_the_original(side, severity, photos):
    published = {
        (32, 1): np.arange(1, 1.06, 0.01),
        (32, 4): np.arange(1, 1.21, 0.01),
        (224, 3): np.arange(1, 1.21, 0.02),
    }
    image = resized(photos[0], side)[..., :1]
    factors = published[side, severity]
    x = image / 255
    expected = (x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1)
    changed = corrupt(image, "zoom_blur", severity, np.random.default_rng(0))
    assert np.abs(changed - 255 * expected).max() < 0.501


def gaussian_blur(x, std):
    """Gaussian of 4 standard deviations along rows and columns; pixels beyond the edge are those of the edge."""
    reach = int(4 * std + 0.5)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * std**2))
    for axis in (0, 1):
        places = np.arange(x.shape[axis])
        shifted = [np.take(x, np.clip(places + k, 0, len(places) - 1), axis) for k in range(-reach, reach + 1)]
        x = sum(w * part for w, part in zip(weights / weights.sum(), shifted, strict=True))
    return x


@pytest.mark.parametrize(
    ("side", "severity", "std", "d", "rounds"), [(32, 1, 0.05, 1, 1), (32, 5, 0.4, 1, 2), (224, 4, 1.1, 3, 2)]
)
def test_glass_blur_is_the_original(side, severity, std, d, rounds, photos):
    """Pixels are copied, not swapped: `x[a], x[b] = x[b], x[a]` of NumPy rows sets both to x[b]."""
    image, rng = resized(photos[0], side), np.random.default_rng(0)
    x = np.uint8(gaussian_blur(image / 255, std) * 255)
    for _ in range(rounds):
        for row in range(side - d, d, -1):
            for column in range(side - d, d, -1):
                right, down = rng.integers(-d, d, 2)
                x[row, column], x[row + down, column + right] = x[row + down, column + right], x[row, column]
    expected = 255 * gaussian_blur(x / 255, std)
    changed = corrupt(image, "glass_blur", severity, np.random.default_rng(0))
    assert np.abs(changed - expected).max() < 0.501


def motion_blur(x, radius, std, degrees):
    """ImageMagick: the pixel itself and 2 radius more along the angle, each at the nearest pixel; beyond the edge, the edge's; 8 bits."""
    rows, columns = (np.arange(side) for side in x.shape[:2])
    result, total = np.zeros_like(x), 0.0
    for distance in range(2 * radius + 1):
        weight = np.exp(-(distance**2) / (2 * std**2))
        right, down = (int(np.ceil(distance * f(np.radians(degrees)) - 0.5)) for f in (np.cos, np.sin))
        total += weight
        result += weight * x[np.clip(rows + down, 0, rows[-1])][:, np.clip(columns + right, 0, columns[-1])]
    return np.round(result / total * 255) / 255


@pytest.mark.parametrize(("side", "severity", "radius", "std"), [(32, 1, 6, 1), (32, 5, 9, 2.5), (224, 5, 20, 15)])
def test_motion_blur_is_the_original(side, severity, radius, std, photos):
    image = resized(photos[0], side)[..., :1]
    expected = 255 * motion_blur(image / 255, radius, std, np.random.default_rng(1).uniform(-45, 45))
    changed = corrupt(image, "motion_blur", severity, np.random.default_rng(1))
    assert np.abs(changed - expected).max() < 1.001


SNOW = {
    (32, 3): (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (32, 5): (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    (224, 4): (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
}
"""(side, severity) -> mean, std, zoom, threshold, radius, blur, keep of the authors' scripts."""


@pytest.mark.parametrize(("side", "severity"), SNOW)
def test_snow_is_the_original(side, severity, photos):
    mean, std, zoom, threshold, radius, blur, keep = SNOW[side, severity]
    image, rng = resized(photos[0], side), np.random.default_rng(2)
    x = image / 255
    layer = clipped_zoom(rng.normal(mean, std, (side, side, 1)), zoom)
    layer = np.where(layer < threshold, 0, np.clip(layer, 0, 1))
    layer = motion_blur((layer * 255).astype(np.uint8) / 255, radius, blur, rng.uniform(-135, -45))
    gray = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]
    pale = keep * x + (1 - keep) * np.maximum(x, gray * 1.5 + 0.5)
    expected = 255 * np.clip(pale + layer + layer[::-1, ::-1], 0, 1)
    changed = corrupt(image, "snow", severity, np.random.default_rng(2))
    assert np.abs(changed - expected).max() < 1.501


def diamond_square(size, decay, rng):
    """Heights of a periodic square, point by point: middles of squares, then of edges, as the mean of their 4 neighbors plus noise."""
    heights, step, wibble = np.zeros((size, size)), size, 100.0
    while step >= 2:
        half = step // 2
        straight, diagonal = [(0, half), (half, 0)], [(half, half), (half, -half)]
        for (top, left), neighbors in (((half, half), diagonal), ((0, half), straight), ((half, 0), straight)):
            for row in range(top, size, step):
                for column in range(left, size, step):
                    around = [(sign * down, sign * right) for down, right in neighbors for sign in (1, -1)]
                    mean = sum(heights[(row + down) % size, (column + right) % size] for down, right in around) / 4
                    heights[row, column] = mean + wibble * rng.uniform(-wibble, wibble)
        step, wibble = half, wibble / decay
    heights -= heights.min()
    return heights / heights.max()


@pytest.mark.parametrize(
    ("side", "severity", "amount", "decay"), [(32, 1, 0.2, 3), (32, 5, 1.5, 1.75), (224, 3, 2.5, 1.7)]
)
def test_fog_is_the_original(side, severity, amount, decay, photos):
    image = resized(photos[0], side)
    x = image / 255
    clouds = diamond_square({32: 32, 224: 256}[side], decay, np.random.default_rng(4))[:side, :side, None]
    expected = 255 * (x + amount * clouds) * x.max() / (x.max() + amount)
    changed = corrupt(image, "fog", severity, np.random.default_rng(4))
    assert np.abs(changed - expected).max() < 0.501


@pytest.mark.parametrize(
    ("side", "severity", "radius", "std", "ksize"),
    [(32, 1, 0.3, 0.4, 3), (32, 4, 1, 0.2, 3), (32, 5, 1.5, 0.1, 3), (224, 4, 8, 0.5, 3), (224, 5, 10, 0.5, 5)],
)
def test_defocus_blur_is_the_original(side, severity, radius, std, ksize, photos):
    """A disk of whole pixels in a square of at least 17 of them, blurred by OpenCV's Gaussian; edges mirrored, the edge pixel once."""
    image = resized(photos[0], side)[..., :1]
    reach, half = max(8, int(radius)), ksize // 2
    line = np.arange(-reach, reach + 1)
    disk = np.array([[float(row**2 + column**2 <= radius**2) for column in line] for row in line])
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * std**2))
    around = np.pad(disk / disk.sum(), half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(around, (ksize, ksize))
    kernel = (windows * np.outer(taps, taps) / taps.sum() ** 2).sum((2, 3))
    padded = np.pad(image / 255, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    expected = 255 * sum(
        kernel[row, column] * padded[row : row + side, column : column + side]
        for row in range(len(line))
        for column in range(len(line))
    )
    changed = corrupt(image, "defocus_blur", severity, np.random.default_rng(0))
    assert np.abs(changed - expected).max() < 0.501


def sample(x, rows, columns, mirror):
    """Pixels of (H, W, 1) at fractional places, bilinearly; `mirror` gives the index inside that an index outside stands for."""
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    pick = lambda r, c: x[mirror(r, x.shape[0]), mirror(c, x.shape[1])]  # noqa: E731
    upper = (1 - right) * pick(top, left) + right * pick(top, left + 1)
    return (1 - down) * upper + down * ((1 - right) * pick(top + 1, left) + right * pick(top + 1, left + 1))


ELASTIC = {(32, 2): (32, 0.05, 0.2, 0.07), (32, 5): (32, 0.1, 0.03, 0.03), (224, 3): (244, 0.05, 0.01, 0.02)}
"""(side, severity) -> pixels (244 is a slip that the authors keep), and shift, smooth, affine as fractions of them."""


@pytest.mark.parametrize(("side", "severity"), ELASTIC)
def test_elastic_transform_is_the_original(side, severity, photos):
    """Two interpolations: an affine map with the edge pixel mirrored once, then a flow with the edge pixel repeated."""
    image, rng = resized(photos[0], side)[..., :1], np.random.default_rng(5)
    pixels, *fractions = ELASTIC[side, severity]
    shift, smooth, affine = (pixels * fraction for fraction in fractions)
    middle, third = side // 2, side // 3
    points = np.array(
        [[middle + third, middle + third], [middle - third, middle + third], [middle - third, middle - third]]
    )
    moved = points + rng.uniform(-1, 1, (3, 2)) * affine
    # row = a * row' + b * column' + c, from the three pairs; the same for the column.
    solve = [np.linalg.solve(np.c_[moved, np.ones(3)], points[:, axis]) for axis in (0, 1)]
    rows, columns = np.mgrid[:side, :side].astype(float)
    from_row, from_column = (a * rows + b * columns + c for a, b, c in solve)

    def edge_once(index, size):
        index = index % (2 * size - 2)
        return np.where(index < size, index, 2 * size - 2 - index)

    def edge_twice(index, size):
        index = index % (2 * size)
        return np.where(index < size, index, 2 * size - 1 - index)

    x = sample(image / 255, from_row, from_column, edge_once)
    taps = np.arange(-int(3 * smooth + 0.5), int(3 * smooth + 0.5) + 1)
    weights = np.exp(-(taps**2) / (2 * smooth**2))
    flow = []
    for _ in range(2):
        noise = rng.uniform(-1, 1, (side, side))
        for axis in (0, 1):
            parts = [np.take(noise, edge_twice(np.arange(side) + tap, side), axis) for tap in taps]
            noise = sum(weight * part for weight, part in zip(weights / weights.sum(), parts, strict=True))
        flow.append(shift * noise)
    expected = 255 * sample(x, rows + flow[0], columns + flow[1], edge_twice)
    changed = corrupt(image, "elastic_transform", severity, np.random.default_rng(5))
    assert np.abs(changed - expected).max() < 0.501


@pytest.mark.parametrize("kind", ["gaussian_noise", "glass_blur"])
def test_draws_depend_on_the_image_alone(kind, crops):
    images = list_images(crops)

    def dataset(listed, augment):
        return ViewDataset(listed, ViewSpec(image_size=(32, 32)), image_size=(32, 32), augment=augment)

    corruption = Corruption(kind, 3)
    whole = dataset(images, corruption).batch([(0, 4), (0, 7)]).images
    alone = dataset(images.subset([4, 7]), corruption).batch([(0, 1)]).images
    assert torch.equal(whole[1], alone[0])
    difference = (whole.float() - dataset(images, None).batch([(0, 4), (0, 7)]).images.float()) / 255
    assert abs(float(torch.corrcoef(difference.flatten(1))[0, 1])) < 0.1


def test_mean_corruption_error_by_hand():
    errors = {"fog": [0.1, 0.3], "jpeg": [0.5, 0.5]}
    reference = {"fog": [0.4, 0.4], "jpeg": [0.2, 0.3]}
    first, second = (
        ProtocolResult({"corruption_mean": MetricValue(0.5)}, details={"errors": own}) for own in (reference, errors)
    )
    add_mce({"first": {"corruptions": first}, "second": {"corruptions": second}})
    assert second.details["corruption_errors"] == pytest.approx({"fog": 0.4 / 0.8, "jpeg": 1.0 / 0.5})
    assert second.metrics["mce"].value == pytest.approx(1.25)
    assert first.metrics["mce"].value == pytest.approx(1)
