"""What a person would otherwise run, at the same time budget: mapet, the MAE and BEiT objectives, lightly-train, nothing.

    python -m venv LT && LT/bin/pip install lightly-train
    python benchmarks/comparison.py --cifar10 cifar10.zip --photos photos.zip --lightly LT/bin/python --out runs/comparison

One ViT, pre-trained by each method on the same images without labels for as many seconds of one core, at each seed; passes
over the images are chosen by timing short runs first, and what was really used is reported (tokenizer and tokens
count). Then linear probe and k-NN of frozen features and fine-tuning on a few labels, against the same ViT from random
weights. What is done already is not done again. Writes comparison.md and comparison.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from cifar10_data import first_of_each_class, unpack

from mapet.files import write_json
from mapet.models.backbone import save_backbone
from mapet.run_state import RunState

HERE = Path(__file__).parent
MAPET = [sys.executable, "-m", "mapet"]
BATCH, PER_CLASS = 128, 500
METHODS: dict[str, list[str]] = {
    "mapet": [],
    "mapet --objective pim": ["--objective", "pim"],
    "BEiT's objective in mapet": ["--objective", "mim", "--patch-order", "blockwise", "--mask-ratio", "0.4"],
    "MAE's target in mapet": ["--objective", "mim", "--target", "pixels", "--mask-ratio", "0.75"],
    "lightly-train, simclr": [],
    "lightly-train, dino": [],
}
"""Name -> options of `pretrain`. Words are those of the `pixels` teacher: no method has seen a label."""
GROUPS = {
    "bird": ((1_503_000, 1_623_000), (1_794_000, 1_861_000), (2_002_000, 2_059_000)),
    "dog": ((2_085_000, 2_120_000),),
    "other animal": ((0, 2_666_000),),
    "artefact": ((2_666_000, 4_620_000),),
    "food, plant, place, person": ((4_620_000, 99_999_999),),
}
"""Of ImageNet's classes, by WordNet's numbers; the first that holds one."""


@dataclass
class Data:
    """Images and how the ViT sees them.

    Attributes:
        train: text file of the images; their labels are used by probes alone.
        test: folder or text file of labelled images.
        test_few: likewise, for fine-tuning.
        budget: seconds of one core.
    """

    name: str
    train: Path
    test: Path
    test_few: Path
    image: int
    patch: int
    budget: float
    words: int
    width: int = 96
    depth: int = 4
    heads: int = 3

    @property
    def count(self) -> int:
        return len(self.train.read_text().split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="cifar10.zip, or its folder")
    parser.add_argument("--photos", type=Path, help="photos.zip, or its folder")
    parser.add_argument("--lightly", type=Path, required=True, help="python of an environment with lightly-train")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=300, help="seconds of one core for CIFAR-10; photos: a third")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sets = []
    if options.cifar10:
        folder = unpack(options.cifar10, options.out)
        train, test = first_of_each_class(folder / "train", PER_CLASS), first_of_each_class(folder / "test", 200)
        sets.append(Data("cifar10", train, folder / "test", test, 32, 4, options.budget, 512))
    if options.photos:
        train, test = group(options.photos, options.out)
        sets.append(Data("photos", train, test, test, 64, 8, options.budget / 3, 128))
    for data in sets:
        tokens(data, options.out)
        with ThreadPoolExecutor(2) as pool:
            epochs = pool.map(lambda method, data=data: epochs_within_budget(method, data, options), options.methods)
            rates = dict(zip(options.methods, epochs, strict=True)) | {"from scratch": 0}
        jobs = [(method, seed) for seed in range(options.seeds) for method in rates]
        with ThreadPoolExecutor(2) as pool:  # one core each
            list(pool.map(lambda job, data=data, rates=rates: measure(*job, rates[job[0]], data, options), jobs))
        report(data, options)


def group(photos: Path, out: Path) -> tuple[Path, Path]:
    """The photos in five coarse classes of 500, one half to train on and one to test on: every other image of a class."""
    folder = out / "photos"
    if photos.suffix == ".zip" and not folder.exists():
        with zipfile.ZipFile(photos) as archive:
            archive.extractall(folder)
    files = sorted((folder if photos.suffix == ".zip" else photos).rglob("*.JPEG"))
    halves: tuple[list[str], list[str]] = ([], [])
    counts = dict.fromkeys(GROUPS, 0)
    for file in files:
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


def run(command: list[str], log: Path) -> float:
    """Runs it on one core; returns the seconds of processor time it took."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed, see {log}")
    return usage.ru_utime + usage.ru_stime


def remove(*folders: Path) -> None:
    """What a run that was stopped left."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def tokens(data: Data, out: Path) -> float:
    """What mapet needs before training, once for all; returns the seconds of one core, which count for each run."""
    folder = out / data.name
    done = folder / "tokens.json"
    if not done.exists():
        remove(folder / "tokenizer", folder / "tokens")
        images = ["--images", str(data.train), "--workers", "0"]
        sizes = ["--image-size", str(data.image), "--patch-size", str(data.patch), "--vocab-size", str(data.words)]
        words = ["--tokenizer", str(folder / "tokenizer"), "--out", str(folder / "tokens"), "--views", "center-flip"]
        log = folder / "tokens.txt"
        seconds = run([*MAPET, "fit-tokenizer", *images, *sizes, "--out", str(folder / "tokenizer")], log)
        seconds += run([*MAPET, "tokenize", *images, *words], log)
        write_json(done, seconds)
    return json.loads(done.read_text())


def pretrain(method: str, seed: int, epochs: int, data: Data, folder: Path, options: argparse.Namespace) -> float:
    """Leaves a timm folder at folder/backbone; returns the seconds of one core."""
    remove(folder)
    if method.startswith("lightly-train"):
        numbers = map(str, [epochs, seed, data.width, data.depth, data.heads, data.image, data.patch])
        command = [str(options.lightly), str(HERE / "lightly_run.py"), str(data.train), str(folder), method.split()[-1]]
        seconds = run([*command, *numbers], folder.with_suffix(".txt"))
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=data.image, patch_size=data.patch, embed_dim=data.width, depth=data.depth,
            num_heads=data.heads, num_classes=0,
        )  # fmt: skip
        vit.load_state_dict(torch.load(folder / "exported_models" / "exported_last.pt", weights_only=True))
        save_backbone(vit, folder / "backbone")
        return seconds
    made = options.out / data.name
    command = [*MAPET, "pretrain", "--images", str(data.train), "--workers", "0"]
    command += ["--tokenizer", str(made / "tokenizer"), "--tokens", str(made / "tokens"), "--out", str(folder)]
    command += ["--model-args", f"embed_dim={data.width}", f"depth={data.depth}", f"num_heads={data.heads}"]
    command += ["--layer-scale-init", "none", "--drop-path", "0", "--lr", "1.5e-3", "--batch-size", str(BATCH)]
    command += ["--epochs", str(epochs), "--seed", str(seed), "--probe-every", "0", *METHODS[method]]
    return run(command, folder.with_suffix(".txt"))


def epochs_within_budget(method: str, data: Data, options: argparse.Namespace) -> int:
    """Passes over the images that fit, from a run of few."""
    folder = options.out / data.name / method / "pilot"
    made = 0.0 if method.startswith("lightly-train") else tokens(data, options.out)
    if not (folder / "pilot.json").exists():
        few = max(1, 2000 // data.count)
        other = method.startswith("lightly-train")
        python, module = (options.lightly, "lightly_train") if other else (sys.executable, "mapet")
        start = run([str(python), "-c", f"import {module}, timm"], folder / "log.txt")
        seconds = pretrain(method, 0, few, data, folder / "run", options) - start
        write_json(folder / "pilot.json", {"start": start, "epoch": seconds / few})
    pilot = json.loads((folder / "pilot.json").read_text())
    return max(1, round((data.budget - made - pilot["start"]) / pilot["epoch"]))


def measure(method: str, seed: int, epochs: int, data: Data, options: argparse.Namespace) -> None:
    """Pre-train and judge; the figures go to result.json."""
    folder = options.out / data.name / method / f"seed_{seed}"
    if (folder / "result.json").exists():
        return
    if not (folder / "cost.json").exists():
        seconds = 0.0
        if method == "from scratch":
            folder.mkdir(parents=True, exist_ok=True)
        else:
            seconds = pretrain(method, seed, epochs, data, folder / "run", options)
            seconds += 0.0 if method.startswith("lightly-train") else tokens(data, options.out)
        write_json(folder / "cost.json", {"epochs": epochs, "seconds": seconds})
    scratch = method == "from scratch"
    backbone = (
        options.out / data.name / next(iter(METHODS)) / "seed_0" / "run" if scratch else folder / "run" / "backbone"
    )
    labelled = ["--backbone", str(backbone), "--images", str(data.train), "--workers", "0", "--seed", str(seed)]
    if not (folder / "probe.json").exists():
        run(
            [*MAPET, "probe", *labelled, "--test-images", str(data.test), "--out", str(folder / "probe.json")],
            folder / "log.txt",
        )
    if not (folder / "tuned" / "model").exists():
        few = [
            "--labels-per-class",
            "10",
            "--epochs",
            "100",
            "--views",
            "crop",
            "--min-crop-scale",
            "0.5",
            "--drop-path",
            "0",
        ]
        few += [
            "--test-images",
            str(data.test_few),
            "--lr",
            "1e-3",
            "--batch-size",
            "32",
            "--scratch-dir",
            str(scratch),
        ]
        remove(folder / "tuned")
        run([*MAPET, "finetune", *labelled, *few, "--out", str(folder / "tuned")], folder / "log.txt")
    result = json.loads((folder / "probe.json").read_text())["untrained" if scratch else "pretrained"]
    result["fine-tuned, 10 labels a class"] = RunState.read(folder / "tuned").results["accuracy"]
    write_json(folder / "result.json", result | json.loads((folder / "cost.json").read_text()))
    print(data.name, method, seed, result, flush=True)


def report(data: Data, options: argparse.Namespace) -> None:
    rows = {}
    for method in [*options.methods, "from scratch"]:
        files = sorted((options.out / data.name / method).glob("seed_*/result.json"))
        rows[method] = [json.loads(file.read_text()) for file in files]
    columns = [key for key in rows["from scratch"][0] if key not in ("epochs", "seconds")]
    lines = [f"| {data.name} | {' | '.join(columns)} | epochs | seconds of a core |", "|---" * (len(columns) + 3) + "|"]
    for method, found in rows.items():
        figures = [", ".join(f"{result[key]:.3f}" for result in found) for key in columns]
        mean = [
            f"**{statistics.mean(result[key] for result in found):.3f}** ({text})"
            for key, text in zip(columns, figures, strict=True)
        ]
        seconds = statistics.mean(result["seconds"] for result in found)
        lines.append(f"| {method} | {' | '.join(mean)} | {found[0]['epochs']} | {seconds:.0f} |")
    text = "\n".join(lines) + "\n"
    write_json(options.out / f"{data.name}.json", rows)
    (options.out / f"{data.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
