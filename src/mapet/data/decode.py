"""One image file -> uint8 pixels of any box of it, or a `BadImage` that says why not."""

import io
from types import ModuleType

from jaxtyping import UInt8
from torch import Tensor

from mapet.data.readers import jpeg, numpy_arrays, pillow
from mapet.data.readers.base import BadImage, ImageFile, LazyImage, Window, translate_errors

READERS: tuple[ModuleType, ...] = (numpy_arrays, jpeg, pillow)
"""The first that matches a file opens it."""
EXTENSIONS = frozenset(extension for reader in READERS for extension in reader.EXTENSIONS)
HEAD_BYTES = 256


def open_image(file: ImageFile, channels: int = 3, window: Window | None = None) -> LazyImage:
    """Open an image file, or the bytes of one, to read `channels` channels of 8 bits, upright.

    EXIF rotation is applied; of an animation the first frame counts; transparency is laid on white; CMYK, palette and
    other modes are converted. `.npy` arrays of shape (H, W) or (H, W, C) carry any number of channels; other formats give
    1 (gray) or 3 (RGB).

    Args:
        window: what of 16-bit, integer and floating-point values is kept; without one the upper 8 of 16 bits.

    Raises:
        BadImage: with the reason: truncated, not an image, no permission, too large, wrong number of channels, ...
            A JPEG's pixels are not decoded yet: reading them can still fail.
    """
    with translate_errors(), io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb", buffering=0) as stream:
        head = stream.read(HEAD_BYTES)
        if not head:
            raise BadImage("zero bytes")
        name = "" if isinstance(file, bytes) else str(file).lower()
        reader = next(reader for reader in READERS if reader.matches(head, name))
        image: LazyImage = reader.open_image(head + stream.read() if reader.TAKES_BYTES else file, channels, window)
        return image


def read_image(file: ImageFile, channels: int = 3, window: Window | None = None) -> UInt8[Tensor, "C H W"]:
    """Read all of an image's pixels; see `open_image`."""
    return open_image(file, channels, window).read()
