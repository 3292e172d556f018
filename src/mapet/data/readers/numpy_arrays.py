"""Arrays (H, W) or (H, W, C) of any number of channels, as `numpy.save` writes them."""

import io
import math

import numpy as np

from mapet.data.readers.base import BadImage, DecodedImage, ImageFile, Window, check_pixel_count

EXTENSIONS = (".npy",)
TAKES_BYTES = False


def matches(head: bytes, name: str) -> bool:
    return head.startswith(b"\x93NUMPY") or name.endswith(EXTENSIONS)


def open_image(file: ImageFile, channels: int, window: Window | None) -> DecodedImage:
    """Open an array; of a file on disk, only the box that is asked for is read."""
    array = _view(file) if isinstance(file, bytes) else np.load(file, mmap_mode="r", allow_pickle=False)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise BadImage(f"array of shape {array.shape}, wanted (H, W, {channels})")
    check_pixel_count(*array.shape[:2])
    if array.dtype.kind not in "uif":
        raise BadImage(f"array of {array.dtype}, wanted numbers")
    return DecodedImage(array, f"NPY {array.dtype.name}", window)


def _view(data: bytes) -> np.ndarray:
    """View bytes as an array, without a copy: `np.load` would first take the memory that their header asks for."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise BadImage("array of Python objects")
    return np.frombuffer(data, dtype, math.prod(shape), stream.tell()).reshape(shape, order="F" if fortran else "C")
