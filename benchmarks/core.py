"""What benchmarks share: results with what they were measured on, timing in turns, processes of their own."""

import json
import multiprocessing
import os
import platform
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from mapet.files import write_json

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
STARTED = time.monotonic()
PACKAGES = ("mapet", "torch", "torchvision", "timm", "numpy", "faiss-cpu", "lightly-train")
Row = dict[str, Any]
T = TypeVar("T")
K = TypeVar("K")


@dataclass
class Result:
    """What a benchmark returns: rows of its tables, what they were measured on, and seeds."""

    rows: list[Row]
    data: str
    seeds: list[int] = field(default_factory=lambda: [0])


def run_info(name: str, result: Result) -> Row:
    """JSON of a result: command, date, commit, machine and versions beside the rows."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "name": name,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": done.stdout.strip() or None,
        "source": "measured",
        "machine": machine(),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "data": result.data,
        "seeds": result.seeds,
        "rows": result.rows,
    }


def save(path: Path | None, name: str, result: Result) -> None:
    """Write a result's JSON, also one that has not all its rows yet; None: nowhere."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, run_info(name, result))


class TimeUp(KeyboardInterrupt):
    """The time limit of a benchmark has passed; no handler of errors takes it for one."""


def seconds_left(minutes: float) -> float:
    """Return the seconds until `minutes` have passed since the program began."""
    return 60 * minutes - (time.monotonic() - STARTED)


@contextmanager
def time_limit(minutes: float) -> Iterator[None]:
    """Interrupt the block `minutes` after the program began."""

    def stop(*_: Any) -> None:
        raise TimeUp

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, seconds_left(minutes)))
    try:
        yield
    except TimeUp:
        print(f"stopped after {minutes:g} minutes: the rows until then are kept", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def machine() -> Row:
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = f"{known.get('model name', cpu)} (family {known.get('cpu family')}, model {known.get('model')})"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def installed_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Return seconds, GPU included, and the result of `work`."""
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def in_turns(works: Mapping[K, Callable[[], Any]], rounds: int, warmup: int = 0) -> dict[K, list[float]]:
    """Time `rounds` calls of each, alternating, so that noise affects all; the first `warmup` rounds are discarded."""
    seconds: dict[K, list[float]] = {name: [] for name in works}
    for _ in range(warmup + rounds):
        for name, work in works.items():
            seconds[name].append(timed(work)[0])
    return {name: values[warmup:] for name, values in seconds.items()}


def median_seconds(work: Callable[[], Any], rounds: int = 3) -> float:
    """Time `work` after one warm-up call."""
    return statistics.median(in_turns({"work": work}, rounds, warmup=1)["work"])


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median ratio of neighboring timings."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=False))


def in_new_process(work: Callable[..., T], *args: Any) -> T:
    """Call a function of a module in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def memory_now() -> int:
    """Return the resident memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory() -> int:
    """Return the peak resident memory of this process, bytes; getrusage's includes the parent's."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def cached(path: Path, work: Callable[[], T]) -> T:
    """Return the result of `work`, cached as JSON in `path`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, work())
    return json.loads(path.read_text())
