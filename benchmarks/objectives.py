"""Which tokens, which objective, how long? Small ViTs on CIFAR-10, NEU and pneumonia, one run for each line of the plan.

    python -m benchmarks objectives --plan                                   # every run, with its measured or estimated minutes
    python -m benchmarks objectives --data FOLDER --out runs/objectives --groups tokens --json benchmarks/results/objectives.json

A run pre-trains without labels, then its frozen features are scored on the test images by linear probe, k-NN and the linear probe of 5
and 10 labels a class, for the mean and for 2 x 2 cells of the last layer's patches. What is done in `--out` is not done again, a run
that was stopped resumes, and `--json` is written after every run. One thread for each process: OMP_NUM_THREADS=1.
"""

import argparse
import math
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from scipy import stats

import mapet
from benchmarks.core import Result, Row, cached, save
from benchmarks.data import cifar10, first_of_each_class, unpack
from benchmarks.tables import Table
from mapet.run_state import RunState

PROBES = ("logistic", "knn", "few_shot_5", "few_shot_10")
POOLS = ("mean", "2x2")
FEW_SHOT_SEEDS = 10
NUM_VIEWS = 8
"""Stored views of each image where pre-training sees crops."""
TOKENIZERS: dict[str, Row] = {
    "pixels": {"teacher": "pixels"},
    "hog": {"teacher": "hog"},
    "whitened": {"teacher": "whitened"},
    "hog+whitened": {"teacher": ["hog", "whitened"]},
}


@dataclass(frozen=True)
class ImageSet:
    """Images and how small ViTs learn from them.

    Attributes:
        archive: a zip in the folder `--data`; '' stands for digits of 32 px.
        per_class: the first training images of each class are used, this many; None: all.
        sizes: options of `fit-tokenizer`.
        views: of pre-training, tokens computed online unless they are 'center'.
        pretrain: options of `pretrain`.
        pass_seconds: estimated time of one thread for an epoch of MIM.
    """

    archive: str
    per_class: int | None
    sizes: Row
    views: str
    pretrain: Row
    pass_seconds: float


SETS = {
    "CIFAR-10": ImageSet(
        "cifar10.zip", 1000, {"image_size": 32, "patch_size": 4, "vocab_size": 512}, "center",
        {"model_args": {"embed_dim": 96, "depth": 4, "num_heads": 3}, "batch_size": 128}, 30,
    ),
    "EuroSAT": ImageSet(
        "eurosat-mini.zip", None, {"image_size": 64, "patch_size": 8, "vocab_size": 512}, "random-crop",
        {"model_args": {"embed_dim": 128, "depth": 4, "num_heads": 4}, "batch_size": 64}, 10,
    ),
    "NEU": ImageSet(
        "neu.zip", None, {"image_size": 64, "patch_size": 8, "vocab_size": 256, "channels": 1}, "random-crop",
        {"model_args": {"embed_dim": 128, "depth": 4, "num_heads": 4}, "batch_size": 64}, 6,
    ),
    "pneumonia": ImageSet(
        "pneumonia.zip", None, {"image_size": 28, "patch_size": 4, "vocab_size": 256, "channels": 1}, "center",
        {"model_args": {"embed_dim": 96, "depth": 4, "num_heads": 3}, "batch_size": 64}, 12,
    ),
}  # fmt: skip
DIGITS = ImageSet(
    "", 20, {"image_size": 32, "patch_size": 8, "vocab_size": 16}, "center",
    {"model_args": {"embed_dim": 96, "depth": 4, "num_heads": 3}, "batch_size": 32}, 1,
)  # fmt: skip
"""Of trials without `--data`."""
OPTIONS: Row = {"lr": 1.5e-3, "layer_scale_init": None, "drop_path": 0.0, "mask_ratio": 0.75, "probe_every": 0}
COST = {"mim": 1.0, "pim": 1.35, "mapet": 2.0}
"""Seconds of an epoch relative to MIM, estimated from the first runs."""


@dataclass(frozen=True)
class Run:
    """One pre-training.

    Attributes:
        images: name of a set.
        tokenizer: name of a tokenizer.
        objective: as in `pretrain`; '' is the untrained ViT.
        epochs: of pre-training.
        seed: of weights, order and masks.
        variant: name of the change, '' for none.
        changes: options of `pretrain` that differ from `OPTIONS`.
    """

    images: str
    tokenizer: str
    objective: str
    epochs: float
    seed: int
    variant: str = ""
    changes: Row = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        parts = (
            self.images,
            self.tokenizer,
            self.objective or "untrained",
            f"{self.epochs:g} epochs",
            self.variant,
            f"seed {self.seed}",
        )
        return ", ".join(filter(None, parts))

    @property
    def minutes(self) -> float:
        """Estimated minutes of one thread, with a minute for evaluation."""
        return 1 + self.epochs * SETS[self.images].pass_seconds * COST.get(self.objective, 1.0) / 60


def seeds(run: Run, count: int) -> list[Run]:
    """Return one run for each of `count` seeds."""
    return [replace(run, seed=seed) for seed in range(count)]


def in_turn(*groups: list[Run]) -> list[Run]:
    """Return runs seed by seed, so that a plan that is stopped has compared what it has."""
    return sorted((run for group in groups for run in group), key=lambda run: run.seed)


EPOCHS = {"CIFAR-10": 5, "EuroSAT": 25, "NEU": 40, "pneumonia": 10}
NAMES = ("mapet", "pim", "mim")
GROUPS: dict[str, list[Run]] = {
    "untrained": [run for name in SETS for run in seeds(Run(name, "hog", "", 0, 0), 5)],
    "tokens": in_turn(*(
        seeds(Run(name, tokens, "pim", epochs, 0), 5)
        for name, epochs in EPOCHS.items()
        for tokens in ("pixels", "hog+whitened")
    )),
    "more tokens": in_turn(*(
        seeds(Run(name, tokens, "pim", epochs, 0), 3) for name, epochs in EPOCHS.items() for tokens in ("hog", "whitened")
    )),
    "5 epochs": in_turn(*(seeds(Run("CIFAR-10", "hog+whitened", name, 5, 0), 5) for name in NAMES)),
    "20 epochs": in_turn(*(seeds(Run("CIFAR-10", "hog+whitened", name, 20, 0), 3) for name in NAMES)),
    "equal compute": in_turn(*(seeds(Run("CIFAR-10", "hog+whitened", name, 20 * 2 / COST[name], 0), 3) for name in ("pim", "mim"))),
    "60 epochs": [Run("CIFAR-10", "hog+whitened", name, 60, 0) for name in NAMES],
    "NEU": in_turn(*(seeds(Run("NEU", "hog+whitened", name, epochs, 0), 3) for epochs in (40, 160) for name in NAMES)),
}  # fmt: skip
"""Group -> its runs, in the order in which they are made. A run of two groups is made once."""
LONG = {
    name: Run(name, "hog+whitened", "pim", epochs, 0)
    for name, epochs in {"CIFAR-10": 20, "EuroSAT": 50, "NEU": 80, "pneumonia": 30}.items()
}
"""Set -> the pre-training whose backbone is compared with controls, and at several poolings: 21 to 40 minutes of one thread
beside three other programs on 2 cores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the archives")
    parser.add_argument("--out", type=Path, help="runs; what is done there is not done again")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--plan", action="store_true", help="list runs and minutes, make none")


def chosen(args: argparse.Namespace) -> list[Run]:
    """Return the runs of the chosen groups and sets, each once."""
    runs = {run.name: run for group in args.groups for run in GROUPS[group] if run.images in args.sets}
    return list(runs.values())


def run(args: argparse.Namespace) -> Result:
    """Make the chosen runs in order and return their rows; with `--plan` none are made and the rows have the minutes that are expected."""
    runs = chosen(args)
    if args.plan:
        print(f"{len(runs)} runs, {sum(run.minutes for run in runs) / 60:.1f} hours of one thread")
        return Result([{"run": run.name, "minutes": run.minutes} for run in runs], "none: a plan")
    result = Result([], f"{', '.join(args.sets)} of {args.data}", sorted({run.seed for run in runs}))
    for run in runs:
        result.rows.append(cached(args.out / "rows" / f"{run.name}.json", partial(make, run, args.data, args.out)))
        save(args.json, args.name, result)
    return result


def make(run: Run, data: Path, out: Path) -> Row:
    """Pre-train, and score the frozen features.

    Returns:
        What was run; seconds of pre-training, images seen per second and FLOPs; for each pooling and probe the accuracy, balanced where
        the test images are imbalanced, and what the probe selected.
    """
    spec, folder = SETS[run.images], out / run.images
    train, test = (image_list(spec, data, out, part) for part in ("train", "test"))
    seen = {"run": run.name, "set": run.images, "tokenizer": run.tokenizer, "objective": run.objective or "untrained",
            "epochs": run.epochs, "variant": run.variant, "seed": run.seed}  # fmt: skip
    if run.objective:
        trained = pretrain(run, spec, train, folder)
        state = RunState.read(trained)
        seen |= {"seconds": state.seconds, "precision": state.device, "steps": state.counts["steps"]}
        source = str(trained)
    else:
        source = f"random:{next(path.parent.parent for path in folder.glob('*/backbone/config.json'))}"
    for pool in POOLS:
        seen |= {
            f"{pool}_{key}": value
            for key, value in score(source, run.seed, pool, train, test, folder / f"{run.name} {pool}").items()
        }
    return seen


def pretrain(run: Run, spec: ImageSet, images: Path, folder: Path) -> Path:
    """Fit the tokenizer and pre-train in `folder`, where what is finished is not done again; return the run's folder."""
    trained = folder / run.name
    if not (trained / "backbone").exists():
        options = fit_and_tokenize(spec, run.tokenizer, images, folder)
        options |= (
            OPTIONS | spec.pretrain | {"objective": run.objective, "epochs": run.epochs, "seed": run.seed} | run.changes
        )
        mapet.pretrain(images=images, out=trained, resume=(trained / "config.yaml").exists(), **options)
    return trained


def long_runs(data: Path | None, sets: list[str], out: Path) -> Iterator[tuple[str, Path, Path, Path]]:
    """Yield (set, the folder of its run of `LONG`, training images, test images), pre-trained if it is not there.

    Args:
        data: folder of the archives; None: digits, whatever the sets.
        sets: names of `SETS`.
        out: as of the benchmark `objectives`, which shares its runs.
    """
    specs = (
        {name: (SETS[name], LONG[name]) for name in sets}
        if data
        else {"digits": (DIGITS, Run("digits", "hog", "mim", 1, 0))}
    )
    for name, (spec, run) in specs.items():
        train, test = (image_list(spec, data, out, part) for part in ("train", "test"))
        yield name, pretrain(run, spec, train, out / name), train, test


def image_list(spec: ImageSet, data: Path | None, out: Path, part: str) -> Path:
    """Return training or test images of a set: a folder of class folders, or the text file of the first images of each class."""
    folder = (unpack(data / spec.archive, out / "images") if data else cifar10(None, out)) / part
    return first_of_each_class(folder, spec.per_class) if spec.per_class and part == "train" else folder


def fit_and_tokenize(spec: ImageSet, name: str, images: Path, folder: Path) -> Row:
    """Fit a tokenizer and store its tokens, unless they are there; return them as options of `pretrain`."""
    tokenizer, tokens = folder / f"tokenizer {name}", folder / f"tokens {name}"
    if not tokenizer.exists():
        mapet.fit_tokenizer(images=images, out=tokenizer, **spec.sizes, **TOKENIZERS[name])
    if not (tokens / "run.json").exists() or RunState.read(tokens).status != "finished":
        views = {"views": spec.views} | ({"num_views": NUM_VIEWS} if spec.views != "center" else {})
        mapet.tokenize(images=images, tokenizer=tokenizer, out=tokens, resume=tokens.exists(), **views)
    return {"tokenizer": tokenizer, "tokens": tokens}


def score(source: str, seed: int, pool: str, train: Path, test: Path, out: Path) -> Row:
    """Score frozen features by all probes; what is in `out` is replaced."""
    shutil.rmtree(out, ignore_errors=True)  # of an evaluation that was stopped
    mapet.evaluate(
        backbone=[source], seed=seed, images=train, test_images=test, out=out, pool=pool, controls=["none"],
        protocols=["logistic", "knn", "few-shot"], few_shot=[5, 10], num_seeds=FEW_SHOT_SEEDS,
    )  # fmt: skip
    (by_protocol,) = RunState.read(out).results["backbones"].values()
    row: Row = {}
    for protocol in by_protocol.values():
        for name, metric in protocol["metrics"].items():
            row |= {name: metric["value"]} | (
                {f"{name}_selected": metric["selected"]} if metric.get("selected") else {}
            )
    return row


def mean_and_interval(values: list[float]) -> str:
    """Return the mean with half of its 95 % interval by Student's t, or the value of a single run."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def by_setting(rows: list[Row], images: str | None = None, pool: str = "mean") -> list[Row]:
    """Return a row for each set, tokenizer, objective, length and variant: number of seeds, seconds, each probe with its interval."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if images in (None, row["set"]):
            key = row["set"], row["tokenizer"] if row["epochs"] else "", row["objective"], row["epochs"], row["variant"]
            groups.setdefault(key, []).append(row)
    found = []
    for (name, tokenizer, objective, epochs, variant), members in groups.items():
        cells: Row = {
            "set": name,
            "tokenizer": tokenizer,
            "objective": objective,
            "epochs": epochs,
            "variant": variant or None,
        }
        if all("seconds" in row for row in members):
            cells["minutes"] = statistics.median(row["seconds"] for row in members) / 60
        cells["seeds"] = len(members)
        for probe in PROBES:
            cells[probe] = mean_and_interval([leading(row, pool, probe) for row in members])
        found.append(cells)
    return found


def leading(row: Row, pool: str, probe: str) -> float:
    """Return a probe's accuracy, balanced where the test images are imbalanced."""
    balanced = f"{pool}_{probe}_balanced_accuracy"
    return float(row[balanced if balanced in row else f"{pool}_{probe}"])


def pairs(rows: list[Row], pool: str = "mean") -> list[Row]:
    """Compare tokens with those of `pixels`, paired by seed: a row for each set, tokenizer, objective and length."""
    by_key = {
        (row["set"], row["objective"], row["epochs"], row["variant"], row["seed"], row["tokenizer"]): row
        for row in rows
    }
    differences: dict[tuple[Any, ...], list[Row]] = {}
    for (*setting, tokenizer), row in by_key.items():
        if row["epochs"] and tokenizer != "pixels" and (other := by_key.get((*setting, "pixels"))):
            difference = {probe: leading(row, pool, probe) - leading(other, pool, probe) for probe in PROBES}
            differences.setdefault((row["set"], tokenizer, row["objective"], row["epochs"]), []).append(difference)
    return [
        {"set": name, "tokenizer": tokenizer, "objective": objective, "epochs": epochs, "seeds": len(members)}
        | {probe: mean_and_interval([row[probe] for row in members]) for probe in PROBES}
        for (name, tokenizer, objective, epochs), members in differences.items()
    ]


SMOKE = ["--plan"]
COLUMNS = {
    "set": "{set}", "tokens": "{tokenizer}", "objective": "{objective}", "epochs": "{epochs:g}", "variant": "{variant}", "seeds": "{seeds}",
    "minutes": "{minutes:.1f}", "linear probe": "{logistic}", "k-NN": "{knn}", "5 labels a class": "{few_shot_5}",
    "10 labels a class": "{few_shot_10}",
}  # fmt: skip
TABLES = {
    "plan": Table({"run": "{run}", "minutes": "{minutes:.0f}"}, rows=lambda rows: [row for row in rows if "set" not in row]),
    "main": Table(COLUMNS, rows=lambda rows: by_setting([row for row in rows if "set" in row])),
    "2x2": Table(COLUMNS, rows=lambda rows: by_setting([row for row in rows if "set" in row], pool="2x2")),
    "pairs": Table(COLUMNS, rows=lambda rows: pairs([row for row in rows if "set" in row])),
}  # fmt: skip
