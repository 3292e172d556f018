"""What the released ImageNet recipes cost: counted operations, and projections that say what they assume.

    python benchmarks/imagenet_cost.py --images-per-second 14.0 4.6

Operations are exact (`arithmetic.py`). The rate is what this machine was measured at (`training_step.py`), and so are those
of the H100; an A100 is assumed to reach the same share of its maker's peak for dense bfloat16.
"""

import argparse
import math

from arithmetic import Shape, training_flops

IMAGES, EPOCHS = 1_281_167, 300
MODELS = {"ViT-T": Shape(192, 12), "ViT-S": Shape(384, 12), "ViT-B": Shape(768, 12)}
H100 = {"ViT-T": 5978, "ViT-S": 3324, "ViT-B": 1456}
"""Images a second, compiled, batch 256 (`training_step.py --device cuda --models base small tiny --batch 256`)."""
A100_TO_H100 = 312 / 989
"""Of the makers' peaks for dense bfloat16."""
DECODED_A_CORE = 925
"""Images a second: centred views of 500 x 375 JPEGs (`data_path.py`)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images-per-second", type=float, nargs="*", default=[], help="measured here: ViT-T, ViT-S, ..."
    )
    measured = dict(zip(MODELS, parser.parse_args().images_per_second, strict=False))
    seen = IMAGES * EPOCHS
    print(
        "| model | GFLOP an image | FLOP in all | H100, h | A100, h (assumed) | H100 reads | this machine, days |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name, shape in MODELS.items():
        flops, rate = training_flops(shape), H100[name]
        hours = seen / rate / 3600
        here = f"{seen / measured[name] / 86400:,.0f}" if name in measured else "-"
        reads = f"{rate:,} images/s, {math.ceil(rate / DECODED_A_CORE)} cores"
        both = f"{hours:,.0f} | {hours / A100_TO_H100:,.0f}"
        print(f"| {name} | {flops / 1e9:.1f} | {seen * flops:.2g} | {both} | {reads} | {here} |")


if __name__ == "__main__":
    main()
