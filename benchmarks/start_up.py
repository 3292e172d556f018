"""How soon something happens: `mapet --help`, and the first training step after `mapet pretrain`."""

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.core import Result, in_turns
from benchmarks.tables import Table
from mapet.data.digits import write_digits

MAPET = [sys.executable, "-m", "mapet"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "mapet --help": [*MAPET, "--help"],
    "mapet pretrain --help": [*MAPET, "pretrain", "--help"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace) -> Result:
    works = {what: functools.partial(quietly, *command) for what, command in COMMANDS.items()}
    seconds = {
        name: statistics.median(values)
        for name, values in in_turns(works, args.rounds, warmup=int(args.rounds > 1)).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        seconds["first training step of the digits, from the command"] = first_step(Path(folder))
    return Result([{"what": name, "seconds": value} for name, value in seconds.items()], "scikit-learn's digits")


def quietly(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


def first_step(folder: Path) -> float:
    """Seconds from the command to the first logged step of a small run, imports, scan and first batch included."""
    train, _ = write_digits(folder / "digits", 1437)
    size = ["--image-size", "8", "8", "--patch-size", "2", "--channels", "1"]
    quietly(*MAPET, "fit-tokenizer", "--images", train, "--out", folder / "tokenizer", *size)
    command: list[str | Path] = [
        *MAPET,
        "pretrain",
        "--images",
        train,
        "--tokenizer",
        folder / "tokenizer",
        "--out",
        folder / "run",
    ]
    command += ["--log-interval", "1", "--model-args", "embed_dim=64", "depth=4", "num_heads=4"]
    metrics = folder / "run" / "metrics.jsonl"
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"pretrain ended with exit code {process.returncode} before its first step")
            time.sleep(0.02)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


SMOKE = ["--rounds", "1"]
TABLES = {"main": Table({"": "{what}", "s": "{seconds:.2f}"})}
