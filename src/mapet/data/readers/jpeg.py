"""JPEG, by libjpeg-turbo: decoded when a box is read, reduced as far as that box allows."""

import io
import warnings

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image
from torch import Tensor

from mapet.config.shared import AS_STORED, ReadOptions
from mapet.data.readers.image import ORIENTATIONS, REDUCTIONS, Box, LazyImage, Orientation, check_pixel_count
from mapet.data.readers.pillow import open_with_pillow


def open_jpeg(data: bytes, channels: int, options: ReadOptions) -> LazyImage:
    """Open a JPEG without decoding it, if it is gray or YCbCr; otherwise (e.g. CMYK), and if its header is damaged, decode it with Pillow.

    Args:
        data: the file's bytes.
        channels: C of the pixels to return, 1 (gray) or 3 (RGB), whatever the file holds.
        options: passed on to `open_with_pillow`, which selects bands; the JPEGs that are opened without decoding have 8 bits.

    Returns:
        A `LazyJpeg`, whose `read` decodes and may fail, or an image that Pillow has decoded.

    Raises:
        ImageDecodeError: the JPEG has too many pixels, Pillow cannot decode it, or it does not have `channels` bands.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        colors = ""
    if colors not in ("YCbCr", "Gray") or channels not in (1, 3) or options.bands is not None:
        return open_with_pillow(data, channels, options)
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
        self.bands = 1 if kind.endswith("L") else 3
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
            return open_with_pillow(self.data, self.channels, AS_STORED).read(box)
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
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1), Orientation())
