"""Pooling and layers: which features of one backbone do linear probe and k-NN prefer, on several sets?

    python -m benchmarks pooling --data FOLDER --out runs/objectives

The backbones are the long runs of `python -m benchmarks objectives` with the same `--out` (PIM on tokens of HOG and whitened windows, 21 to
40 minutes of one thread on a busy machine), and are trained if they are not there. The probes of `mapet evaluate` measure them with every
`--pool`, on the last layer and on three evenly spaced ones. What is done in `--out` is not done again.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.core import Result, Row, cached
from benchmarks.objectives import SETS, long_runs
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the archives; default: digits of 32 px, as a trial")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--out", type=Path, required=True, help="runs; what is done there is not done again")


def run(args: argparse.Namespace) -> Result:
    rows = []
    for name, pretrained, train, test in long_runs(args.data, args.sets, args.out):
        found = cached(args.out / f"pooling {name}.json", partial(measure, pretrained / "backbone", train, test))
        rows += [{"set": name, **row} for row in found]
    return Result(rows, f"{', '.join(dict.fromkeys(row['set'] for row in rows))}, tokens of HOG and whitened windows")


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
