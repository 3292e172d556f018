"""Packed segments: one sequence of tokens, one attention mask for the whole batch, and attention under that mask."""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor

from mapet.errors import MapetError
from mapet.models.objectives import Objective, Segment

TargetIndices = Int[Tensor, " m"]
"""Which of the p hidden patches are predicted, ascending positions in the permutation's hidden part."""


class QueryBlock(NamedTuple):
    """Consecutive queries, the range of keys that any of them attends to, and whether some attend only to part of it."""

    queries: slice
    keys: slice
    masked: bool


class PackedLayout(NamedTuple):
    """The packed sequence of R rows for one c.

    Attributes:
        segment_lengths: rows of each segment, in packing order.
        attn_mask: True where a row attends to a column.
        num_kv: C, rows that are attended to: the first ones, the columns of attention.
        output_rows: the rows that predict.
        attn_bias: 0 where a row attends to a column, -inf elsewhere.
        blocks: of all rows; `output_blocks` of those that predict.
    """

    segment_lengths: dict[Segment, int]
    attn_mask: Bool[Tensor, "R R"]
    num_kv: int
    output_rows: slice
    attn_bias: Float[Tensor, "R C"]
    blocks: list[QueryBlock]
    output_blocks: list[QueryBlock]

    @classmethod
    def from_counts(cls, objective: Objective, num_prefix: int, num_context: int, num_hidden: int) -> "PackedLayout":
        """Lay out an objective's segments for c context and p hidden patches.

        Raises:
            MapetError: see `attention_mask`.
        """
        lengths = segment_lengths(objective, num_prefix, num_context, num_hidden)
        mask = attention_mask(objective, num_prefix, num_context, num_hidden)
        attended = {column for columns in objective.attends_to.values() for column in columns}
        num_kv = sum(length for segment, length in lengths.items() if segment in attended)
        ends = dict(zip(lengths, accumulate(lengths.values()), strict=True))
        stop = ends[objective.output_segment]
        output_rows = slice(stop - lengths[objective.output_segment], stop)
        kv_mask = mask[:, :num_kv]
        bias = torch.zeros(kv_mask.shape).masked_fill(~kv_mask, float("-inf"))
        blocks = split_query_blocks(kv_mask), split_query_blocks(kv_mask[output_rows])
        return cls(lengths, mask, num_kv, output_rows, bias, *blocks)

    @property
    def queries_only(self) -> bool:
        """Whether nothing attends to the output rows, so that only those of the predicted patches are packed."""
        return self.output_rows.start >= self.num_kv


def segment_lengths(objective: Objective, num_prefix: int, num_context: int, num_hidden: int) -> dict[Segment, int]:
    """Return the rows of each packed segment, in packing order."""
    return {s: num_prefix + num_context if s == "context" else num_hidden for s in objective.segments}


def attention_mask(objective: Objective, num_prefix: int, num_context: int, num_hidden: int) -> Bool[Tensor, "R R"]:
    """Return True where the row's token attends to the column's. Rows and columns are the packed segments in order.

    Raises:
        MapetError: a row attends to nothing at all (PIM's first query when there is no context and no prefix token).
    """
    lengths = segment_lengths(objective, num_prefix, num_context, num_hidden)
    i, j = torch.arange(num_hidden)[:, None], torch.arange(num_hidden)[None, :]
    by_order = {"before": j < i, "up to": j <= i, "from": j >= i, "after": j > i}

    def part(row: Segment, column: Segment) -> Bool[Tensor, "r c"]:
        rule = objective.attends_to[row].get(column)
        return by_order[rule] if rule in by_order else torch.full((lengths[row], lengths[column]), rule == "all")

    mask = torch.cat([torch.cat([part(row, column) for column in lengths], dim=1) for row in lengths])
    if not mask.any(dim=1).all():
        hint = "its first query sees nothing"
        raise MapetError(f"objective '{objective.name}' needs at least one context patch or a class token: {hint}")
    return mask


def split_query_blocks(mask: Bool[Tensor, "R C"]) -> list[QueryBlock]:
    """Cut an attention mask so that as much as possible of it is plain attention over a contiguous range of keys.

    For MaPeT these are two blocks: mask and context rows over mask and context columns, without a mask; target and query
    rows over all columns, with one.
    """
    starts = [0, *((mask[1:] != mask[:-1]).any(dim=1).nonzero().flatten() + 1).tolist(), len(mask)]
    blocks: list[QueryBlock] = []
    complete = False  # whether the last block may not grow: its rows all attend to the same keys
    for start, stop in pairwise(starts):
        same = stop - start > 1
        if blocks and not same and not complete:
            start = blocks.pop().queries.start
        complete = same
        attended = mask[start:stop].any(dim=0).nonzero()
        keys = slice(int(attended.min()), int(attended.max()) + 1)
        blocks.append(QueryBlock(slice(start, stop), keys, not bool(mask[start:stop, keys].all())))
    return blocks


def truncate_blocks(blocks: list[QueryBlock], num_rows: int) -> list[QueryBlock]:
    """Return the blocks of the first rows."""
    kept = [block for block in blocks if block.queries.start < num_rows]
    return [block._replace(queries=slice(block.queries.start, min(block.queries.stop, num_rows))) for block in kept]


def pack(
    vit: VisionTransformer, mask_token: Float[Tensor, "1 1 D"], query_token: Float[Tensor, "1 1 D"] | None,
    images: Float[Tensor, "B C H W"], permutation: Int[Tensor, "B N"], segment_lengths: dict[Segment, int],
    target_indices: TargetIndices | None,
) -> Float[Tensor, "B R D"]:  # fmt: skip
    """Embed the segments in permutation order; `query` only for `target_indices` (None: all p).

    Args:
        query_token: what query tokens start as; None: as mask tokens.
    """
    num_patches = permutation.shape[1]
    c = segment_lengths["context"] - vit.num_prefix_tokens
    embedded = vit._pos_embed(vit.patch_embed(images))  # prefix tokens and patches, with positions, as in fine-tuning
    prefix, patches = embedded.split([vit.num_prefix_tokens, num_patches], dim=1)
    positions = gather_patches(vit.pos_embed[:, -num_patches:].expand_as(patches), permutation[:, c:])
    content = gather_patches(patches, permutation)

    def at_hidden_positions(token: Tensor) -> Tensor:
        return vit.pos_drop(token + positions).to(content.dtype)

    parts: dict[Segment, Tensor] = {}
    for segment in segment_lengths:
        if segment == "context":
            part = torch.cat([prefix, content[:, :c]], dim=1)
        elif segment == "target":
            part = content[:, c:]
        elif segment == "next":
            start = content[:, c - 1 : c] if c else mask_token.expand(len(content), -1, -1)
            part = at_hidden_positions(torch.cat([start, content[:, c:-1]], dim=1))
        elif segment == "query" and query_token is not None:
            part = at_hidden_positions(query_token)
        else:
            part = parts["mask"] if "mask" in parts else at_hidden_positions(mask_token)
        parts[segment] = part if target_indices is None or segment != "query" else part[:, target_indices]
    return vit.norm_pre(torch.cat(list(parts.values()), dim=1))


def gather_patches(values: Tensor, indices: Int[Tensor, "B n"]) -> Tensor:
    """Gather (B, N, ...) at each image's patch indices into (B, n, ...)."""
    return values.gather(1, indices if values.ndim == 2 else indices[:, :, None].expand(-1, -1, values.shape[2]))


def two_stream_attention(
    attn: Attention, kv: Float[Tensor, "B C D"], q: Float[Tensor, "B R D"], attn_bias: Float[Tensor, "R C"],
    blocks: list[QueryBlock],
) -> Float[Tensor, "B R D"]:  # fmt: skip
    """Compute a timm Attention in which not all rows that have a query have a key (XLNet's two streams, arXiv 1906.08237).

    Queries that attend to one contiguous key range run without a mask; the rest share one masked call.

    Args:
        kv, q: normalized rows, of which keys and values, and queries are made.
        attn_bias: 0 where a row attends to a column, -inf elsewhere.
        blocks: of all rows of `q`.
    """

    def heads(rows: Float[Tensor, "B n D"], part: int) -> Float[Tensor, "B h n d"]:
        projected = F.linear(rows, weights[part], None if qkv_bias is None else qkv_bias[part])
        return projected.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)

    weights = attn.qkv.weight.chunk(3)
    qkv_bias = None if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    query, key, value = attn.q_norm(heads(q, 0)), attn.k_norm(heads(kv, 1)), heads(kv, 2)
    attention = F.scaled_dot_product_attention if attn.fused_attn else eager_attention
    dropout = attn.attn_drop.p if attn.training else 0.0
    parts = []
    for queries, keys, masked in blocks:
        mask = attn_bias[queries, keys] if masked else None
        q_k_v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        parts.append(attention(*q_k_v, attn_mask=mask, dropout_p=dropout, scale=attn.scale))
    x = attn.norm(torch.cat(parts, dim=2).transpose(1, 2).flatten(2))
    if attn.gate is not None:
        x = x * attn.gate(q).sigmoid()
    return attn.proj_drop(attn.proj(x))


def eager_attention(
    q: Float[Tensor, "B h r d"], k: Float[Tensor, "B h s d"], v: Float[Tensor, "B h s d"],
    attn_mask: Float[Tensor, "r s"] | None, dropout_p: float, scale: float,
) -> Float[Tensor, "B h r d"]:  # fmt: skip
    """Compute `scaled_dot_product_attention` as products and a softmax: faster than the fused one on CPUs in bfloat16."""
    scores = (q * scale) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores += attn_mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v
