"""Packed segments: one sequence of tokens, one attention mask for the whole batch, and attention under that mask.

Sizes: B images of N patches, of which the first c of the permutation are context and p = N - c are hidden (predicted); R rows
in the packed sequence, of which the first C have keys and values; D = h x d embedding dimensions in h heads.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor

from mapet.errors import MapetError, option
from mapet.models.objectives import Objective, Segment

TargetIndices = Int[Tensor, " m"]
"""Which of the p hidden patches are predicted: ascending indices, 0 to p - 1, in permutation order."""


class QueryBlock(NamedTuple):
    """Consecutive queries that share one call of attention.

    Attributes:
        queries: their rows.
        keys: contiguous range of columns that covers all that any of them attends to.
        masked: whether the call needs the attention mask: some of them attend to a part of `keys` only.
    """

    queries: slice
    keys: slice
    masked: bool


class PackedLayout(NamedTuple):
    """The packed sequence of R rows for one c.

    Attributes:
        segment_lengths: number of rows of each segment, in packing order.
        attn_mask: True where a row attends to a column.
        num_kv: C: the first C rows are attended to, and are the columns of attention; the others are queries only.
        output_rows: the p rows that predict.
        attn_bias: 0 where a row attends to a column, -inf elsewhere.
        blocks: calls of attention that compute all R rows. They hold also if the last query rows are omitted.
        output_blocks: the same for the output rows alone, numbered from 0.
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
        """Lay out an objective's segments.

        Args:
            objective: its segments are packed.
            num_prefix: class and register tokens of the ViT.
            num_context: c.
            num_hidden: p.

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
        """Whether nothing attends to the output rows, so that those of patches that aren't predicted may be omitted."""
        return self.output_rows.start >= self.num_kv


def segment_lengths(objective: Objective, num_prefix: int, num_context: int, num_hidden: int) -> dict[Segment, int]:
    """Return the number of rows of each packed segment, in packing order; see `PackedLayout.from_counts`."""
    return {name: num_prefix + num_context if name == "context" else num_hidden for name in objective.attends_to}


def attention_mask(objective: Objective, num_prefix: int, num_context: int, num_hidden: int) -> Bool[Tensor, "R R"]:
    """Return the attention mask: True where the row's token attends to the column's.

    Rows and columns are the packed segments in order, so there are columns also of tokens that nothing attends to.

    Args:
        objective, num_prefix, num_context, num_hidden: see `PackedLayout.from_counts`.

    Raises:
        MapetError: a row attends to nothing at all (PIM's first query when there is no context and no prefix token).
    """
    lengths = segment_lengths(objective, num_prefix, num_context, num_hidden)
    i, j = torch.arange(num_hidden)[:, None], torch.arange(num_hidden)[None, :]
    ordered = {"before": j < i, "up to": j <= i, "from": j >= i, "after": j > i}

    def segment_mask(row: Segment, column: Segment) -> Bool[Tensor, "r c"]:
        rule = objective.attends_to[row].get(column)  # None: it attends to no position of this segment
        return ordered[rule] if rule in ordered else torch.full((lengths[row], lengths[column]), rule == "all")

    mask = torch.cat([torch.cat([segment_mask(row, column) for column in lengths], dim=1) for row in lengths])
    if not mask.any(dim=1).all():
        raise MapetError(
            f"objective '{objective.name}' needs at least one context patch or a class token, or its first query attends to "
            f"nothing: give a {option('mask_ratio')} below 1 or a model with a class token"
        )
    return mask


def split_query_blocks(mask: Bool[Tensor, "R C"]) -> list[QueryBlock]:
    """Split the rows of an attention mask into consecutive blocks, so that as many as possible need no mask.

    Consecutive rows that attend to the same keys are a block of their own; rows that each differ from the row before are
    merged into one block. For MaPeT there are two: mask and context rows over mask and context columns, without a mask;
    target and query rows over all columns, with one.
    """
    row_changes = (mask[1:] != mask[:-1]).any(dim=1).nonzero().flatten() + 1
    blocks: list[QueryBlock] = []
    can_grow = False  # whether the last block is of rows that differ
    for start, stop in pairwise([0, *row_changes.tolist(), len(mask)]):
        is_single_row = stop - start == 1
        if is_single_row and can_grow:
            start = blocks.pop().queries.start
        can_grow = is_single_row
        attended = mask[start:stop].any(dim=0).nonzero()
        keys = slice(int(attended.min()), int(attended.max()) + 1)
        blocks.append(QueryBlock(slice(start, stop), keys, not bool(mask[start:stop, keys].all())))
    return blocks


def pack(
    vit: VisionTransformer, mask_token: Float[Tensor, "1 1 D"], query_token: Float[Tensor, "1 1 D"] | None,
    images: Float[Tensor, "B C H W"], permutation: Int[Tensor, "B N"], segment_lengths: dict[Segment, int],
    target_indices: TargetIndices | None,
) -> Float[Tensor, "B R D"]:  # fmt: skip
    """Embed the images and assemble the packed sequence: the ViT's `norm_pre` of all segments, in packing order.

    Args:
        vit: its patch embedding, prefix tokens and position embeddings are used, as in fine-tuning.
        mask_token: its vector is at all mask tokens, to which positions are added.
        query_token: the same for query tokens; None: `mask_token`.
        images: normalized.
        permutation: patch indices of each image; the first c are context.
        segment_lengths: the segments, in packing order; that of 'context' tells c.
        target_indices: query tokens of these hidden patches only are packed, m instead of p; None: of all.
    """
    num_patches = permutation.shape[1]
    c = segment_lengths["context"] - vit.num_prefix_tokens
    embedded = vit._pos_embed(vit.patch_embed(images))
    prefix, patches = embedded.split([vit.num_prefix_tokens, num_patches], dim=1)
    hidden_positions = gather_patches(vit.pos_embed[:, -num_patches:].expand_as(patches), permutation[:, c:])
    content = gather_patches(patches, permutation)

    def add_hidden_positions(tokens: Float[Tensor, "#B #p D"]) -> Float[Tensor, "B p D"]:
        return vit.pos_drop(tokens + hidden_positions).to(content.dtype)

    segments: dict[Segment, Tensor] = {}
    for name in segment_lengths:
        if name == "context":
            rows = torch.cat([prefix, content[:, :c]], dim=1)
        elif name == "target":
            rows = content[:, c:]
        elif name == "next":
            start = content[:, c - 1 : c] if c else mask_token.expand(len(content), -1, -1)
            rows = add_hidden_positions(torch.cat([start, content[:, c:-1]], dim=1))
        elif name == "query" and query_token is not None:
            rows = add_hidden_positions(query_token)
        else:  # mask tokens, or query tokens that are the same as these
            rows = segments["mask"] if "mask" in segments else add_hidden_positions(mask_token)
        segments[name] = rows[:, target_indices] if name == "query" and target_indices is not None else rows
    return vit.norm_pre(torch.cat(list(segments.values()), dim=1))


def gather_patches(values: Tensor, indices: Int[Tensor, "B n"]) -> Tensor:
    """Gather each image's patches: (B, N) or (B, N, D) at `indices` -> (B, n) or (B, n, D)."""
    return values.gather(1, indices if values.ndim == 2 else indices[:, :, None].expand(-1, -1, values.shape[2]))


def two_stream_attention(
    attn: Attention, kv: Float[Tensor, "B C D"], q: Float[Tensor, "B R D"], attn_bias: Float[Tensor, "R C"],
    blocks: list[QueryBlock],
) -> Float[Tensor, "B R D"]:  # fmt: skip
    """Compute a timm Attention in which not all rows that have a query have a key (XLNet's two streams, arXiv 1906.08237).

    Queries that attend to one contiguous key range run without a mask; the rest share one masked call.

    Args:
        attn: with its qkv projection, norms, dropout, gate and output projection; `fused_attn` chooses PyTorch's fused
            attention or `eager_attention`.
        kv: normalized rows that keys and values are projected from.
        q: normalized rows that queries are projected from.
        attn_bias: 0 where a row of `q` attends to a row of `kv`, -inf elsewhere.
        blocks: consecutive, for at least the rows of `q`: the last one may be for more.
    """

    def project(rows: Float[Tensor, "B n D"], part: int) -> Float[Tensor, "B h n d"]:
        """Project rows to queries (part 0), keys (1) or values (2) of each head."""
        projected = F.linear(rows, weights[part], None if qkv_bias is None else qkv_bias[part])
        return projected.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)

    weights = attn.qkv.weight.chunk(3)
    qkv_bias = None if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    query, key, value = attn.q_norm(project(q, 0)), attn.k_norm(project(kv, 1)), project(kv, 2)
    attention = F.scaled_dot_product_attention if attn.fused_attn else eager_attention
    dropout = attn.attn_drop.p if attn.training else 0.0
    outputs = []
    for queries, keys, masked in blocks:
        mask = attn_bias[queries, keys] if masked else None
        q_k_v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        outputs.append(attention(*q_k_v, attn_mask=mask, dropout_p=dropout, scale=attn.scale))
    x = attn.norm(torch.cat(outputs, dim=2).transpose(1, 2).flatten(2))
    if attn.gate is not None:
        x = x * attn.gate(q).sigmoid()
    return attn.proj_drop(attn.proj(x))


def eager_attention(
    q: Float[Tensor, "B h r d"], k: Float[Tensor, "B h s d"], v: Float[Tensor, "B h s d"],
    attn_mask: Float[Tensor, "r s"] | None, dropout_p: float, scale: float,
) -> Float[Tensor, "B h r d"]:  # fmt: skip
    """Compute `F.scaled_dot_product_attention` as matmul, softmax, matmul: on CPUs in bfloat16 that is faster than fused.

    Args:
        attn_mask: added to the scores: 0 or -inf; None: every query attends to every key.
        dropout_p: dropout probability of attention weights.
        scale: factor of the scores.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores += attn_mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v
