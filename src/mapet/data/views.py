"""Views of an image: which box of it, mirrored or not. A view is a small value, so that the same one can be rendered
for the student and for the teacher at their own sizes, now or later, and tokens stay aligned with patches."""

from typing import Literal, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from jaxtyping import Float, UInt8
from torch import Tensor

from mapet.config.base import Config
from mapet.data.readers.base import Box, LazyImage
from mapet.data.readers.jpeg import REDUCTIONS

ViewKind = Literal["center", "center-flip", "random-crop"]


class View(NamedTuple):
    """A box in pixels of the upright image, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    @property
    def box(self) -> Box:
        return Box(*self[:4])


class ViewSpec(Config):
    """How views are drawn. Stored with the tokens, so that student and teacher cannot disagree."""

    kind: ViewKind = "center"
    """center: largest centred box (the released recipe); flip: that, mirrored every other time; crop: a random box,
    mirrored half the time."""
    image_size: tuple[int, int]
    """Height and width of the student's input, pixels; fixes the box's aspect ratio."""
    min_scale: float = 0.2
    """crop: the smallest box, as a share of the centred box's area."""
    seed: int = 0
    """Seed of the draws."""


def draw_view(spec: ViewSpec, size: tuple[int, int], key: int, number: int) -> View:
    """View `number` of the image with stable key `key` and (height, width) `size`: a pure function of its arguments.

    Where the box is at least r times `image_size`, r = 2, 4 or 8, its edges lie on multiples of r pixels: so a JPEG that
    is reduced r times as it is decoded still shows exactly this box. It costs less than a pixel of the student's.
    """
    target_height, target_width = spec.image_size
    scale = min(size[0] / target_height, size[1] / target_width)
    box = max(1, round(target_height * scale)), max(1, round(target_width * scale))
    if spec.kind == "random-crop":
        rng = np.random.default_rng([spec.seed, key, number])
        flip = bool(rng.integers(2))
        shrink = float(np.sqrt(rng.uniform(spec.min_scale, 1.0)))
        height, width = max(1, round(box[0] * shrink)), max(1, round(box[1] * shrink))
        top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
    else:
        height, width = box
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        flip = spec.kind == "center-flip" and bool(
            (key + number) % 2
        )  # in turn, so that two stored views are both of them
    room = min(height // target_height, width // target_width)
    unit = next((reduction for reduction in REDUCTIONS if reduction <= room), 1)
    top, left, height, width = (edge // unit * unit for edge in (top, left, height, width))
    return View(top, left, height, width, flip)


def render(picture: LazyImage, view: View, size: tuple[int, int]) -> UInt8[Tensor, "C h w"]:
    """The view's pixels at (height, width) `size`: antialiased bicubic; untouched where the box has that size.

    A pure function of its arguments, so that tokens made weeks ago are those of the pixels the teacher would see today.
    """
    pixels = picture.read(view.box, at_least=size)
    if pixels.shape[1:] != size:
        # Rows of RGB, as decoded: torchvision has vector code for bytes in that layout.
        pixels = tvf.resize(pixels, list(size), interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)
    return pixels.movedim(0, -1).flip(1).movedim(-1, 0) if view.flip else pixels


def draw_jitter(strength: float, rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    """Factors of brightness, contrast and saturation in 1 +- strength, none below 0."""
    return rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3).astype(np.float32)


def color_jitter(images: Float[Tensor, "B C h w"], factors: Float[Tensor, "B 3"]) -> Float[Tensor, "B C h w"]:
    """Brightness, contrast and (for RGB) saturation of pixels in 0..255, in place, each image by its own three factors.

    Saturation mixes a pixel with its grey, contrast with the image's mean grey, brightness with black. As affine maps of
    RGB the three commute, so they are one, clamped once at its end. Changes colours only, so the tokens of the
    unjittered view stay those of the student's patches.
    """
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    if images.shape[1] == 3:
        grey = 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]
    else:
        grey, saturation = images.mean(dim=1, keepdim=True), torch.ones_like(saturation)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    gain = brightness * contrast
    offset = (gain * (1 - saturation)) * grey + brightness * (1 - contrast) * mean
    return images.mul_(gain * saturation).add_(offset).clamp_(0, 255)
