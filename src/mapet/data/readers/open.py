"""Recognize the format of an image file, and open it with the reader of its family."""

import io
import os
import warnings

from PIL import ExifTags, Image

from mapet.config.shared import AS_STORED, ReadOptions
from mapet.data.readers.arrays import open_archive, open_array
from mapet.data.readers.dicom import MAGIC, MAGIC_OFFSET, count_frames, open_dicom
from mapet.data.readers.image import (
    ORIENTATIONS,
    SYSTEM_ERRORS,
    ImageDecodeError,
    ImageFile,
    LazyImage,
    Orientation,
    StoredImage,
    translate_errors,
)  # fmt: skip
from mapet.data.readers.jpeg import open_jpeg
from mapet.data.readers.pillow import FORMATS, check_webp, convert_pillow_image, open_with_pillow
from mapet.data.readers.tiff import count_tiff_pages, open_tiff

JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")
PILLOW_EXTENSIONS = (".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif")
EXTENSIONS = frozenset((".npy", ".npz", ".tif", ".tiff", ".dcm", ".dicom", *JPEG_EXTENSIONS, *PILLOW_EXTENSIONS))
"""Extensions, in lower case, of the files that count as images in folders and archives."""
HEAD_BYTES = 256
"""What is read of a file to recognize its format."""
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF, little and big endian."""


@translate_errors()
def open_image(
    file: ImageFile | Image.Image, channels: int = 3, options: ReadOptions = AS_STORED, page: int | None = None
) -> LazyImage:
    """Open an image file to read 8-bit channels of the upright image.

    The orientation that EXIF or TIFF gives is applied; of an animation the first frame is taken; transparency is laid on white; what is
    stored with 0 as white is inverted; CMYK, palette and other color modes are converted. All else is read as it is stored, or refused.

    The format is recognized by the file's first bytes; only `.npy` also by the path's extension, so that a damaged array is
    reported as one.

    Args:
        file: its path, its bytes, or an image of Pillow of any mode.
        channels: C of the pixels that `LazyImage.read` returns. Files of B bands give B channels, and 1 (gray) or 3 (RGB) as they allow.
        options: which pages and bands to read, and the values that become 0 and 255. Without a range the upper 8 bits of unsigned
            integers of up to 16 bits are taken; other types need one and are refused.
        page: index of the page to read, of a file whose pages are images each; None: `options.pages` decides.

    Returns:
        An image of known size whose pixels `read` returns, any number of times. A JPEG is decoded then only: `read` can fail.

    Raises:
        ImageDecodeError: with the reason: truncated, not an image, no permission, too large, wrong number of channels, values that
            need a range, ...
    """
    if isinstance(file, Image.Image):
        return convert_pillow_image(file, channels, options)
    # Unbuffered: of most formats only the head is read here.
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb", buffering=0) as stream:
        head = stream.read(HEAD_BYTES)
        if not head:
            raise ImageDecodeError("zero bytes")
        if head[MAGIC_OFFSET:].startswith(MAGIC):  # before it there may be anything, even a TIFF's head
            return open_dicom(file, channels, options, page)
        if head.startswith(b"\x93NUMPY") or (not isinstance(file, bytes) and str(file).lower().endswith(".npy")):
            return open_array(file, channels, options)
        if head.startswith(b"PK\x03\x04"):
            return open_archive(file, channels, options)
        if head.startswith(b"\xff\xd8"):
            return open_jpeg(head + stream.read(), channels, options)
        if head.startswith(TIFF_HEADS):
            return open_tiff(file, channels, options, page)
        if head[8:12] == b"WEBP":
            check_webp(head)
        return open_with_pillow(file, channels, options)


def count_pages(file: ImageFile) -> int:
    """Return the number of pages of an image file; frames of an animation are no pages.

    Raises:
        ImageDecodeError: the file cannot be read, with the reason.
    """
    with translate_errors(), io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb", buffering=0) as stream:
        head = stream.read(HEAD_BYTES)
        if head[MAGIC_OFFSET:].startswith(MAGIC):
            return count_frames(file)
        return count_tiff_pages(file) if head.startswith(TIFF_HEADS) else 1


def read_orientation(file: ImageFile) -> StoredImage:
    """Return how an image file is stored, by its EXIF; formats that Pillow does not know, and damaged files, count as upright."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image,
        ):
            return StoredImage(
                ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1), Orientation()), image.size[::-1]
            )
    except Exception:  # of any kind, from a damaged file, which is reported when it is read
        return StoredImage(Orientation(), (0, 0))


def is_image_name(path: str | bytes) -> bool:
    """Return whether a path counts as an image: by its extension or, of a file without one, as scanners write DICOM, by its first bytes."""
    extension = os.path.splitext(os.fsdecode(path))[1].lower()
    if extension:
        return extension in EXTENSIONS
    try:
        with open(path, "rb", buffering=0) as stream:
            return stream.read(MAGIC_OFFSET + len(MAGIC))[MAGIC_OFFSET:] == MAGIC
    except OSError as error:
        if error.errno in SYSTEM_ERRORS:
            raise
        return False
