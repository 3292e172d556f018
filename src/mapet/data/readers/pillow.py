"""Whatever Pillow knows, decoded in full; and PNG and JPEG 2000 of more than 8 bits, of which Pillow would keep 8."""

import io
import struct
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
from jaxtyping import Num
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mapet.config.limits import limits
from mapet.config.shared import ReadOptions
from mapet.data.readers.image import (
    ORIENTATIONS,
    DecodedImage,
    ImageDecodeError,
    ImageFile,
    Orientation,
    check_byte_count,
    check_pixel_count,
    translate_errors,
)  # fmt: skip

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that Pillow may recognize in a file, whatever its name: it would open others, too (PostScript by starting Ghostscript)."""
PNG_COLORS = (2, 4, 6)
"""Color types of PNG with more than one channel: RGB, gray and alpha, RGBA."""
BYTES_PER_PIXEL = 24
"""Memory that Pillow takes at most for a pixel of 8-bit channels, with its copies (an animated WebP; others take about 10)."""
JP2_START = b"\xff\x4f\xff\x51"
"""Start and size markers of a JPEG 2000 code stream."""


@translate_errors()
def open_with_pillow(file: ImageFile, channels: int, options: ReadOptions) -> DecodedImage:
    """Decode an image file in full; see `convert_pillow_image`. PNG and JPEG 2000 of more than 8 bits keep all of them.

    Args:
        file: its path or its bytes.
        channels: C of the pixels.
        options: bands to select, and the range of values of more than 8 bits.

    Returns:
        The image, upright.

    Raises:
        ImageDecodeError: with the reason: Pillow does not know the format, the file is damaged or too large, other `channels`, values that
            need a range, ...
    """
    if (most := limits().image_bytes // BYTES_PER_PIXEL) > 2 * (Image.MAX_IMAGE_PIXELS or most):
        Image.MAX_IMAGE_PIXELS = most  # Pillow's own check, which by default allows as many as `limits`
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns from half the size that it refuses, and about odd EXIF
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as stored:
                _check_size(stored.height, stored.width)
                values = _decode_deep(file, stored)
                if values is None:
                    return convert_pillow_image(stored, channels, options)
                orientation = ORIENTATIONS.get(stored.getexif().get(ExifTags.Base.Orientation, 1), Orientation())
                num_bands = values.shape[2]
                return DecodedImage(
                    orientation.apply(values), f"{stored.format} {values.dtype.name}", channels, options, rgb=num_bands >= 3,
                    alpha="straight" if num_bands in (2, 4) else None,
                )  # fmt: skip
    except UnidentifiedImageError:
        raise ImageDecodeError("not an image, or of a format that Pillow does not read") from None
    except Image.DecompressionBombError as error:
        raise ImageDecodeError(f"too many pixels: {error}") from None


def _check_size(height: int, width: int) -> None:
    """Raise ImageDecodeError if an image that Pillow decodes is larger than `limits` allow."""
    check_pixel_count(height, width)
    check_byte_count(BYTES_PER_PIXEL * height * width, "bytes to decode")


def check_webp(head: bytes) -> None:
    """Raise ImageDecodeError if a WebP of these first bytes is larger than `limits` allow: Pillow would reserve the memory first."""
    if head[12:16] == b"VP8X":  # 24 bits each, minus 1
        width, height = (int.from_bytes(head[start : start + 3], "little") + 1 for start in (24, 27))
    elif head[12:16] == b"VP8L":  # 14 bits each, minus 1, after a byte of signature
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:  # VP8, after a tag of 3 bytes and 3 of signature: 14 bits each, and 2 of scale
        width, height = (int.from_bytes(head[start : start + 2], "little") & 0x3FFF for start in (26, 28))
    _check_size(height, width)


def convert_pillow_image(stored: Image.Image, channels: int, options: ReadOptions) -> DecodedImage:
    """Convert an image of Pillow, of any mode: EXIF rotation applied, present frame of an animation, transparency laid on white.

    Gray images of more than 8 bits (16 or 32, integers or floating point) keep their values, which `DecodedImage.read` maps to 8 bits.

    Args:
        stored: the image, which may still be encoded; it is not changed.
        channels: C of the pixels: gray is repeated 3 times, colors are converted to gray, other numbers are those stored.
        options: bands to select, and the range of values of more than 8 bits. Without a range, integers from 0 to 65535 count as
            uint16, of which the upper 8 bits are taken; other values need one.

    Returns:
        The image, upright.

    Raises:
        ImageDecodeError: other `channels`, or values that need a range.
        Exception: of any kind, from a damaged file; the caller's `translate_errors` turns it into an ImageDecodeError.
    """
    kind = f"{stored.format} {stored.mode}{' animated' if getattr(stored, 'is_animated', False) else ''}"
    stored.load()
    image = ImageOps.exif_transpose(stored)
    if image.mode.startswith(("I", "F")):  # gray, of more than 8 bits
        values = np.asarray(image)
        # Pillow widens 16 bits to 32 in some formats and modes: without a range their upper 8 bits are taken, too.
        if values.dtype.kind != "f" and values.min(initial=0) >= 0 and values.max(initial=0) <= 65535:
            values = values.astype(np.uint16)
        return DecodedImage(values[:, :, None], kind, channels, options)
    if options.bands is None and channels in (1, 3):
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = image.convert("L" if channels == 1 else "RGB")
    elif image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    pixels = np.asarray(image)
    return DecodedImage(pixels.reshape(image.height, image.width, -1), kind, channels, options)


def _decode_deep(file: ImageFile, image: Image.Image) -> Num[np.ndarray, "H W B"] | None:
    """Decode an image of more than 8 bits of which Pillow would keep only 8; return None if it is none.

    Args:
        file: its path or its bytes.
        image: opened from it, not loaded.

    Raises:
        ImageDecodeError: the format cannot be read with all its bits.
        Exception: of any kind, from a damaged file.
    """
    if image.format not in ("PNG", "JPEG2000", "PPM"):
        return None
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    values = None
    if image.format == "PNG" and data[24] == 16 and data[25] in PNG_COLORS:  # depth and color type of IHDR
        values = imagecodecs.png_decode(data)
    elif image.format == "JPEG2000" and (start := data.find(JP2_START)) >= 0:
        num_bands, depth = struct.unpack_from(">HB", data, start + 40)  # Csiz and the first Ssiz: sign and bits - 1
        if depth > 7 or num_bands > 4:
            values = imagecodecs.jpeg2k_decode(data)
    elif image.format == "PPM" and image.mode == "RGB" and data[:2] == b"P6" and int(data.split(maxsplit=4)[3]) > 255:
        raise ImageDecodeError("PPM of 16 bits, of which 8 would be lost: convert it to PNG or TIFF")
    if values is None:
        return None
    return values[:, :, None] if values.ndim == 2 else values
