"""Whatever Pillow knows, decoded in full."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mapet.data.readers.base import BadImage, DecodedImage, ImageFile, Window, check_pixel_count, translate_errors
from mapet.errors import option

EXTENSIONS = (
    ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif",
)  # fmt: skip
TAKES_BYTES = False


def matches(head: bytes, name: str) -> bool:
    return True


@translate_errors()
def open_image(file: ImageFile, channels: int, window: Window | None) -> DecodedImage:
    """Decode an image: EXIF rotation is applied, the first frame of an animation taken, transparency laid on white."""
    if channels not in (1, 3):
        raise BadImage(f"{option('channels')} {channels} needs .npy arrays; pictures give 1 or 3")
    try:
        image, kind = _load(io.BytesIO(file) if isinstance(file, bytes) else file)
    except UnidentifiedImageError:
        raise BadImage("not an image Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from None
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


def _load(file: str | Path | io.BytesIO) -> tuple[Image.Image, str]:
    """Return the upright image, and its format and mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of half the size it refuses, and of odd EXIF
        with Image.open(file) as image:
            check_pixel_count(image.height, image.width)
            kind = f"{image.format} {image.mode}{' animated' if getattr(image, 'is_animated', False) else ''}"
            image.load()
            return ImageOps.exif_transpose(image), kind
