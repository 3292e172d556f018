"""Views of an image: which box of it, mirrored or not. A view is a small value, so that the same one can be rendered
for the student and for the teacher at their own sizes, now or later, and tokens stay aligned with patches."""

from typing import Literal, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from jaxtyping import UInt8
from torch import Tensor

from mapet.recipe import Config

ViewKind = Literal["center", "flip", "crop"]


class View(NamedTuple):
    """A box in pixels of the upright image, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


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
    """View `number` of the image with stable key `key` and (height, width) `size`: a pure function of its arguments."""
    target_height, target_width = spec.image_size
    scale = min(size[0] / target_height, size[1] / target_width)
    box = max(1, round(target_height * scale)), max(1, round(target_width * scale))
    if spec.kind == "center":
        return View((size[0] - box[0]) // 2, (size[1] - box[1]) // 2, *box, flip=False)
    if spec.kind == "flip":  # in turn, so that two stored views are both of them
        return View((size[0] - box[0]) // 2, (size[1] - box[1]) // 2, *box, flip=bool((key + number) % 2))
    rng = np.random.default_rng([spec.seed, key, number])
    flip = bool(rng.integers(2))
    shrink = float(np.sqrt(rng.uniform(spec.min_scale, 1.0)))
    height, width = max(1, round(box[0] * shrink)), max(1, round(box[1] * shrink))
    top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
    return View(top, left, height, width, flip)


def render(image: UInt8[Tensor, "C H W"], view: View, size: tuple[int, int]) -> UInt8[Tensor, "C h w"]:
    """The view's pixels at (height, width) `size`: antialiased bicubic; untouched where the box has that size."""
    pixels = image[:, view.top : view.top + view.height, view.left : view.left + view.width]
    if pixels.shape[1:] != size:
        pixels = tvf.resize(pixels, list(size), interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)
    return pixels.flip(-1) if view.flip else pixels


def color_jitter(image: UInt8[Tensor, "C h w"], strength: float, rng: np.random.Generator) -> UInt8[Tensor, "C h w"]:
    """Brightness, contrast and (for RGB) saturation by factors in 1 +- strength, in random order.

    Changes colours only, so the tokens of the unjittered view stay those of the student's patches.
    """
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3)
    steps = [tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation]
    for step in rng.permutation(3 if image.shape[0] == 3 else 2):
        if image.shape[0] in (1, 3):
            image = steps[step](image, float(factors[step]))
        else:  # many channels: torchvision knows grey and RGB only
            pivot = 0.0 if step == 0 else image.float().mean()
            image = ((image.float() - pivot) * float(factors[step]) + pivot).round().clamp(0, 255).to(torch.uint8)
    return image
