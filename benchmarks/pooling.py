"""Pooling and layers: which features of one backbone do linear probe and k-NN prefer, on several sets?

    python -m benchmarks pooling --data FOLDER --out runs/pooling

On each set, of the archives in FOLDER, a small ViT is pre-trained on its training images without labels (MaPeT on tokens of the
`pixels` teacher, for a few minutes of one core); then the probes of `mapet evaluate` measure it with every `--pool`, on the last
layer and on three evenly spaced ones. What is done in `--out` is not done again.
"""

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import mapet
from benchmarks.core import Result, Row, cached
from benchmarks.data import cifar10, first_of_each_class, unpack
from benchmarks.tables import Table
from mapet.config.shared import Pool
from mapet.device import ComputeContext
from mapet.evaluation.datasets import LabeledSet, load_train_test
from mapet.evaluation.eval_context import measure_classifier
from mapet.evaluation.features import BackboneWrapper, CacheConfig
from mapet.evaluation.logistic_regression import fit_logistic
from mapet.evaluation.probes import KNN_K, KNN_TEMPERATURE, nearest_neighbors
from mapet.models.pooling import pool_tokens

POOLS: tuple[Pool, ...] = ("mean", "cls", "2x2", "3x3")
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
    "CIFAR-10": ImageSet("cifar10.zip", 500, 32, 4, 3, 2),
    "EuroSAT": ImageSet("eurosat-mini.zip", None, 64, 8, 3, 6),
    "NEU": ImageSet("neu.zip", None, 64, 8, 1, 10),
    "pneumonia": ImageSet("pneumonia.zip", 1000, 28, 4, 1, 5),
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
        found = cached(args.out / f"{name}.json", partial(measure, backbone, train, test))
        rows += [{"set": name, **row} for row in found]
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
            epochs=spec.epochs, batch_size=32, lr=1e-3, probe_every=0,
        )  # fmt: skip
    return trained / "backbone"


@torch.inference_mode()
def extract(backbone: BackboneWrapper, data: LabeledSet) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Compute all features of a set at once: ((pooling, layers) -> (n, F); the n labels)."""
    batches: dict[tuple[str, str], list[Tensor]] = {}
    indices = []
    for index, pixels in backbone.batches(data.images, CacheConfig(progress=False)):
        maps = backbone.forward_intermediates(backbone.normalize(pixels), LAYERS["three"])
        for pool in POOLS:
            parts = [pool_tokens(*each, pool) for each in maps]
            for name, layers in LAYERS.items():
                batches.setdefault((pool, name), []).append(torch.cat(parts[-len(layers) :], 1))
        indices.append(index)
    return {key: torch.cat(parts) for key, parts in batches.items()}, torch.from_numpy(data.labels)[torch.cat(indices)]


def measure(backbone: Path, train: Path, test: Path) -> list[Row]:
    """Evaluate every pooling and choice of layers as `mapet evaluate` does, of features that are computed once.

    Returns:
        A row for each: width of the features; C; for each probe its accuracy, balanced where the test images are imbalanced, and
        the ends of its 95 % interval ('_low', '_high').
    """
    wrapper = BackboneWrapper.load(str(backbone), ComputeContext.from_options("cpu", "float32"))
    train_set, test_set = load_train_test(str(train), str(test))
    (features, labels), (test_features, test_labels) = (extract(wrapper, part) for part in (train_set, test_set))
    rows, num_classes = [], len(train_set.classes)
    for (pool, layers), x in features.items():
        test_x, probe = test_features[pool, layers], fit_logistic(x, labels, num_classes)
        similarity, nearest = nearest_neighbors([(0, x)], test_x, KNN_K, StandardScaler().fit(x.numpy()))
        votes = F.one_hot(labels[nearest], num_classes) * (similarity / KNN_TEMPERATURE).exp()[..., None]
        row: Row = {"pool": pool, "layers": layers, "width": x.shape[1], "C": probe.C}
        for name, scores in (("logistic", probe(test_x)), ("knn", votes.sum(1).log())):
            metric = next(iter(measure_classifier(scores, test_labels).values()))
            row |= {name: metric.value, f"{name}_low": metric.ci_low, f"{name}_high": metric.ci_high}
        rows.append(row)
    return rows


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
