"""TIFF by tifffile and imagecodecs: any number of bands, in any layout, of any real type; multi-page, OME, ImageJ and GeoTIFF."""

import io
import logging
from typing import NamedTuple

import numpy as np
from jaxtyping import Num
from tifffile import COMPRESSION, PHOTOMETRIC, TiffFile, TiffFrame, TiffPage, TiffPageSeries

from mapet.config.shared import ReadOptions
from mapet.data.readers.image import (
    ORIENTATIONS,
    DecodedImage,
    ImageDecodeError,
    ImageFile,
    Orientation,
    check_byte_count,
    check_pixel_count,
    choose_page,
)  # fmt: skip
from mapet.data.readers.pillow import open_with_pillow

GDAL_NODATA, ORIENTATION = 42113, 274
"""Tags of the value without data, as text, and of the orientation, by EXIF's numbers."""
ALPHA = {1: "premultiplied", 2: "straight"}
"""Values of ExtraSamples that mean transparency."""
MIN_OPAQUE_OR_CLEAR = 0.5
"""Fraction of pixels that a transparency leaves opaque or clear: GDAL marks any fourth band of 8 bits as one, e.g. near infrared."""
PLAIN_KINDS = ("generic", "uniform", "shaped")
"""Kinds of series in which every page is an image unless it is marked as a reduced copy."""
logging.getLogger("tifffile").setLevel(
    logging.CRITICAL
)  # its warnings about a file repeat the error, or have no effect


class TiffImage(NamedTuple):
    """A page that is an image, and how to read it.

    Attributes:
        page: its tags; those of the first page, if the file writes only these for a stack.
        series: the stack, if it has only one page's tags; else None.
        plane: index in the stack.
    """

    page: TiffPage | TiffFrame
    series: TiffPageSeries | None = None
    plane: int = 0

    def array(self) -> Num[np.ndarray, "..."]:
        """Decode the page."""
        if self.series is None:
            return self.page.asarray(maxworkers=1)
        return self.series.asarray(maxworkers=1).reshape(-1, *self.page.shape)[self.plane]


def list_image_pages(tiff: TiffFile) -> list[TiffImage]:
    """Return the pages that are images of their own: neither reduced copies of others, nor masks of them."""
    image_pages = []
    # tifffile takes pages of falling sizes for the levels of a pyramid; those of slide scanners are, whatever their tags say.
    levels = [level for series in tiff.series for level in (series.levels if series.kind in PLAIN_KINDS else [series])]
    for series in levels:
        if series.keyframe.is_reduced or series.keyframe.is_mask:
            continue
        count = series.size // series.keyframe.size
        pages = [page for page in series.pages if page is not None]
        if len(pages) == count:
            image_pages += [TiffImage(page) for page in pages]
        else:
            image_pages += [TiffImage(series.keyframe, series, index) for index in range(count)]
    return image_pages


def count_tiff_pages(file: ImageFile) -> int:
    """Return the number of pages that are images, at least 1."""
    with TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file) as tiff:
        return max(1, len(list_image_pages(tiff)))


def open_tiff(file: ImageFile, channels: int, options: ReadOptions, page: int | None) -> DecodedImage:
    """Decode a TIFF.

    Args:
        file: its path or its bytes.
        channels: C of the pixels that the image's `read` returns.
        options: pages and bands to read, and the range of values that are not of 8 bits.
        page: index of the page to read; None: `options.pages` decides.

    Returns:
        The image, upright.

    Raises:
        ImageDecodeError: it holds several pages and nothing says which to read, colors that need a conversion, complex numbers, bands or
            values that do not fit the options, or too many pixels.
        Exception: of any kind, from a damaged file.
    """
    with TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file) as tiff:
        image_pages = list_image_pages(tiff)
        if not image_pages:
            raise ImageDecodeError("TIFF without a page")
        index = choose_page(len(image_pages), "page", options, page)
        selected = image_pages if index is None else [image_pages[index]]
        first = selected[0].page.keyframe
        check_pixel_count(first.imagelength, first.imagewidth)
        check_byte_count(first.nbytes * len(selected), "bytes of pixels")
        if first.dtype is None or first.dtype.kind not in "buif":
            kind = first.dtype or f"samples of {first.bitspersample} bits"
            raise ImageDecodeError(f"TIFF of {kind}, expected real numbers: save e.g. magnitude and phase as two bands")
        if (
            first.photometric in (PHOTOMETRIC.SEPARATED, PHOTOMETRIC.YCBCR)
            and first.compression != COMPRESSION.JPEG
            and len(selected) == 1
        ):
            return open_with_pillow(file, channels, options)  # inks, and subsampled colors, that Pillow converts
        if first.photometric > PHOTOMETRIC.PALETTE and first.photometric != PHOTOMETRIC.YCBCR:
            raise ImageDecodeError(f"TIFF of {PHOTOMETRIC(first.photometric).name} colors: convert it to RGB")
        if any(item.page.keyframe.shape != first.shape for item in selected):
            raise ImageDecodeError(f"{len(selected)} pages of several sizes: {options.pages} needs pages of one size")
        arrays = [_bands_last(item.array(), first) for item in selected]
    return _make_image(np.concatenate(arrays, axis=2), first, len(selected) > 1, channels, options)


def _bands_last(array: Num[np.ndarray, "..."], page: TiffPage) -> Num[np.ndarray, "H W B"]:
    """Return a page's array as (H, W, B), a palette's indices as its colors.

    Raises:
        ImageDecodeError: it has further axes, such as depth.
    """
    axes = page.axes
    if "".join(sorted(axes)) not in ("XY", "SXY"):
        raise ImageDecodeError(
            f"TIFF with the axes {axes}, {' x '.join(map(str, page.shape))}, expected one plane: save each as a page"
        )
    array = np.moveaxis(array, axes.index("S"), -1) if "S" in axes else array[:, :, None]
    if page.photometric == PHOTOMETRIC.PALETTE:
        return (page.colormap >> 8).astype(np.uint8)[:, array[:, :, 0]].transpose(1, 2, 0)
    return array


def _make_image(
    array: Num[np.ndarray, "H W B"], page: TiffPage, is_stack: bool, channels: int, options: ReadOptions
) -> DecodedImage:
    """Make an image of stored values by what the page's tags say of them.

    Args:
        array: as it is stored.
        page: has the tags.
        is_stack: the bands are pages.
        channels, options: see `open_tiff`.

    Returns:
        The image, upright.
    """
    is_palette = page.photometric == PHOTOMETRIC.PALETTE
    bits = 8 if is_palette else page.bitspersample
    if array.dtype.kind == "b":
        array, bits = array.view(np.uint8), 1
    if page.tags.get(ORIENTATION) is not None:
        array = ORIENTATIONS.get(int(page.tags[ORIENTATION].value), Orientation()).apply(array)
    extra = int(page.extrasamples[-1]) if page.extrasamples and not is_stack else 0
    rgb = page.photometric in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR, PHOTOMETRIC.PALETTE)
    largest = 2**bits - 1 if array.dtype.kind == "u" else 1
    if extra in ALPHA and len(page.extrasamples) == 1:
        last = array[..., -1]
        if np.isin(last, (0, largest)).mean() < MIN_OPAQUE_OR_CLEAR:
            extra = 0
    tag = page.tags.get(GDAL_NODATA)
    nodata = float(tag.value.strip("\0 ")) if tag is not None else None
    if (
        nodata is not None
        and array.dtype.kind != "f"
        and not (np.iinfo(array.dtype).min <= nodata <= np.iinfo(array.dtype).max)
    ):
        nodata = None  # a value that none can have
    bands = f", {array.shape[2]} bands" if array.shape[2] > 1 else ""
    return DecodedImage(
        array, f"TIFF {page.photometric.name if is_palette or rgb else array.dtype.name}{bands if not rgb else ''}", channels, options,
        bits=bits if array.dtype.kind == "u" else None, rgb=rgb and not is_stack, alpha=ALPHA.get(extra),  # type: ignore[arg-type]
        inverted=page.photometric == PHOTOMETRIC.MINISWHITE, nodata=None if nodata is None or np.isnan(nodata) else nodata,
    )  # fmt: skip
