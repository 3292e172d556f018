"""What the released ImageNet recipes cost: counted operations, and projections that say what they assume.

    python benchmarks/imagenet_cost.py --images-per-second 14.0 4.6

Operations are exact (`arithmetic.py`). The rate is what this machine was measured at (`training_step.py`); the rates of
GPUs are their makers' peak for dense bfloat16 times an assumed share: no GPU was measured.
"""

import argparse
import math

from arithmetic import Shape, training_flops

IMAGES, EPOCHS = 1_281_167, 300
MODELS = {"ViT-T": Shape(192, 12), "ViT-S": Shape(384, 12), "ViT-B": Shape(768, 12)}
PEAK = {"H100": 989e12, "A100": 312e12}
ASSUMED_SHARE = 0.4
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
        f"| model | GFLOP an image | FLOP in all | {' | '.join(f'{g}, h' for g in PEAK)} | H100 reads | this machine, days |"
    )
    print("|---|---|---|" + "---|" * (len(PEAK) + 2))
    for name, shape in MODELS.items():
        flops = training_flops(shape)
        hours = [f"{seen * flops / (peak * ASSUMED_SHARE) / 3600:,.0f}" for peak in PEAK.values()]
        rate = PEAK["H100"] * ASSUMED_SHARE / flops
        here = f"{seen / measured[name] / 86400:,.0f}" if name in measured else "-"
        reads = f"{rate:,.0f} images/s, {math.ceil(rate / DECODED_A_CORE)} cores"
        print(f"| {name} | {flops / 1e9:.1f} | {seen * flops:.2g} | {' | '.join(hours)} | {reads} | {here} |")


if __name__ == "__main__":
    main()
