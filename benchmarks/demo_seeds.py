"""The demo over several seeds: mean and range of each figure.

python benchmarks/demo_seeds.py --seeds 5 --out runs/demo_seeds
"""

import argparse
import statistics
from pathlib import Path

import mapet
from mapet.files import write_json
from mapet.run_state import read_or_none

MEASURES = ("linear", "knn", "finetune")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        out = options.out / f"seed{seed}"
        done = read_or_none(out)
        results.append(done.results if done and done.results else mapet.demo(out=out, seed=seed))
    lines = [
        "| accuracy on 360 unseen digits | untrained | pre-trained | margin, smallest to largest |",
        "|---|---|---|---|",
    ]
    for measure in MEASURES:
        before, after = ([r[name][measure] for r in results] for name in ("untrained", "pretrained"))
        margins = [b - a for a, b in zip(before, after, strict=True)]
        cells = [f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in (before, after)]
        lines.append(f"| {measure} | {' | '.join(cells)} | {min(margins):+.3f} to {max(margins):+.3f} |")
    report = "\n".join(lines)
    write_json(options.out / "results.json", results)
    (options.out / "results.md").write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
