"""Packed segments: one sequence of tokens, one attention mask for the whole batch, and attention under that mask.

Sizes: B images of N patches, of which the first c of the permutation are context and p = N - c are masked (predicted); R rows
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
"""Which of the p masked patches are predicted: ascending indices, 0 to p - 1, in permutation order."""


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
    def from_counts(cls, objective: Objective, num_prefix: int, num_context: int, num_masked: int) -> "PackedLayout":
        """Lay out the packed sequence of an objective: its segments (context, mask tokens, ...) one after another.

        Segments that something attends to come first; their num_kv rows have keys and values, the rows behind them queries alone.

        Args:
            objective: says which segments are packed, in which order, and which attends to which.
            num_prefix: number of class and register tokens of the ViT, which are in the context segment.
            num_context: c, number of context patches.
            num_masked: p, number of patches to predict.

        Returns:
            The layout, with tensors on the CPU.

        Raises:
            MapetError: a row would attend to nothing at all, see `attention_mask`.
        """
        lengths = segment_lengths(objective, num_prefix, num_context, num_masked)
        mask = attention_mask(objective, num_prefix, num_context, num_masked)
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
        """Return whether nothing attends to the output rows, so that those of patches that aren't predicted may be omitted."""
        return self.output_rows.start >= self.num_kv


def segment_lengths(objective: Objective, num_prefix: int, num_context: int, num_masked: int) -> dict[Segment, int]:
    """Return the number of rows of each packed segment, in packing order: num_prefix + num_context for 'context', else num_masked."""
    return {name: num_prefix + num_context if name == "context" else num_masked for name in objective.attends_to}


def attention_mask(objective: Objective, num_prefix: int, num_context: int, num_masked: int) -> Bool[Tensor, "R R"]:
    """Return the attention mask of a packed sequence: True where the row's token attends to the column's.

    Rows and columns are the objective's segments in packing order (the context segment of num_prefix + c tokens, any other of p), so
    there are columns also of tokens that nothing attends to. Between segments of p tokens a rule compares the positions i of the row
    and j of the column in the permutation.

    Args:
        objective: which segments are packed, in which order, and which attends to which by what rule.
        num_prefix: number of class and register tokens, which are in the context segment.
        num_context: c, number of context patches.
        num_masked: p, number of patches to predict.

    Raises:
        MapetError: a row attends to nothing at all (the first query of objective 'pim' when there is no context and no prefix token).
    """
    lengths = segment_lengths(objective, num_prefix, num_context, num_masked)
    i, j = torch.arange(num_masked)[:, None], torch.arange(num_masked)[None, :]
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

    Args:
        mask: True where a row attends to a column; every row attends to at least one.

    Returns:
        The blocks in the order of their rows, together all rows.
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
    """Embed images and assemble the packed sequence of a pre-training objective, the input of the ViT's first block.

    The permutation of an image is the order in which its patches are predicted: the first c patches are context, the other p = N - c
    are masked. The sequence is the concatenation of these segments, those in `segment_lengths`, R tokens in all:

        context  prefix tokens (class, registers) and the c context patches: content + position
        target   the masked patches: content + position
        mask     for each masked patch the mask token + its position
        query    for each masked patch the query token + its position
        next     for each masked patch the content + position of the patch before it in the permutation, + its own position

    Args:
        vit: its patch embedding, prefix tokens, position embeddings and `norm_pre` are used, as in fine-tuning.
        mask_token: vector of all mask tokens, before positions are added.
        query_token: the same for query tokens; None: `mask_token`.
        images: normalized, in the dtype of the ViT.
        permutation: row-major patch indices of each image, on the device of `images`.
        segment_lengths: segment -> number of tokens, in packing order; that of 'context' (prefix tokens + c) tells c.
        target_indices: which m of the p masked patches are predicted, as ascending indices from 0 in the order of the permutation: the
            query segment has only these. None: all.

    Returns:
        The segments in packing order, after `norm_pre`.
    """
    num_patches = permutation.shape[1]
    c = segment_lengths["context"] - vit.num_prefix_tokens
    embedded = vit._pos_embed(vit.patch_embed(images))  # with positions and prefix tokens
    prefix, patches = embedded.split([vit.num_prefix_tokens, num_patches], dim=1)
    # Prefix tokens may have positions, too, which come first.
    hidden_positions = gather_patches(vit.pos_embed[:, -num_patches:].expand_as(patches), permutation[:, c:])
    content = gather_patches(patches, permutation)  # (B, N, D), all patches in the order of the permutation

    def add_hidden_positions(tokens: Float[Tensor, "#B #p D"]) -> Float[Tensor, "B p D"]:
        """Add the positions of the masked patches, with the ViT's dropout of embeddings."""
        return vit.pos_drop(tokens + hidden_positions).to(content.dtype)

    segments: dict[Segment, Tensor] = {}
    for name in segment_lengths:
        if name == "context":
            rows = torch.cat([prefix, content[:, :c]], dim=1)
        elif name == "target":
            rows = content[:, c:]
        elif name == "next":
            # Before the first masked patch is the last context patch, or a mask token if there is no context.
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
    attn: Attention, k: Float[Tensor, "B C D"], v: Float[Tensor, "B C D"], q: Float[Tensor, "B R D"],
    attn_bias: Float[Tensor, "R C"], blocks: list[QueryBlock],
) -> Float[Tensor, "B R D"]:  # fmt: skip
    """Compute a timm Attention of queries over keys and values from other rows (XLNet's two streams, arXiv 1906.08237).

    In pre-training some tokens have a query but no key: nothing attends to them. The calls of attention are made block by block,
    so that queries which attend to one contiguous range of keys need no mask.

    Args:
        attn: with its qkv projection, norms, dropout, gate and output projection; `fused_attn` chooses PyTorch's fused
            attention or `eager_attention`.
        k, v: rows, normalized by the block's norm, that keys and that values are projected from: the same but in CAE's regressor.
        q: rows, normalized by the block's norm, that queries are projected from.
        attn_bias: 0 where a row of `q` attends to a row of `k`, -inf elsewhere; used in blocks with `masked` alone.
        blocks: each is (slice of rows of `q`, slice of rows of `k` and `v` that they attend to, whether some attend to a part of these only).
            They are in the order of the rows of `q` and cover them; the last one may exceed them.

    Returns:
        Outputs of the attention's projection for the rows of `q`, without residual connection.
    """

    def project(rows: Float[Tensor, "B n D"], part: int) -> Float[Tensor, "B h n d"]:
        """Project rows to queries (part 0), keys (1) or values (2) of each head."""
        projected = F.linear(rows, weights[part], None if qkv_bias is None else qkv_bias[part])
        return projected.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)

    weights = attn.qkv.weight.chunk(3)
    qkv_bias = None if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    query, key, value = attn.q_norm(project(q, 0)), attn.k_norm(project(k, 1)), project(v, 2)
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
        q, k, v: queries, keys and values of B images in h heads of d dimensions.
        attn_mask: added to the scores: 0 or -inf; None: every query attends to every key.
        dropout_p: dropout probability of attention weights; 0 in evaluation mode.
        scale: factor of the scores.

    Returns:
        Weighted means of the values for each query, without the output projection.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores += attn_mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v
