"""Is a pre-trained ViT ahead of features that need no pre-training? Linear probe and k-NN, on several sets.

    python -m benchmarks controls --data FOLDER --out runs/objectives

The backbones are those of `python -m benchmarks pooling`, the long runs of `python -m benchmarks objectives` with the same `--out`, and are
trained if they are not there. `mapet evaluate` measures them and all controls, with each pooling of `--pools`: linear probe, k-NN, and the
linear probe of 5 labels a class. What is done in `--out` is not done again.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mapet
from benchmarks.core import Result, Row, cached, save
from benchmarks.objectives import SETS, long_runs
from benchmarks.pooling import PROBES
from benchmarks.tables import Table
from mapet.run_state import RunState

MEASURED = (*PROBES, "few_shot_5")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the archives; default: digits of 32 px, as a trial")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--pools", nargs="+", default=["mean", "2x2"])
    parser.add_argument("--out", type=Path, required=True, help="runs; what is done there is not done again")


def run(args: argparse.Namespace) -> Result:
    result = Result([], f"{', '.join(args.sets)}; tokens of HOG and whitened windows")
    for name, pretrained, train, test in long_runs(args.data, args.sets, args.out):
        for pool in args.pools:
            out = args.out / f"controls {name} {pool}"
            images = {"images": train, "test_images": test}
            found = cached(out.with_suffix(".json"), partial(measure, pretrained, pool, images, out))
            result.rows += [{"set": name, "pool": pool, **row} for row in found]
            save(args.json, args.name, result)
    return result


def measure(pretrained: Path, pool: str, images: dict[str, Path], out: Path) -> list[Row]:
    """Evaluate a backbone and all controls; what is in `out` is replaced.

    Returns:
        A row for each: 'features', and for each probe its accuracy, balanced where the test images are imbalanced, the ends of the 95 %
        interval ('_low', '_high') and what it selected.
    """
    shutil.rmtree(out, ignore_errors=True)  # of an evaluation that was stopped
    mapet.evaluate(
        backbone=[str(pretrained)], protocols=["logistic", "knn", "few-shot"], few_shot=[5], num_seeds=10, pool=pool, out=out, **images
    )  # fmt: skip
    results: dict[str, Any] = RunState.read(out).results
    rows: list[Row] = []
    for source, by_protocol in (results["backbones"] | results["controls"]).items():
        row: Row = {"features": "pre-trained" if source == str(pretrained) else title(source, pretrained)}
        metrics = {name: metric for protocol in by_protocol.values() for name, metric in protocol["metrics"].items()}
        for probe in MEASURED:
            metric = metrics.get(f"{probe}_balanced_accuracy", metrics[probe])
            row |= {probe: metric["value"], f"{probe}_low": metric["ci_low"], f"{probe}_high": metric["ci_high"]}
            row[f"{probe}_selected"] = metric["selected"]
        rows.append(row)
    return rows


def title(control: str, pretrained: Path) -> str:
    """Return the name of a control without the folder of the run."""
    return "untrained" if control.startswith("random:") else control.removesuffix(f" of {pretrained}")


def by_features(rows: list[Row], pool: str, probes: tuple[str, ...] = MEASURED) -> list[Row]:
    """Return a row for each kind of features by one pooling, sets side by side: the value of each probe, the best of each in bold."""
    rows = [row for row in rows if row["pool"] == pool]
    best = {
        (row["set"], probe): max(r[probe] for r in rows if r["set"] == row["set"]) for row in rows for probe in probes
    }
    pivot: dict[str, Row] = {}
    for row in rows:
        cells = [
            f"**{row[probe]:.3f}**" if row[probe] == best[row["set"], probe] else f"{row[probe]:.3f}"
            for probe in probes
        ]
        pivot.setdefault(row["features"], {"features": row["features"]})[row["set"]] = " / ".join(cells)
    return list(pivot.values())


SMOKE = ["--out", "{scratch}", "--pools", "mean"]
TABLES = {
    name: Table({title: "{features}", **{each: f"{{{each}}}" for each in SETS}}, rows=partial(by_features, pool=pool, probes=probes))
    for name, title, pool, probes in (
        ("main", "linear probe / k-NN / 5 labels a class", "2x2", MEASURED),
        ("mean", "linear probe / k-NN / 5 labels a class", "mean", MEASURED),
        ("linear", "linear probe", "2x2", ("logistic",)),
    )
}  # fmt: skip
