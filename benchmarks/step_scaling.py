"""How a training step's time and memory grow with batch, patches, context, vocabulary and predicted patches.

ViT-T, one micro-batch (so that memory shows). Each value is the median of three steps in a process of its own; peak memory is
that process's, less what it held before the step. `expected` is the ratio of exact FLOP counts to the first row of an axis:
time grows faster or slower where the rate of products changes.
"""

import argparse

import torch

from benchmarks.core import Result, Row, in_new_process, median_seconds, peak_memory
from benchmarks.flops import Shape, training_flops
from benchmarks.tables import Table
from mapet.data.dataset import Batch
from mapet.device import ComputeContext
from mapet.models.backbone import create_vit, prepare_for_device
from mapet.models.objectives import MAPET
from mapet.models.pretraining import ViTForPreTraining
from mapet.training.step import ForwardBackward

BASE = {"batch": 4, "image_size": 224, "context": 49, "vocab_size": 8192, "num_predict": 147}
AXES: dict[str, list[int]] = {
    "batch": [1, 2, 4, 8, 16],
    "image_size": [96, 160, 224, 320, 448],
    "context": [0, 49, 98, 147, 186],
    "vocab_size": [512, 2048, 8192, 32768, 65536],
    "num_predict": [147, 74, 37, 15],
}
TITLES = {
    "image_size": "image size (N = (size / 16)^2, c = N / 4)", "context": "c, context patches", "vocab_size": "V, codes",
    "num_predict": "predicted patches",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--num-values", type=int, default=5, help="of each axis, the first ones")
    parser.add_argument("--batch", type=int, default=BASE["batch"])


def run(args: argparse.Namespace) -> Result:
    rows: list[Row] = []
    for axis in args.axes:
        first: Row = {}
        for value in AXES[axis][: args.num_values]:
            setting = BASE | {"batch": args.batch, axis: value}
            if axis == "image_size":
                setting["context"] = (value // 16) ** 2 // 4
            if axis != "num_predict":  # all
                setting["num_predict"] = (setting["image_size"] // 16) ** 2 - setting["context"]
            row = {"axis": TITLES.get(axis, axis), "value": value} | in_new_process(measure, setting)
            first = first or row
            row["times_first"] = row["milliseconds"] / first["milliseconds"]
            row["expected"] = row["GFLOP"] / first["GFLOP"] if axis != "num_predict" else None
            rows.append(row)
    return Result(rows, "random pixels and tokens")


def measure(setting: dict[str, int]) -> Row:
    """Milliseconds, GFLOP and peak memory of a step."""
    compute = ComputeContext.from_options()
    size, batch, vocab_size = setting["image_size"], setting["batch"], setting["vocab_size"]
    vit = create_vit("vit_tiny_patch16_224", (size, size))
    patches = (size // 16) ** 2
    num_predict = setting["num_predict"] if setting["num_predict"] < patches - setting["context"] else None
    model = prepare_for_device(ViTForPreTraining(vit, vocab_size, MAPET, setting["context"], num_predict), compute)
    inputs = Batch(
        torch.arange(batch), torch.randn(batch, 3, size, size), targets=torch.randint(vocab_size, (batch, patches)),
        permutation=torch.rand(batch, patches).argsort(1),
    ).to(compute.device)  # fmt: skip
    step = ForwardBackward(model, compute, micro_batch=batch)
    cuda = compute.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated if cuda else peak_memory
    before = peak()
    seconds = median_seconds(lambda: step(inputs))
    return {
        "milliseconds": 1000 * seconds, "images_per_second": batch / seconds, "peak_MB": (peak() - before) / 1e6,
        "GFLOP": training_flops(Shape(192, 12, patches, setting["context"], vocab_size)) * batch / 1e9,
    }  # fmt: skip


SMOKE = ["--axes", "batch", "--num-values", "1"]
TABLES = {
    "main": Table({
        "axis": "{axis}", "value": "{value:,}", "images/s": "{images_per_second:.1f}", "ms per step": "{milliseconds:,.0f}",
        "relative to the first": "{times_first:.2f}", "expected": "{expected:.2f}", "peak MB": "{peak_MB:,.0f}",
    }),
}  # fmt: skip
