"""Attention of packed rows. Rows that see the same columns need no mask; the others share one call under the table."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.models.vision_transformer import Attention
from torch import Tensor


class RowBlock(NamedTuple):
    """Consecutive rows, the range of columns that any of them sees, and whether some see only part of it."""

    rows: slice
    columns: slice
    masked: bool


def row_blocks(table: Bool[Tensor, "R C"]) -> list[RowBlock]:
    """Cut a visibility table so that as much as possible of it is plain attention over a range of columns.

    For MaPeT's table these are two blocks: mask and context rows over mask and context columns, without a mask; target
    and query rows over all columns, with one.
    """
    starts = [0, *((table[1:] != table[:-1]).any(dim=1).nonzero().flatten() + 1).tolist(), len(table)]
    blocks: list[RowBlock] = []
    alone = False  # whether the last block may not grow: its rows all see the same
    for start, stop in pairwise(starts):
        same = stop - start > 1
        if blocks and not same and not alone:
            start = blocks.pop().rows.start
        alone = same
        seen = table[start:stop].any(dim=0).nonzero()
        columns = slice(int(seen.min()), int(seen.max()) + 1)
        blocks.append(RowBlock(slice(start, stop), columns, not bool(table[start:stop, columns].all())))
    return blocks


def clip(blocks: list[RowBlock], rows: int) -> list[RowBlock]:
    """The blocks of the first `rows` rows."""
    return [RowBlock(slice(b.rows.start, min(b.rows.stop, rows)), *b[1:]) for b in blocks if b.rows.start < rows]


def attend(
    attn: Attention,
    seen: Float[Tensor, "B C D"],
    asking: Float[Tensor, "B R D"],
    bias: Float[Tensor, "R C"],
    blocks: list[RowBlock],
) -> Float[Tensor, "B R D"]:
    """A timm Attention in which not all rows that ask are seen (XLNet's two streams, arXiv 1906.08237).

    Args:
        seen: normalised rows, of which keys and values are made.
        asking: normalised rows, of which queries are made.
        bias: 0 where a row sees a column, -inf elsewhere.
        blocks: of all rows.
    """

    def heads(rows: Float[Tensor, "B n D"], part: int) -> Float[Tensor, "B h n d"]:
        projected = F.linear(rows, weights[part], None if offsets is None else offsets[part])
        return projected.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)

    weights = attn.qkv.weight.chunk(3)
    offsets = None if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    q, k, v = attn.q_norm(heads(asking, 0)), attn.k_norm(heads(seen, 1)), heads(seen, 2)
    dropout = attn.attn_drop.p if attn.training else 0.0
    product = F.scaled_dot_product_attention if attn.fused_attn else plain_attention
    parts = [
        product(
            q[:, :, rows],
            k[:, :, columns],
            v[:, :, columns],
            attn_mask=bias[rows, columns] if masked else None,
            dropout_p=dropout,
            scale=attn.scale,
        )
        for rows, columns, masked in blocks
    ]
    x = attn.norm(torch.cat(parts, dim=2).transpose(1, 2).flatten(2))
    if attn.gate is not None:
        x = x * attn.gate(asking).sigmoid()
    return attn.proj_drop(attn.proj(x))


def plain_attention(
    q: Float[Tensor, "B h r d"],
    k: Float[Tensor, "B h s d"],
    v: Float[Tensor, "B h s d"],
    attn_mask: Float[Tensor, "r s"] | None,
    dropout_p: float,
    scale: float,
) -> Float[Tensor, "B h r d"]:
    """`scaled_dot_product_attention` as products and a softmax: on CPUs in bfloat16 PyTorch's fused one is slower."""
    scores = (q * scale) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores += attn_mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v
