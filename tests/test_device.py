"""Where and how to compute."""

import subprocess
import sys

import pytest
import torch

from mapet import device
from mapet.device import ComputeContext, num_workers
from tests.refused import refused

PRODUCTS = """
import itertools
import torch
from mapet.device import ComputeContext

ComputeContext.from_options("cpu")
torch.set_num_threads(1)
torch.manual_seed(0)

def moved(values, by):  # the same numbers, `by` of them past a multiple of 64 bytes
    buffer = torch.empty(values.numel() + 32)
    start = -buffer.data_ptr() // 4 % 16 + by
    return buffer[start : start + values.numel()].view(values.shape).copy_(values)

for m, k, n in [(33, 13, 7), (100, 16, 48), (344, 192, 576)]:
    a, b = torch.randn(m, k), torch.randn(n, k)
    products = {(moved(a, i) @ moved(b, j).T).numpy().tobytes() for i, j in itertools.product((0, 1, 4, 8), repeat=2)}
    assert len(products) == 1, f"{len(products)} different products of the same {m} x {k} and {k} x {n} numbers"
"""


def test_a_product_does_not_depend_on_where_its_numbers_lie(monkeypatch):
    # Or a resumed run would not end with the bits of one that was never interrupted.
    monkeypatch.delenv("MKL_CBWR", raising=False)
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_images_are_read_by_as_many_processes_as_the_environment_says(monkeypatch):
    monkeypatch.setenv("MAPET_WORKERS", "3")
    assert num_workers() == 3
    monkeypatch.setenv("MAPET_WORKERS", "")
    assert 1 <= num_workers() <= 8
    monkeypatch.setenv("MAPET_WORKERS", "-1")
    with refused("MAPET_WORKERS=-1"):
        num_workers()


@pytest.mark.parametrize(("bfloat16", "expected"), [(0.5, "bfloat16"), (0.95, "float32"), (1.3, "float32")])
def test_precision_is_the_faster_one_in_a_timing_whatever_the_cpu_says(bfloat16, expected, monkeypatch):
    """A Xeon with avx512_bf16 but without AMX reports support, and is a third slower."""
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16}
    monkeypatch.setattr(device, "_time_matmul", lambda _, dtype: seconds[dtype])
    device.faster_precision.cache_clear()
    assert ComputeContext.from_options("cpu").precision == expected
    device.faster_precision.cache_clear()
