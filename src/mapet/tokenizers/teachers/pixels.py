"""The patch's own pixels, flattened: label-free, and needs no weights."""

from torch import nn


def build(patch_size: int) -> nn.Module:
    """Return an encoder (B, C, H, W) -> (B, C p^2, H / p, W / p)."""
    return nn.PixelUnshuffle(patch_size)
