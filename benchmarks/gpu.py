"""MaPeT's training step on a GPU against the released way, and the loader that feeds it: ends by itself after 9 minutes.

    python -m benchmarks gpu --json benchmark_results/gpu.json       # with the file of `python -m benchmarks gpu-data`

It needs PyTorch and timm; the JSON is written after every row. First the loader: photographs read, decoded and resized by more and more
processes, copied and normalized on the device. Then for each ViT what `training_step` measures (a step of a batch that lies on the device
already, the reference, a matrix product), and the same step fed by the loader. MFU is counted FLOPs over the maker's dense bfloat16 peak.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import gpu_data
from benchmarks.core import Result, Row, save, time_limit
from benchmarks.tables import Table
from benchmarks.training_step import VOCAB_SIZE, compare, make_model
from mapet.data.dataset import Batch, ViewDataset, position_batches
from mapet.data.loader import load
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec, normalize
from mapet.device import WORKERS, ComputeContext, usable_cores
from mapet.models.backbone import prepare_for_device
from mapet.training.step import MIN_COMPILE_STEPS, ForwardBackward, auto_compile, auto_micro_batch

PEAK_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0}
"""Part of a GPU's name -> its vendor's peak for dense bfloat16 matmuls; the first match counts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu_data.add_data(parser)
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--num-images", type=int, default=8192, help="that the loader reads for a row, photographs in turn"
    )
    parser.add_argument("--minutes", type=float, default=9, help="until it ends, from the start; default: %(default)s")


def run(args: argparse.Namespace) -> Result:
    compute = ComputeContext.from_options(args.device)
    rows: list[Row] = []
    result = Result(rows, f"random pixels and tokens; for the loader the photographs of {args.data}")

    def add(row: Row) -> None:
        print(row, flush=True)
        rows.append(row)
        save(getattr(args, "json", None), "gpu", result)

    with time_limit(args.minutes), gpu_data.opened(args.data) as file, tempfile.TemporaryDirectory() as folder:
        images = list_images(gpu_data.write_photographs(file, Path(folder)))
        spec = ViewSpec(kind="center", image_size=(224, 224))  # as pre-training reads them by default, with jitter
        dataset = ViewDataset(images, spec, 3, (224, 224), grid=(14, 14), jitter=0.4)
        cores = usable_cores()
        for workers in sorted({0, cores // 4, cores // 2, cores}):
            os.environ[WORKERS] = str(workers)
            add({"loader": workers, **feed(dataset, args.batch, args.num_images, compute, None)})
        for name in args.models:
            compiled = auto_compile(None, compute, MIN_COMPILE_STEPS)
            row = compare(name, args.batch, compute, args.rounds, compiled, kernels=compute.device.type == "cuda")
            peak = peak_tflops(compute.device)
            add(row | {"peak_TFLOP_per_second": peak, "MFU": row["GFLOP_per_second"] / 1000 / peak if peak else None})
            add(
                {
                    "fed": row["model"],
                    "loader": cores,
                    **feed(dataset, args.batch, args.num_images, compute, name, compiled),
                }
            )
    return result


def peak_tflops(device: torch.device) -> float | None:
    """Return the vendor's peak for dense bfloat16 matmuls; None: unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def feed(
    dataset: ViewDataset,
    batch: int,
    num_images: int,
    compute: ComputeContext,
    model: str | None,
    compiled: bool = False,
) -> Row:
    """Images/s of the loader, normalized on the device, with the step of a model or without; and the part of the time spent waiting."""
    step = None
    if model is not None:
        network = prepare_for_device(make_model(model), compute).train()
        if compiled:
            network.compile()
        step = ForwardBackward(network, compute, auto_micro_batch(network, batch, compute))
    num_batches = max(2, num_images // batch) + 1  # the first one starts the workers, and compiles
    indices = [index % len(dataset) for index in range(num_batches * batch)]
    loader = iter(load(dataset.batch, position_batches(indices, batch), pin_memory=compute.device.type == "cuda"))
    waited = started = 0.0
    for index in range(num_batches):
        before = time.perf_counter()
        read = next(loader)
        waited += time.perf_counter() - before
        made = on_device(read, compute)
        if step:
            step(made)
        if index == 0:
            synchronize(compute)
            started, waited = time.perf_counter(), 0.0
    synchronize(compute)
    seconds = time.perf_counter() - started
    return {"fed_images_per_second": (num_batches - 1) * batch / seconds, "waiting": waited / seconds}


def on_device(batch: Batch, compute: ComputeContext) -> Batch:
    """Normalized pixels, and random tokens."""
    moved = batch.to(compute.device)
    assert moved.images is not None
    tokens = torch.randint(VOCAB_SIZE, (len(batch), 196), device=compute.device)
    return replace(moved, images=normalize(moved.images, 3, moved.jitter), targets=tokens)


def synchronize(compute: ComputeContext) -> None:
    if compute.device.type == "cuda":
        torch.cuda.synchronize()


def steps(rows: list[Row]) -> list[Row]:
    """A row for each ViT, with its rate when the loader feeds it."""
    fed = {row["fed"]: row for row in rows if "fed" in row}
    return [row | fed.get(row["model"], {}) for row in rows if "model" in row]


SMOKE = [
    "--device",
    "cpu",
    "--data",
    "random",
    "--models",
    "tiny",
    "--batch",
    "1",
    "--rounds",
    "1",
    "--num-images",
    "2",
]
TABLES = {
    "main": Table({
        "model": "{model}", "batch": "{batch}", "images/s": "{images_per_second:,.0f}", "reference": "{reference_images_per_second:,.0f}",
        "speedup": "{speedup:.1f}", "MFU": "{MFU:.0%}", "fraction of the matmul rate": "{utilization:.0%}", "GB": "{peak_GB:.1f}",
        "reference, GB": "{reference_peak_GB:.1f} at {reference_batch}", "images/s with the loader": "{fed_images_per_second:,.0f}",
        "of it waiting": "{waiting:.0%}",
    }, rows=steps),
    "loader": Table({
        "processes that read": "{loader}", "images/s": "{fed_images_per_second:,.0f}",
    }, rows=lambda rows: [row for row in rows if "loader" in row and "fed" not in row]),
}  # fmt: skip
