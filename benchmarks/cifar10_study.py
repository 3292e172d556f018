"""The comparison of objectives on CIFAR-10: images for recipes/study_cifar10.yaml, then `mapet study`.

    python benchmarks/cifar10_study.py --data cifar10.zip --out runs/study

Pre-training and probes see the first 1,000 training images of each class; tests are the 10,000 test images and, out of
distribution, 2,000 of them in grey and with noise. Stopped and started again, it goes on. The stand-in teacher needs
the packages that benchmarks/stand_in.py names.
"""

import argparse
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

import mapet
from mapet.recipe import read_recipe

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.zip, or its folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--recipe", type=Path, default=HERE.parent / "recipes" / "study_cifar10.yaml")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # for cells: stand_in
    data = options.data
    if data.suffix == ".zip":
        if not (options.out / "cifar10").exists():
            with zipfile.ZipFile(data) as archive:
                archive.extractall(options.out)
        data = options.out / "cifar10"
    chosen = data / "train" / f"first{options.per_class}.txt"
    if not chosen.exists():
        names = [
            f"{folder.name}/{file.name}"
            for folder in sorted((data / "train").iterdir())
            if folder.is_dir()
            for file in sorted(folder.iterdir())[: options.per_class]
        ]
        chosen.write_text("\n".join(names) + "\n")
    others = {name: changed(data / "test", options.out / name, change) for name, change in CHANGES.items()}
    mapet.study(
        **read_recipe(options.recipe),
        images=chosen,
        test_images=data / "test",
        other_test_images=others,
        out=options.out,
    )


def grey(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)


def noise(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return pixels + rng.normal(0, 20, pixels.shape)


CHANGES = {"grey": grey, "noise": noise}


def changed(test: Path, out: Path, change, per_class: int = 200) -> Path:  # type: ignore[no-untyped-def]
    """The first test images of each class, changed, as PNG."""
    rng = np.random.default_rng(0)
    for folder in sorted(path for path in test.iterdir() if path.is_dir()):
        (out / folder.name).mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir())[:per_class]:
            pixels = change(np.asarray(Image.open(file).convert("RGB"), dtype=float), rng)
            Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(out / folder.name / f"{file.stem}.png")
    return out


if __name__ == "__main__":
    main()
