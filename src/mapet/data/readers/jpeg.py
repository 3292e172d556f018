"""JPEG, by libjpeg-turbo: decoded when a box is read, reduced as far as that box allows."""

import io
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor

from mapet.data.readers import pillow
from mapet.data.readers.base import Box, LazyImage, Window, check_pixel_count

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")
TAKES_BYTES = True
REDUCTIONS = (8, 4, 2)
"""Factors that a JPEG can be reduced by while it is decoded. libjpeg-turbo knows other eighths too, but has fast code
for these only: at 5/8 it takes longer than at full size."""


def matches(head: bytes, name: str) -> bool:
    return head.startswith(b"\xff\xd8")


def open_image(data: bytes, channels: int, window: Window | None) -> LazyImage:
    """Open a JPEG; Pillow reads those of other colors than gray and YCbCr, and those that libjpeg-turbo finds fault with."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        colors = ""
    if colors not in ("YCbCr", "Gray") or channels not in (1, 3):
        return pillow.open_image(data, channels, window)
    check_pixel_count(height, width)
    return LazyJpeg(data, channels, height, width, colors == "Gray")


class LazyJpeg(LazyImage):
    """A JPEG with 8 bits a channel, grey or YCbCr: libjpeg-turbo decodes it when a box is read, as small as will do.

    Pillow reads those that libjpeg-turbo finds fault with, so what is bad and why is one decoder's judgement.
    """

    def __init__(self, data: bytes, channels: int, height: int, width: int, grey: bool) -> None:
        self.data, self.channels, self.stored_size = data, channels, (height, width)
        self.kind = "JPEG L" if grey else "JPEG RGB"
        self.orientation = _orientation(data)
        self.size = (width, height) if self.orientation.transpose else (height, width)
        self._decoded: dict[tuple[int, bool], np.ndarray] = {}  # so that student and teacher share it

    def read(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        box = box or Box(0, 0, *self.size)
        if at_least is None:
            reduction, fast = 1, False
        else:
            stored = self.orientation.stored(box, self.size)
            room = min(box.height // at_least[0], box.width // at_least[1])
            reduction = next((r for r in REDUCTIONS if r <= room and not any(edge % r for edge in stored)), 1)
            fast = box.height > at_least[0] and box.width > at_least[1]
        try:
            array = self._decode(reduction, fast)
        except ValueError:
            return pillow.open_image(self.data, self.channels, None).read(box)
        top, left, height, width = (edge // reduction for edge in self.orientation.stored(box, self.size))
        pixels = np.ascontiguousarray(array[top : top + height, left : left + width])
        return self.orientation.upright(torch.from_numpy(pixels).permute(2, 0, 1))

    def _decode(self, reduction: int, fast: bool) -> np.ndarray:
        """The whole image, reduced. `fast` interpolates colour roughly, which does not show in smaller pictures."""
        key = reduction, fast
        if key not in self._decoded:
            height, width = (-(-side // reduction) for side in self.stored_size)
            self._decoded[key] = simplejpeg.decode_jpeg(
                self.data,
                "GRAY" if self.channels == 1 else "RGB",
                fastdct=fast,
                fastupsample=fast,
                min_height=height,
                min_width=width,
            )
        return self._decoded[key]


class Orientation(NamedTuple):
    """How stored pixels become upright ones: transposed, then turned upside down, then mirrored."""

    transpose: bool
    flip_rows: bool
    flip_columns: bool

    def stored(self, box: Box, size: tuple[int, int]) -> Box:
        """Where a box of the upright image of that size lies in the stored one."""
        top, left, height, width = box
        if self.flip_rows:
            top = size[0] - top - height
        if self.flip_columns:
            left = size[1] - left - width
        return Box(left, top, width, height) if self.transpose else Box(top, left, height, width)

    def upright(self, image: UInt8[Tensor, "C h w"]) -> UInt8[Tensor, "C H W"]:
        axes = [axis for axis, flip in ((1, self.flip_rows), (2, self.flip_columns)) if flip]
        image = image.transpose(1, 2) if self.transpose else image
        return image.flip(axes) if axes else image


UPRIGHT = Orientation(False, False, False)
ORIENTATIONS = {  # by EXIF's number
    2: Orientation(False, False, True),
    3: Orientation(False, True, True),
    4: Orientation(False, True, False),
    5: Orientation(True, False, False),
    6: Orientation(True, False, True),
    7: Orientation(True, True, True),
    8: Orientation(True, True, False),
}


def _orientation(data: bytes) -> Orientation:
    header = data[: data.find(b"\xff\xda")]  # up to the first scan
    if b"Exif\0\0" not in header and b"tiff:Orientation" not in header:  # so it is with most files of a data set
        return UPRIGHT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            return ORIENTATIONS.get(image.getexif().get(Base.Orientation, 1), UPRIGHT)
