"""DICOM by pydicom (extra `medical`): physical values of a frame; no attribute of patient, institution or physician is kept."""

import io
import warnings
import zlib
from typing import Any

import numpy as np

from mapet.config.shared import ReadOptions
from mapet.data.readers.image import (
    DecodedImage,
    ImageDecodeError,
    ImageFile,
    check_byte_count,
    check_pixel_count,
    choose_page,
)
from mapet.errors import first_line, install_hint

MAGIC_OFFSET, MAGIC = 128, b"DICM"
"""Where a DICOM file says that it is one, and how."""
DEFLATED = "1.2.840.10008.1.2.1.99"
"""Transfer syntax of a data set that is compressed as a whole."""
BLOCK_BYTES = 1 << 20
GRAY = ("MONOCHROME1", "MONOCHROME2")


def _read(file: ImageFile, stop_before_pixels: bool = False) -> Any:
    """Return the data set of a DICOM file that holds pixels.

    Raises:
        ImageDecodeError: pydicom is not installed, or the file holds no image.
        Exception: of any kind, from a damaged file.
    """
    try:
        import pydicom
    except ImportError:
        raise ImageDecodeError(f"a DICOM file, which needs pydicom: {install_hint('medical')}") from None
    with warnings.catch_warnings(action="ignore"):  # of odd values in attributes
        _check_deflated(pydicom, file)
        dataset = pydicom.dcmread(
            io.BytesIO(file) if isinstance(file, bytes) else file, stop_before_pixels=stop_before_pixels
        )
        if "Rows" not in dataset or "Columns" not in dataset:
            raise ImageDecodeError(f"DICOM without an image ({dataset.get('Modality', 'no modality')})")
        return dataset


def _check_deflated(pydicom: Any, file: ImageFile) -> None:
    """Raise ImageDecodeError if a file whose data set is compressed as a whole would become larger than `limits` allow."""
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as stream:
        pydicom.filereader.read_preamble(stream, force=False)
        if pydicom.filereader._read_file_meta_info(stream).get("TransferSyntaxUID") != DEFLATED:
            return
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        count, data = 0, stream.read(BLOCK_BYTES)
        while data and not inflate.eof:
            count += len(inflate.decompress(data, BLOCK_BYTES))
            check_byte_count(count, "bytes when inflated")
            data = inflate.unconsumed_tail or stream.read(BLOCK_BYTES)


def count_frames(file: ImageFile) -> int:
    """Return the number of frames of a DICOM file; see `_read` for errors."""
    return max(1, int(_read(file, stop_before_pixels=True).get("NumberOfFrames", 1) or 1))


def open_dicom(file: ImageFile, channels: int, options: ReadOptions, page: int | None) -> DecodedImage:
    """Decode a frame of a DICOM file, or all as bands, into physical values (DICOM PS3.3, C.11.1): Hounsfield units of a CT, say.

    Modality LUT or rescale slope and intercept are applied; pixels of PixelPaddingValue hold no data; MONOCHROME1 is inverted; palettes and
    YBR become RGB. The windows in the file are not applied, as each file may have its own: `value_range` is one window for all.

    Args:
        file: its path or its bytes.
        channels: C of the pixels that the image's `read` returns.
        options: frames (`pages`) and bands to read, and the range of physical values that are not of 8 bits.
        page: index of the frame; None: `options.pages` decides.

    Returns:
        The image, with physical values.

    Raises:
        ImageDecodeError: several frames and nothing says which, pixels that no installed plugin decodes, bands or values that do not fit the
            options; without a range, the message names the window of the file.
        Exception: of any kind, from a damaged file.
    """
    dataset = _read(file)
    from pydicom import pixels

    photometric, modality = str(dataset.PhotometricInterpretation), str(dataset.get("Modality", ""))
    check_pixel_count(dataset.Rows, dataset.Columns)
    count = max(1, int(dataset.get("NumberOfFrames", 1) or 1))
    index = choose_page(count, "frame", options, page)
    num_values = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * (count if index is None else 1)
    check_byte_count(num_values * -(-dataset.BitsAllocated // 8), "bytes of pixels")
    with warnings.catch_warnings(action="ignore"):
        try:
            stored = pixels.pixel_array(dataset, index=index)  # YBR becomes RGB
        except (RuntimeError, NotImplementedError) as error:
            syntax = dataset.file_meta.TransferSyntaxUID.name
            raise ImageDecodeError(
                f"DICOM of {syntax}, which no installed plugin decodes: {first_line(error)}"
            ) from None
        if photometric == "PALETTE COLOR":
            lookup = pixels.apply_color_lut(stored, dataset)
            stored = lookup if lookup.dtype == np.uint8 else (lookup >> 8).astype(np.uint8)
        nodata = _read_padding(dataset) if photometric in GRAY else None
        has_lut = "ModalityLUTSequence" in dataset
        slope, intercept = (
            float(dataset.get(name, default)) for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
        is_rescaled = photometric in GRAY and (has_lut or (slope, intercept) != (1, 0))
        values = pixels.apply_modality_lut(stored, dataset) if is_rescaled else stored
    if nodata is not None and is_rescaled:
        values, nodata = np.where(stored == nodata, np.nan, values), None
    if photometric in GRAY:
        values = values[..., None] if index is not None else np.moveaxis(values, 0, -1)
    is_unsigned = values.dtype.kind == "u"
    try:
        image = DecodedImage(
            np.ascontiguousarray(values), f"DICOM {modality} {values.dtype.name}", channels, options, nodata=nodata,
            bits=int(dataset.BitsStored) if is_unsigned and photometric in GRAY else None, rgb=photometric not in GRAY,
            inverted=photometric == "MONOCHROME1",
        )  # fmt: skip
    except ImageDecodeError as error:
        raise ImageDecodeError(f"{error}{_describe_window(dataset)}") from None
    image.windowed = True  # so that `prepare` copies no file with what it says of the patient
    return image


def _read_padding(dataset: Any) -> float | None:
    """Return the stored value of pixels without data, with the sign of the pixels; None: there is none."""
    value = dataset.get("PixelPaddingValue")
    if value is None or "PixelPaddingRangeLimit" in dataset:
        return None
    bits = int(dataset.BitsAllocated)
    value = int(value) % 2**bits  # some writers give it the other sign
    return value - 2**bits if dataset.PixelRepresentation and value >= 2 ** (bits - 1) else value


def _describe_window(dataset: Any) -> str:
    """Return '; its own window is --value-range LOW HIGH' of the first window in the file, or ''."""
    if "WindowCenter" not in dataset or "WindowWidth" not in dataset:
        return ""
    center, width = (float(np.atleast_1d(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    return f"; its own window is --value-range {center - width / 2:g} {center + width / 2:g}"
