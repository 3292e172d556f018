"""An image whose size is known and whose pixels are read on demand, a box at a time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

ImageFile = str | Path | bytes
"""A path, or the bytes of a file."""
MAX_PIXELS = 178_956_970
"""Larger images are refused as decompression bombs (the limit of Pillow, 0.5 GB as RGB)."""
MAX_BYTES = 4 << 30
"""Larger files are refused too: they would be read into memory to find out what they are."""


class BadImage(Exception):
    """An image that cannot be used; the message is the reason."""


class Box(NamedTuple):
    """A part of the upright image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


class Window(NamedTuple):
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
        windowed: whether it is read through a `Window`, so that its pixels are others than those stored.
    """

    size: tuple[int, int]
    kind: str
    windowed = False

    @abstractmethod
    def read(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        """Read the pixels of `box` (all, without one).

        Args:
            at_least: the height and width that will be made of it: with those, the pixels may come reduced by a whole
                factor, to this size or more; the box they show is exactly the same.

        Raises:
            BadImage: with the reason.
        """


class DecodedImage(LazyImage):
    """Pixels that are decoded already: (H, W, C). Without a window the upper 8 of 16 bits count.

    Raises:
        BadImage: values that need a window.
    """

    def __init__(self, array: np.ndarray, kind: str, window: Window | None = None) -> None:
        self.array, self.kind, self.size = array, kind, (array.shape[0], array.shape[1])
        self.window, self.windowed = window, window is not None and self.is_deep
        if window is None and self.is_deep and (array.dtype.kind, array.dtype.itemsize) != ("u", 2):
            values = array[np.isfinite(array)]
            found = f"{values.min():g} to {values.max():g}" if values.size else "none of them finite"
            raise BadImage(
                f"{array.dtype.name} pixels, {found}: `mapet prepare --value-range LOW HIGH` makes 8 bits of them"
            )

    @property
    def is_deep(self) -> bool:
        """Whether its values are others than 8 bits."""
        return self.array.dtype != np.uint8

    def read(self, box: Box | None = None, at_least: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        top, left, height, width = box or Box(0, 0, *self.size)
        pixels = self.array[top : top + height, left : left + width]
        if self.is_deep:
            pixels = self.window.apply(pixels) if self.window else pixels >> 8
        return torch.from_numpy(pixels.astype(np.uint8, order="C")).permute(2, 0, 1)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn whatever a decoder raises into a `BadImage` with the reason."""
    try:
        yield
    except BadImage:
        raise
    except PermissionError:
        raise BadImage("no permission to read it") from None
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    except Exception as error:  # parsers raise anything on damaged files (struct, tokenize, recursion, ...)
        raise BadImage(f"damaged: {error or type(error).__name__}") from None


def check_pixel_count(height: int, width: int) -> None:
    """Raises BadImage for an image of too many pixels."""
    if height * width > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
