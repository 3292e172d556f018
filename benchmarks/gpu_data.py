"""One file for a GPU machine without a network: CIFAR-10, photographs, and the packages of mapet that PyTorch and timm don't bring.

    python -m benchmarks gpu-data --cifar10 cifar10.zip --photos photos.zip

Images of CIFAR-10 lie side by side in one JPEG for each class of train and test: 32 px are whole JPEG blocks, so that neighbors don't
mix, and one header for thousands of images makes the file 3 times smaller than theirs. Packages are wheels for Python 3.12 on Linux
(pip downloads them); what a machine has itself it keeps.
"""

import argparse
import importlib.util
import io
import itertools
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.core import Result
from benchmarks.tables import Table

FILE, MAX_BYTES = Path("gpu_data/gpu.zip"), 30_000_000
PACKAGES = (
    "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "simplejpeg", "jaxtyping", "wadler_lindig",
)  # fmt: skip
SIZE, RANDOM = 32, "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cifar10", type=Path, help="cifar10.zip with train/CLASS/*.jpg and test/CLASS/*.jpg; default: random images"
    )
    parser.add_argument("--photos", type=Path, help="zip of JPEG photographs; default: random ones")
    parser.add_argument("--num-photos", type=int, default=150)
    parser.add_argument("--packages", nargs="*", default=PACKAGES, help="to download as wheels; default: %(default)s")
    parser.add_argument("--out", type=Path, default=FILE, help="file to write, below 30 MB; default: %(default)s")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Option of the benchmarks that read the file."""
    text = "file of gpu-data, or 'random': random images, as a trial; default: %(default)s"
    parser.add_argument("--data", type=Path, default=FILE, help=text)


def run(args: argparse.Namespace) -> Result:
    """Write the file, a row for each part of it."""
    rows = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    parts = {
        "CIFAR-10, classes": cifar10_mosaics(args.cifar10),
        "photographs": photographs(args.photos, args.num_photos),
        "wheels": wheels(args.packages),
    }
    for part, contents in parts.items():
        rows.append({"part": part, "files": len(contents), "MB": sum(map(len, contents.values())) / 1e6})
    write(args.out, {name: content for contents in parts.values() for name, content in contents.items()})
    size = args.out.stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"{args.out} has {size:,} bytes, more than {MAX_BYTES:,}: give fewer --num-photos")
    return Result([*rows, {"part": "file", "files": 1, "MB": size / 1e6}], f"{args.cifar10}, {args.photos}")


def write(file: Path, contents: dict[str, bytes]) -> None:
    """Write a zip of files; JPEGs and wheels are compressed already."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def cifar10_mosaics(file: Path | None) -> dict[str, bytes]:
    """'cifar10/PART-CLASS-COUNT.jpg' -> the images of a class side by side, in the order of their names."""
    groups: dict[tuple[str, str], list[np.ndarray]] = {}
    if file is None:
        rng = np.random.default_rng(0)
        for part, label in itertools.product(("train", "test"), "ab"):
            groups[part, label] = [np.asarray(random_image(rng, (SIZE, SIZE))) for _ in range(24)]
    else:
        with zipfile.ZipFile(file) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
                part, label = name.split("/")[-3:-1]
                pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
                groups.setdefault((part, label), []).append(pixels)
    return {f"cifar10/{part}-{label}-{len(images)}.jpg": mosaic(images) for (part, label), images in groups.items()}


def mosaic(images: list[np.ndarray]) -> bytes:
    """Images in rows of equal length, the last one filled up with black, as a JPEG."""
    columns = math.isqrt(len(images) - 1) + 1
    rows = -(-len(images) // columns)
    tiles = np.zeros((rows * columns, SIZE, SIZE, 3), np.uint8)
    tiles[: len(images)] = images
    pixels = tiles.reshape(rows, columns, SIZE, SIZE, 3).swapaxes(1, 2).reshape(rows * SIZE, columns * SIZE, 3)
    return jpeg(Image.fromarray(pixels), 75)


def random_image(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Of 4 x 4 random colors, smoothly enlarged to (width, height)."""
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)


def jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG without chroma subsampling, whose blocks would have 16 px."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, subsampling=0, optimize=True)
    return content.getvalue()


def photographs(file: Path | None, count: int) -> dict[str, bytes]:
    """'photos/NAME.jpg' -> its bytes as they are, of the first ones by name."""
    if file is None:
        rng = np.random.default_rng(0)
        return {f"photos/{index}.jpg": jpeg(random_image(rng, (340, 256)), 75) for index in range(count)}
    with zipfile.ZipFile(file) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))[:count]
        return {f"photos/{index}.jpg": archive.read(name) for index, name in enumerate(names)}


def wheels(packages: tuple[str, ...]) -> dict[str, bytes]:
    """'wheels/NAME.whl' -> bytes, of the versions that are installed here."""
    platforms = [arg for tag in ("manylinux_2_28", "manylinux_2_17") for arg in ("--platform", f"{tag}_x86_64")]
    with tempfile.TemporaryDirectory() as folder:
        if packages:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.12",
                       "--implementation", "cp", *platforms, "--dest", folder, *(f"{name}=={version(name)}" for name in packages)]  # fmt: skip
            subprocess.run(command, check=True)
        return {f"wheels/{path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}


# ---- on the machine


@contextmanager
def opened(file: Path) -> Iterator[Path]:
    """The file, which must exist; of 'random' a temporary one."""
    if str(file) != RANDOM:
        if not file.exists():
            sys.exit(f"no file {file}: make it with python -m benchmarks gpu-data, or give --data random as a trial")
        yield file
    else:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / FILE.name
            write(made, cifar10_mosaics(None) | photographs(None, 4))
            yield made


def add_packages(file: Path) -> list[str]:
    """Make those wheels of the file importable whose packages this Python lacks; nothing is installed.

    They are unpacked to a temporary folder of the process at the end of `sys.path`. Returns their names.
    """
    if not file.exists():
        return []
    folder, added = tempfile.mkdtemp(), []
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            package = Path(name).name.partition("-")[0]
            if name.startswith("wheels/") and importlib.util.find_spec(package) is None:
                zipfile.ZipFile(io.BytesIO(archive.read(name))).extractall(folder)
                added.append(package)
    sys.path.append(folder)
    return added


def load_cifar10(file: Path, part: str, per_class: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) of 'train' or 'test': the first ones of each class, or all."""
    images, labels = [], []
    with zipfile.ZipFile(file) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"cifar10/{part}-"))
        for label, name in enumerate(names):
            pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            tiles = (
                pixels.reshape(pixels.shape[0] // SIZE, SIZE, -1, SIZE, 3)
                .transpose(0, 2, 4, 1, 3)
                .reshape(-1, 3, SIZE, SIZE)
            )
            count = int(Path(name).stem.rpartition("-")[2])
            images.append(tiles[: min(count, per_class or count)])
            labels.append(np.full(len(images[-1]), label))
    return np.concatenate(images), np.concatenate(labels)


def write_photographs(file: Path, folder: Path) -> Path:
    """The folder, with the file's photographs as JPEG files in 'photos'."""
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("photos/")])
    return folder / "photos"


SMOKE = ["--num-photos", "4", "--packages", "--out", "{scratch}/gpu.zip"]
TABLES = {"main": Table({"part": "{part}", "files": "{files}", "MB": "{MB:.2f}"})}
