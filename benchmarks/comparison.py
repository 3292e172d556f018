"""mapet, the MAE and BEiT objectives, lightly-train and no pre-training, at one budget of CPU time.

    python -m venv LT && LT/bin/pip install lightly-train
    python -m benchmarks comparison --data cifar10.zip --lightly LT/bin/python --out runs/comparison
    python -m benchmarks comparison --photos photos.zip --lightly LT/bin/python --out runs/comparison --budget 67

One ViT, pre-trained by each method on the same images without labels for as many seconds of one core, at each seed; epochs are
chosen by timing short runs first, and what was really used is reported (tokenizer and tokens count). Then linear probe and k-NN of
frozen features and fine-tuning on 10 labels a class, against the same ViT from random weights. What is done already is not done again.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from benchmarks.core import Result, Row, cached
from benchmarks.data import add_data, cifar10, first_of_each_class, unpack
from benchmarks.tables import Table
from mapet.models.backbone import save_backbone
from mapet.run_state import RunState

METHODS: dict[str, list[str]] = {
    "`mapet` (MaPeT)": [],
    "`mapet --objective pim`": ["--objective", "pim"],
    "BEiT's objective in mapet": ["--objective", "mim", "--patch-order", "blockwise", "--mask-ratio", "0.4"],
    "MAE's target in mapet": ["--objective", "mim", "--target", "pixels", "--mask-ratio", "0.75"],
    "lightly-train, SimCLR": ["simclr"],
    "lightly-train, DINO": ["dino"],
}
"""Name -> options of `pretrain`, or lightly-train's method. Tokens are those of the `pixels` teacher: no method has seen a label."""
SCRATCH = "random weights; fine-tuned: from scratch"
METRICS = ("logistic", "knn", "finetune")
WIDTH, DEPTH, HEADS = 96, 4, 3
PRETRAIN = {"probe_every": 0, "layer_scale_init": "none", "drop_path": 0, "lr": 1.5e-3, "batch_size": 128}
FINETUNE = {
    "labels_per_class": 10, "views": "random-crop", "min_crop_scale": 0.5, "drop_path": 0, "lr": 1e-3, "batch_size": 32,
}  # fmt: skip
GROUPS = {
    "bird": ((1_503_000, 1_623_000), (1_794_000, 1_861_000), (2_002_000, 2_059_000)),
    "dog": ((2_085_000, 2_120_000),),
    "other animal": ((0, 2_666_000),),
    "artifact": ((2_666_000, 4_620_000),),
    "food, plant, place, person": ((4_620_000, 99_999_999),),
}
"""Of ImageNet's classes, by wnids; the first that holds one."""


@dataclass
class Benchmark:
    """Images, input size of the ViT, and seconds of one core for each run.

    Attributes:
        train: text file of images; their labels are used by probes alone.
        test, test_few: labeled images for probes and for fine-tuning.
        lightly: python of an environment with lightly-train.
    """

    out: Path
    train: Path
    test: Path
    test_few: Path
    image_size: int
    patch_size: int
    vocab_size: int
    budget: float
    finetune_epochs: int
    lightly: Path | None

    def tokens(self) -> float:
        """Fit tokenizer and tokens once for all runs; return seconds of one core, added to each run."""

        def work() -> float:
            remove(self.out / "tokenizer", self.out / "tokens")
            sizes = {"image_size": self.image_size, "patch_size": self.patch_size, "vocab_size": self.vocab_size}
            made = {"tokenizer": self.out / "tokenizer", "out": self.out / "tokens"}
            fit = mapet("fit-tokenizer", images=self.train, **sizes, out=self.out / "tokenizer")
            tokenize = mapet("tokenize", images=self.train, **made, views="center-flip")
            return sum(cpu_seconds(command, self.out / "tokens.txt") for command in (fit, tokenize))

        return cached(self.out / "tokens.json", work)

    def pretrain(self, method: str, seed: int, epochs: int, folder: Path) -> float:
        """Write a timm folder at folder/backbone; return seconds of one core."""
        remove(folder)
        log = folder.with_suffix(".txt")
        if not method.startswith("lightly-train"):
            made = {"tokenizer": self.out / "tokenizer", "tokens": self.out / "tokens", "out": folder}
            command = mapet("pretrain", images=self.train, **made, epochs=epochs, seed=seed, **PRETRAIN)
            size = ["--model-args", f"embed_dim={WIDTH}", f"depth={DEPTH}", f"num_heads={HEADS}"]
            return cpu_seconds([*command, *size, *METHODS[method]], log)
        numbers = [epochs, seed, WIDTH, DEPTH, HEADS, self.image_size, self.patch_size]
        script = Path(__file__).with_name("lightly_run.py")
        seconds = cpu_seconds([self.lightly, script, self.train, folder, *METHODS[method], *numbers], log)
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=self.image_size, patch_size=self.patch_size, embed_dim=WIDTH, depth=DEPTH,
            num_heads=HEADS, num_classes=0,
        )  # fmt: skip
        vit.load_state_dict(torch.load(folder / "exported_models" / "exported_last.pt", weights_only=True))
        save_backbone(vit, folder / "backbone")
        return seconds

    def epochs_within_budget(self, method: str) -> int:
        """Epochs that fit, from a run of few."""
        folder = self.out / method / "pilot"
        lightly = method.startswith("lightly-train")

        def pilot() -> dict[str, float]:
            few = max(1, 2000 // len(self.train.read_text().split()))
            python, module = (self.lightly, "lightly_train") if lightly else (sys.executable, "mapet")
            start = cpu_seconds([python, "-c", f"import {module}, timm"], folder / "log.txt")
            return {"start": start, "epoch": (self.pretrain(method, 0, few, folder / "run") - start) / few}

        known = cached(folder / "pilot.json", pilot)
        before = known["start"] + (0.0 if lightly else self.tokens())
        return max(1, round((self.budget - before) / known["epoch"]))

    def measure(self, method: str, seed: int, epochs: int) -> Row:
        """Pre-train and evaluate."""
        folder = self.out / method / f"seed_{seed}"

        def cost() -> Row:
            if method == SCRATCH:
                return {"epochs": 0, "seconds": 0.0}
            tokens = 0.0 if method.startswith("lightly-train") else self.tokens()
            return {"epochs": epochs, "seconds": tokens + self.pretrain(method, seed, epochs, folder / "run")}

        spent = cached(folder / "cost.json", cost)
        scratch = method == SCRATCH
        backbone = self.out / next(iter(METHODS)) / "seed_0" / "run" if scratch else folder / "run" / "backbone"
        labeled = {"backbone": backbone, "images": self.train, "seed": seed}
        evaluation, tuned, log = folder / "evaluation", folder / "tuned", folder / "log.txt"
        source = f"random:{backbone}" if scratch else str(backbone)
        if not (evaluation / "evaluation.md").exists():
            remove(evaluation)
            options = labeled | {"backbone": source, "test_images": self.test, "out": evaluation}
            cpu_seconds([*mapet("evaluate", **options), "--protocols", "logistic", "knn"], log)
        if not (tuned / "model").exists():
            remove(tuned)
            options = labeled | FINETUNE | {"test_images": self.test_few, "epochs": self.finetune_epochs, "out": tuned}
            command = [*mapet("finetune", **options), *["--from-scratch"] * scratch]
            cpu_seconds(command, log)
        results = RunState.read(evaluation).results["backbones"][source]
        result = {name: results[name]["metrics"][name]["value"] for name in ("logistic", "knn")}
        accuracy = RunState.read(tuned).results["accuracy"]
        return {"method": method, "logistic": result["logistic"], "knn": result["knn"], "finetune": accuracy, **spent}


def mapet(name: str, **options: object) -> list[object]:
    """Arguments of a command."""
    argv = [arg for key, value in options.items() for arg in (f"--{key.replace('_', '-')}", value)]
    return [sys.executable, "-m", "mapet", name, *argv]


def cpu_seconds(command: list[object], log: Path) -> float:
    """Run a command on one core; returns the seconds of CPU time it took."""
    log.parent.mkdir(parents=True, exist_ok=True)
    argv = [str(arg) for arg in command]
    with log.open("a") as file:
        process = subprocess.Popen(
            argv,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MAPET_WORKERS": "0"},
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(argv)} failed, see {log}")
    return usage.ru_utime + usage.ru_stime


def remove(*folders: Path) -> None:
    """Remove the files of an interrupted run."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def grouped(photos: Path, out: Path) -> tuple[Path, Path]:
    """The photos in five coarse classes, one half to train on and one to test on: every other image of a class."""
    halves: tuple[list[str], list[str]] = ([], [])
    counts = dict.fromkeys(GROUPS, 0)
    for file in sorted(unpack(photos, out).rglob("*.JPEG")):
        number = int(file.name[1:9])
        name = next(name for name, spans in GROUPS.items() if any(a <= number < b for a, b in spans))
        link = out / "grouped" / name.replace(", ", "-").replace(" ", "-") / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(file.resolve())
        halves[counts[name] % 2].append(str(link.relative_to(out / "grouped")))
        counts[name] += 1
    lists = out / "grouped" / "train.txt", out / "grouped" / "test.txt"
    for path, names in zip(lists, halves, strict=True):
        path.write_text("\n".join(names) + "\n")
    return lists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--photos", type=Path, help="photos.zip or its folder, instead of CIFAR-10")
    parser.add_argument(
        "--lightly", type=Path, help="python of an environment with lightly-train; else its methods are skipped"
    )
    parser.add_argument("--budget", type=float, default=200, help="seconds of one core")
    parser.add_argument("--finetune-epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--per-class", type=int, default=500, help="of CIFAR-10")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))


def run(args: argparse.Namespace) -> Result:
    if args.photos:
        train, test = grouped(args.photos, args.out)
        bench = Benchmark(
            args.out / "photos", train, test, test, 64, 8, 128, args.budget, args.finetune_epochs, args.lightly
        )
    else:
        data = cifar10(args.data, args.out)
        train, few = first_of_each_class(data / "train", args.per_class), first_of_each_class(data / "test", 200)
        bench = Benchmark(
            args.out / "cifar", train, data / "test", few, 32, 4, 512, args.budget, args.finetune_epochs, args.lightly
        )
    bench.tokens()
    methods = [name for name in args.methods if args.lightly or not name.startswith("lightly-train")]
    with ThreadPoolExecutor(2) as pool:  # one core each
        epochs = dict(zip(methods, pool.map(bench.epochs_within_budget, methods), strict=True)) | {SCRATCH: 0}
        first, *jobs = [(method, seed, epochs[method]) for method in epochs for seed in args.seeds]
        rows = [
            bench.measure(*first),
            *pool.map(lambda job: bench.measure(*job), jobs),
        ]  # from scratch: the first's architecture
    return Result(
        over_seeds(rows),
        f"{args.photos or args.data or 'digits of 32 px'}, {len(train.read_text().split())} images",
        args.seeds,
    )


def over_seeds(runs: list[Row]) -> list[Row]:
    """Mean and single seeds, a row for each method, best linear probe first."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        row: Row = {
            "method": method,
            "epochs": own[0]["epochs"],
            "seconds": statistics.mean(run["seconds"] for run in own),
        }
        for key in METRICS:
            values = [run[key] for run in own]
            row |= {key: statistics.mean(values), f"{key}_seeds": values}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["logistic"])


def joined(rows: list[Row]) -> list[Row]:
    """Seeds as text."""
    return [
        row | {f"{key}_seeds": ", ".join(f"{value:.3f}" for value in row[f"{key}_seeds"]) for key in METRICS}
        for row in rows
    ]


SMOKE = [
    "--out",
    "{scratch}",
    "--budget",
    "1",
    "--finetune-epochs",
    "1",
    "--seeds",
    "0",
    "--per-class",
    "20",
    "--methods",
    next(iter(METHODS)),
]
TABLES = {
    "main": Table({
        "": "{method}", "linear probe": "{logistic:.3f} ({logistic_seeds})", "k-NN": "{knn:.3f} ({knn_seeds})",
        "fine-tuned, 10 labels a class": "{finetune:.3f} ({finetune_seeds})", "epochs": "{epochs}", "seconds of a core": "{seconds:.0f}",
    }, rows=joined),
}  # fmt: skip
