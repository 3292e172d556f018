"""End commands before and after each of their writes, renames, truncations and deletions, resume them, and compare with an uninterrupted run.

    python -m tests.crash_points [--state STATE.json] [--sample N] [COMMAND ...]

Each attempt is a fork of this process, which has imported torch and all of mapet and has computed nothing. STATE keeps the points that
passed, so that an interrupted call is resumed. The points are Python's audit events of the files below a command's folder; what a crash
leaves within a write is nothing else, as a file is written under a temporary name and renamed.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
IGNORED = ("log.txt", "run.json", "train.log", "report.html", "learning_curve.png")
"""Files with times and processes in them."""
TIMES = re.compile(r', "(images_per_second|data_time_fraction|seconds)": [^,}]+')
IMAGE_LIMITS = ("--image-size", "8", "--patch-size", "2", "--channels", "1")
TINY = ("--model-args", "embed_dim=32", "depth=1", "num_heads=2")
OUT = {"predict": "out.csv"}
"""Name of the output of commands that write a file; of the others it is out."""
LOOP = ("--epochs", "2", "--batch-size", "20", "--lr", "1e-3", "--device", "cpu")


class Point(NamedTuple):
    """Where a command is ended: before or after its n-th event, counted from 1."""

    command: str
    number: int
    after: bool


def perform(event: str, args: tuple[Any, ...]) -> None:
    """Do what an audit event announces, so that the process can be ended right after it."""
    if event == "open":
        os.close(os.open(args[0], args[2] & ~os.O_EXCL, 0o644))
    elif event in ("os.remove", "os.rmdir"):
        function = {"os.remove": os.remove, "os.rmdir": os.rmdir}[event]
        function(args[0], dir_fd=args[1] if args[1] != -1 else None)
    elif event == "os.mkdir":
        os.mkdir(args[0], args[1])
    elif event == "os.truncate":
        os.truncate(*args)
    else:
        os.rename(args[0], args[1])


def end_at(folder: Path, number: int, after: bool, counter: list[int]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that ends this process at the n-th event below a folder; `counter` counts them."""
    active = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal active
        if not active or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return
        if event == "open" and not (args[2] or 0) & WRITES:
            return
        path = args[1] if event == "os.rename" else args[0]
        if not isinstance(path, (str, bytes)):
            return
        if event in ("os.remove", "os.rmdir") and args[1] != -1:
            active = False
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), os.fsdecode(path))
            active = True
        text = os.fsdecode(path)
        if not text.startswith(str(folder)) or "tensorboard" in text:  # whose thread writes at its own times
            return
        counter[0] += 1
        if counter[0] == number:
            active = False
            if after:
                with contextlib.suppress(OSError):
                    perform(event, args)
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def attempt(argv: list[str], folder: Path, number: int = 0, after: bool = False) -> tuple[int, int]:
    """Run a command in a fork, and end it at a point (0: nowhere); return (exit code, number of its events)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        from mapet.cli import main

        counter = [0]
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.addaudithook(end_at(folder, number, after, counter))
        code = main(argv)
        os.write(writer, str(counter[0]).encode())
        os._exit(code)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reader) as pipe:
        return os.waitstatus_to_exitcode(status), int(pipe.read() or 0)


def digest(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file below a folder, also of what is left over, without what differs between two runs."""
    result = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and "tensorboard" not in name and path.name not in IGNORED:
            data = path.read_bytes()
            if path.suffix in (".jsonl", ".json"):
                data = TIMES.sub("", data.decode()).replace(str(folder), "OUT").encode()
            result[name] = hashlib.sha256(data.replace(str(folder).encode(), b"OUT")).hexdigest()
    return result


class Workshop:
    """Inputs of all commands in a temporary folder, and for each command the digest and the number of events of an uninterrupted run."""

    def __init__(self, folder: Path) -> None:
        from mapet.data.digits import write_digits

        self.folder = folder
        write_digits(folder / "digits", 1437)
        train = sorted((folder / "digits" / "train").rglob("*.png"))[::24]
        for path in train:
            target = folder / "images" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        self.whole: dict[str, tuple[dict[str, str], int]] = {}

    def argv(self, command: str) -> list[str]:
        """Return the arguments of a command, without `out`; inputs from other commands come from uninterrupted runs of them."""
        images, made = (
            ["--images", str(self.folder / "images")],
            lambda name: str(self.folder / f"whole-{name}" / "out"),
        )
        for needed in {"tokenize": ["fit-tokenizer"], "pretrain": ["fit-tokenizer", "tokenize"]}.get(command, []):
            self.run_whole(needed)
        for needed in (
            ["pretrain"] if command in ("finetune", "embed") else ["finetune"] if command == "predict" else []
        ):
            self.run_whole(needed)
        often = self.folder / "often.yaml"  # a checkpoint after every step
        often.write_text("checkpoint_interval_min: 1.0e-9\n")
        return {
            "prepare": ["prepare", *images, "--short-side", "8", "--channels", "1"],
            "fit-tokenizer": ["fit-tokenizer", *images, *IMAGE_LIMITS, "--vocab-size", "16", "--kmeans-iters", "4"],
            "tokenize": ["tokenize", *images, "--tokenizer", made("fit-tokenizer")],
            "train-tokenizer": ["train-tokenizer", str(often), *images, *IMAGE_LIMITS, "--vocab-size", "16", *LOOP,
                                "--model-args", "embed_dim=64", "depth=1", "num_heads=1"],
            "pretrain": ["pretrain", str(often), *images, "--tokenizer", made("fit-tokenizer"), "--tokens", made("tokenize"), *TINY, *LOOP,
                         "--probe-every", "0"],
            "finetune": ["finetune", str(often), *images, "--backbone", made("pretrain"), *LOOP],
            "embed": ["embed", *images, "--backbone", made("pretrain"), "--device", "cpu"],
            "predict": ["predict", "--backbone", made("finetune"), *images, "--device", "cpu"],
        }[command]  # fmt: skip

    def run_whole(self, command: str) -> tuple[dict[str, str], int]:
        """Run a command to its end without any crash, once, and return what `digest` finds and its number of events."""
        if command not in self.whole:
            argv, place = self.argv(command), self.folder / f"whole-{command}"
            place.mkdir()
            code, count = attempt([*argv, "--out", str(place / OUT.get(command, "out"))], place)
            assert code == 0, (place / "log.txt").read_text()[-2000:]
            self.whole[command] = digest(place), count
        return self.whole[command]

    def check(self, point: Point) -> str:
        """End a command at a point, resume it, and compare; return what is wrong, or ''."""
        expected, _ = self.run_whole(point.command)
        place = self.folder / "attempt"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        argv = [*self.argv(point.command), "--out", str(place / OUT.get(point.command, "out"))]
        code, _ = attempt(argv, place, point.number, point.after)
        if code != -signal.SIGKILL:
            return f"ended with {code} before the point"
        code, _ = attempt([*argv, "--resume"], place)
        if code:
            return f"resuming ended with {code}: {(place / 'log.txt').read_text()[-600:]}"
        result = digest(place)
        if result != expected:
            return f"other files, or left over: {sorted(dict(result.items() ^ expected.items()))}"
        return ""


COMMANDS = ("prepare", "fit-tokenizer", "tokenize", "embed", "predict", "pretrain", "train-tokenizer", "finetune")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path)
    parser.add_argument("--sample", type=int, help="so many points of each command, always the same")
    parser.add_argument("commands", nargs="*", default=[])
    options = parser.parse_args()
    os.environ |= {"MAPET_WORKERS": "0", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    import mapet

    for module in pkgutil.walk_packages(mapet.__path__, "mapet."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import torch
    import torch.utils.tensorboard

    torch.set_num_threads(1)
    passed: list[list[Any]] = json.loads(options.state.read_text()) if options.state and options.state.exists() else []
    failed, started, count = [], time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for command in options.commands or COMMANDS:
            _, number = workshop.run_whole(command)
            points = [Point(command, each, after) for each in range(1, number + 1) for after in (False, True)]
            if options.sample:
                points = sorted(random.Random(0).sample(points, min(options.sample, len(points))))
            for point in points:
                if [*point] in passed:
                    continue
                count += 1
                if problem := workshop.check(point):
                    failed.append(point)
                    print(f"{point}: {problem}", flush=True)
                    continue
                passed.append([*point])
                if options.state:
                    options.state.write_text(json.dumps(passed))
            print(f"{command}: {number} events, {len(points)} points, {time.monotonic() - started:.0f} s", flush=True)
    print(json.dumps({"points": count, "failed": len(failed)}))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
