"""Training step against the released way of computing it, and against the machine's own limit.

    python benchmarks/training_step.py                                   # CPU: ViT-T and ViT-S, batch 16
    python benchmarks/training_step.py --device cuda --models base small tiny --batch 256 --largest

One step is mask making (where there are masks), forward and backward at 224 px, patch 16, 8192 words. The reference
(`reference.py`) runs in float32 on the CPU and under bfloat16 autocast on a GPU, there with as large a part of the batch as
fits. Rounds alternate reference, mapet and a bfloat16 matrix product (4096^3; on a GPU ten of 8192^3), so that noise meets
all three; figures are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arithmetic import Shape, forward, reference_training_flops, training_flops
from reference import reference_loss
from report import machine, print_table, write_report
from torch.autograd import DeviceType

from mapet.data.dataset import Batch
from mapet.device import Compute
from mapet.models.backbone import create_vit, prepare_for_device
from mapet.models.objectives import MAPET
from mapet.models.pretraining import ViTForPreTraining
from mapet.training.sizing import automatic_micro_batch
from mapet.training.step import ForwardBackward, auto_compile

VOCABULARY = 8192


def measure(
    models: list[str],
    batch: int,
    device: str = "auto",
    rounds: int = 7,
    largest: bool = False,
    precision: str = "auto",
    kernels: bool = False,
    compile: bool | None = None,
) -> list[dict[str, Any]]:
    """One row a model (and with `largest`, one more at the largest batch that fits the GPU)."""
    compute = Compute.choose(device, precision)  # type: ignore[arg-type]
    compiled = auto_compile(compile, compute)
    rows = []
    for name in models:
        rows.append(_compare(name, batch, compute, rounds, kernels, compiled))
        if largest and compute.device.type == "cuda":
            rows.append(_compare(name, _largest(name, compute, compiled), compute, rounds, False, compiled))
    return rows


def _make(name: str) -> ViTForPreTraining:
    torch.manual_seed(0)
    return ViTForPreTraining(create_vit(f"vit_{name}_patch16_224", (224, 224)), VOCABULARY, MAPET, 49)


def _inputs(size: int, device: torch.device) -> Batch:
    """Images and tokens where they are used; the permutation on the CPU, where a loader makes it."""
    images, tokens = torch.randn(size, 3, 224, 224).to(device), torch.randint(VOCABULARY, (size, 196)).to(device)
    return Batch(torch.arange(size), images, targets=tokens, permutation=torch.rand(size, 196).argsort(1))


def _compare(name: str, batch: int, compute: Compute, rounds: int, kernels: bool, compile: bool) -> dict[str, Any]:
    model = prepare_for_device(_make(name), compute).train()
    shape = Shape(model.vit.embed_dim, len(model.vit.blocks))
    inputs = _inputs(batch, compute.device)
    step = ForwardBackward(model, compute, automatic_micro_batch(model, batch, compute), compile)
    cuda = compute.device.type == "cuda"
    fits = batch  # of the reference

    def reference() -> torch.Tensor:
        with torch.autocast(compute.device.type, torch.bfloat16, enabled=cuda):
            loss = reference_loss(model, *(x[:fits] for x in (inputs.images, inputs.targets, inputs.permutation)))[0]
        loss.backward()
        return loss

    def fast() -> torch.Tensor:
        return step(inputs.to(compute.device)).loss

    width, products = (8192, 10) if cuda else (4096, 1)
    side = torch.randn(width, width, dtype=compute.dtype, device=compute.device)

    def product() -> None:
        for _ in range(products):
            side @ side

    works: dict[str, Callable[[], Any]] = {"mapet": fast, "reference": reference, "product": product}
    times: dict[str, list[float]] = {key: [] for key in works}
    memory: dict[str, float] = {}
    losses: dict[str, float] = {}
    for round in range(rounds + 2):
        for key, work in works.items():
            if key == "reference" and round > 4:
                continue  # seconds long: three measured rounds are enough
            while True:
                try:
                    seconds, peak, result = _timed(work, compute)
                    break
                except torch.OutOfMemoryError:
                    if key != "reference" or fits == 1:
                        raise
                fits //= 2
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            if key != "product":
                losses[key] = float(result.detach())
                memory[key] = peak
            model.zero_grad(set_to_none=True)
            if round >= 2:
                times[key].append(seconds)
    seconds = {key: statistics.median(values) for key, values in times.items() if values}
    peak_rate = products * 2 * width**3 / seconds["product"]
    limit = peak_rate / training_flops(shape) * seconds["reference"] / fits
    rate = training_flops(shape) * batch / seconds["mapet"]
    row: dict[str, Any] = {
        "model": f"ViT-{name}",
        "batch": batch,
        "micro_batch": step.micro_batch,
        "compiled": compile,
        "GMAC_forward": sum(forward(shape).values()) / 1e9,
        "GFLOP_step_image": training_flops(shape) / 1e9,
        "images_per_second": batch / seconds["mapet"],
        "GFLOP_per_second": rate / 1e9,
        "product_GFLOP_per_second": peak_rate / 1e9,
        "utilization": rate / peak_rate,
        "loss": losses["mapet"],
        "peak_GB": memory["mapet"],
        "reference_batch": fits,
        "reference_images_per_second": fits / seconds["reference"],
        "reference_GFLOP_image": reference_training_flops(shape) / 1e9,
        "speedup": seconds["reference"] / fits / (seconds["mapet"] / batch),
        "speedup_at_the_limit": limit,
        "reference_loss": losses["reference"],
        "reference_peak_GB": memory["reference"],
    }
    if kernels:
        row["kernels"] = _kernels(fast)
    return row


def _timed(work: Callable[[], Any], compute: Compute) -> tuple[float, float, Any]:
    """Seconds, peak GPU memory in GB (0 on a CPU), result."""
    if cuda := compute.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return time.perf_counter() - started, peak, result


def _largest(name: str, compute: Compute, compile: bool) -> int:
    """The largest power of two that fits."""
    batch = 256
    while True:
        model = prepare_for_device(_make(name), compute)
        inputs = _inputs(batch * 2, compute.device)
        step = ForwardBackward(model, compute, batch * 2, compile)
        step(inputs.to(compute.device))
        fits = step.micro_batch == batch * 2  # it halves where memory does not suffice
        del model, inputs, step
        torch.cuda.empty_cache()
        if not fits:
            return batch
        batch *= 2


def _kernels(work: Callable[[], Any]) -> list[str]:
    """What takes most of the time, with its share: the ten first kernels of a GPU, or operations of a CPU."""
    work()
    with torch.profiler.profile() as profile:
        work()
    averages = profile.key_averages()
    kernels = [(e.self_device_time_total, e.key) for e in averages if e.device_type == DeviceType.CUDA]
    events = kernels or [(e.self_cpu_time_total, e.key) for e in averages]
    total = sum(time for time, _ in events)
    return [f"{key} {time / total:.1%}" for time, key in sorted(events, reverse=True)[:10]]


COLUMNS = {
    "model": "model",
    "batch": "batch",
    "compiled": "compiled",
    "images_per_second": "img/s",
    "reference_images_per_second": "reference img/s",
    "speedup": "times as fast",
    "speedup_at_the_limit": "at the limit",
    "GFLOP_per_second": "GFLOP/s",
    "product_GFLOP_per_second": "large product",
    "utilization": "share of it",
    "peak_GB": "peak GB",
    "reference_peak_GB": "reference GB",
    "reference_batch": "at batch",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "small"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--largest", action="store_true", help="also the largest power of two that fits a GPU")
    parser.add_argument("--kernels", action="store_true", help="name the operations that dominate")
    parser.add_argument("--compile", action="store_true", default=None, help="with torch.compile also on a CPU")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows = measure(
        options.models,
        options.batch,
        options.device,
        options.rounds,
        options.largest,
        kernels=options.kernels,
        compile=options.compile,
    )
    print_table(rows, COLUMNS)
    for row in rows:
        for kernel in row.get("kernels", []):
            print("  ", row["model"], kernel)
    write_report(options.json, {"training_step": rows, "machine": machine()})


if __name__ == "__main__":
    main()
