"""FLOPs of MaPeT's training step, counted exactly, and what the released ImageNet recipes cost.

Projections say what they assume: rates are those of stored results of `training_step` and `data_loading`, an A100 is assumed to reach
the same fraction of its maker's peak for dense bfloat16 as the H100.
"""

import argparse
import math
from dataclasses import dataclass

from benchmarks.core import Result
from benchmarks.tables import Table, load_rows


@dataclass(frozen=True)
class Shape:
    """A ViT and its input, in the letters of the paper: N patches, c context, V codes, width D."""

    width: int
    depth: int
    patches: int = 196
    context: int = 49
    vocabulary: int = 8192
    patch_values: int = 16 * 16 * 3
    mlp_ratio: int = 4

    @property
    def predicted(self) -> int:
        return self.patches - self.context

    @property
    def content_rows(self) -> int:
        """Class token, patches, mask tokens."""
        return 1 + self.patches + self.predicted


def linear(shape: Shape, content: int, query: int, keys: int) -> int:
    """Multiply-adds of a block's linear layers: `content` and `query` rows have queries, `keys` rows keys and values."""
    d2 = shape.width**2
    return (content + query) * (2 + 2 * shape.mlp_ratio) * d2 + keys * 2 * d2


def forward(shape: Shape) -> dict[str, int]:
    """Fewest multiply-adds for one image that MaPeT's definition needs.

    Each row attends to exactly N + 1 columns; query rows make no keys and values; in the last block only query rows have queries.
    """
    p, sees = shape.predicted, 1 + shape.patches
    whole = linear(shape, shape.content_rows, p, shape.content_rows)
    last = linear(shape, 0, p, shape.content_rows)
    attention = 2 * sees * shape.width
    return {
        "patch embedding": shape.patches * shape.patch_values * shape.width,
        "blocks, linear": (shape.depth - 1) * whole + last,
        "blocks, attention": ((shape.depth - 1) * (shape.content_rows + p) + p) * attention,
        "head": p * shape.width * shape.vocabulary,
    }


def training_flops(shape: Shape) -> int:
    """Floating-point operations of forward and backward for one image; the pixels need no gradient."""
    parts = forward(shape)
    return 2 * (3 * sum(parts.values()) - parts["patch embedding"])


def reference_training_flops(shape: Shape) -> int:
    """FLOPs of the released implementation: every row in every block, attention over all keys."""
    p, columns = shape.predicted, shape.content_rows
    block = linear(shape, columns, p, columns) + (columns + p) * columns * 2 * shape.width
    embedding = shape.patches * shape.patch_values * shape.width
    return 2 * (3 * (shape.depth * block + p * shape.width * shape.vocabulary + embedding) - embedding)


MODELS = {"ViT-T": Shape(192, 12), "ViT-S": Shape(384, 12), "ViT-B": Shape(768, 12)}
IMAGES, EPOCHS = 1_281_167, 300
A100_TO_H100 = 312 / 989
"""Fraction of the vendors' peaks for dense bfloat16."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu", default="training_step-another_day", help="stored result with this machine's rates")
    parser.add_argument("--gpu", default="training_step-h100", help="stored result with an H100's rates")


def run(args: argparse.Namespace) -> Result:
    cpu, h100 = ({row["model"]: row["images_per_second"] for row in load_rows(stem)} for stem in (args.cpu, args.gpu))
    (decoded,) = [
        row["center"] for row in load_rows("data_loading") if row["name"] == "mapet, bytes ready for the device"
    ]
    seen, rows = IMAGES * EPOCHS, []
    for name, shape in MODELS.items():
        flops, hours = training_flops(shape), seen / h100[name] / 3600
        rows.append({
            "model": name, "GFLOP_per_image": flops / 1e9, "FLOP": seen * flops, "reference_GFLOP_per_image": reference_training_flops(shape) / 1e9,
            "H100_hours": hours, "A100_hours": hours / A100_TO_H100, "H100_images_per_second": h100[name],
            "loader_cores": math.ceil(h100[name] / decoded), "cpu_days": seen / cpu[name] / 86400 if name in cpu else None,
        })  # fmt: skip
    return Result(
        rows, f"{EPOCHS} epochs of {IMAGES:,} images at 224 px; rates of {args.cpu}, {args.gpu} and data_loading"
    )


SMOKE: list[str] = []
TABLES = {
    "main": Table({
        "model": "{model}", "GFLOPs per image": "{GFLOP_per_image:.1f}", "total FLOPs": "{FLOP:.2g}", "H100, h": "{H100_hours:,.0f}",
        "A100, h (assumed)": "{A100_hours:,.0f}", "H100 data loading": "{H100_images_per_second:,.0f} images/s, {loader_cores} cores",
        "this machine, days": "{cpu_days:,.0f}",
    }),
}  # fmt: skip
