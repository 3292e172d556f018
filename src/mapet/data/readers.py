"""Read one image file as uint8 pixels of any box of it, or raise an `ImageDecodeError` with the reason.

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
"""Extensions, in lower case, of the files that count as images in folders and archives."""
HEAD_BYTES = 256
"""What is read of a file to recognize its format."""
MAX_PIXELS = 178_956_970
"""Larger images are refused as decompression bombs (the limit of Pillow, 0.5 GB as RGB)."""
MAX_BYTES = 4 << 30
"""Larger files are refused: they would be read into memory to find out what they are."""
REDUCTIONS = (8, 4, 2)
"""Factors by which a JPEG can be reduced while it is decoded. libjpeg-turbo knows other eighths too, but has fast code
for these only: at 5/8 it takes longer than at full size."""


class ImageDecodeError(Exception):
    """An image that cannot be read; the message is the reason, e.g. 'zero bytes'."""


class Box(NamedTuple):
    """A rectangle of the upright image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


class IntensityWindow(NamedTuple):
    """Values that become 0 and 255 of 8 bits, as in radiology: linear between, clipped beyond; NaN becomes 0."""

    low: float
    high: float

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Map an array of any real numeric type to a new uint8 array of the same shape.

        Values up to `low`, and NaN, become 0; values from `high` on become 255; between, they are scaled linearly and rounded.
        """
        floats = values.astype(np.promote_types(values.dtype, np.float32))
        scaled = ((floats - self.low) * (255 / (self.high - self.low))).clip(0, 255)
        return np.nan_to_num(scaled).round().astype(np.uint8)


class LazyImage(ABC):
    """An open image: its size and kind are known, its pixels may still be encoded.

    Attributes:
        size: height and width of the upright image, pixels.
        kind: format and mode, e.g. 'JPEG RGB'.
        windowed: whether an `IntensityWindow` maps its values, so that `read` gives others than those stored.
    """

    size: tuple[int, int]
    kind: str
    windowed = False

    @abstractmethod
    def read(self, box: Box | None = None, min_size: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        """Read the pixels of a box.

        Args:
            box: rectangle inside the upright image, in its full-size pixels; None: the whole image.
            min_size: height and width that the caller will resize the box to. The pixels may then come reduced by a
                factor of `REDUCTIONS`, but no smaller than this; they show exactly the same box. None: not reduced.

        Returns:
            The pixels, which the caller may change; C is the `channels` that the image was opened with.

        Raises:
            ImageDecodeError: with the reason why the image cannot be read.
        """


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn any Exception that a decoder raises in the context into an `ImageDecodeError` whose message is the reason.

    An `ImageDecodeError` passes unchanged. An OSError's reason is the system's text, e.g. 'No such file or directory'; every
    other exception counts as damage of the file.
    """
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


@translate_errors()
def open_image(
    file: ImageFile | Image.Image, channels: int = 3, window: IntensityWindow | None = None
) -> LazyImage:  # fmt: skip
    """Open an image file to read 8-bit channels of the upright image.

    EXIF rotation is applied; of an animation the first frame is taken; transparency is laid on white; CMYK, palette and
    other modes are converted.

    The format is recognized by the file's first bytes; only `.npy` also by the path's extension, so that a damaged array is
    reported as one.

    Args:
        file: its path, its bytes, or an image of Pillow of any mode.
        channels: C of the pixels that `LazyImage.read` returns: 1 (gray) or 3 (RGB). Only `.npy` arrays may have other numbers;
            an array of shape (H, W) has 1 channel, and an array of another number than this is refused.
        window: maps all values but uint8 linearly to 8 bits. None: of uint16 the upper 8 bits are taken; all other types need a window
            and are refused.

    Returns:
        An image of known size whose pixels `read` returns, any number of times. A JPEG is decoded then only: `read` can fail.

    Raises:
        ImageDecodeError: with the reason: truncated, not an image, no permission, too large, wrong number of channels, values that
            need a window, ...
    """
    if isinstance(file, Image.Image):
        return convert_pillow_image(file, channels, window)
    # Unbuffered: of most formats only the head is read here.
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb", buffering=0) as stream:
        head = stream.read(HEAD_BYTES)
        if not head:
            raise ImageDecodeError("zero bytes")
        if head.startswith(b"\x93NUMPY") or (not isinstance(file, bytes) and str(file).lower().endswith(".npy")):
            return open_array(file, channels, window)
        if head.startswith(b"\xff\xd8"):
            return open_jpeg(head + stream.read(), channels, window)
        return open_with_pillow(file, channels, window)


def check_pixel_count(height: int, width: int) -> None:
    """Raise ImageDecodeError if an image has more than `MAX_PIXELS`."""
    if height * width > MAX_PIXELS:
        raise ImageDecodeError(f"{width} x {height} pixels, more than the {MAX_PIXELS:,} pixels that mapet reads")


class DecodedImage(LazyImage):
    """An image whose pixels are decoded already.

    Attributes:
        array: (H, W, C) upright pixels.
        window: maps values of another type than uint8 to 8 bits; None: the upper 8 of 16 bits are taken.
        is_deep: whether `array` has another type than uint8.
    """

    def __init__(self, array: np.ndarray, kind: str, window: IntensityWindow | None = None) -> None:
        """Keep the pixels, without a copy.

        Args:
            array: (H, W, C) upright pixels of any real type.
            kind: format and mode, e.g. 'PNG RGB'.
            window: maps values that are not uint8 to 8 bits; None: the upper 8 bits of uint16 are taken.

        Raises:
            ImageDecodeError: the values are neither uint8 nor uint16, and there is no window; it names their range.
        """
        self.array, self.kind, self.size, self.window = array, kind, (array.shape[0], array.shape[1]), window
        self.is_deep = array.dtype != np.uint8
        self.windowed = window is not None and self.is_deep
        if window is None and self.is_deep and (array.dtype.kind, array.dtype.itemsize) != ("u", 2):
            values = array[np.isfinite(array)]
            found = f"{values.min():g} to {values.max():g}" if values.size else "all NaN or Inf"
            raise ImageDecodeError(
                f"{array.dtype.name} pixels ({found}), expected uint8 or uint16: `mapet prepare --value-range LOW HIGH` maps them to 8 bits"
            )

    def read(self, box: Box | None = None, min_size: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        """Return a copy of the pixels of a box as 8 bits, never reduced.

        Values of another type than uint8 are mapped by the window; without one they are uint16, whose upper 8 bits are taken.

        Args:
            box: rectangle inside the image, pixels; None: the whole image.
            min_size: not used, as the pixels are decoded already; see `LazyImage.read`.
        """
        top, left, height, width = box or Box(0, 0, *self.size)
        pixels = self.array[top : top + height, left : left + width]
        if self.is_deep:
            pixels = self.window.apply(pixels) if self.window else pixels >> 8
        return torch.from_numpy(pixels.astype(np.uint8, order="C")).permute(2, 0, 1)


# ---- arrays (H, W) or (H, W, C) of any number of channels, as `numpy.save` writes them


def open_array(file: ImageFile, channels: int, window: IntensityWindow | None) -> DecodedImage:
    """Open an `.npy` array of shape (H, W) or (H, W, C).

    A file on disk is mapped into memory, so only the boxes that `read` is called with are read from it.

    Args:
        file: its path or its bytes.
        channels: C that the array must have; (H, W) counts as C = 1.
        window: maps values that are not uint8 linearly to 8 bits; None: of uint16 the upper 8 bits are taken.

    Returns:
        An image whose values `read` maps to 8 bits.

    Raises:
        ImageDecodeError: the array has another shape, another number of channels, no pixels or too many, or no real numbers; or its
            values are neither uint8 nor uint16, and there is no window.
        Exception: of any kind, from a damaged file; the caller's `translate_errors` turns it into an ImageDecodeError.
    """
    array = _array_from_bytes(file) if isinstance(file, bytes) else np.load(file, mmap_mode="r", allow_pickle=False)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise ImageDecodeError(f"array of shape {array.shape}, expected (H, W, {channels})")
    check_pixel_count(*array.shape[:2])
    if array.dtype.kind not in "uif":
        raise ImageDecodeError(f"array of {array.dtype}, expected integers or floating-point numbers")
    return DecodedImage(array, f"NPY {array.dtype.name}", window)


def _array_from_bytes(data: bytes) -> np.ndarray:
    """View the bytes of an .npy file as a read-only array, without a copy.

    `np.load` would first allocate as much memory as the header says the array needs, however few bytes follow it.

    Args:
        data: content of the file, header included. Bytes after the array are ignored.

    Raises:
        ImageDecodeError: its elements are Python objects.
        ValueError: the header is damaged, or fewer bytes follow the header than the array needs.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise ImageDecodeError("array of Python objects, expected integers or floating-point numbers")
    return np.frombuffer(data, dtype, math.prod(shape), stream.tell()).reshape(shape, order="F" if fortran else "C")


# ---- whatever Pillow knows, decoded in full


@translate_errors()
def open_with_pillow(file: ImageFile, channels: int, window: IntensityWindow | None) -> DecodedImage:
    """Decode an image file in full with Pillow; see `convert_pillow_image`.

    Args:
        file: its path or its bytes.
        channels: C of the pixels, 1 (gray) or 3 (RGB).
        window: maps gray values of more than 8 bits to 8 bits.

    Raises:
        ImageDecodeError: with the reason: other `channels`, Pillow does not know the format, the file is damaged or too large, its
            values need a window, ...
    """
    _check_pillow_channels(channels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns from half the size that it refuses, and about odd EXIF
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as stored:
                check_pixel_count(stored.height, stored.width)
                return convert_pillow_image(stored, channels, window)
    except UnidentifiedImageError:
        raise ImageDecodeError("not an image, or of a format that Pillow does not read") from None
    except Image.DecompressionBombError as error:
        raise ImageDecodeError(f"too many pixels: {error}") from None


def _check_pillow_channels(channels: int) -> None:
    """Raise ImageDecodeError if Pillow's images cannot be converted to this number of channels."""
    if channels not in (1, 3):
        raise ImageDecodeError(f"{option('channels')} {channels} needs .npy arrays; other formats give 1 or 3")


def convert_pillow_image(stored: Image.Image, channels: int, window: IntensityWindow | None) -> DecodedImage:
    """Convert an image of Pillow, of any mode: EXIF rotation applied, present frame of an animation, transparency laid on white.

    Gray images of more than 8 bits (16 or 32, integers or floating point) keep their values, which `DecodedImage.read` maps to 8 bits;
    all others become 8-bit gray or RGB.

    Args:
        stored: the image, which may still be encoded; it is not changed.
        channels: C of the pixels, 1 (gray) or 3 (RGB): gray is repeated 3 times, colors are converted to gray.
        window: maps gray values of more than 8 bits to 8 bits. None: integers from 0 to 65535 count as uint16, of which the upper 8 bits
            are taken; other values need a window.

    Raises:
        ImageDecodeError: other `channels`, or values that need a window.
        Exception: of any kind, from a damaged file; the caller's `translate_errors` turns it into an ImageDecodeError.
    """
    _check_pillow_channels(channels)
    kind = f"{stored.format} {stored.mode}{' animated' if getattr(stored, 'is_animated', False) else ''}"
    stored.load()
    image = ImageOps.exif_transpose(stored)
    if image.mode.startswith(("I", "F")):  # gray, of more than 8 bits
        values = np.asarray(image)
        # Pillow widens 16 bits to 32 in some formats and modes: without a window their upper 8 bits are taken, too.
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
    """Open a JPEG without decoding it, if it is gray or YCbCr; otherwise (e.g. CMYK), and if its header is damaged, decode it with Pillow.

    Args:
        data: the file's bytes.
        channels: C of the pixels to return, 1 (gray) or 3 (RGB), whatever the file holds.
        window: passed on to `open_with_pillow`; the JPEGs that are opened without decoding have 8 bits and need none.

    Returns:
        A `LazyJpeg`, whose `read` decodes and may fail, or an image that Pillow has decoded.

    Raises:
        ImageDecodeError: the JPEG has too many pixels, Pillow cannot decode it, or `channels` is neither 1 nor 3.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        colors = ""
    if colors not in ("YCbCr", "Gray") or channels not in (1, 3):
        return open_with_pillow(data, channels, window)
    check_pixel_count(height, width)
    return LazyJpeg(data, channels, height, width, "JPEG L" if colors == "Gray" else "JPEG RGB")


class LazyJpeg(LazyImage):
    """A JPEG with 8 bits per channel, gray or YCbCr: libjpeg-turbo decodes it when a box is read, reduced as far as possible.

    A file that libjpeg-turbo refuses or warns about is decoded by Pillow instead, so one decoder alone, Pillow, decides which
    files are unreadable and why.

    Attributes:
        data: the file's bytes.
        channels: C of the pixels that `read` returns, 1 (gray) or 3 (RGB), whatever the file holds.
        stored_size: height and width before EXIF rotation, pixels; `size` is that after it.
        orientation: what EXIF rotation does to the stored pixels.
    """

    def __init__(self, data: bytes, channels: int, height: int, width: int, kind: str) -> None:
        """Keep the bytes of a JPEG, and look up its EXIF rotation; nothing is decoded yet.

        Args:
            data: the file's bytes.
            channels: C of the pixels to return, 1 (gray) or 3 (RGB).
            height, width: size in the header, before EXIF rotation, pixels.
            kind: format and mode, 'JPEG L' or 'JPEG RGB'.
        """
        self.data, self.channels, self.stored_size, self.kind = data, channels, (height, width), kind
        self.orientation = _read_orientation(data)
        self.size = (width, height) if self.orientation.transpose else (height, width)
        self._decoded: dict[int, np.ndarray] = {}  # reduction -> pixels: a view may be read at two sizes

    def read(self, box: Box | None = None, min_size: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        """Decode the JPEG and return the pixels of a box of the upright image, reduced r = 8, 4, 2 or 1 times.

        While it decodes, libjpeg-turbo can make an image r times smaller on each side, which takes less time than decoding all
        pixels. The largest r is used for which the reduced box is no smaller than `min_size` and has no edge inside a pixel of
        the reduced image. The decoded image is kept, so another box, or the same one at another size, may cost no decoding.

        Args:
            box: rectangle inside the upright image (after EXIF rotation), in its full-size pixels; None: the whole image.
            min_size: height and width, pixels, that the caller will resize the box to. None: r = 1, exact pixels.

        Returns:
            A copy of the pixels, (C, box.height / r, box.width / r): C is `channels`. If libjpeg-turbo refuses the data, Pillow decodes
            them, and r = 1.

        Raises:
            ImageDecodeError: neither libjpeg-turbo nor Pillow can decode the data.
        """
        box = box or Box(0, 0, *self.size)
        reduction = 1
        if min_size is not None:
            max_reduction = min(box.height // min_size[0], box.width // min_size[1])
            # A pixel of the reduced image is a block of r x r stored pixels, counted from the stored top left corner. So r must
            # divide the box's edges and, as a flip makes the last row (column) the first, each side that the rotation flips.
            flips = self.orientation.flip_rows, self.orientation.flip_columns
            flipped_sides = [side * flip for side, flip in zip(self.size, flips, strict=True)]  # 0: not flipped
            exact = [r for r in REDUCTIONS if not any(edge % r for edge in (*box, *flipped_sides))]
            reduction = next((r for r in exact if r <= max_reduction), 1)
        try:
            upright = self.orientation.apply(self._decode(reduction))
        except ValueError:  # libjpeg-turbo refuses the file: Pillow may still decode it
            return open_with_pillow(self.data, self.channels, None).read(box)
        top, left, height, width = (edge // reduction for edge in box)
        pixels = upright[top : top + height, left : left + width].copy()
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _decode(self, reduction: int) -> UInt8[np.ndarray, "h w C"]:
        """Decode the whole image as it is stored, before EXIF rotation, or return it if it was decoded so before.

        libjpeg-turbo's fast inverse DCT and color upsampling are not used: they are a tenth faster, but darken images by 0.8 of 255.

        Args:
            reduction: how many times smaller each side becomes, rounded up to whole pixels; 1 or one of `REDUCTIONS`.

        Returns:
            The pixels, which `_decoded` keeps and the caller must not change; C is `channels`.

        Raises:
            ValueError: libjpeg-turbo finds the data damaged.
        """
        if reduction not in self._decoded:
            height, width = (-(-side // reduction) for side in self.stored_size)
            colors = "GRAY" if self.channels == 1 else "RGB"
            self._decoded[reduction] = simplejpeg.decode_jpeg(self.data, colors, min_height=height, min_width=width)
        return self._decoded[reduction]


class Orientation(NamedTuple):
    """How stored pixels become upright: rows and columns are exchanged, then rows reversed, then columns reversed."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, stored: UInt8[np.ndarray, "h w C"]) -> UInt8[np.ndarray, "H W C"]:
        """Return an upright view of stored pixels, without a copy; height and width are exchanged if `transpose` is set."""
        upright = stored.transpose(1, 0, 2) if self.transpose else stored
        return upright[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


ORIENTATIONS = {  # by EXIF's number
    2: Orientation(False, False, True), 3: Orientation(False, True, True), 4: Orientation(False, True, False),
    5: Orientation(True, False, False), 6: Orientation(True, False, True), 7: Orientation(True, True, True),
    8: Orientation(True, True, False),
}  # fmt: skip


def _read_orientation(data: bytes) -> Orientation:
    """Return what turns a JPEG's stored pixels upright, by the orientation in its EXIF or XMP data; nothing if it has none.

    Args:
        data: the file's bytes.

    Raises:
        Exception: of any kind, from Pillow on a damaged file; `translate_errors` around `open_image` makes it an ImageDecodeError.
    """
    header = data[: data.find(b"\xff\xda")]  # up to the marker of the first scan, where the pixels begin
    if b"Exif\0\0" not in header and b"tiff:Orientation" not in header:  # most files of a data set have neither
        return Orientation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            return ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1), Orientation())
