"""One entry to all benchmarks.

python -m benchmarks --list
python -m benchmarks start_up --json benchmarks/results/start_up.json
python -m benchmarks training_step --smoke      # does it run?
python -m benchmarks all --photos PHOTOS        # every speed benchmark, about half an hour; JSON in benchmark_results/
python -m benchmarks gpu-data --cifar10 cifar10.zip --photos photos.zip      # a file for gpu and gpu-study
python -m benchmarks tables [--check]           # the docs' tables from benchmarks/results/*.json
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import gpu_data, tables
from benchmarks.core import ROOT, save, timed

NAMES = (
    "training_step", "step_scaling", "flops", "data_loading", "image_lists", "tokenizer", "start_up", "probe_memory", "demo", "cifar10", "study",
    "comparison", "pooling", "controls", "objectives", "variants", "cae", "predict", "verdict", "gpu", "gpu_study", "gpu_data",
)  # fmt: skip
SPEED = {
    "training_step": "--device cpu",
    "training_step-compiled": "--device cpu --compile",
    "training_step-gpu": "--device cuda --models base small tiny --batch 256 --largest --kernels",
    "step_scaling": "",
    "data_loading": "",
    "image_lists": "",
    "tokenizer": "--features pixels --max-patches 30000",
    "start_up": "",
}
"""Result -> options of `all`."""


def main() -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    argv = sys.argv[1:]
    argv[:1] = [arg.replace("-", "_") if arg[0] != "-" else arg for arg in argv[:1]]
    names: Sequence[str] = NAMES
    if argv[:1] in (["gpu"], ["gpu_study"]):  # without the others, and what they import
        names = argv[:1]
        early = argparse.ArgumentParser(add_help=False)
        early.add_argument("--data", type=Path, default=gpu_data.FILE)
        gpu_data.add_packages(early.parse_known_args(argv)[0].data)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=raw)
    parser.add_argument("--list", action="store_true", help="name all benchmarks")
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    for name, module in modules.items():
        command = commands.add_parser(name, description=module.__doc__, formatter_class=raw)
        command.add_argument("--json", type=Path, help="write the result here")
        command.add_argument("--smoke", action="store_true", help=f"smallest setting: {' '.join(module.SMOKE)}")
        module.add_arguments(command)
    command = commands.add_parser("all", description=run_all.__doc__)
    command.add_argument("--photos", help="folder of photographs, for data_loading and tokenizer")
    command.add_argument("--out", type=Path, default=Path("benchmark_results"))
    command.add_argument("--smoke", action="store_true", help="smallest settings: do they run?")
    command = commands.add_parser("tables", description=tables.update.__doc__)
    command.add_argument("--check", action="store_true", help="write nothing, fail if a table differs")

    with tempfile.TemporaryDirectory() as scratch:
        if "--smoke" in argv and argv[0] in modules:
            argv[1:1] = [arg.format(scratch=scratch) for arg in modules[argv[0]].SMOKE]
        args = parser.parse_args(argv)
        if args.name in modules:
            run_one(args)
    if args.list:
        print("\n".join(f"{name:<15}{(module.__doc__ or '').splitlines()[0]}" for name, module in modules.items()))
    elif args.name == "all":
        run_all(args)
    elif args.name == "tables":
        changed = ", ".join(str(page.relative_to(ROOT)) for page in tables.update(args.check))
        if changed and args.check:
            sys.exit(f"tables differ from benchmarks/results: {changed}; run `python -m benchmarks tables`")
        print(changed or "nothing to change")
    elif args.name is None:
        parser.print_help()


def run_one(args: argparse.Namespace) -> None:
    """Run a benchmark, print its tables, keep its result."""
    module = importlib.import_module(f"benchmarks.{args.name}")
    result = module.run(args)
    print("\n".join(filter(None, (table.render(result.rows) for table in module.TABLES.values()))))
    save(args.json, args.name, result)


def run_all(args: argparse.Namespace) -> None:
    """Run every speed benchmark in its own process. Nothing else should run meanwhile."""
    failed = []
    for name, options in SPEED.items():
        benchmark = name.partition("-")[0]
        if name.endswith("-gpu") and not torch.cuda.is_available():
            continue
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            benchmark,
            *options.split(),
            "--json",
            str(args.out / f"{name}.json"),
        ]
        command += ["--photos", args.photos] if args.photos and benchmark in ("data_loading", "tokenizer") else []
        print(f"\n== {name}", flush=True)
        seconds, code = timed(lambda: subprocess.call([*command, *["--smoke"] * args.smoke]))  # noqa: B023
        print(f"({seconds:.0f} s)", flush=True)
        failed += [name] if code else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
