"""The linear probe on a feature set of ImageNet's size: the memory it takes, and the time of its passes.

    python benchmarks/probe_memory.py                       # 1,281,167 x 3,072 features, 8 GB in a scratch file
    python benchmarks/probe_memory.py --images 50000        # quick

Features are drawn (a class's centre and noise), as four layers of 768 would be cached; one epoch, 4 layers x 8 learning
rates x with and without batch norm, chosen and trained anew, as `mapet evaluate --protocols linear` does it.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from mapet.device import Compute
from mapet.evaluation.bank import Bank
from mapet.evaluation.linear import linear_probes
from mapet.files import write_json
from mapet.tokenizers.feature_store import FeatureStore

LAYERS, WIDTH = (3, 6, 9, 12), 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=20, help="1,000 take 50 times the arithmetic")
    parser.add_argument("--memory", type=float, default=1.0, help="GB that features may take")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    compute = Compute.choose("cpu", "float32")
    torch.manual_seed(0)
    centres = torch.randn(options.classes, len(LAYERS) * WIDTH) * 0.05
    labels = torch.randint(options.classes, (options.images,))
    with tempfile.TemporaryDirectory() as scratch:
        store = FeatureStore(options.images, int(options.memory * 1e9), Path(scratch))
        before, started = peak(), time.perf_counter()
        for part in labels.split(4096):
            store.append(centres[part] + torch.randn(len(part), centres.shape[1]))
        written, started = time.perf_counter() - started, time.perf_counter()
        columns = {layer: slice(i * WIDTH, (i + 1) * WIDTH) for i, layer in enumerate(LAYERS)}
        bank = Bank(store, torch.arange(options.images), labels, columns)
        probes = linear_probes(bank, labels, options.classes, compute, epochs=1)
        trained, started = time.perf_counter() - started, time.perf_counter()
        right = (probes["linear"].predict(bank).argmax(1) == labels).float().mean()
        result = {
            "features_GB": options.images * centres.shape[1] * 2 / 1e9,
            "in_memory": store.in_memory,
            "peak_GB_above_start": (peak() - before) / 1e9,
            "write_s": written,
            "choose_and_train_s": trained,
            "predict_s": time.perf_counter() - started,
            "accuracy": float(right),
        }
        bank.close()
    for name, value in result.items():
        print(f"{name:20} {value:.3f}")
    if options.json:
        write_json(options.json, result)


def peak() -> int:
    """Bytes of this process in memory at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
