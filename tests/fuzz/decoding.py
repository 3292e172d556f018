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
from PIL import Image

from mapet.data.readers.image import Box, ImageDecodeError
from mapet.data.readers.open import open_image
from tests.fuzz.mutate import mutations

FORMATS = ["JPEG", "progressive", "PNG", "palette", "TIFF", "WebP", "GIF", "BMP", "npy"]


def encode(kind: str) -> tuple[str, bytes]:
    """(ending, bytes) of a photo of 40 x 30."""
    from sklearn.datasets import load_sample_image

    pixels = np.ascontiguousarray(load_sample_image("china.jpg")[100:130, 200:240])
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, pixels)
        return ".npy", file.getvalue()
    image = Image.fromarray(pixels)
    options = {"JPEG": {"quality": 90}, "progressive": {"progressive": True}, "TIFF": {"compression": "tiff_lzw"}}
    name = {"progressive": "JPEG", "palette": "PNG"}.get(kind, kind)
    (image.quantize(16) if kind == "palette" else image).save(file, name, **options.get(kind, {}))
    return {"JPEG": ".jpg", "TIFF": ".tif"}.get(name, f".{name.lower()}"), file.getvalue()


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
                opened = open_image(file)
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
