"""How soon something happens: `mapet --help`, and the first training step after `mapet pretrain`.

python benchmarks/start_up.py --json start_up.json
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import machine, write_report

PRETRAIN = ["--image-size", "8", "8", "--patch-size", "2", "--channels", "1"]


def seconds(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mapet", *command], check=True, capture_output=True)
    return time.perf_counter() - started


def first_step(folder: Path) -> float:
    """From the command to the first step of a small run, imports, scan and first batch included."""
    from mapet.data.digits import write_digits

    train, _ = write_digits(folder / "digits", 1437)
    subprocess.run(
        [sys.executable, "-m", "mapet", "fit-tokenizer", "--images", train, "--out", folder / "tokenizer", *PRETRAIN],
        check=True,
        capture_output=True,
    )
    command = [sys.executable, "-m", "mapet", "pretrain", "--images", train, "--tokenizer", folder / "tokenizer"]
    command += [
        "--out",
        folder / "run",
        "--log-interval",
        "1",
        "--model-args",
        "embed_dim=64",
        "depth=4",
        "num_heads=4",
    ]
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "run" / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.02)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    python = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        python.append(time.perf_counter() - started)
    figures = {
        "python -c pass": statistics.median(python),
        "mapet --help": statistics.median(seconds("--help") for _ in range(5)),
        "mapet pretrain --help": statistics.median(seconds("pretrain", "--help") for _ in range(5)),
    }
    with tempfile.TemporaryDirectory() as folder:
        figures["first training step, digits"] = first_step(Path(folder))
    for name, value in figures.items():
        print(f"{name}: {value:.2f} s")
    write_report(options.json, {"start_up": figures, "machine": machine()})


if __name__ == "__main__":
    main()
