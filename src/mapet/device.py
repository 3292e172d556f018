"""Where and in which precision to compute."""

import ctypes
import functools
import logging
import os
import re
import sys
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mapet import distributed
from mapet.config.shared import Precision
from mapet.errors import MapetError, option

log = logging.getLogger("mapet")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's mallopt(3)."""
MEMINFO = Path("/proc/meminfo")
"""Linux tells there of its memory."""
WORKERS = "MAPET_WORKERS"
"""Environment variable: processes that read images, in every command."""


@dataclass(frozen=True)
class ComputeContext:
    """A device and the precision of matrix products on it (parameters stay float32)."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_options(cls, device: str = "auto", precision: Precision = "auto") -> "ComputeContext":
        """Resolve a device and a precision, and set this process up to compute there.

        Args:
            device: 'auto' (the first available of CUDA, MPS, CPU), 'cpu', 'cuda', 'cuda:1' or 'mps'. Where torchrun has started
                several ranks, each takes the CUDA device of its local rank.
            precision: 'float32', 'bfloat16', or 'auto': bfloat16 where the hardware accelerates it.

        Raises:
            MapetError: the device is not available.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            place = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            cuda = str(error).splitlines()[0].split(". ")[0]
            reasons = {"cuda": cuda, "mps": "this machine, or its PyTorch, has none"}
            why = reasons.get(device.split(":")[0], "mapet knows none of that name")
            raise MapetError(
                f"device '{device}' is not available: {why}. Use {option('device')} auto, cpu, cuda or mps"
            ) from None
        if place.type == "cuda" and distributed.world_size() > 1:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(place)
        fast = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if place.type == "cpu":
            _keep_freed_memory()
            _warn_if_busy()
            # MKL's float32 products otherwise depend on where in memory their inputs lie: the same run would not end with the same bits.
            os.environ.setdefault("MKL_CBWR", "AUTO")  # read by MKL before its first product
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if precision == "auto":
            precision = "bfloat16" if fast else "float32"
        return cls(place, getattr(torch, precision))

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def precision(self) -> str:
        """'float32' or 'bfloat16'."""
        return str(self.dtype).removeprefix("torch.")

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        return f"{name}, {self.precision}"


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one: pages taken anew from the system cost as much as the work on them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes from its heap
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@functools.cache
def _warn_if_busy() -> None:
    """Threads that wait for each other get nothing done while others have the cores."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if torch.get_num_threads() > 1 and load > cores:
        log.warning(
            "this machine is busy: %.0f programs want its %d cores. With OMP_NUM_THREADS=1 before the command small models may be "
            "several times faster", load, cores,
        )  # fmt: skip


def usable_cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def num_workers() -> int:
    """Return how many processes read images: MAPET_WORKERS, else one a usable core, less the one that computes, from 1 to 8."""
    given = os.environ.get(WORKERS, "")
    if given and not given.isdecimal():
        raise MapetError(f"{WORKERS}={given}: must be the number of processes that read images")
    return int(given) if given else max(1, min(8, usable_cores() - 1))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):  # includes the file cache, which reading images fills
        if available := re.search(r"^MemAvailable: +(\d+) kB", MEMINFO.read_text(), flags=re.MULTILINE):
            return int(available[1]) * 1024
    with suppress(ValueError, OSError):
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return 4 << 30
