"""Device and precision of the computation, and the resources of this machine: cores, memory, data-loading workers."""

import ctypes
import functools
import logging
import math
import os
import re
import sys
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mapet import distributed
from mapet.config.shared import Precision
from mapet.errors import MapetError, first_line, option

log = logging.getLogger("mapet")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
MEMINFO = Path("/proc/meminfo")
"""Linux's file about its memory."""
MMAP_THRESHOLD, TRIM_THRESHOLD = 32 << 20, 2**31 - 1
"""Bytes from which on an allocation is not taken from the heap (glibc's maximum); free bytes at the heap's end that are kept (all)."""
MAX_AUTO_WORKERS = 8
DEFAULT_FREE_MEMORY = 4 << 30
"""Bytes that count as free where the system does not say how many are."""
TIMED_SHAPES = ((1024, 384), (384, 1536))
"""Shapes of the matrix product that is timed: tokens by width of a ViT-S, and the first layer of its MLP."""
NUM_TIMINGS, MIN_SPEEDUP = 5, 1.2
"""Timings of a matrix product, of which the shortest counts; how much faster bfloat16 must be, as it rounds."""
WORKERS = "MAPET_WORKERS"
"""Environment variable: number of data-loading workers, in every command."""


@dataclass(frozen=True)
class ComputeContext:
    """A device and the precision of matrix products on it.

    Attributes:
        device: where tensors are.
        dtype: of matrix products under `autocast`, float32 or bfloat16; parameters stay float32.
    """

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_options(cls, device: str = "auto", precision: Precision = "auto") -> "ComputeContext":
        """Resolve a device and a precision, and set this process up to compute there.

        Args:
            device: 'auto' (the first available of CUDA, MPS, CPU), 'cpu', 'cuda', 'cuda:1' or 'mps'. Where torchrun has started
                several ranks, each takes the CUDA device of its local rank.
            precision: 'float32', 'bfloat16', or 'auto': the one that `faster_precision` measures, on rank 0.

        Returns:
            The context.

        Raises:
            MapetError: the device is not available.
        """
        if device == "auto":
            available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
            device = next(name for name, is_available in available.items() if is_available)
        try:
            resolved = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            torch_reason = first_line(error).split(". ")[0]
            reasons = {"cuda": torch_reason, "mps": "this machine or this build of PyTorch has no MPS"}
            reason = reasons.get(device.split(":")[0], "mapet knows no device of that name")
            raise MapetError(
                f"device '{device}' is not available: {reason}. Use {option('device')} auto, cpu, cuda or mps"
            ) from None
        if resolved.type == "cuda" and distributed.world_size() > 1:
            resolved = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(resolved)
        if resolved.type == "cpu":
            _tune_malloc()
            _warn_if_oversubscribed()
            # MKL's float32 products otherwise depend on the alignment of their inputs, and a run would not be bit-exact.
            os.environ.setdefault("MKL_CBWR", "AUTO")  # MKL reads it before its first product
        if precision == "auto":
            is_bfloat16 = torch.tensor(faster_precision(resolved) == "bfloat16", dtype=torch.int64)
            precision = "bfloat16" if bool(distributed.broadcast(is_bfloat16)) else "float32"
        return cls(resolved, getattr(torch, precision))

    def autocast(self) -> AbstractContextManager:
        """Return torch's autocast to `dtype`, disabled for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def precision(self) -> str:
        """Return 'float32' or 'bfloat16'."""
        return str(self.dtype).removeprefix("torch.")

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor to the device; the copy to a GPU is asynchronous."""
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def __str__(self) -> str:
        """Return device and precision for logs: 'cpu, float32', 'NVIDIA H100 80GB HBM3, bfloat16'."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        return f"{name}, {self.precision}"


@functools.cache
def faster_precision(device: torch.device) -> Precision:
    """Return 'bfloat16' if matrix products of a ViT's size are at least `MIN_SPEEDUP` times as fast in it on this device, else 'float32'.

    What a CPU says of itself does not decide: with avx512_bf16 but without AMX, bfloat16 may be slower. The device is timed once per process.
    """
    times = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(NUM_TIMINGS):  # in turns, so that other programs disturb both
        for dtype in times:
            times[dtype] = min(times[dtype], _time_matmul(device, dtype))
    return "bfloat16" if times[torch.float32] > MIN_SPEEDUP * times[torch.bfloat16] else "float32"


def _time_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of a matrix product, of the size of the first layer of an MLP in a ViT-S for a few images."""
    rows, weight = (torch.ones(shape, device=device, dtype=dtype) for shape in TIMED_SHAPES)
    started = time.perf_counter()
    float((rows @ weight)[0, 0])  # waits for the device
    return time.perf_counter() - started


def _tune_malloc() -> None:
    """Make glibc keep the memory that a step frees, for the next step; no effect with other C libraries.

    Pages that are requested from the system again at every step cost as much time as the computation on them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


@functools.cache
def _warn_if_oversubscribed() -> None:
    """Warn, once per process, if the load average of the last minute exceeds the number of CPU cores.

    PyTorch's threads wait for each other, so one whose core is taken by another program delays all of them.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = os.cpu_count() or 1
    if torch.get_num_threads() > 1 and load > cores:
        log.warning(
            "CPU oversubscribed: load average %.0f on %d cores. Small models may be several times faster with OMP_NUM_THREADS=1 "
            "before the command", load, cores,
        )  # fmt: skip


def usable_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def num_workers() -> int:
    """Return the number of data-loading workers: MAPET_WORKERS if set, else usable cores - 1, from 1 to 8.

    0 means that images are read by the process that computes.

    Raises:
        MapetError: MAPET_WORKERS is not a whole number.
    """
    value = os.environ.get(WORKERS, "")
    if value and not value.isdecimal():
        raise MapetError(
            f"{WORKERS}={value}: must be the number of processes that read images, a whole number from 0; set it so, or unset it"
        )
    return int(value) if value else max(1, min(MAX_AUTO_WORKERS, usable_cores() - 1))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device, of any other than CUDA the machine's main memory.

    On Linux this includes the memory of the file cache, which the system gives back on demand: reading images fills it.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        if available := re.search(r"^MemAvailable: +(\d+) kB", MEMINFO.read_text(), flags=re.MULTILINE):
            return int(available[1]) * 1024
    with suppress(ValueError, OSError):
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return DEFAULT_FREE_MEMORY
