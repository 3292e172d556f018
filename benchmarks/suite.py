"""All speed benchmarks, one after the other: tables on the screen, JSON in a folder. `make bench` runs this.

    python benchmarks/suite.py --photos PHOTOS --out benchmark_results

Leave the machine alone while it runs (about half an hour on 2 cores; --quick: some minutes). On a machine with a GPU the step is
measured there as well, with ViT-T, S and B at batch 256 and at the largest batch that fits.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from report import machine, write_report

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photographs; the tokenizer's benchmark needs it")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    quick = ["--quick"] if options.quick else []
    photos = ["--photos", str(options.photos)] if options.photos else []
    work = {
        "training_step": ["training_step.py", "--device", "cpu", *(["--rounds", "3"] if quick else [])],
        "training_step_compiled": ["training_step.py", "--device", "cpu", "--compile"],
        "cost_growth": ["cost_growth.py", *quick],
        "data_path": ["data_path.py", *photos, *quick],
        "start_up": ["start_up.py"],
    }
    if torch.cuda.is_available():
        cuda = ["--device", "cuda", "--models", "base", "small", "tiny", "--batch", "256", "--largest", "--kernels"]
        work["training_step_gpu"] = ["training_step.py", *cuda]
    if options.photos:
        work["tokenizer"] = ["tokenizer.py", "--images", str(options.photos), *quick]
    failed = []
    for name, (script, *arguments) in work.items():
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        command = [sys.executable, str(HERE / script), *arguments, "--json", str(options.out / f"{name}.json")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"({time.monotonic() - started:.0f} s)", flush=True)
    write_report(options.out / "machine.json", machine())
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
