"""Pooling and layers: which features of one backbone do linear probe and k-NN prefer, on several sets?

    python -m benchmarks pooling --data FOLDER --out runs/pooling

On each set, of the archives in FOLDER, a small ViT is pre-trained on its training images without labels (MaPeT on tokens of the
`pixels` teacher, for a few minutes of one core); then `mapet evaluate` measures it with every `--pool`, on the last layer and on
three evenly spaced ones. What is done in `--out` is not done again.
"""

import argparse
import shutil
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mapet
from benchmarks.core import Result, Row, cached
from benchmarks.data import cifar10, first_of_each_class, unpack
from benchmarks.tables import Table
from mapet.run_state import RunState

POOLS = ("mean", "cls", "2x2", "3x3")
LAYERS = {"last": (-1,), "three": (1, 2, 3)}
"""Of 4 blocks, three evenly spaced ones: 4/3, 8/3 and 4, counted from 1, rounded up."""
PROBES = ("logistic", "knn")
WIDTH, DEPTH, HEADS = 96, 4, 3


class ImageSet(NamedTuple):
    """Images, how the ViT sees them, and how long it learns.

    Attributes:
        archive: a zip in the folder `--data`; '' stands for digits of 32 px.
        per_class: the first training images of each class are used, this many, and two fifths as many test images; None: all.
        image_size, patch_size: pixels.
        channels: of the input.
        epochs: of pre-training.
    """

    archive: str
    per_class: int | None
    image_size: int
    patch_size: int
    channels: int
    epochs: int


SETS = {
    "CIFAR-10": ImageSet("cifar10.zip", 500, 32, 4, 3, 4),
    "EuroSAT": ImageSet("eurosat-mini.zip", None, 64, 8, 3, 12),
    "NEU": ImageSet("neu.zip", None, 64, 8, 1, 20),
    "pneumonia": ImageSet("pneumonia.zip", None, 28, 4, 1, 5),
}
DIGITS = {"digits": ImageSet("", 20, 32, 8, 3, 1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the archives; default: digits of 32 px, as a trial")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--out", type=Path, required=True, help="runs; what is done there is not done again")


def run(args: argparse.Namespace) -> Result:
    rows = []
    for name, spec, train, test in image_sets(args):
        backbone = pretrain(spec, train, args.out / f"run {name}")
        for pool in POOLS:
            for layers in LAYERS:
                folder = args.out / f"{name} {pool} {layers}"
                work = partial(measure, backbone, {"images": train, "test_images": test}, pool, layers, folder)
                rows.append({"set": name, "pool": pool, "layers": layers, **cached(folder.with_suffix(".json"), work)})
    return Result(rows, f"{', '.join(dict.fromkeys(row['set'] for row in rows))}, tokens of the `pixels` teacher")


def image_sets(args: argparse.Namespace) -> Iterator[tuple[str, ImageSet, Path, Path]]:
    """Yield (name, settings, training images, test images) of the chosen sets, unpacked into `--out`."""
    for name, spec in ({name: SETS[name] for name in args.sets} if args.data else DIGITS).items():
        folder = unpack(args.data / spec.archive, args.out) if args.data else cifar10(None, args.out)
        counts = {"train": spec.per_class, "test": spec.per_class and spec.per_class * 2 // 5}
        train, test = (first_of_each_class(folder / part, n) if n else folder / part for part, n in counts.items())
        yield name, spec, train, test


def pretrain(spec: ImageSet, images: Path, out: Path) -> Path:
    """Pre-train in `out`, where what is finished is not done again; return the folder of the backbone."""
    tokenizer, tokens, trained = out / "tokenizer", out / "tokens", out / "pretrain"
    if not tokenizer.exists():
        sizes = {"image_size": spec.image_size, "patch_size": spec.patch_size, "channels": spec.channels}
        mapet.fit_tokenizer(images=images, out=tokenizer, vocab_size=512, **sizes)
    if not (trained / "backbone").exists():
        mapet.tokenize(images=images, tokenizer=tokenizer, out=tokens, resume=tokens.exists())
        mapet.pretrain(
            images=images, tokenizer=tokenizer, tokens=tokens, out=trained, resume=(trained / "config.yaml").exists(),
            model_args={"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}, layer_scale_init=None, drop_path=0.0,
            epochs=spec.epochs, batch_size=64, lr=1.5e-3, probe_every=0,
        )  # fmt: skip
    return trained / "backbone"


def measure(backbone: Path, images: dict[str, Path], pool: str, layers: str, out: Path) -> Row:
    """Evaluate the features of one pooling and some layers; what is in `out` is replaced.

    Returns:
        'width' of the features; for each probe its accuracy, the ends of the 95 % interval ('_low', '_high'), and what it selected.
    """
    shutil.rmtree(out, ignore_errors=True)  # of an evaluation that was stopped
    features: dict[str, Any] = {"pool": pool, "layers": LAYERS[layers]}
    mapet.evaluate(backbone=[str(backbone)], protocols=list(PROBES), out=out, **features, **images)
    vit = mapet.load_backbone(backbone).eval()
    black = torch.zeros(1, vit.in_chans, *vit.patch_embed.img_size)
    row: Row = {"width": mapet.pooled_features(vit, black, **features).shape[1]}
    results: dict[str, Any] = RunState.read(out).results["backbones"][str(backbone)]
    for probe in PROBES:
        metric = results[probe]["metrics"][probe]
        row |= {probe: metric["value"], f"{probe}_low": metric["ci_low"], f"{probe}_high": metric["ci_high"]}
        row[f"{probe}_selected"] = metric["selected"]
    return row


def by_features(rows: list[Row]) -> list[Row]:
    """Return a row for each pooling and choice of layers, sets side by side, and the mean over sets."""
    pivot: dict[tuple[str, str], Row] = {}
    for row in rows:
        cells = pivot.setdefault((row["pool"], row["layers"]), {"features": f"`{row['pool']}`, {row['layers']}"})
        cells[row["set"]] = f"{row['logistic']:.3f} / {row['knn']:.3f}"
        cells.setdefault("all", []).append([row[probe] for probe in PROBES])
    for cells in pivot.values():
        cells["mean"] = " / ".join(f"{statistics.mean(values):.3f}" for values in zip(*cells["all"], strict=True))
    return list(pivot.values())


SMOKE = ["--out", "{scratch}"]
TABLES = {
    "main": Table(
        {"pooling, layers (linear / k-NN)": "{features}", **{name: f"{{{name}}}" for name in SETS}, "mean": "{mean}"},
        rows=by_features,
    )
}
