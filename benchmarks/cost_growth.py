"""How a training step's time and memory grow with batch, patches, context, words and targets.

    python benchmarks/cost_growth.py --json cost_growth.json

ViT-T unless said otherwise, one micro-batch (so that memory shows). Each figure is the median of a few steps in a process of
its own; peak memory is that process's, less what it held before the step. `expected` is what arithmetic alone predicts: the ratio of
exact counts to the first row of its group. Time grows faster or slower than that where the rate of products changes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from arithmetic import Shape, training_flops
from report import machine, print_table, write_report

from mapet.data.dataset import Batch
from mapet.device import Compute
from mapet.models.backbone import create_vit, prepare_for_device
from mapet.models.objectives import MAPET
from mapet.models.pretraining import ViTForPreTraining
from mapet.training.step import ForwardBackward

BASE = {"batch": 4, "image_size": 224, "context": 49, "vocabulary": 8192}
GROUPS: dict[str, list[int]] = {
    "batch": [1, 2, 4, 8, 16],
    "image_size": [96, 160, 224, 320, 448],
    "context": [0, 49, 98, 147, 186],
    "vocabulary": [512, 2048, 8192, 32768, 65536],
}


def measure(quick: bool = False) -> list[dict[str, Any]]:
    """One row a setting: seconds, peak memory, and both relative to the first of its group."""
    rows: list[dict[str, Any]] = []
    for axis, values in GROUPS.items():
        first: dict[str, Any] = {}
        for value in [values[0], values[2], values[4]] if quick else values:
            setting = BASE | {axis: value}
            if axis == "image_size":
                setting["context"] = (value // 16) ** 2 // 4
            row = {"axis": axis, "value": value} | _in_own_process(setting)
            first = first or row
            row["time_times"] = row["milliseconds"] / first["milliseconds"]
            row["expected_times"] = row["GFLOP"] / first["GFLOP"]
            rows.append(row)
    return rows


def _in_own_process(setting: dict[str, int]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(setting)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _one(batch: int, image_size: int, context: int, vocabulary: int) -> dict[str, float]:
    compute = Compute.choose()
    vit = create_vit("vit_tiny_patch16_224", (image_size, image_size))
    model = prepare_for_device(ViTForPreTraining(vit, vocabulary, MAPET, context), compute)
    patches = model.num_patches
    shape = Shape(192, 12, patches, context, vocabulary)
    inputs = Batch(
        torch.arange(batch),
        torch.randn(batch, 3, image_size, image_size),
        targets=torch.randint(vocabulary, (batch, patches)),
        permutation=torch.rand(batch, patches).argsort(1),
    ).to(compute.device)
    step = ForwardBackward(model, compute, micro_batch=batch)
    cuda = compute.device.type == "cuda"
    before = _peak_bytes(cuda)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        step(inputs)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "milliseconds": 1000 * statistics.median(seconds[2:]),
        "peak_MB": (_peak_bytes(cuda) - before) / 1e6,
        "GFLOP": training_flops(shape) * batch / 1e9,
    }


def _peak_bytes(cuda: bool) -> float:
    return torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


COLUMNS = {
    "axis": "axis",
    "value": "value",
    "milliseconds": "ms a step",
    "time_times": "times the first",
    "expected_times": "expected",
    "peak_MB": "peak MB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three values of each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(**json.loads(options.one))))
        return
    rows = measure(options.quick)
    print_table(rows, COLUMNS)
    write_report(options.json, {"cost_growth": rows, "machine": machine()})


if __name__ == "__main__":
    main()
