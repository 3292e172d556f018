"""One image file -> uint8 pixels of any box of it, or a `ImageDecodeError` that says why not.

A format is a branch of `open_image`. A reader that cannot give the pixels as they are stored must raise: an image is never
misread silently.
"""

import io
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mapet.errors import option

ImageFile = str | Path | bytes
"""A path, or the bytes of a file."""
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")
PILLOW_EXTENSIONS = (".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif")
EXTENSIONS = frozenset((".npy", *JPEG_EXTENSIONS, *PILLOW_EXTENSIONS))
"""Names by which folders are searched."""
HEAD_BYTES = 256
MAX_PIXELS = 178_956_970
"""Larger images are refused as decompression bombs (the limit of Pillow, 0.5 GB as RGB)."""
MAX_BYTES = 4 << 30
"""Larger files are refused too: they would be read into memory to find out what they are."""
REDUCTIONS = (8, 4, 2)
"""Factors that a JPEG can be reduced by while it is decoded. libjpeg-turbo knows other eighths too, but has fast code
for these only: at 5/8 it takes longer than at full size."""


class ImageDecodeError(Exception):
    """An image that cannot be used; the message is the reason."""


class Box(NamedTuple):
    """A part of the upright image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


class IntensityWindow(NamedTuple):
    """Values that become 0 and 255 of 8 bits, as radiology's window does it: linear between, cut off beyond. NaN becomes 0."""

    low: float
    high: float

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Map any numbers to uint8."""
        full = values.astype(np.promote_types(values.dtype, np.float32))
        scaled = ((full - self.low) * (255 / (self.high - self.low))).clip(0, 255)
        return np.nan_to_num(scaled).round().astype(np.uint8)


class LazyImage(ABC):
    """An open image: its size and kind are known, its pixels may still be encoded.

    Attributes:
        size: height and width, upright.
        kind: format and mode, e.g. 'JPEG RGB'.
        windowed: whether it is read through a `IntensityWindow`, so that its pixels are others than those stored.
    """

    size: tuple[int, int]
    kind: str
    windowed = False

    @abstractmethod
    def read(self, box: Box | None = None, min_size: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        """Read the pixels of `box` (all, without one).

        Args:
            min_size: the height and width that will be made of it: with those, the pixels may come reduced by a whole
                factor, to this size or more; the box they show is exactly the same.

        Raises:
            ImageDecodeError: with the reason.
        """


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn whatever a decoder raises into a `ImageDecodeError` with the reason."""
    try:
        yield
    except ImageDecodeError:
        raise
    except PermissionError:
        raise ImageDecodeError("no permission to read it") from None
    except OSError as error:
        raise ImageDecodeError(error.strerror or str(error)) from None
    except Exception as error:  # parsers raise anything on damaged files (struct, tokenize, recursion, ...)
        raise ImageDecodeError(f"damaged: {error or type(error).__name__}") from None


def open_image(file: ImageFile, channels: int = 3, window: IntensityWindow | None = None) -> LazyImage:
    """Open an image file, or the bytes of one, to read `channels` channels of 8 bits, upright.

    EXIF rotation is applied; of an animation the first frame counts; transparency is laid on white; CMYK, palette and
    other modes are converted. `.npy` arrays of shape (H, W) or (H, W, C) carry any number of channels; other formats give
    1 (gray) or 3 (RGB).

    Args:
        window: what of 16-bit, integer and floating-point values is kept; without one the upper 8 of 16 bits.

    Raises:
        ImageDecodeError: with the reason: truncated, not an image, no permission, too large, wrong number of channels, ...
            A JPEG's pixels are not decoded yet: reading them can still fail.
    """
    with translate_errors(), io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb", buffering=0) as stream:
        head = stream.read(HEAD_BYTES)
        if not head:
            raise ImageDecodeError("zero bytes")
        if head.startswith(b"\x93NUMPY") or (not isinstance(file, bytes) and str(file).lower().endswith(".npy")):
            return open_array(file, channels, window)
        if head.startswith(b"\xff\xd8"):
            return open_jpeg(head + stream.read(), channels, window)
        return open_with_pillow(file, channels, window)


def check_pixel_count(height: int, width: int) -> None:
    """Raises ImageDecodeError for an image of too many pixels."""
    if height * width > MAX_PIXELS:
        raise ImageDecodeError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")


class DecodedImage(LazyImage):
    """Pixels that are decoded already: (H, W, C). Without a window the upper 8 of 16 bits count.

    Attributes:
        is_deep: whether its values are others than 8 bits.

    Raises:
        ImageDecodeError: values that need a window.
    """

    def __init__(self, array: np.ndarray, kind: str, window: IntensityWindow | None = None) -> None:
        self.array, self.kind, self.size, self.window = array, kind, (array.shape[0], array.shape[1]), window
        self.is_deep = array.dtype != np.uint8
        self.windowed = window is not None and self.is_deep
        if window is None and self.is_deep and (array.dtype.kind, array.dtype.itemsize) != ("u", 2):
            values = array[np.isfinite(array)]
            found = f"{values.min():g} to {values.max():g}" if values.size else "none of them finite"
            raise ImageDecodeError(
                f"{array.dtype.name} pixels, {found}: `mapet prepare --value-range LOW HIGH` takes them"
            )

    def read(self, box: Box | None = None, min_size: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        top, left, height, width = box or Box(0, 0, *self.size)
        pixels = self.array[top : top + height, left : left + width]
        if self.is_deep:
            pixels = self.window.apply(pixels) if self.window else pixels >> 8
        return torch.from_numpy(pixels.astype(np.uint8, order="C")).permute(2, 0, 1)


# ---- arrays (H, W) or (H, W, C) of any number of channels, as `numpy.save` writes them


def open_array(file: ImageFile, channels: int, window: IntensityWindow | None) -> DecodedImage:
    """Open an array; of a file on disk, only the box that is asked for is read."""
    array = _view(file) if isinstance(file, bytes) else np.load(file, mmap_mode="r", allow_pickle=False)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise ImageDecodeError(f"array of shape {array.shape}, wanted (H, W, {channels})")
    check_pixel_count(*array.shape[:2])
    if array.dtype.kind not in "uif":
        raise ImageDecodeError(f"array of {array.dtype}, wanted numbers")
    return DecodedImage(array, f"NPY {array.dtype.name}", window)


def _view(data: bytes) -> np.ndarray:
    """View bytes as an array, without a copy: `np.load` would first take the memory that their header asks for."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise ImageDecodeError("array of Python objects")
    return np.frombuffer(data, dtype, math.prod(shape), stream.tell()).reshape(shape, order="F" if fortran else "C")


# ---- whatever Pillow knows, decoded in full


@translate_errors()
def open_with_pillow(file: ImageFile, channels: int, window: IntensityWindow | None) -> DecodedImage:
    """Decode an image: EXIF rotation is applied, the first frame of an animation taken, transparency laid on white."""
    if channels not in (1, 3):
        raise ImageDecodeError(f"{option('channels')} {channels} needs .npy arrays; pictures give 1 or 3")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of half the size it refuses, and of odd EXIF
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as stored:
                check_pixel_count(stored.height, stored.width)
                kind = f"{stored.format} {stored.mode}{' animated' if getattr(stored, 'is_animated', False) else ''}"
                stored.load()
                image = ImageOps.exif_transpose(stored)
    except UnidentifiedImageError:
        raise ImageDecodeError("not an image Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise ImageDecodeError(str(error)) from None
    if image.mode.startswith(("I", "F")):  # gray, of more than 8 bits
        values = np.asarray(image)
        if values.dtype.kind != "f" and values.min(initial=0) >= 0 and values.max(initial=0) <= 65535:
            values = values.astype(np.uint16)
        return DecodedImage(np.broadcast_to(values[:, :, None], (*values.shape, channels)), kind, window)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return DecodedImage(pixels.reshape(image.height, image.width, channels), kind)


# ---- JPEG, by libjpeg-turbo: decoded when a box is read, reduced as far as that box allows


def open_jpeg(data: bytes, channels: int, window: IntensityWindow | None) -> LazyImage:
    """Open a JPEG; Pillow reads those of other colors than gray and YCbCr, and those that libjpeg-turbo finds fault with."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        colors = ""
    if colors not in ("YCbCr", "Gray") or channels not in (1, 3):
        return open_with_pillow(data, channels, window)
    check_pixel_count(height, width)
    return LazyJpeg(data, channels, height, width, "JPEG L" if colors == "Gray" else "JPEG RGB")


class LazyJpeg(LazyImage):
    """A JPEG with 8 bits a channel, gray or YCbCr: libjpeg-turbo decodes it when a box is read, as small as will do.

    Pillow reads those that libjpeg-turbo finds fault with, so what is bad and why is one decoder's judgment.
    """

    def __init__(self, data: bytes, channels: int, height: int, width: int, kind: str) -> None:
        self.data, self.channels, self.stored_size, self.kind = data, channels, (height, width), kind
        self.orientation = _orientation(data)
        self.size = (width, height) if self.orientation.transpose else (height, width)
        self._decoded: dict[tuple[int, bool], np.ndarray] = {}  # so that student and teacher share it

    def read(self, box: Box | None = None, min_size: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        box = box or Box(0, 0, *self.size)
        stored = self.orientation.stored(box, self.size)
        reduction, fast = 1, False
        if min_size is not None:
            room = min(box.height // min_size[0], box.width // min_size[1])
            reduction = next((r for r in REDUCTIONS if r <= room and not any(edge % r for edge in stored)), 1)
            fast = box.height > min_size[0] and box.width > min_size[1]
        try:
            array = self._decode(reduction, fast)
        except ValueError:
            return open_with_pillow(self.data, self.channels, None).read(box)
        top, left, height, width = (edge // reduction for edge in stored)
        pixels = np.ascontiguousarray(array[top : top + height, left : left + width])
        return self.orientation.upright(torch.from_numpy(pixels).permute(2, 0, 1))

    def _decode(self, reduction: int, fast: bool) -> np.ndarray:
        """The whole image, reduced. `fast` interpolates color roughly, which does not show in smaller pictures."""
        key = reduction, fast
        if key not in self._decoded:
            height, width = (-(-side // reduction) for side in self.stored_size)
            colors = "GRAY" if self.channels == 1 else "RGB"
            self._decoded[key] = simplejpeg.decode_jpeg(
                self.data, colors, fastdct=fast, fastupsample=fast, min_height=height, min_width=width
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
    2: Orientation(False, False, True), 3: Orientation(False, True, True), 4: Orientation(False, True, False),
    5: Orientation(True, False, False), 6: Orientation(True, False, True), 7: Orientation(True, True, True),
    8: Orientation(True, True, False),
}  # fmt: skip


def _orientation(data: bytes) -> Orientation:
    header = data[: data.find(b"\xff\xda")]  # up to the first scan
    if b"Exif\0\0" not in header and b"tiff:Orientation" not in header:  # so it is with most files of a data set
        return UPRIGHT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            return ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1), UPRIGHT)
