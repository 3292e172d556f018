"""Arrays (H, W) or (H, W, C) of any number of channels, as `numpy.save` and `numpy.savez` write them."""

import io
import math
import zipfile

import numpy as np

from mapet.config.shared import ReadOptions
from mapet.data.readers.image import DecodedImage, ImageDecodeError, ImageFile, check_byte_count, check_pixel_count

NUM_NAMES_SHOWN = 5
"""Arrays of an archive that a message names."""


def open_array(file: ImageFile, channels: int, options: ReadOptions) -> DecodedImage:
    """Open an `.npy` array of shape (H, W) or (H, W, C).

    A file on disk is mapped into memory, so only the boxes that `read` is called with are read from it.

    Args:
        file: its path or its bytes.
        channels: C that the array must have, unless `options` select bands; (H, W) counts as C = 1.
        options: bands to select and the range of values that are not of 8 bits.

    Returns:
        An image whose values `read` maps to 8 bits.

    Raises:
        ImageDecodeError: the array has another shape, another number of channels, no pixels or too many, or no real numbers; or its
            values need a range.
        Exception: of any kind, from a damaged file; the caller's `translate_errors` turns it into an ImageDecodeError.
    """
    array = _array_from_bytes(file) if isinstance(file, bytes) else np.load(file, mmap_mode="r", allow_pickle=False)
    return _from_array(array, "NPY", channels, options)


def open_archive(file: ImageFile, channels: int, options: ReadOptions) -> DecodedImage:
    """Open an `.npz` archive that holds one array, as `open_array` does an `.npy` file.

    Raises:
        ImageDecodeError: it holds several arrays, or see `open_array`.
        Exception: of any kind, from a damaged file.
    """
    with zipfile.ZipFile(io.BytesIO(file) if isinstance(file, bytes) else file) as archive:
        names = archive.namelist()
        if len(names) != 1:
            shown = [name.removesuffix(".npy") for name in names[:NUM_NAMES_SHOWN]]
            listed = ", ".join(shown) + (", ..." if len(names) > NUM_NAMES_SHOWN else "")
            raise ImageDecodeError(
                f".npz of {len(names)} arrays ({listed}): save each image as an .npy file (`np.save`)"
            )
        check_byte_count(archive.infolist()[0].file_size, "bytes of pixels")  # zipfile reads no more than that
        return _from_array(_array_from_bytes(archive.read(names[0])), "NPZ", channels, options)


def _from_array(array: np.ndarray, kind: str, channels: int, options: ReadOptions) -> DecodedImage:
    """Make an image of an array of shape (H, W) or (H, W, C).

    Args:
        array: as it is stored.
        kind: format, e.g. 'NPY'.
        channels, options: see `open_array`.

    Returns:
        The image.

    Raises:
        ImageDecodeError: see `open_array`.
    """
    if array.dtype.kind not in "buif":
        raise ImageDecodeError(f"array of {array.dtype}, expected integers or floating-point numbers")
    shape, expected = array.shape, channels if options.bands is None else "C"
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape or (options.bands is None and array.shape[2] != channels):
        is_first = array.ndim == 3 and shape[0] == channels
        hint = "; channels come last: save it after `np.moveaxis(array, 0, -1)`" if is_first else ""
        raise ImageDecodeError(f"array of shape {' x '.join(map(str, shape))}, expected (H, W, {expected}){hint}")
    check_pixel_count(*array.shape[:2])
    is_bool = array.dtype.kind == "b"
    return DecodedImage(
        array.view(np.uint8) if is_bool else array,
        f"{kind} {array.dtype.name}",
        channels,
        options,
        bits=1 if is_bool else None,
    )


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
