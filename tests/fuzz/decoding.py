"""Decode mutated images, in a process of its own: a crash of a decoder must not be the tests'.

    python -m tests.fuzz.decoding MUTATIONS FOLDER

Prints JSON: of each format how many were refused and how many read, the slowest in seconds, the process's peak in bytes.
"""

import io
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage

from mapet.config.shared import ReadOptions
from mapet.data.readers.image import Box, ImageDecodeError
from mapet.data.readers.open import open_image
from tests.fuzz.mutate import mutations

FORMATS = [
    "JPEG", "progressive", "PNG", "palette", "TIFF", "tiles", "WebP", "GIF", "BMP", "PPM", "JPEG2000", "npy", "npz", "DICOM", "RLE",
]  # fmt: skip


def encode(kind: str) -> tuple[str, bytes]:
    """(ending, bytes) of a photo of 40 x 30."""
    from sklearn.datasets import load_sample_image

    pixels = np.ascontiguousarray(load_sample_image("china.jpg")[100:130, 200:240])
    file = io.BytesIO()
    if kind in ("npy", "npz"):
        np.save(file, pixels) if kind == "npy" else np.savez_compressed(file, pixels)
        return f".{kind}", file.getvalue()
    if kind in ("DICOM", "RLE"):
        return ".dcm", dicom(pixels, RLELossless if kind == "RLE" else ExplicitVRLittleEndian)
    if kind == "tiles":
        tifffile.imwrite(file, pixels, tile=(16, 16), compression="deflate", bigtiff=True)
        return ".tif", file.getvalue()
    image = Image.fromarray(pixels)
    options = {"JPEG": {"quality": 90}, "progressive": {"progressive": True}, "TIFF": {"compression": "tiff_lzw"}}
    name = {"progressive": "JPEG", "palette": "PNG"}.get(kind, kind)
    (image.quantize(16) if kind == "palette" else image).save(file, name, **options.get(kind, {}))
    return {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}.get(name, f".{name.lower()}"), file.getvalue()


def dicom(pixels: np.ndarray, syntax: str) -> bytes:
    """A DICOM file of RGB pixels."""
    file, dataset = io.BytesIO(), Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = SecondaryCaptureImageStorage, "1.2.3", "OT"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PlanarConfiguration = *pixels.shape[:2], 3, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PhotometricInterpretation, dataset.PixelData = "RGB", pixels.tobytes()
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax)
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


if __name__ == "__main__":
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    outcomes: dict[str, Counter[str]] = {}
    slowest = 0.0
    for kind in FORMATS:
        ending, data = encode(kind)
        tally = outcomes[kind] = Counter()
        for number, changed in enumerate(mutations(data, count, seed=len(kind))):
            file = folder / f"{number}{ending}"
            file.write_bytes(changed)
            started = time.monotonic()
            try:
                opened = open_image(file, options=ReadOptions(pages="first"))
                height, width = opened.size
                pixels = opened.read(Box(0, 0, height, width), min_size=(8, 8))
                assert pixels.shape[0] == 3 and str(pixels.dtype) == "torch.uint8"
                tally["read"] += 1
            except ImageDecodeError as error:
                assert str(error)
                tally["refused"] += 1
            slowest = max(slowest, time.monotonic() - started)
            file.unlink()
    # getrusage's figure would be that of the process that started this one, if it was larger.
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"outcomes": outcomes, "slowest": slowest, "peak": peak}))
