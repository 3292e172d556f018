"""The verdict of a run beside scikit-learn's own logistic regression on the features that `mapet embed` writes.

    python -m benchmarks verdict --runs runs/photos runs/cells        # finished runs of `mapet run` with labels
    python -m benchmarks verdict --time 10                            # scikit-learn's digits, which are run first

For the backbone, the untrained network, and the backbone that a run was started from: StandardScaler and LogisticRegressionCV on the images
of the run's evaluation. Where the two 95 % intervals of two of them do not overlap, the verdict must call the same one better.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mapet
from benchmarks.core import Result, Row
from benchmarks.tables import Table
from mapet.config.base import build_config, read_config
from mapet.config.pipeline import RunConfig
from mapet.data.digits import write_digits
from mapet.device import ComputeContext
from mapet.evaluation.datasets import LabeledSet, load_train_test
from mapet.evaluation.eval_context import wilson_interval
from mapet.evaluation.features import RANDOM_PREFIX, BackboneWrapper
from mapet.models.backbone import save_backbone
from mapet.run_state import RunState

NUM_TRAIN = 1437
MAX_ITER = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", nargs="+", type=Path, help="folders of `mapet run`; default: one of scikit-learn's digits"
    )
    parser.add_argument("--time", default="5", help="of the default run, minutes")
    parser.add_argument("--epochs", type=float, help="of the default run, in place of its time")


def run(args: argparse.Namespace) -> Result:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        runs = args.runs or [run_digits(Path(scratch), args)]
        for folder in runs:
            rows += compare(folder, Path(scratch))
    wrong = [row for row in rows if row["agrees"] == "no"]
    assert not wrong, f"the verdict names another one: {wrong}"
    return Result(rows, ", ".join(folder.name for folder in runs))


def run_digits(scratch: Path, args: argparse.Namespace) -> Path:
    """Run on the digits with a test set, and return the run's folder."""
    train, test = write_digits(scratch / "digits", NUM_TRAIN)
    length = {"epochs": args.epochs} if args.epochs else {"time": args.time}
    mapet.run(images=train, test_images=test, out=scratch / "run", device="cpu", **length)
    return scratch / "run"


def compare(folder: Path, scratch: Path) -> list[Row]:
    """Return a row for each other features that the backbone of a run is compared with, all by `embed`."""
    config = build_config(RunConfig, read_config(folder / "config.yaml"))
    evaluated = RunState.read(folder / "evaluation")
    count = evaluated.config["max_images"]
    sets = load_train_test(config.images, config.test_images, config, config.group_by)
    train, test = (part.sample(count or len(part)) for part in sets)
    compute = ComputeContext.from_options("cpu", "float32")
    random = BackboneWrapper.load(f"{RANDOM_PREFIX}{folder / 'pretrain' / 'backbone'}", compute, config.seed)
    untrained = scratch / f"{folder.name} untrained.vit"
    save_backbone(random.model, untrained)
    sources = {"untrained": str(untrained), "pre-trained": str(folder)}
    if config.pretrain.init_from:
        sources[config.pretrain.init_from] = config.pretrain.init_from
    found = {}
    for name, source in sources.items():
        parts = [embed(source, part, config, scratch / f"{folder.name} {name} {side}") for side, part in
                 (("train", train), ("test", test))]  # fmt: skip
        found[name] = count_correct(*parts)
    by_name = {each["control"]: each for each in RunState.read(folder).results["evaluation"]["comparisons"]
               if each["metric"].startswith("logistic")}  # fmt: skip
    rows = []
    total, own = len(test), found.pop("pre-trained")
    for name, correct in found.items():
        intervals = [wilson_interval(hits, total) for hits in (own, correct)]
        is_apart = max(low for low, _ in intervals) > min(high for _, high in intervals)
        verdict = by_name[name]
        better = (verdict["ci_low"] > 0) - (verdict["ci_high"] < 0)
        agrees = better == np.sign(own - correct) if is_apart else None
        rows.append({
            "run": folder.name, "other": name, "images": total, "pretrained": own / total, "value": correct / total,
            "intervals": ", ".join(f"{low:.3f} to {high:.3f}" for low, high in intervals),
            "verdict": f"{verdict['value']:.3f} against {verdict['control_value']:.3f}: "
                       f"{'not clear' if not better else 'better' if better > 0 else 'worse'}",
            "agrees": {None: "intervals overlap", True: "yes", False: "no"}[None if agrees is None else bool(agrees)],
        })  # fmt: skip
    return rows


def embed(source: str, data: LabeledSet, config: RunConfig, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return features of labeled images, as `mapet embed` writes them, and their classes."""
    mapet.embed(
        backbone=source, images=data.images.root, out=out, pool=config.pretrain.pool, layers=config.pretrain.layers,
        device="cpu", precision="float32",
    )  # fmt: skip
    features = np.load(out / "features.npy")
    row = {image_id: index for index, image_id in enumerate(json.loads((out / "ids.json").read_text()))}
    kept = [row[data.images.id(index)] for index in range(len(data))]
    is_read = np.isfinite(features[kept]).all(1)
    return features[kept][is_read], data.labels[is_read]


def count_correct(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> int:
    """Return how many test images scikit-learn's logistic regression classifies correctly, C chosen by its cross-validation."""
    model = make_pipeline(StandardScaler(), LogisticRegressionCV(cv=5, max_iter=MAX_ITER))
    with warnings.catch_warnings(action="ignore"):  # of convergence with large C, and of changes to come
        model.fit(*train)
    return int((model.predict(test[0]) == test[1]).sum())


SMOKE = ["--epochs", "1"]
TABLES = {
    "main": Table({
        "run": "{run}", "beside": "{other}", "test images": "{images:,}", "scikit-learn, pre-trained": "{pretrained:.3f}",
        "scikit-learn, other": "{value:.3f}", "intervals": "{intervals}", "verdict": "{verdict}", "agrees": "{agrees}",
    })
}  # fmt: skip
