"""An open image: what it holds, and its pixels as 8-bit channels; what every reader of a format makes.

A reader that cannot give the pixels as they are stored must raise: an image is never misread silently.
"""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Num, UInt8
from torch import Tensor

from mapet.config.limits import limits
from mapet.config.shared import AS_STORED, ReadOptions
from mapet.errors import MapetError, os_error_hint, pluralize

ImageFile = str | Path | bytes
"""A path, or the bytes of a file."""
_SYSTEM_ERRORS = """EMFILE ENFILE ENOSPC EDQUOT ENOMEM EIO ESTALE ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET
ECONNRESET ECONNABORTED ECONNREFUSED ENOTCONN EREMOTEIO"""
SYSTEM_ERRORS = frozenset(getattr(errno, name) for name in _SYSTEM_ERRORS.split() if hasattr(errno, name))
"""Errors of the system or a share, which are not the image's fault: it may well be readable later."""
REDUCTIONS = (8, 4, 2)
"""Factors by which a JPEG can be reduced while it is decoded. libjpeg-turbo knows other eighths too, but has fast code
for these only: at 5/8 it takes longer than at full size."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in gray (ITU-R BT.601), as in Pillow."""


class ImageDecodeError(Exception):
    """An image that cannot be read; the message is the reason, e.g. 'zero bytes', with options as flags: files keep it."""


class Box(NamedTuple):
    """A rectangle of the upright image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


class LazyImage(ABC):
    """An open image: what it holds is known, its pixels may still be encoded.

    Attributes:
        size: height and width of the upright image, pixels.
        kind: format and mode, e.g. 'JPEG RGB' or 'TIFF uint16, 4 bands'.
        bands: number of bands that are stored, of the page or pages that are read.
        dtype: NumPy's name of the type of the stored values.
        windowed: whether `read` gives other values than a file with 8 bits would hold: mapped, inverted or selected ones.
    """

    size: tuple[int, int]
    kind: str
    bands: int
    dtype = "uint8"
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

    An `ImageDecodeError` or MapetError passes unchanged. An OSError's reason is the system's text, e.g. 'No such file or directory';
    every other exception counts as damage of the file.

    Raises:
        ImageDecodeError: see above.
        MapetError: an error of `SYSTEM_ERRORS`, which says nothing of the file.
    """
    try:
        yield
    except (ImageDecodeError, MapetError):
        raise
    except PermissionError:
        raise ImageDecodeError("no permission to read it") from None
    except OSError as error:
        if error.errno in SYSTEM_ERRORS:
            name, what = f" {os.fsdecode(error.filename)}" if error.filename else "", error.strerror or error
            hint = os_error_hint(error.errno) or ": nothing is wrong with the image; correct that and resume"
            raise MapetError(f"cannot read an image{name} ({what}){hint}") from None
        raise ImageDecodeError(error.strerror or str(error)) from None
    except MemoryError:
        raise ImageDecodeError("more memory to decode it than is free") from None
    except Exception as error:  # parsers raise anything on damaged files (struct, tokenize, recursion, ...)
        raise ImageDecodeError(f"damaged: {error or type(error).__name__}") from None


class Orientation(NamedTuple):
    """How stored pixels become upright: rows and columns are exchanged, then rows reversed, then columns reversed."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, stored: Num[np.ndarray, "h w ..."]) -> Num[np.ndarray, "H W ..."]:
        """Return an upright view of stored pixels, without a copy; height and width are exchanged if `transpose` is set."""
        upright = stored.swapaxes(0, 1) if self.transpose else stored
        return upright[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


ORIENTATIONS = {  # by the value of EXIF's tag
    2: Orientation(False, False, True), 3: Orientation(False, True, True), 4: Orientation(False, True, False),
    5: Orientation(True, False, False), 6: Orientation(True, False, True), 7: Orientation(True, True, True),
    8: Orientation(True, True, False),
}  # fmt: skip


class StoredImage(NamedTuple):
    """How an image file is stored.

    Attributes:
        turn: what makes it upright.
        size: height and width before that, pixels.
    """

    turn: Orientation
    size: tuple[int, int]

    def is_stored_by_size(self, annotated: tuple[int, ...]) -> bool | None:
        """Return whether an annotation of this (height, width) was drawn on the stored image, False if on the upright one, None if unknown."""
        if not self.turn.transpose or self.size[0] == self.size[1]:
            return None
        return {self.size: True, self.size[::-1]: False}.get((annotated[0], annotated[1]))

    def is_as_stored(self, annotated: tuple[int, ...], otherwise: bool) -> bool:
        """Return `is_stored_by_size`, or `otherwise` where that is unknown; False for an image that is upright as stored."""
        is_stored = self.is_stored_by_size(annotated)
        return self.turn != Orientation() and (otherwise if is_stored is None else is_stored)

    def turn_box(self, left: float, top: float, width: float, height: float) -> list[float]:
        """Return [left, top, width, height] in the upright image of a box in the stored one, pixels."""
        rows, columns = self.size
        if self.turn.transpose:
            left, top, width, height, rows, columns = top, left, height, width, columns, rows
        left = columns - left - width if self.turn.flip_columns else left
        return [left, rows - top - height if self.turn.flip_rows else top, width, height]


def check_pixel_count(height: int, width: int) -> None:
    """Raise ImageDecodeError if an image has more pixels than `limits` allow."""
    if height * width > limits().image_pixels:
        raise ImageDecodeError(
            f"{width} x {height} pixels, more than the {limits().image_pixels:,} of --limits.image-pixels"
        )


def check_byte_count(count: int, what: str = "bytes") -> None:
    """Raise ImageDecodeError if an image's file, or its pixels, take more bytes than `limits` allow."""
    if count > limits().image_bytes:
        raise ImageDecodeError(f"{count:,} {what}, more than the {limits().image_bytes:,} of --limits.image-bytes")


def choose_page(count: int, noun: str, options: ReadOptions, page: int | None) -> int | None:
    """Return the index of the page to read of a file that holds several, or None if all are bands of one image.

    Args:
        count: of the pages, at least 1.
        noun: what they are, e.g. 'page' or 'frame'.
        options: `pages` says which to read.
        page: index of the page that an entry of an image list stands for; None: the entry is the file.

    Raises:
        ImageDecodeError: there are several, and nothing says which.
    """
    if count == 1 or options.pages == "first":
        return 0
    if page is not None or options.pages == "bands":
        return page
    raise ImageDecodeError(
        f"{pluralize(count, noun)} in one file: give --pages first, each (every {noun} is an image) or bands ({noun}s are the bands of one image)"
    )


def map_to_uint8(values: Num[np.ndarray, "h w B"], ranges: Num[np.ndarray, "P 2"]) -> UInt8[np.ndarray, "h w C"]:
    """Map values linearly to 8 bits, as a window in radiology: up to LOW 0, from HIGH on 255, rounded between; NaN becomes 0.

    Args:
        values: of any real type.
        ranges: (LOW, HIGH) of each of B bands, or of all; of one band of values, P pairs give P channels.
    """
    floats = values.astype(np.promote_types(values.dtype, np.float32))
    low, high = ranges.T.astype(floats.dtype)
    with np.errstate(invalid="ignore"):  # Inf - Inf
        scaled = ((floats - low) * (255 / (high - low))).clip(0, 255)
    return np.nan_to_num(scaled).round().astype(np.uint8)


class DecodedImage(LazyImage):
    """An image whose pixels are decoded already, of any number of bands and any real type.

    Attributes:
        array: (H, W, B) upright values, as they are stored (physical ones where the format says how to compute them).
        nodata: value of pixels that hold no data, which become 0; None: there is none.
        is_deep: whether the values are not of 8 bits.
    """

    def __init__(
        self, array: Num[np.ndarray, "H W B"], kind: str, channels: int | None = None, options: ReadOptions = AS_STORED, *,
        bits: int | None = None, rgb: bool = False, alpha: Literal["straight", "premultiplied"] | None = None,
        inverted: bool = False, nodata: float | None = None,
    ) -> None:  # fmt: skip
        """Keep the values, without a copy, and check that they can be read as `channels` channels of 8 bits.

        Args:
            array: see the class.
            kind: format and mode, e.g. 'PNG RGB'.
            channels: C of the pixels that `read` returns; None: B. B bands give B channels; one band 1 or 3 equal ones; RGB its gray.
            options: `bands` to select, and `value_range` to map.
            bits: of an unsigned integer that are used, from the lowest; None: all of its type.
            rgb: whether the first bands are red, green and blue.
            alpha: how the last band makes the others transparent; it is then laid on white, but for B channels; None: it does not.
            inverted: 0 is shown white.
            nodata: see the class.

        Raises:
            ImageDecodeError: the bands do not give `channels` channels, or the values need a range; it names the options.
        """
        self.array, self.kind, self.size, self.nodata = array, kind, (array.shape[0], array.shape[1]), nodata
        self.bands, self.dtype = array.shape[2], array.dtype.name
        self.channels = channels or self.bands
        is_unsigned = array.dtype.kind == "u" and array.dtype.itemsize <= 2
        self.bits = bits or 8 * array.dtype.itemsize
        self.is_deep, self.inverted = not (is_unsigned and self.bits <= 8), inverted
        self.ranges = np.array(options.value_range).reshape(-1, 2) if options.value_range and self.is_deep else None
        self.selected = None if options.bands is None else [band - 1 for band in options.bands]
        self.alpha = alpha if self.selected is None and self.channels != self.bands else None
        self.windowed = self.is_deep or inverted or self.selected is not None or nodata is not None or self.bits < 8
        self._check_bands(rgb)
        if self.ranges is None and self.is_deep and not is_unsigned:
            raise ImageDecodeError(
                f"{self.dtype} pixels ({self._describe_values()}), expected uint8 or uint16: --value-range LOW HIGH maps them to 8 bits"
            )

    def _check_bands(self, rgb: bool) -> None:
        """Find out how B bands become C channels.

        Args:
            rgb: whether the first bands are red, green and blue.

        Raises:
            ImageDecodeError: they do not; or a selected band is not there.
        """
        if self.selected is not None and max(self.selected) >= self.bands:
            raise ImageDecodeError(
                f"{pluralize(self.bands, 'band')}, but --bands asks for band {max(self.selected) + 1}"
            )
        num_bands = self.bands if self.selected is None else len(self.selected)
        num_colors = num_bands - (self.alpha is not None)
        self.to_gray = rgb and self.selected is None and self.channels == 1 and num_colors == 3
        if num_colors not in (1 if self.channels in (1, 3) else None, self.channels) and not self.to_gray:
            choice = f"--bands with {self.channels} of them" if num_bands > self.channels else ""
            raise ImageDecodeError(
                f"{pluralize(num_bands, 'band')} of {self.dtype}, read as {pluralize(self.channels, 'channel')}: give "
                + " or ".join(filter(None, [f"--channels {num_bands}", choice]))
            )

    def valid(self, values: Num[np.ndarray, "h w B"]) -> Bool[np.ndarray, "h w B"]:
        """Return which values are neither nodata nor NaN or Inf."""
        valid = np.isfinite(values)
        return valid if self.nodata is None else valid & (values != self.nodata)

    def stored_values(self) -> Num[np.ndarray, "H W B"]:
        """Return the values that a range would map, of the selected bands, without a transparency; those without data are NaN."""
        values = self.array[..., :-1] if self.alpha else self.array
        values = values if self.selected is None else values[..., self.selected]
        return np.where(self.valid(values), values.astype(np.promote_types(values.dtype, np.float32)), np.nan)

    def _describe_values(self) -> str:
        """Return the smallest and the largest value as text, without those that hold no data."""
        values = self.array[self.valid(self.array)]
        return f"{values.min():g} to {values.max():g}" if values.size else "all nodata, NaN or Inf"

    def read(self, box: Box | None = None, min_size: tuple[int, int] | None = None) -> UInt8[Tensor, "C h w"]:
        """Return a copy of the pixels of a box as 8 bits, never reduced.

        With a range, values that are not of 8 bits are mapped by it; else they are unsigned integers, of whose bits the upper 8 are
        taken. Values without data become 0. Transparent pixels are laid on white.

        Args:
            box: rectangle inside the image, pixels; None: the whole image.
            min_size: not used, as the pixels are decoded already; see `LazyImage.read`.
        """
        top, left, height, width = box or Box(0, 0, *self.size)
        values = self.array[top : top + height, left : left + width]
        opacity = None
        if self.alpha:  # of which the full range of the type, or of its bits, is opaque
            largest = 2.0**self.bits - 1 if values.dtype.kind == "u" else 1.0
            values, opacity = values[..., :-1], values[..., -1:] / np.float32(largest)
        if self.selected is not None:
            values = values[..., self.selected]
        pixels = self._to_uint8(values)
        if opacity is not None:
            colors = pixels * (opacity if self.alpha == "straight" else np.float32(1))
            pixels = (colors + 255 * (1 - opacity)).clip(0, 255).round().astype(np.uint8)
        if self.to_gray:
            pixels = (pixels @ LUMA).round().astype(np.uint8)[..., None]
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], self.channels))
        return torch.from_numpy(np.array(pixels, np.uint8, order="C")).permute(2, 0, 1)

    def _to_uint8(self, values: Num[np.ndarray, "h w B"]) -> UInt8[np.ndarray, "h w C"]:
        """Map stored values to 8 bits as they are seen: inverted where 0 is white; 0 without data."""
        if self.ranges is not None:
            pixels = map_to_uint8(values, self.ranges)
        elif self.bits < 8:
            pixels = (values * np.float32(255 / (2**self.bits - 1))).round().astype(np.uint8)
        else:
            pixels = (values >> (self.bits - 8)).astype(np.uint8) if self.is_deep else values
        if self.inverted:
            pixels = 255 - pixels
        return (
            pixels if self.nodata is None and not self.inverted else np.where(self.valid(values), pixels, np.uint8(0))
        )
