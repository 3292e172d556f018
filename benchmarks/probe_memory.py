"""The linear probe on features of ImageNet's size: the memory it takes, and the time of its passes.

    python -m benchmarks probe_memory                       # 1,281,167 x 3,072 features, 8 GB in a scratch file
    python -m benchmarks probe_memory --num-images 50000

Features are drawn (a class's center and noise), as four layers of 768 would be cached; one epoch, 4 layers x 8 learning
rates x with and without batch norm, selected and trained again, as `mapet evaluate --protocols linear-sgd` does it.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.core import Result, peak_memory, timed
from benchmarks.tables import Table
from mapet.device import ComputeContext
from mapet.evaluation.features import FeatureCache
from mapet.evaluation.probes import fit_linear_sgd
from mapet.tokenizers.feature_store import FeatureStore

LAYERS, WIDTH = (3, 6, 9, 12), 768


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-images", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=20, help="1,000 take 50 times the arithmetic")
    parser.add_argument("--memory-gb", type=float, default=1.0, help="that features may take")


def run(args: argparse.Namespace) -> Result:
    compute = ComputeContext.from_options("cpu", "float32")
    torch.manual_seed(0)
    centers = torch.randn(args.classes, len(LAYERS) * WIDTH) * 0.05
    labels = torch.randint(args.classes, (args.num_images,))
    with tempfile.TemporaryDirectory() as scratch:
        store = FeatureStore(args.num_images, int(args.memory_gb * 1e9), Path(scratch))
        before = peak_memory()

        def write() -> None:
            for part in labels.split(4096):
                store.append(centers[part] + torch.randn(len(part), centers.shape[1]))

        writing, _ = timed(write)
        columns = {str(layer): slice(i * WIDTH, (i + 1) * WIDTH) for i, layer in enumerate(LAYERS)}
        cache = FeatureCache(store, torch.arange(args.num_images), labels, columns)
        training, probes = timed(lambda: fit_linear_sgd(cache, args.classes, compute, epochs=1))
        predicting, scores = timed(lambda: probes["linear_sgd"][0].predict(cache))
        row = {
            "features_GB": args.num_images * centers.shape[1] * 2 / 1e9, "in_memory": store.scratch_file is None,
            "added_GB": (peak_memory() - before) / 1e9, "write_s": writing, "train_s": training, "predict_s": predicting,
            "accuracy": float((scores.argmax(1) == labels).float().mean()),
        }  # fmt: skip
        cache.close()
    return Result(
        [row],
        f"random features of {args.num_images:,} images, {args.classes} classes; {args.memory_gb:g} GB may be in memory",
    )


SMOKE = ["--num-images", "2000", "--memory-gb", "0.001"]
TABLES = {
    "main": Table({
        "features, GB": "{features_GB:.1f}", "more memory than before, GB": "{added_GB:.2f}", "selection and training, s": "{train_s:,.0f}",
        "write, s": "{write_s:,.0f}", "prediction, s": "{predict_s:.1f}", "accuracy": "{accuracy:.3f}",
    }),
}  # fmt: skip
