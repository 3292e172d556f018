"""How many images fit: a coarse count of a training step's memory."""

import torch

from mapet.device import Compute, free_memory
from mapet.models.pretraining import ViTForPreTraining

CACHE = 6 << 20
"""Bytes of one activation that a CPU's caches hold beside what it is made from (measured: python -m benchmarks training_step)."""


def bytes_per_image(model: ViTForPreTraining, compute: Compute) -> int:
    """Activations kept for the backward pass of one image.

    With plain attention about 34 numbers of width D a row and block (norms, qkv, attention output, MLP with GELU) and 3 of
    each attention score; with a GPU's fused one no score, and 17 to 18 numbers (measured on ViT-T, S and B: docs/performance.md),
    to which LayerScale adds two.
    """
    vit = model.vit
    rows = sum(model.layout().segment_lengths.values())
    heads = vit.blocks[0].attn.num_heads
    size = 2 if compute.dtype == torch.bfloat16 else 4
    numbers, scores = (20, 0) if compute.device.type == "cuda" else (34, 3)
    return len(vit.blocks) * size * (numbers * rows * vit.embed_dim + scores * heads * rows * rows)


def auto_micro_batch(model: ViTForPreTraining, batch_size: int, compute: Compute) -> int:
    """Images at a time within a step: all on a GPU; on a CPU so many that the widest activation stays in its cache."""
    if compute.device.type != "cpu":
        return batch_size
    rows = sum(model.layout().segment_lengths.values())
    widest = rows * model.vit.blocks[0].mlp.fc1.out_features * (2 if compute.dtype == torch.bfloat16 else 4)
    return max(1, min(batch_size, CACHE // widest))


def auto_batch_size(model: ViTForPreTraining, num_images: int, compute: Compute, processes: int = 1) -> int:
    """The largest power of two up to the paper's 2048 that takes at most 60 % of a GPU's free memory and leaves 20 steps an epoch.

    Args:
        processes: that share the batch, each with such a device.
    """
    most = max(1, min(2048, max(16, num_images // 20), num_images))
    if compute.device.type == "cpu":
        most = min(most, 256)  # more doesn't make it faster; what memory holds is up to the micro-batch
    else:
        fits = processes * (int(0.6 * free_memory(compute.device)) // bytes_per_image(model, compute))
        most = max(1, min(most, fits))
    return 1 << (most.bit_length() - 1)
