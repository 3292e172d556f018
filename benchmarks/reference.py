"""The baseline for speed: MaPeT's step as the authors' released code computes it, without any of its bugs.

Written from the method's description for comparison only, and equal to `ViTForPreTraining` in float64 (tests/models/test_packing.py). Rows stay
in raster order, so the attention mask differs from image to image: a dense additive float mask is made for every image and
head on the CPU and moved to the device. Content rows (the image and its mask tokens) and query rows attend separately,
through an unfused softmax; all N + 1 + 2p of them go through every layer, and all logits are kept.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor

from mapet.models.pretraining import ViTForPreTraining


def dense_masks(
    permutation: Int[Tensor, "B N"], num_context: int, num_prefix: int, heads: int
) -> tuple[Float[Tensor, "B h content content"], Float[Tensor, "B h p content"]]:
    """Additive masks (0 or -inf) of content rows and of query rows, on the CPU. Columns: prefix, N patches, p mask tokens."""
    batch, n = permutation.shape
    p = n - num_context
    rank = permutation.argsort(1)  # of each patch, in raster order
    patch_rank = torch.cat([torch.full((batch, num_prefix), -1), rank - num_context], dim=1).clamp_min(
        -1
    )  # -1: context
    mask_rank = torch.arange(p).expand(batch, p)

    def sees(row: Tensor, include_own: bool) -> Tensor:
        row = row[:, :, None]
        content = patch_rank[:, None] <= row if include_own else patch_rank[:, None] < row
        masks = mask_rank[:, None] > row if include_own else mask_rank[:, None] >= row
        return torch.cat([content.expand(-1, row.shape[1], -1), masks.expand(-1, row.shape[1], -1)], dim=2)

    content = torch.cat([sees(patch_rank, True), sees(torch.full((batch, p), -1), True)], dim=1)
    return tuple(  # type: ignore[return-value]
        torch.where(table, 0.0, float("-inf"))[:, None].repeat(1, heads, 1, 1)
        for table in (content, sees(mask_rank, False))
    )


def attention(
    block: Block, rows: Float[Tensor, "B r D"], columns: Float[Tensor, "B s D"], mask: Float[Tensor, "B h r s"]
) -> Float[Tensor, "B r D"]:
    """Softmax attention with separate query and key-value products."""
    attn = block.attn
    wq, wkv = attn.qkv.weight.split([attn.attn_dim, 2 * attn.attn_dim])
    bq, bkv = attn.qkv.bias.split([attn.attn_dim, 2 * attn.attn_dim])
    q = F.linear(rows, wq, bq).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    k, v = F.linear(columns, wkv, bkv).unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)) * attn.scale + mask
    return attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def reference_loss(
    model: ViTForPreTraining,
    images: Float[Tensor, "B C H W"],
    tokens: Int[Tensor, "B N"],
    permutation: Int[Tensor, "B N"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "B p V"]]:
    """Loss and logits with the weights of `model` (MaPeT). `permutation` is on the CPU, as in the released loader."""
    vit, c = model.vit, model.num_context
    content_mask, query_mask = (
        mask.to(images.device, images.dtype)
        for mask in dense_masks(permutation, c, vit.num_prefix_tokens, vit.blocks[0].attn.num_heads)
    )
    hidden = permutation[:, c:].to(images.device)
    x = vit._pos_embed(vit.patch_embed(images))
    masked = model.mask_token + vit.pos_embed[0, -model.num_patches :][hidden]
    content, query = vit.norm_pre(torch.cat([x, masked], dim=1)), vit.norm_pre(masked)
    for block in vit.blocks:
        columns, asking = block.norm1(content), block.norm1(query)
        content = content + block.ls1(attention(block, columns, columns, content_mask))
        query = query + block.ls1(attention(block, asking, columns, query_mask))
        content = content + block.ls2(block.mlp(block.norm2(content)))
        query = query + block.ls2(block.mlp(block.norm2(query)))
    logits = model.head(vit.norm(query))
    return F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, hidden).flatten()), logits
