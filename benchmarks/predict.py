"""`predict` and `search` beside `embed`: images/s, peak memory, and whether a killed `predict` resumes to the same file.

    python -m benchmarks predict --images FOLDER            # any source that --images takes, e.g. CIFAR-10's 50,000 files
    python -m benchmarks predict --num-images 64            # crops of scikit-learn's photographs

Each command runs in a fresh process, by a ViT with random weights: weights change neither. `search` is timed twice: in full, and with the
features of `embed`, which is the search alone. Then `predict` is killed in the middle and resumed. Memory is that of the main process,
without the loader's workers.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mapet
from benchmarks.core import Result, Row, in_new_process, memory_now, peak_memory, timed
from benchmarks.data import write_photos
from benchmarks.tables import Table
from mapet.data.sources import list_images
from mapet.files import file_hash
from mapet.models.backbone import create_vit, save_backbone

CLASSES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", help="default: crops of scikit-learn's photographs, as JPEG files")
    parser.add_argument("--num-images", type=int, default=256, help="of the default images")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")


def run(args: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.images is None:
            write_photos(None, folder / "photos", args.num_images)
        images = args.images or str(folder / "photos")
        torch.manual_seed(0)
        vit = create_vit(args.model, (args.image_size, args.image_size), args.patch_size)
        vit.reset_classifier(CLASSES)
        save_backbone(vit, folder / "vit", [f"class {number}" for number in range(CLASSES)], 1.0)
        count = len(list_images(images))
        options = {"backbone": str(folder / "vit"), "images": images, "device": args.device}
        features = {"features": folder / "features"}
        works: dict[str, tuple[Callable[..., object], dict[str, object]]] = {
            "embed": (mapet.embed, {"out": folder / "features"}),
            "predict": (mapet.predict, {"out": folder / "whole.csv"}),
            "search": (mapet.search, {"out": folder / "search"}),
            "search, with features": (mapet.search, {"out": folder / "again", **features}),
        }
        rows: list[Row] = []
        for name, (command, more) in works.items():
            seconds, added = in_new_process(measure, command.__name__, options | more)
            rows.append({"name": name, "seconds": seconds, "images_per_s": count / seconds, "added_GB": added / 1e9})
        rows[1]["same_when_killed"] = kill_and_resume(folder, options, rows[1]["seconds"] / 2)
    data = f"{count:,} images, {args.model} at {args.image_size} px in patches of {args.patch_size}"
    return Result(rows, data)


def measure(name: str, options: dict[str, object]) -> tuple[float, int]:
    """Return the seconds of a command, and its peak memory above that of a process that has imported torch."""
    before = memory_now()
    seconds, _ = timed(lambda: getattr(mapet, name)(**options))
    return seconds, peak_memory() - before


def kill_and_resume(folder: Path, options: dict[str, str], seconds: float) -> bool:
    """Kill `predict` some seconds after its first batch, resume it, and compare the file with the uninterrupted one."""
    argv = [sys.executable, "-m", "mapet", "predict", "--out", str(folder / "parts.csv")]
    argv += [arg for name, value in options.items() for arg in (f"--{name}", value)]
    process = subprocess.Popen(argv)
    while process.poll() is None and not (folder / ".parts.csv.partial" / "features.npy").exists():
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*argv, "--resume"], check=True)
    return file_hash(folder / "parts.csv") == file_hash(folder / "whole.csv")


SMOKE = ["--num-images", "12", "--image-size", "32", "--patch-size", "16", "--device", "cpu"]
TABLES = {
    "main": Table({
        "": "{name}", "images/s": "{images_per_s:,.0f}", "seconds": "{seconds:,.1f}", "memory beyond the start, GB": "{added_GB:.2f}",
    }),
}  # fmt: skip
