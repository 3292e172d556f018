"""Does a cheap look at a tokenizer forecast the worth of its words? Eight tokenizers on CIFAR-10.

    python benchmarks/tokenizer_choice.py --data cifar10.zip --out runs/tokenizers

First `mapet study` of recipes/study_tokenizers.yaml: pre-training on each tokenizer's words, three seeds or --seeds. Then the measures of
`mapet inspect --tokenizer` for each, and the rank correlation (Spearman's) of each measure with the linear probe of what
was pre-trained. Writes forecast.md and forecast.json. Stopped and started again, it goes on.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

from cifar10_data import first_of_each_class, unpack
from cifar10_study import HERE, run_study
from scipy.stats import spearmanr

import mapet
from mapet.config.base import read_recipe
from mapet.files import write_json

OUTCOME = "linear probe"
MEASURES = {
    "entropy, bits": ("usage", "entropy"),
    "commonest word": ("usage", "commonest_share"),
    "kept under jitter": ("stability", "jitter", "kappa"),
    "kept under noise": ("stability", "noise", "kappa"),
    "kept when moved": ("stability", "shift", "kappa"),
    "kept when mirrored": ("stability", "flip", "kappa"),
    "neighbour, bits": ("neighbour", "bits"),
    "position, share": ("position", "share"),
    "class, bits": ("label", "bits"),
    "bag of tokens": ("bag_of_tokens", "accuracy"),
}
"""Column -> where health.json keeps it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.zip, or its folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=HERE.parent / "recipes" / "study_tokenizers.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the recipe's three")
    options = parser.parse_args()
    data = run_study(options.data, options.out, options.recipe, seeds=options.seeds)
    rows = [
        looked_at(name, spec, options.out, unpack(data, options.out))
        for name, spec in read_recipe(options.recipe)["tokenizers"].items()
    ]
    with (options.out / "report" / "report.csv").open(newline="", encoding="utf-8-sig") as file:
        runs = [run for run in csv.DictReader(file) if run["status"] == "done"]
    for row in rows:
        scores = [float(run[OUTCOME]) for run in runs if run["tokenizer"] == row["tokenizer"]]
        row[OUTCOME] = statistics.mean(scores)
    measures = list(MEASURES)
    outcomes = [row[OUTCOME] for row in rows]
    forecasts = {name: float(spearmanr([row[name] for row in rows], outcomes).statistic) for name in measures}
    write_json(options.out / "forecast.json", {"tokenizers": rows, "rank_correlation": forecasts})
    columns = ["tokenizer", *measures, OUTCOME]
    table = [columns, ["---"] * len(columns)]
    table += [[row["tokenizer"], *(f"{row[name]:.3f}" for name in columns[1:])] for row in rows]
    table.append(["rank correlation with the probe", *(f"{forecasts[name]:+.2f}" for name in measures), ""])
    text = "\n".join("| " + " | ".join(row) + " |" for row in table) + "\n"
    (options.out / "forecast.md").write_text(text)
    print(text)


def looked_at(name: str, spec: dict[str, Any], out: Path, data: Path) -> dict[str, Any]:
    """The measures of `mapet inspect --tokenizer`, numbers alone."""
    folder = out / "health" / name
    if not (folder / "health.json").exists():
        own = {"teacher": spec["teacher"]} if ":" in spec.get("teacher", "") else {}
        mapet.inspect(
            tokenizer=out / "tokenizers" / name / "tokenizer",
            images=first_of_each_class(data / "train", 1000),
            out=folder,
            **own,
        )
    measures = json.loads((folder / "health.json").read_text())["measures"]
    row: dict[str, Any] = {"tokenizer": name}
    for column, path in MEASURES.items():
        value = measures
        for key in path:
            value = value[key]
        row[column] = float(value)
    return row


if __name__ == "__main__":
    main()
