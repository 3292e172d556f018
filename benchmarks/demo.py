"""The demo over several seeds: mean and range of each metric."""

import argparse
import statistics
from pathlib import Path

import mapet
from benchmarks.core import Result, Row, cached
from benchmarks.tables import Table

METRICS = {"logistic": "linear probe", "knn": "k-NN", "finetune": "fine-tuned, 10 labels a class"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo_seeds"), help="what is done there is not done again"
    )


def run(args: argparse.Namespace) -> Result:
    def results(seed: int) -> dict[str, dict[str, float]]:
        return cached(args.out / f"seed{seed}.json", lambda: mapet.demo(out=args.out / f"seed{seed}", seed=seed))

    runs = [results(seed) for seed in args.seeds]
    rows = []
    for metric, title in METRICS.items():
        row: Row = {"metric": title}
        for name in ("raw pixels", "untrained", "pretrained"):
            values = [result[name][metric] for result in runs if metric in result[name]]
            if values:
                key = name.replace(" ", "_")
                row |= {key: statistics.mean(values), f"{key}_min": min(values), f"{key}_max": max(values)}
        rows.append(row)
    return Result(rows, "scikit-learn's digits, 1,437 to train and 360 to test", args.seeds)


SMOKE = ["--seeds", "0", "--out", "{scratch}"]
TABLES = {
    "main": Table({
        "accuracy on 360 unseen digits": "{metric}",
        "raw pixels": "{raw_pixels:.3f}",
        "untrained": "{untrained:.3f} ({untrained_min:.3f} to {untrained_max:.3f})",
        "pre-trained": "{pretrained:.3f} ({pretrained_min:.3f} to {pretrained_max:.3f})",
    }),
}  # fmt: skip
