"""scikit-learn's 1,797 handwritten digits (8 x 8 px, UCI Optical Recognition of Handwritten Digits) as image files."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(folder: Path, train: int) -> tuple[Path, Path]:
    """Write the first `train` digits to `folder/train/DIGIT/*.png` and the others to `folder/test`; return both folders."""
    digits = load_digits()
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("train" if index < train else "test") / str(digit) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(path)
    return folder / "train", folder / "test"
