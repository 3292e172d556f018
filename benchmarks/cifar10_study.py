"""The comparison of objectives on CIFAR-10: images for recipes/study_cifar10.yaml, then `mapet study`.

    python benchmarks/cifar10_study.py --data cifar10.zip --out runs/study

Pre-training and probes see the first 1,000 training images of each class; tests are the 10,000 test images and, out of
distribution, 2,000 of them in grey and with noise. Stopped and started again, it goes on. The stand-in teacher needs
the packages that benchmarks/stand_in.py names.
"""

import argparse
import os
from pathlib import Path

from cifar10_data import changed_test_sets, first_of_each_class, unpack

import mapet
from mapet.config.base import read_recipe

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.zip, or its folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--recipe", type=Path, default=HERE.parent / "recipes" / "study_cifar10.yaml")
    options = parser.parse_args()
    run_study(options.data, options.out, options.recipe, options.per_class)


def run_study(data: Path, out: Path, recipe: Path, per_class: int = 1000, seeds: list[int] | None = None) -> Path:
    """Prepare the images and run a study of that recipe, with other seeds if there are some; returns the folder of CIFAR-10."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # for cells: stand_in
    data = unpack(data, out)
    mapet.study(
        **read_recipe(recipe) | ({"seeds": seeds} if seeds else {}),
        images=first_of_each_class(data / "train", per_class),
        test_images=data / "test",
        ood_images=changed_test_sets(data, out),
        out=out,
    )
    return data


if __name__ == "__main__":
    main()
