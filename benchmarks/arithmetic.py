"""Multiply-adds of MaPeT's step, counted exactly: what has to be done, so that speed can be set against it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A ViT and its input, in the letters of the paper: N patches, c context, V words, D wide."""

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
    """Multiply-adds of a block's products with weights: `content` and `query` rows ask, `keys` rows are seen."""
    d2 = shape.width**2
    return (content + query) * (2 + 2 * shape.mlp_ratio) * d2 + keys * 2 * d2


def forward(shape: Shape) -> dict[str, int]:
    """Multiply-adds for one image that MaPeT's definition asks for, and no more.

    Each row attends to exactly N + 1 columns; query rows make no keys and values; in the last block only query rows ask.
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
    """What the released way computes: every row in every block, attention over all columns."""
    p, columns = shape.predicted, shape.content_rows
    block = linear(shape, columns, p, columns) + (columns + p) * columns * 2 * shape.width
    embedding = shape.patches * shape.patch_values * shape.width
    return 2 * (3 * (shape.depth * block + p * shape.width * shape.vocabulary + embedding) - embedding)
