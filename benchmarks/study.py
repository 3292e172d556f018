"""Studies on CIFAR-10: which objective learns most, and does a look at a tokenizer forecast what its tokens are worth?

    python -m benchmarks study --data cifar10.zip --out runs/study                             # recipes/study_cifar10.yaml
    python -m benchmarks study --recipe tokenizers --data cifar10.zip --out runs/tokenizers    # recipes/study_tokenizers.yaml

Pre-training and probes see the first 1,000 training images of each class; tests are the 10,000 test images and, out of
distribution, 2,000 of them in gray and with noise. Stopped and started again, it resumes. With `tokenizers`, the metrics of
`mapet inspect-tokenizer` follow and the rank correlation (Spearman's) of each with the linear probe of what was pre-trained. The
proxy teacher needs the packages that benchmarks/proxy_teacher.py names.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

import mapet
from benchmarks.core import ROOT, Result, Row
from benchmarks.data import add_data, cifar10, first_of_each_class, ood_test_sets
from benchmarks.tables import Table
from mapet.config.base import read_config
from mapet.evaluation.eval_context import mean_and_margin

PROBE, KNN = "logistic", "knn"
"""Columns of a study's report.csv."""
METRICS = {
    "entropy": ("usage", "entropy"),
    "majority": ("usage", "top_code_fraction"),
    "noise": ("stability", "noise", "kappa"),
    "shift": ("stability", "shift", "kappa"),
    "neighbor": ("neighbor", "bits"),
    "position": ("position", "fraction"),
    "class": ("label", "bits"),
    "bag": ("bag_of_tokens", "accuracy"),
}
"""Column -> where a tokenizer's metrics keep it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--recipe", choices=["cifar10", "tokenizers"], default="cifar10")
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the recipe's three")
    parser.add_argument("--epochs", type=int, help="of pre-training; default: the recipe's")
    parser.add_argument("--finetune-epochs", type=int, help="default: the recipe's")
    parser.add_argument("--tokenizers", nargs="+", help="default: all of the recipe")
    parser.add_argument("--mask-ratios", type=float, nargs="+", help="default: those of the recipe")


def run(args: argparse.Namespace) -> Result:
    data, recipe = cifar10(args.data, args.out), read_config(ROOT / "recipes" / f"study_{args.recipe}.yaml")
    recipe["seeds"] = args.seeds or recipe["seeds"]
    recipe["grid"]["tokenizer"] = args.tokenizers or recipe["grid"]["tokenizer"]
    if args.mask_ratios:
        recipe["grid"]["mask_ratio"] = args.mask_ratios
    recipe["tokenizers"] = {name: recipe["tokenizers"][name] for name in recipe["grid"]["tokenizer"]}
    for section, epochs in (("pretrain", args.epochs), ("finetune", args.finetune_epochs)):
        recipe[section]["epochs"] = epochs or recipe[section]["epochs"]
    train = first_of_each_class(data / "train", args.per_class)
    ood = ood_test_sets(data, args.out)
    report = mapet.study(images=train, test_images=data / "test", ood_images=ood, out=args.out / "study", **recipe)
    with (report / "report.csv").open(newline="", encoding="utf-8-sig") as file:
        runs = [run for run in csv.DictReader(file) if run["status"] == "finished"]
    if args.recipe == "tokenizers":
        images = first_of_each_class(data / "train", 1000)
        rows = forecasts(
            runs, {name: token_metrics(name, spec, args.out, images) for name, spec in recipe["tokenizers"].items()}
        )
    else:
        rows = scores(runs)
    return Result(rows, f"{args.data or 'digits of 32 px'}, the first {args.per_class} of each class", recipe["seeds"])


def scores(runs: list[dict[str, str]]) -> list[Row]:
    """Mean and half of a 95 % interval over seeds, a row for each budget and setting."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for run in runs:
        for budget in run["budgets"].split("; "):
            groups[budget, run["tokenizer"], run["mask_ratio"], run["objective"]].append(run)
    rows = []
    for (budget, tokenizer, ratio, objective), members in groups.items():
        row: Row = {"budget": budget, "tokenizer": tokenizer, "mask_ratio": float(ratio), "objective": objective}
        for key, column in (("logistic", PROBE), ("knn", KNN)):
            row[key], row[f"{key}_ci95"] = mean_and_margin([float(run[column]) for run in members])
        rows.append(row)
    return rows


def token_metrics(name: str, spec: dict[str, Any], out: Path, images: Path) -> Row:
    """Numbers of `mapet inspect-tokenizer`."""
    folder = out / "health" / name
    if not (folder / "tokenizer_metrics.json").exists():
        own = {"teacher": spec["teacher"]} if ":" in spec.get("teacher", "") else {}
        mapet.inspect_tokenizer(
            tokenizer=out / "study" / "tokenizers" / name / "tokenizer", images=images, out=folder, **own
        )
    metrics = json.loads((folder / "tokenizer_metrics.json").read_text())["metrics"]
    row: Row = {}
    for column, path in METRICS.items():
        value = metrics
        for key in path:
            value = value[key]
        row[column] = float(value)
    return row


def forecasts(runs: list[dict[str, str]], metrics: dict[str, Row]) -> list[Row]:
    """A row for each tokenizer, with its probe, and one of the rank correlations with the probe."""
    rows = []
    for name, row in metrics.items():
        mean, _ = mean_and_margin([float(run[PROBE]) for run in runs if run["tokenizer"] == name])
        rows.append({"tokenizer": name, **row, "probe": mean})
    probes = [row["probe"] for row in rows]
    ranks = {key: float(spearmanr([row[key] for row in rows], probes).statistic) for key in METRICS}
    return [*rows, {"tokenizer": "rank correlation with the probe", "rank_correlation": ranks}]


def side_by_side(budget: str) -> Table:
    """A row for each setting, objectives beside each other."""

    def pivot(rows: list[Row]) -> list[Row]:
        settings: dict[tuple[str, float], Row] = {}
        for row in rows:
            if row.get("budget") == budget:
                setting = settings.setdefault((row["tokenizer"], row["mask_ratio"]), dict(row))
                for key in ("logistic", "knn"):
                    width = row[f"{key}_ci95"]
                    setting[f"{row['objective']}_{key}"] = f"{row[key]:.3f}" + (
                        "" if width is None else f" ± {width:.3f}"
                    )
        return list(settings.values())

    titles = {"mim": "MIM", "pim": "PIM", "mapet": "MaPeT"}
    columns = {
        f"{title}{suffix}": f"{{{name}_{key}}}"
        for key, suffix in (("logistic", ""), ("knn", " k-NN"))
        for name, title in titles.items()
    }
    return Table({"teacher": "{tokenizer}", "predicted": "{mask_ratio:g}", **columns}, rows=pivot)


def with_signs(rows: list[Row]) -> list[Row]:
    """Cells of the tokenizers' table: numbers of a tokenizer, signed ones of a rank correlation."""
    digits = {"entropy": ".1f", "majority": ".1%", "noise": ".2f", "shift": ".2f", "neighbor": ".2f", "position": ".2f", "class": ".2f",
              "bag": ".3f", "probe": ".3f"}  # fmt: skip
    cells = []
    for row in rows:
        if "budget" not in row:
            ranks = {key: f"{value:+.2f}" for key, value in row.get("rank_correlation", {}).items()}
            values = {key: format(row[key], digits[key]) for key in digits if row.get(key) is not None}
            cells.append({"tokenizer": row["tokenizer"], **values, **ranks})
    return cells


SMOKE = ["--out", "{scratch}", "--recipe", "tokenizers", "--tokenizers", "pixels-2", "pixels-16", "--per-class", "20", "--epochs", "1",
         "--finetune-epochs", "1", "--seeds", "0"]  # fmt: skip
TABLES = {
    "epochs": side_by_side("equal epochs"),
    "compute": side_by_side("equal compute"),
    "tokenizers": Table({
        "tokenizer": "{tokenizer}", "entropy, bits": "{entropy}", "most frequent token": "{majority}", "kept under noise": "{noise}",
        "kept when moved": "{shift}", "neighbor, bits": "{neighbor}", "position, fraction": "{position}", "class, bits": "{class}",
        "bag of tokens": "{bag}", "linear probe": "{probe}",
    }, rows=with_signs),
}  # fmt: skip
