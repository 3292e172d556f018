"""Images of the benchmarks: CIFAR-10, its first images of each class and out-of-distribution test sets, photographs."""

import argparse
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from mapet.data.digits import write_digits
from mapet.data.sources import list_images


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options of benchmarks that train on CIFAR-10."""
    parser.add_argument("--data", type=Path, help="cifar10.zip or its folder; default: digits of 32 px, as a trial")
    parser.add_argument("--out", type=Path, required=True, help="runs; what is done there is not done again")


def unpack(data: Path, out: Path) -> Path:
    """Unpack NAME.zip, which holds a folder NAME, into `out`; return the folder, or `data` itself if it is one."""
    if data.suffix != ".zip":
        return data
    if not (out / data.stem).exists():
        with zipfile.ZipFile(data) as archive:
            archive.extractall(out)
    return out / data.stem


def cifar10(data: Path | None, out: Path) -> Path:
    """Folder with train/CLASS/* and test/CLASS/*; without `data` digits of 32 px take the place of CIFAR-10."""
    if data is not None:
        return unpack(data, out)
    for part in write_digits(out / "digits", 1437):
        for file in part.rglob("*.png"):
            Image.open(file).convert("RGB").resize((32, 32)).save(file)
    return out / "digits"


def first_of_each_class(folder: Path, per_class: int) -> Path:
    """Text file of the first images of each class in train/ or test/."""
    chosen = folder / f"first{per_class}.txt"
    if not chosen.exists():
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        names = [f"{c.name}/{file.name}" for c in classes for file in sorted(c.iterdir())[:per_class]]
        chosen.write_text("\n".join(names) + "\n")
    return chosen


def gray(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)


def noise(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return pixels + rng.normal(0, 20, pixels.shape)


SHIFTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {"gray": gray, "noise": noise}


def ood_test_sets(data: Path, out: Path, per_class: int = 200) -> dict[str, Path]:
    """The first test images of each class in gray and with noise, as PNG."""
    for name, shift in SHIFTS.items():
        rng = np.random.default_rng(0)
        for folder in sorted(path for path in (data / "test").iterdir() if path.is_dir()):
            (out / name / folder.name).mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.iterdir())[:per_class]:
                pixels = shift(np.asarray(Image.open(file).convert("RGB"), dtype=float), rng)
                image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
                image.save(out / name / folder.name / f"{file.stem}.png")
    return {name: out / name for name in SHIFTS}


def write_photos(photos: Path | None, folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Write `count` photographs as JPEGs of quality 90 and (width, height) `size`; without `photos` crops of scikit-learn's two."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = None if photos is None else list_images(photos)
    samples = [Image.fromarray(image) for image in load_sample_images().images]
    for index in range(count):
        if images is None:
            left, top = int(rng.integers(161)), int(rng.integers(68))
            image = samples[index % 2].crop((left, top, left + 480, top + 360))
        else:
            image = Image.open(images[index % len(images)]).convert("RGB")
        scale = max(size[0] / image.width, size[1] / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
        image.crop((left, top, left + size[0], top + size[1])).save(folder / f"{index:04d}.jpg", quality=90)
