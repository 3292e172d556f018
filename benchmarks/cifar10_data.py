"""CIFAR-10 as the benchmarks use it: unpacked, a list of the first images of each class, changed test sets."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def unpack(data: Path, out: Path) -> Path:
    """The folder with train/ and test/ of cifar10.zip, unpacked into `out`, or `data` itself if it is one."""
    if data.suffix != ".zip":
        return data
    if not (out / "cifar10").exists():
        with zipfile.ZipFile(data) as archive:
            archive.extractall(out)
    return out / "cifar10"


def first_of_each_class(folder: Path, per_class: int) -> Path:
    """A text file of the first images of each class in train/ or test/."""
    chosen = folder / f"first{per_class}.txt"
    if not chosen.exists():
        names = [
            f"{of_class.name}/{file.name}"
            for of_class in sorted(path for path in folder.iterdir() if path.is_dir())
            for file in sorted(of_class.iterdir())[:per_class]
        ]
        chosen.write_text("\n".join(names) + "\n")
    return chosen


def grey(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)


def noise(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return pixels + rng.normal(0, 20, pixels.shape)


CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {"grey": grey, "noise": noise}


def changed_test_sets(data: Path, out: Path, per_class: int = 200) -> dict[str, Path]:
    """The first test images of each class in grey and with noise, as PNG: out of distribution."""
    for name, change in CHANGES.items():
        rng = np.random.default_rng(0)
        for folder in sorted(path for path in (data / "test").iterdir() if path.is_dir()):
            (out / name / folder.name).mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.iterdir())[:per_class]:
                pixels = change(np.asarray(Image.open(file).convert("RGB"), dtype=float), rng)
                picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
                picture.save(out / name / folder.name / f"{file.stem}.png")
    return {name: out / name for name in CHANGES}
