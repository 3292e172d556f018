"""One image file -> one uint8 tensor, or a `BadImage` that says why not."""

import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".avif",
        ".npy",
    ]
)
MAX_PIXELS = 178_956_970
"""Larger images are refused as decompression bombs (the limit of Pillow, 0.5 GB as RGB)."""


class BadImage(Exception):
    """An image that cannot be used; the message is the reason."""


def read_image(path: Path, channels: int = 3) -> UInt8[Tensor, "C H W"]:
    """Decode an image to `channels` channels of 8 bits, upright.

    EXIF rotation is applied; of an animation the first frame counts; transparency is laid on white; CMYK, palette and
    other modes are converted; 16-bit values keep their upper 8 bits. `.npy` arrays of shape (H, W) or (H, W, C), uint8
    or uint16, carry any number of channels; other formats give 1 (grey) or 3 (RGB).

    Raises:
        BadImage: with the reason: truncated, not an image, no permission, too large, wrong number of channels, ...
    """
    try:
        if path.stat().st_size == 0:
            raise BadImage("zero bytes")
        array = _read_array(path, channels) if path.suffix.lower() == ".npy" else _read_picture(path, channels)
    except BadImage:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "not an image Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadImage(reason) from None
    except PermissionError:
        raise BadImage("no permission to read it") from None
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    except (ValueError, SyntaxError, EOFError, MemoryError, ArithmeticError, LookupError, TypeError) as error:
        # What Pillow's and NumPy's parsers raise on damaged files, besides OSError.
        raise BadImage(f"damaged: {error}") from None
    return torch.from_numpy(np.array(array, copy=True)).permute(2, 0, 1)


def _read_picture(path: Path, channels: int) -> np.ndarray:
    if channels not in (1, 3):
        raise BadImage(f"{channels} channels need .npy arrays; pictures give 1 or 3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of half the size it refuses, and of odd EXIF
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            image.load()
            upright = ImageOps.exif_transpose(image)
    picture = _to_8_bit(upright).convert("L" if channels == 1 else "RGB")
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
            raise BadImage("32-bit integer pixels: convert to 8 or 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("floating-point pixels: convert to 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image


def _read_array(path: Path, channels: int) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise BadImage(f"array of shape {array.shape}, wanted (H, W, {channels})")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise BadImage(f"{array.shape[1]} x {array.shape[0]} pixels are more than {MAX_PIXELS:,}")
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        raise BadImage(f"array of {array.dtype}, wanted uint8 or uint16")
    return array
