"""Published ViT weights, under whoever's names -> timm's names for a plain VisionTransformer, and its sizes.

The layouts that are known, by what tells them (`docs/export.md` has the table):

    released MaPeT   timm's names with attn.q and attn.kv in two pieces; mask token, token head
    timm, DeiT       timm's names
    MAE              timm's names; decoder_*, mask_token
    DINO, iBOT       student and teacher, backbone.*, head.*
    DINOv2           ls1.gamma, register_tokens, blocks in chunks
    BEiT             gamma_1, q_bias and v_bias, relative_position_bias_table
    Hugging Face     embeddings.*, encoder.layer.* or layers.*, layernorm (ViT, ViTMAE, DINOv2, BEiT)
"""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapet.errors import MapetError, by

Stats = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel in [0, 1]."""
PATCHES = re.compile(r"(.*?)(?:embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.weight")
RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
        (r"^register_tokens$", "reg_token"),
        (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
        (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
        (r"\.attn\.query\.", ".attn.q."),
        (r"\.attn\.key\.", ".attn.k."),
        (r"\.attn\.value\.", ".attn.v."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"^layernorm\.", "norm."),
        (r"^pooler\.layernorm\.", "fc_norm."),
        (r"\.(?:gamma_|lambda_|layer_scale_init)([12])(?:\.lambda1)?$", r".ls\1.gamma"),
    )
]
PLAIN = re.compile(
    r"cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm_pre|norm|fc_norm)\.(weight|bias)"
    r"|blocks\.\d+\.((norm1|norm2|attn\.qkv|attn\.proj|attn\.q_norm|attn\.k_norm|mlp\.fc1|mlp\.fc2)\.(weight|bias)|ls[12]\.gamma)"
)
NO_PLACE = {
    "relative position bias": re.compile(r"relative_position_bias_table"),
    "distillation token": re.compile(r"^dist_token$"),
    "rotary positions": re.compile(r"(^|\.)rope"),
    "gated MLP (SwiGLU)": re.compile(r"^blocks\.\d+\.mlp\.(w12|w3|fc1_g|fc1_x|weights_in|weights_out)\."),
}
"""What a plain ViT computes nothing with, though the weights were learned with it."""
HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
"""Attention heads of the published widths: the weights themselves don't tell."""


class Published(NamedTuple):
    """A ViT's weights, and what else there is to know about it.

    Attributes:
        weights: of the encoder, under timm's names.
        model: a name for timm's `create_model`; with `args` it makes the ViT.
        grid: (rows, columns) of patches that the positions are of.
        stats: what its input was normalised with; None if nothing says so.
        eps: of its norms; None: the model's own.
        left_out: names in the file that are no part of the encoder.
        lost: what the encoder has and a plain ViT hasn't, in words: without it, it computes something else.
    """

    weights: dict[str, Tensor]
    model: str
    args: dict[str, Any]
    grid: tuple[int, int]
    stats: Stats | None = None
    eps: float | None = None
    left_out: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def from_weights(
    weights: dict[str, Tensor],
    source: object,
    known: dict[str, Any] | None = None,
    img_size: tuple[int, int] | None = None,
    **more: Any,
) -> Published:
    """Recognise the layout of a file's tensors, rename them and read the ViT's sizes from them.

    Args:
        source: what errors name.
        known: keywords of the ViT that something else than the weights tells, e.g. {'num_heads': 6, 'img_size': (16, 24)}.
        img_size: the size that its positions are of, where they fit no square.
        more: further attributes, e.g. stats.

    Raises:
        MapetError: not a ViT's weights, or sizes that don't fit together.
    """
    known = dict(known or {})
    biases = [tensor for name, tensor in weights.items() if name.endswith("relative_position_bias_table")]
    if biases:  # BEiT's: (distances, heads)
        known.setdefault("num_heads", biases[0].shape[1])
    try:
        plain, left_out, lost = plain_names(weights, source)
        args, grid = _architecture(plain, known, img_size)
    except KeyError as error:
        raise MapetError(f"{source}: not the weights of a whole ViT: it has no {error.args[0]}") from None
    except ValueError as error:
        raise MapetError(f"{source}: {error}") from None
    more["lost"] = (*lost, *more.get("lost", ()))
    return Published(plain, "vit_base_patch16_224", args, grid, left_out=tuple(left_out), **more)


def plain_names(weights: dict[str, Tensor], source: object) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """(the encoder's tensors under timm's names, names of the others, what of the encoder has no place in a plain ViT).

    Of several ViTs in a file (student and teacher) it is the teacher.

    Raises:
        MapetError: there is no patch embedding, so no ViT.
    """
    beginnings = [match[1] for name in weights if (match := PATCHES.fullmatch(name))]
    if not beginnings:
        raise MapetError(
            f"{source}: not a ViT in a layout that is known: it has no patch_embed.proj.weight, but {shortly(weights)}"
        )
    prefix = next((beginning for beginning in beginnings if "teacher" in beginning), beginnings[0])
    plain, left_out, lost = {}, [], []
    for name, tensor in weights.items():
        if not name.startswith(prefix):
            left_out.append(name)
            continue
        new = name.removeprefix(prefix)
        for pattern, replacement in RENAMED:
            new = pattern.sub(replacement, new)
        missing = next((what for what, pattern in NO_PLACE.items() if pattern.search(new)), None)
        if missing:
            lost.append(missing)
        elif new.endswith("relative_position_index"):
            pass  # follows from the grid
        else:
            plain[new] = tensor
    joined = _join(plain)
    encoder = {name: tensor for name, tensor in joined.items() if PLAIN.fullmatch(name)}
    for name in joined.keys() - encoder.keys():
        (lost if name.startswith("blocks.") else left_out).append(name)
    return encoder, sorted(left_out), sorted(set(lost))


def _join(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one tensor, as timm has them."""
    joined = dict(weights)
    for name in weights:
        match = re.fullmatch(r"(blocks\.\d+\.attn)\.(?:q\.(weight|bias)|q_bias)", name)
        if match is None:
            continue
        start, kind = match[1], match[2] or "bias"
        if name.endswith("q_bias"):  # BEiT: a bias of keys would change no softmax
            v = joined.pop(f"{start}.v_bias")
            parts = [joined.pop(name), torch.zeros_like(v), v]
        else:
            if kind == "bias" and f"{start}.k.weight" in weights:  # BEiT in transformers has no bias of keys either
                joined.setdefault(f"{start}.k.bias", torch.zeros_like(weights[name]))
            rest = ["kv"] if f"{start}.kv.{kind}" in weights else ["k", "v"]
            if missing := [part for part in rest if f"{start}.{part}.{kind}" not in joined]:
                raise KeyError(f"{start}.{missing[0]}.{kind}")
            parts = [joined.pop(f"{start}.{part}.{kind}") for part in ("q", *rest)]
        joined[f"{start}.qkv.{kind}"] = torch.cat(parts)
    return joined


def _architecture(
    weights: dict[str, Tensor], known: dict[str, Any], img_size: tuple[int, int] | None
) -> tuple[dict[str, Any], tuple[int, int]]:
    """(keywords of timm's VisionTransformer, grid of its positions) that the weights are of."""
    patches = weights["patch_embed.proj.weight"]
    if patches.ndim != 4 or patches.shape[2] != patches.shape[3]:
        raise ValueError(f"its patch embedding has the shape {tuple(patches.shape)}; only square patches are known")
    width, channels, patch, _ = patches.shape
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    if not depth:
        raise KeyError("blocks.0")
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    args: dict[str, Any] = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": HEADS.get(width),
        "mlp_ratio": _ratio(hidden, width),
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": 0,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,
        "class_token": "cls_token" in weights,
        "reg_tokens": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "pre_norm": "norm_pre.weight" in weights,
        "final_norm": "norm.weight" in weights or "fc_norm.weight" in weights,
        "fc_norm": "fc_norm.weight" in weights,
    }
    args["global_pool"] = "avg" if args["fc_norm"] or not args["class_token"] else "token"
    args |= known
    prefix = int(args["class_token"]) + args["reg_tokens"]
    if "pos_embed" not in weights:
        args |= {"pos_embed": "none"}
        rows, columns = (side // patch for side in args.setdefault("img_size", (14 * patch, 14 * patch)))
    else:
        count = weights["pos_embed"].shape[1]
        sizes = [(count - in_prefix, in_prefix) for in_prefix in dict.fromkeys((prefix, int(args["class_token"]), 0))]
        squares = [((side := math.isqrt(n), side), p) for n, p in sizes if n > 0 and math.isqrt(n) ** 2 == n]
        fits = [] if "img_size" in args else squares
        if not fits and (size := args.get("img_size", img_size)):
            grid = size[0] // patch, size[1] // patch
            fits = [(grid, in_prefix) for number, in_prefix in sizes if number == grid[0] * grid[1]]
        if not fits:
            raise ValueError(
                f"it has {count} positions, which fit no {'grid of ' + by(grid) if size else 'square of patches'}; "
                "give the size in pixels that they are for: img_size"
            )
        (rows, columns), in_prefix = fits[0]
        args |= {"img_size": (rows * patch, columns * patch), "no_embed_class": prefix > 0 and in_prefix == 0}
        if args["reg_tokens"] and in_prefix == int(args["class_token"]) == 1:
            # DINOv2: the class token has a position, registers have none; timm has all of them or none.
            weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
            weights["pos_embed"] = weights["pos_embed"][:, 1:]
            args["no_embed_class"] = True
    return args, (rows, columns)


def _ratio(hidden: int, width: int) -> float:
    """timm rounds width * ratio down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def shortly(names: Iterable[object], most: int = 3) -> str:
    """'a, b, c and 9 more'."""
    known = list(map(str, names))
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "") or "nothing"
