"""Training step against the released way of computing it, and against the machine's own limit.

    python -m benchmarks training_step                     # CPU: ViT-T and ViT-S, batch 16
    python -m benchmarks training_step --device cuda --models base small tiny --batch 256 --largest --kernels

One step is mask making (where there are masks), forward and backward at 224 px, patch 16, 8192 codes. The reference
(`reference.py`) runs in float32 on the CPU and under bfloat16 autocast on a GPU, there with as large a part of the batch as
fits. Rounds alternate mapet, reference and a bfloat16 matrix product (4096^3; on a GPU ten of 8192^3), so that noise meets
all three; values are medians.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from benchmarks.core import Result, Row, timed
from benchmarks.flops import Shape, forward, reference_training_flops, training_flops
from benchmarks.reference import reference_loss
from benchmarks.tables import Table
from mapet.data.dataset import Batch
from mapet.device import ComputeContext
from mapet.models.backbone import create_vit, prepare_for_device
from mapet.models.objectives import MAPET
from mapet.models.pretraining import ViTForPreTraining
from mapet.training.step import MIN_COMPILE_STEPS, ForwardBackward, auto_compile, auto_micro_batch

VOCAB_SIZE = 8192
REFERENCE_ROUNDS = 3
"""Few iterations, as steps take seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["tiny", "small"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--largest", action="store_true", help="also the largest power of two that fits a GPU")
    parser.add_argument("--kernels", action="store_true", help="name the operations that dominate")
    parser.add_argument("--compile", action="store_true", default=None, help="with torch.compile also on a CPU")


def run(args: argparse.Namespace) -> Result:
    """One row a model, and with `largest` one more at the largest batch that fits the GPU."""
    compute = ComputeContext.from_options(args.device)
    compiled = auto_compile(args.compile, compute, MIN_COMPILE_STEPS)
    rows = []
    for name in args.models:
        rows.append(compare(name, args.batch, compute, args.rounds, compiled, args.kernels))
        if args.largest and compute.device.type == "cuda":
            rows.append(compare(name, largest_batch(name, compute, compiled), compute, args.rounds, compiled))
    return Result(rows, "random pixels and tokens")


def make_model(name: str) -> ViTForPreTraining:
    torch.manual_seed(0)
    return ViTForPreTraining(create_vit(f"vit_{name}_patch16_224", (224, 224)), VOCAB_SIZE, MAPET, 49)


def make_batch(size: int, device: torch.device) -> Batch:
    """Images and tokens where they are used; the permutation on the CPU, where a loader makes it."""
    images, tokens = torch.randn(size, 3, 224, 224).to(device), torch.randint(VOCAB_SIZE, (size, 196)).to(device)
    return Batch(torch.arange(size), images, targets=tokens, permutation=torch.rand(size, 196).argsort(1))


def compare(name: str, batch: int, compute: ComputeContext, rounds: int, compile: bool, kernels: bool = False) -> Row:
    """Time mapet's step, the reference's and a product in turns."""
    model = prepare_for_device(make_model(name), compute).train()
    inputs = make_batch(batch, compute.device)
    arguments = [values for values in (inputs.images, inputs.targets, inputs.permutation) if values is not None]
    if compile:
        model.compile()
    step = ForwardBackward(model, compute, auto_micro_batch(model, batch, compute))
    cuda = compute.device.type == "cuda"
    width, products = (8192, 10) if cuda else (4096, 1)
    side = torch.randn(width, width, dtype=compute.dtype, device=compute.device)

    def mapet() -> torch.Tensor:
        return torch.stack([output.loss for output in step(inputs.to(compute.device))]).sum()

    def reference(part: int) -> torch.Tensor:
        with torch.autocast(compute.device.type, torch.bfloat16, enabled=cuda):
            loss, _ = reference_loss(model, *(values[:part] for values in arguments))
        loss.backward()
        return loss

    def product() -> None:
        for _ in range(products):
            side @ side

    fits = _largest_part(reference, batch, model) if cuda else batch
    works: dict[str, Callable[[], Any]] = {"mapet": mapet, "reference": lambda: reference(fits), "product": product}
    seconds: dict[str, list[float]] = {key: [] for key in works}
    peak: dict[str, float] = {}
    loss: dict[str, float] = {}
    for index in range(rounds + 2):
        for key, work in works.items():
            if key == "reference" and index >= REFERENCE_ROUNDS + 2:
                continue
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            spent, result = timed(work)
            seconds[key] += [spent] * (index >= 2)
            peak[key] = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
            loss[key] = float(result.detach()) if result is not None else 0.0
            model.zero_grad(set_to_none=True)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    shape = Shape(model.vit.embed_dim, len(model.vit.blocks))
    rate, peak_rate = training_flops(shape) * batch / median["mapet"], products * 2 * width**3 / median["product"]
    row = {
        "model": f"ViT-{name[0].upper()}", "batch": batch, "micro_batch": step.micro_batch, "compiled": "yes" if compile else "no",
        "GMAC_forward": sum(forward(shape).values()) / 1e9, "GFLOP_per_image": training_flops(shape) / 1e9,
        "images_per_second": batch / median["mapet"], "GFLOP_per_second": rate / 1e9, "product_GFLOP_per_second": peak_rate / 1e9,
        "utilization": rate / peak_rate, "loss": loss["mapet"], "peak_GB": peak["mapet"] or None,
        "reference_batch": fits, "reference_images_per_second": fits / median["reference"], "reference_loss": loss["reference"],
        "reference_GFLOP_per_image": reference_training_flops(shape) / 1e9, "reference_peak_GB": peak["reference"] or None,
        "speedup": median["reference"] / fits / (median["mapet"] / batch),
        "speedup_at_limit": peak_rate / training_flops(shape) * median["reference"] / fits,
    }  # fmt: skip
    return row | ({"kernels": top_kernels(mapet)} if kernels else {})


def _largest_part(reference: Callable[[int], torch.Tensor], batch: int, model: ViTForPreTraining) -> int:
    """Largest half, quarter, ... of the batch whose reference step fits the GPU."""
    while True:
        try:
            reference(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        else:
            return batch
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def largest_batch(name: str, compute: ComputeContext, compile: bool) -> int:
    """Largest power of two that fits the GPU."""
    batch = 256
    while True:
        inputs = make_batch(batch * 2, compute.device)
        model = prepare_for_device(make_model(name), compute)
        if compile:
            model.compile()
        step = ForwardBackward(model, compute, batch * 2)
        step(inputs.to(compute.device))
        fits = step.micro_batch == batch * 2  # it halves where memory does not suffice
        del inputs, model, step
        torch.cuda.empty_cache()
        if not fits:
            return batch
        batch *= 2


def top_kernels(work: Callable[[], Any]) -> list[str]:
    """The ten GPU kernels, or CPU operations, that take most of the time, with their fraction."""
    work()
    with torch.profiler.profile() as profile:
        work()
    averages = profile.key_averages()
    kernels = [(e.self_device_time_total, e.key) for e in averages if e.device_type == DeviceType.CUDA]
    events = kernels or [(e.self_cpu_time_total, e.key) for e in averages]
    total = sum(time for time, _ in events)
    return [f"{key} {time / total:.1%}" for time, key in sorted(events, reverse=True)[:10]]


def in_tflops(rows: list[Row]) -> list[Row]:
    """Rows measured on a GPU."""
    keys = {"TFLOP_per_second": "GFLOP_per_second", "product_TFLOP_per_second": "product_GFLOP_per_second"}
    return [row | {new: row[key] / 1000 for new, key in keys.items()} for row in rows if row.get("peak_GB")]


SMOKE = ["--device", "cpu", "--models", "tiny", "--batch", "1", "--rounds", "1"]
TABLES = {
    "main": Table({
        "model": "{model}{note}", "compiled": "{compiled}", "images/s": "{images_per_second:.1f}", "reference": "{reference_images_per_second:.2f}",
        "speedup": "{speedup:.2f}", "speedup at the peak": "{speedup_at_limit:.2f}", "GFLOP/s": "{GFLOP_per_second:.0f}",
        "4096^3 matmul": "{product_GFLOP_per_second:.0f}", "fraction of the matmul rate": "{utilization:.1%}",
    }, rows=lambda rows: [{"note": ""} | row for row in rows if not row.get("peak_GB")]),
    "gpu": Table({
        "model": "{model}", "batch": "{batch}", "images/s": "{images_per_second:,.0f}", "reference": "{reference_images_per_second:,.0f}",
        "speedup": "{speedup:.1f}", "TFLOP/s": "{TFLOP_per_second:.0f}", "8192^3 matmul": "{product_TFLOP_per_second:.0f}",
        "fraction of the matmul rate": "{utilization:.0%}", "GB": "{peak_GB:.1f}", "reference, GB": "{reference_peak_GB:.1f} at {reference_batch}",
    }, rows=in_tflops),
    "kernels": Table({
        "model": "{model}", "kernel, fraction of the time": "{kernel}",
    }, rows=lambda rows: [{"model": row["model"], "kernel": kernel} for row in rows for kernel in row.get("kernels", [])]),
}  # fmt: skip
