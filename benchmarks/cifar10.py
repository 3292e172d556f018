"""CIFAR-10: does MaPeT pre-training beat an untrained ViT, and supervised training from scratch?

    python -m benchmarks cifar10 --data cifar10.zip --out runs/cifar10

For each teacher `mapet run recipes/cifar10.yaml`, then linear probe and k-NN on frozen features with 1, 10 and 100 % of the labels,
against the same ViT untrained and against supervised training from scratch with as many labels. The proxy teacher needs the
packages that benchmarks/proxy_teacher.py names; its results lean on ImageNet's labels.
"""

import argparse
import functools
from pathlib import Path

import mapet
from benchmarks.core import ROOT, Result, Row, cached
from benchmarks.data import add_data, cifar10
from benchmarks.tables import Table
from mapet.config.base import read_config

PROXY = {"teacher": "benchmarks.proxy_teacher:efficientnet_lite0", "teacher_image_size": 128}
TEACHERS = {"pixels": {}, "proxy teacher": PROXY}
FRACTIONS = {"1": 0.01, "10": 0.1, "100": 1.0}
"""Percent of the labels -> fraction."""
TITLES = {
    "untrained": "untrained ViT",
    "pixels": "`pixels` (label-free)",
    "proxy teacher": "proxy teacher (ImageNet-supervised)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--epochs", type=int, help="of pre-training; default: the recipe's")
    parser.add_argument(
        "--scratch-epochs", type=int, nargs=3, default=[60, 12, 2], help="with 1, 10 and 100 %% of the labels"
    )


def run(args: argparse.Namespace) -> Result:
    data = cifar10(args.data, args.out)
    images = {"images": data / "train", "test_images": data / "test"}
    backbones = {name: pretrain(name, images, args) for name in args.teachers}
    sources = {"untrained": f"random:{args.out / args.teachers[0]}"} | {name: args.out / name for name in args.teachers}
    rows = []
    for name, source in sources.items():
        work = functools.partial(frozen, name, str(source), images, args.out)
        rows.append({"features": TITLES[name], **cached(args.out / f"{name}.json", work)})
    scratch: Row = {"features": "for comparison: the whole ViT, supervised from scratch"}
    for (percent, fraction), epochs in zip(FRACTIONS.items(), args.scratch_epochs, strict=True):
        scratch[f"logistic_{percent}"] = cached(
            args.out / f"scratch_{percent}.json",
            functools.partial(from_scratch, backbones[args.teachers[0]], fraction, epochs, images),
        )
    return Result([*rows, scratch], str(args.data or "digits of 32 px"))


def pretrain(name: str, images: dict[str, Path], args: argparse.Namespace) -> Path:
    recipe = read_config(ROOT / "recipes" / "cifar10.yaml")
    recipe["fit_tokenizer"] |= TEACHERS[name]
    if args.epochs:
        recipe["pretrain"]["epochs"] = args.epochs
    out = args.out / name
    return mapet.run(out=out, resume=(out / "config.yaml").exists(), **images, **recipe)


def from_scratch(backbone: Path, fraction: float, epochs: int, images: dict[str, Path]) -> float:
    """Accuracy of the whole ViT after supervised training on a fraction of the labels."""
    return mapet.finetune(
        backbone=backbone, from_scratch=True, labels_per_class=None if fraction == 1 else fraction, epochs=epochs,
        views="random-crop", min_crop_scale=0.5, lr=1e-3, batch_size=64 if fraction < 0.1 else 128, **images,
    )  # fmt: skip


def frozen(name: str, source: str, images: dict[str, Path], out: Path) -> Row:
    """k-NN and logistic regression on the features of a backbone, with few labels of seed 0 and with all."""
    per_class = min(len(list(folder.iterdir())) for folder in images["images"].iterdir() if folder.is_dir())
    result = mapet.evaluate(
        backbone=[source], protocols=["knn", "few-shot"], few_shot=(0.01, 0.1, per_class), num_seeds=1, out=out / f"evaluation {name}",
        **images,
    )  # fmt: skip
    (metrics,) = result.values()
    splits = {"1": "1pct", "10": "10pct", "100": f"{per_class}"}
    return {"knn": metrics["knn"]} | {f"logistic_{key}": metrics[f"few_shot_{split}"] for key, split in splits.items()}


SMOKE = ["--out", "{scratch}", "--teachers", "pixels", "--epochs", "1", "--scratch-epochs", "1", "1", "1"]
TABLES = {
    "main": Table({
        "frozen features": "{features}", "k-NN": "{knn:.3f}", "linear, 1 % of labels": "{logistic_1:.3f}", "10 %": "{logistic_10:.3f}",
        "100 %": "{logistic_100:.3f}",
    }),
}  # fmt: skip
