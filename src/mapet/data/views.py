"""Random draws for an image: its view (which box of it, mirrored or not), colors, augmentations and permutation of patches.

A view is a small value, so that the same one can be rendered for the student and for the teacher at their own sizes, now or
later, and tokens stay aligned with patches.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from mapet.config.base import Config
from mapet.config.shared import AS_STORED, ReadOptions, ViewOptions
from mapet.data.readers.image import REDUCTIONS, Box, ImageDecodeError, LazyImage
from mapet.data.readers.open import open_image
from mapet.errors import MapetError, option

PermutationKind = Literal["random", "blockwise", "raster"]
MIN_BLOCK_AREA = 16 / 196
"""Smallest area of a block of BEiT's, as a fraction of the image."""
MIN_BLOCK_ASPECT = 0.3
"""Smallest height over width of a block of BEiT's; the largest is one over it."""
MAX_BLOCK_DRAWS = 1000
"""Draws of blocks for one mask, after which the patches that are missing are random ones. At 14 x 14 about 20 are needed."""
MAX_CROP_ASPECT = 4 / 3
"""Largest width over height of a random crop, relative to the student's input; the smallest is one over it (torchvision's)."""
MAX_CROP_DRAWS = 10
"""Draws of a random crop until one fits into the image; after them it is the largest centered one (torchvision's)."""
TRANSLATION = 0.45
"""Largest translation of RandAugment, as a fraction of the image's shorter side, as in timm's training."""
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels in [0, 1]."""


class View(NamedTuple):
    """A box in pixels of the upright image, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class ViewSpec(Config):
    """How views are drawn. Stored with the tokens, so that student and teacher cannot disagree."""

    kind: Literal["center", "center-flip", "random-crop"] = "center"
    """center: largest centered box (the released recipe); center-flip: that, mirrored every other time; random-crop: the box of
    torchvision's RandomResizedCrop, mirrored half the time."""
    image_size: tuple[int, int]
    """Height and width of the student's input, pixels; their ratio is the box's, a random one is up to a third wider or higher."""
    min_scale: float = 0.2
    """Smallest random box, as a fraction of the image's area (for random-crop)."""
    seed: int = 0
    """Seed of the draws."""

    @classmethod
    def from_config(cls, config: ViewOptions, image_size: tuple[int, int], seed: int) -> "ViewSpec":
        """Return the specification that a command's options ask for; `image_size` is the student's input, pixels."""
        return cls(kind=config.views, image_size=image_size, min_scale=config.min_crop_scale, seed=seed)


def sample_view(spec: ViewSpec, size: tuple[int, int], key: int, view_index: int) -> View:
    """Draw a view of an image: a pure function of the arguments.

    If the box is at least r = 2, 4 or 8 times `spec.image_size`, its sides are rounded down, and the place of its center is rounded, to
    multiples of r pixels, so that a JPEG which is reduced r times while it is decoded still shows exactly this box. That moves its center
    by at most half a pixel of the student's input.

    Args:
        spec: which views are drawn.
        size: height and width of the upright image, pixels.
        key: of the image (`ImageList.key`).
        view_index: which view of the image.

    Returns:
        A box that lies in the image. 'center' and 'center-flip' have the largest box of the input's aspect ratio.
    """
    target_height, target_width = spec.image_size
    flip = spec.kind == "center-flip" and (key + view_index) % 2 == 1  # alternating: two views are both
    if spec.kind == "random-crop":
        rng = np.random.default_rng([spec.seed, key, view_index])
        flip = bool(rng.integers(2))
        box = _random_box(spec, size, rng)
    else:
        box = _centered_box(spec.image_size, size)
    max_reduction = min(box.height // target_height, box.width // target_width)
    unit = next((r for r in REDUCTIONS if r <= max_reduction), 1)
    height, width = box.height // unit * unit, box.width // unit * unit
    top, left = (
        min(round((start + (side - rounded) / 2) / unit), (length - rounded) // unit) * unit
        for start, side, rounded, length in zip(box, box[2:], (height, width), size, strict=False)
    )
    return View(top, left, height, width, flip)


def _centered_box(shape: tuple[float, float], size: tuple[int, int]) -> Box:
    """Return the largest centered box whose height and width have the ratio of `shape`, in an image of `size` (height, width) pixels."""
    scale = min(size[0] / shape[0], size[1] / shape[1])
    height, width = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
    return Box((size[0] - height) // 2, (size[1] - width) // 2, height, width)


def _random_box(spec: ViewSpec, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """Draw a box as torchvision's RandomResizedCrop does, whose aspect ratios are meant for a square input.

    Its area is a uniform fraction of the image's, its width over height relative to the student's input log-uniform, its place
    uniform. If no draw fits, it is the centered box of the aspect nearest to the image's.

    Args:
        spec: gives the student's input and the smallest fraction.
        size: height and width of the image, pixels.
    """
    max_log, (target_height, target_width) = math.log(MAX_CROP_ASPECT), spec.image_size
    for _ in range(MAX_CROP_DRAWS):
        area = size[0] * size[1] * rng.uniform(spec.min_scale, 1)
        aspect = target_width / target_height * math.exp(rng.uniform(-max_log, max_log))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= size[0] and 0 < width <= size[1]:
            return Box(int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1)), height, width)
    stretch = size[1] / size[0] * target_height / target_width  # the image's aspect relative to the input's
    stretch = min(max(stretch, 1 / MAX_CROP_ASPECT), MAX_CROP_ASPECT)
    return _centered_box((target_height, target_width * stretch), size)


def render_view(image: LazyImage, view: View, size: tuple[int, int]) -> UInt8[Tensor, "C h w"]:
    """Return a view's pixels, resized (antialiased bicubic) to a height and width; untouched if the box has that size.

    A pure function of its arguments, so that tokens made weeks ago are those of the pixels that the teacher would get today.
    """
    pixels = image.read(Box(*view[:4]), min_size=size)
    if pixels.shape[1:] != size:
        # In memory these are rows of RGB, as decoded: torchvision has vector code for bytes in that layout.
        pixels = tvf.resize(pixels, list(size), interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)
    return pixels.movedim(0, -1).flip(1).movedim(-1, 0) if view.flip else pixels


def sample_jitter(strength: float, rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    """Draw factors of brightness, contrast and saturation in 1 +- strength, none below 0."""
    return rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3).astype(np.float32)


def color_jitter(images: Float[Tensor, "B C h w"], factors: Float[Tensor, "B 3"]) -> Float[Tensor, "B C h w"]:
    """Change brightness, contrast and (of RGB) saturation of pixels in 0..255, in place, and return them.

    Saturation mixes a pixel with its gray, contrast with the image's mean gray, brightness with black. As affine maps of
    RGB the three commute, so they are applied as one, clamped once at its end. Only colors change, so the tokens of the
    unjittered view stay those of the student's patches.

    Args:
        factors: of brightness, contrast and saturation, for each image; 1 changes nothing.
    """
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    if images.shape[1] == 3:
        gray = 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]
    else:
        gray, saturation = images.mean(dim=1, keepdim=True), torch.ones_like(saturation)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    gain = brightness * contrast
    offset = (gain * (1 - saturation)) * gray + brightness * (1 - contrast) * mean
    return images.mul_(gain * saturation).add_(offset).clamp_(0, 255)


def input_mean_std(channels: int) -> MeanStd:
    """Return mean and standard deviation of pixels in [0, 1]: ImageNet's for 3 channels, 0.5 and 0.25 otherwise."""
    if channels == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.5,) * channels, (0.25,) * channels


def normalize(
    images: UInt8[Tensor, "B C H W"], channels: int, jitter: Float[Tensor, "B 3"] | None = None,
    mean_std: MeanStd | None = None,
) -> Float[Tensor, "B C H W"]:  # fmt: skip
    """Turn uint8 pixels into a model's input: color jitter, then [0, 1], then minus the mean over the standard deviation.

    Args:
        channels: C.
        jitter: factors for `color_jitter`; None: without.
        mean_std: of each channel; None: those of `input_mean_std`.
    """
    stats = mean_std or input_mean_std(channels)
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in stats)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    if jitter is not None:
        pixels = color_jitter(pixels, jitter.to(pixels.device, non_blocking=True))
    return pixels.div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class ImageTransform:
    """Turns images of any kind into a model's input: read, cropped, resized and normalized as `embed`, `evaluate` and `predict` do.

    It can be the `transform` of a torchvision data set, too.

    Attributes:
        image_size: (H, W) of the model's input, pixels.
        channels: C of the model's input.
        read_options: how files are read.
    """

    image_size: tuple[int, int]
    channels: int
    read_options: ReadOptions = AS_STORED

    def __call__(self, image: Image.Image | str | Path | Sequence[Image.Image | str | Path]) -> Float[Tensor, "..."]:
        """Read the largest centered crop of each image, resize it (antialiased bicubic) and normalize it.

        Args:
            image: an image of Pillow of any mode (gray, palette, transparent, CMYK, 16 bits, ...), the path of an image file, or a
                sequence of both. A model of other than 1 or 3 channels takes paths.

        Returns:
            (C, H, W) of one image, (B, C, H, W) of a sequence, float32 on the CPU.

        Raises:
            MapetError: an image cannot be read; the message names it and the reason.
        """
        if not isinstance(image, (Image.Image, str, Path)):
            return torch.stack([self(each) for each in image])
        try:
            opened = open_image(image, self.channels, self.read_options)
            view = sample_view(ViewSpec(image_size=self.image_size), opened.size, key=0, view_index=0)
            pixels = render_view(opened, view, self.image_size)
        except ImageDecodeError as error:
            raise MapetError(f"cannot read the image {image}: {error}. Give another one") from None
        return normalize(pixels[None], self.channels)[0]


def sample_permutation(
    kind: PermutationKind, grid: tuple[int, int], num_context: int, rng: np.random.Generator
) -> Int[np.ndarray, " N"]:
    """Draw the order in which an image's patches are revealed and then predicted.

    Args:
        kind: random: each order is as likely. raster: left to right, top to bottom. blockwise: the last N - c patches are a blockwise
            mask, as `sample_blocks` draws it. The patches of its first block are predicted last, in random order, before them those
            that the second block adds, and so on.
        grid: rows and columns of patches.
        num_context: c, number of patches that are not masked, 0 to N; only blockwise orders depend on it.

    Returns:
        Row-major indices of the patches, every one once.
    """
    num_patches = math.prod(grid)
    if kind == "raster":
        return np.arange(num_patches)
    if kind == "random":
        return rng.permutation(num_patches)
    blocks = [rng.permutation(block) for block in sample_blocks(grid, num_patches - num_context, rng)]
    others = np.setdiff1d(np.arange(num_patches), np.concatenate([[], *blocks]))
    return np.concatenate([rng.permutation(others), *reversed(blocks)]).astype(np.int64)


def sample_blocks(grid: tuple[int, int], num_masked: int, rng: np.random.Generator) -> list[Int[np.ndarray, " n"]]:
    """Draw the blocks of a blockwise mask of BEiT's (arXiv 2106.08254, algorithm 1; `masking_generator.py` of its code).

    A block's area is uniform between `MIN_BLOCK_AREA` and what the mask still misses, its aspect ratio log-uniform, its place uniform. It
    is drawn again if it is as high or as wide as the image, masks nothing new, or more than what is missing. BEiT gives up after 10
    such draws in a row and masks fewer patches than asked for; here draws continue, so that all images of a batch have the same number.

    Args:
        grid: rows and columns of patches.
        num_masked: number of patches to mask, 0 to N.
        rng: generator of the draws.

    Returns:
        Row-major indices of the patches that each block masks and no block before it; `num_masked` in all. They are fewer only after
        `MAX_BLOCK_DRAWS` draws, as in a grid of a single row, which no block fits.
    """
    rows, columns = grid
    patches, free = np.arange(rows * columns).reshape(grid), np.ones(grid, dtype=bool)
    blocks: list[np.ndarray] = []
    min_area, missing = free.size * MIN_BLOCK_AREA, num_masked
    for _ in range(MAX_BLOCK_DRAWS):
        if not missing:
            break
        area = rng.uniform(min(min_area, missing), max(min_area, missing))
        aspect = math.exp(rng.uniform(math.log(MIN_BLOCK_ASPECT), -math.log(MIN_BLOCK_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        window = slice(top, top + height), slice(left, left + width)
        new = patches[window][free[window]]
        if 0 < len(new) <= missing:
            blocks.append(new)
            free[window] = False
            missing -= len(new)
    return blocks


@contextmanager
def fork_rng(*seed: int) -> Iterator[None]:
    """Seed the global generators of Python and NumPy, from which timm draws, until the context ends; then restore them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (timm's choice)
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def rand_augment(
    policy: str, size: tuple[int, int], channels: int
) -> Callable[[UInt8[Tensor, "C H W"]], UInt8[Tensor, "C H W"]]:
    """Return a function that applies timm's RandAugment (arXiv 1909.13719) to one image.

    The function draws from the global generators of Python and NumPy: seed them with `fork_rng`. A gray image is augmented as an RGB
    image of three equal channels, which stay equal; the changes of color leave it as it is.

    Args:
        policy: as timm writes it: rand-m9-mstd0.5 (the released config's; with -inc1 all changes grow with the magnitude).
        size: height and width of the image, pixels; translations are a fraction of the shorter side.
        channels: C, 1 or 3. The mean of `input_mean_std` fills the corners of a rotated image.

    Raises:
        MapetError: timm does not know the policy, or C is another number, for which Pillow has no changes.
    """
    from timm.data.auto_augment import rand_augment_transform

    if channels not in (1, 3):
        problem = f"{option('rand_augment', policy)} is for 1 or 3 channels, this ViT has {channels} channels: omit it"
        raise MapetError(problem, field="rand_augment", value=policy)
    mean = input_mean_std(channels)[0] * (3 // channels)
    fill = tuple(round(255 * value) for value in mean)
    try:
        transform = rand_augment_transform(policy, {"translate_const": int(min(size) * TRANSLATION), "img_mean": fill})
    except (AssertionError, ValueError, KeyError):
        problem = f"{option('rand_augment', policy)} is not a RandAugment policy of timm: write it like rand-m9-mstd0.5"
        raise MapetError(problem, field="rand_augment", value=policy) from None

    def augment(image: UInt8[Tensor, "C H W"]) -> UInt8[Tensor, "C H W"]:
        pillow_image = Image.fromarray(image.expand(3, -1, -1).movedim(0, -1).contiguous().numpy())
        return torch.from_numpy(np.array(transform(pillow_image))).movedim(-1, 0)[:channels]

    return augment
