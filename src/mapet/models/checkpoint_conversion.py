"""Published ViT weights under anybody's names -> a plain timm VisionTransformer: names, sizes, and what must be adapted.

Known layouts, and what tells them (`docs/export.md` has the table):

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
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.data.views import MeanStd, input_mean_std
from mapet.errors import MapetError, format_size
from mapet.weights import describe_mismatch, first_names

Weights = dict[str, Tensor]
PATCH_EMBED = re.compile(r"(.*?)(?:embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.weight")
KEY_RENAMES = {
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
    r"^register_tokens$": "reg_token",
    r"^(?:encoder\.layer|layers)\.(\d+)\.": r"blocks.\1.",
    r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",
    r"\.(?:attn|attention|attention\.attention)\.(q|k|v)(?:uery|ey|alue|_proj)?[._](weight|bias)$": r".attn.\1.\2",
    r"\.attention\.(?:output\.dense|o_proj)\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"^layernorm\.": "norm.",
    r"^pooler\.layernorm\.": "fc_norm.",
    r"\.(?:gamma_|lambda_|layer_scale)([12])(?:\.lambda1)?$": r".ls\1.gamma",
}
"""Patterns of others' names -> timm's names, applied in this order."""
VIT_KEYS = re.compile(
    r"cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm_pre|norm|fc_norm)\.(weight|bias)"
    r"|blocks\.\d+\.((norm1|norm2|attn\.qkv|attn\.proj|attn\.q_norm|attn\.k_norm|mlp\.fc1|mlp\.fc2)\.(weight|bias)|ls[12]\.gamma)"
)
UNSUPPORTED = {
    "relative position bias": re.compile(r"relative_position_bias_table"),
    "distillation token": re.compile(r"^dist_token$"),
    "rotary positions": re.compile(r"(^|\.)rope"),
    "gated MLP (SwiGLU)": re.compile(r"^blocks\.\d+\.mlp\.(w12|w3|fc1_g|fc1_x|weights_in|weights_out)\."),
}
"""Parts that a plain ViT lacks, though the weights were learned with them."""
LAYER_SCALE = re.compile(r"(blocks\.\d+\.)ls([12])\.gamma")
NUM_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
"""Attention heads of the published widths: the weights themselves don't tell."""


class PretrainedViT(NamedTuple):
    """A ViT's weights and what is known about it.

    Attributes:
        state_dict: of the encoder, under timm's names.
        model: a name for timm's `create_model`; with `model_args` it makes the ViT.
        grid: (rows, columns) of patches that the positions are of.
        mean_std: normalization of its input; None if unknown.
        eps: of its norms; None: the model's own.
        unexpected_keys: names in the file that are no part of the encoder.
        unsupported: parts of the encoder that a plain ViT lacks: without them it computes something else.
    """

    state_dict: Weights
    model: str
    model_args: dict[str, Any]
    grid: tuple[int, int]
    mean_std: MeanStd | None = None
    eps: float | None = None
    unexpected_keys: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()


def from_state_dict(
    weights: Mapping[str, Tensor], source: object, overrides: Mapping[str, Any] = {},
    img_size: tuple[int, int] | None = None,
) -> PretrainedViT:  # fmt: skip
    """Recognize the layout of a file's tensors, rename them and infer the ViT's sizes.

    Args:
        weights: tensors by the file's own names.
        source: named by errors.
        overrides: timm keywords known from elsewhere, e.g. {'num_heads': 6, 'img_size': (16, 24)}.
        img_size: pixels that the positions are for, used where their number is no square.

    Raises:
        MapetError: not a ViT's weights, or sizes that don't fit together.
    """
    try:
        encoder, unexpected, unsupported = remap_keys(weights, source)
        args = _infer_model_args(encoder)
        for name, tensor in weights.items():
            if name.endswith("relative_position_bias_table"):  # BEiT's: (distances, heads)
                args["num_heads"] = tensor.shape[1]
        grid = _infer_grid(encoder, args, overrides, img_size)
    except KeyError as error:
        raise MapetError(f"{source}: not the weights of a whole ViT: it has no {error.args[0]}") from None
    except ValueError as error:
        raise MapetError(f"{source}: {error}") from None
    return PretrainedViT(encoder, "vit_base_patch16_224", args, grid, None, None, unexpected, unsupported)


def remap_keys(weights: Mapping[str, Tensor], source: object) -> tuple[Weights, tuple[str, ...], tuple[str, ...]]:
    """Return (the encoder's tensors under timm's names, unexpected keys, unsupported parts).

    Of several ViTs in a file (student and teacher) it takes the teacher.

    Raises:
        MapetError: there is no patch embedding, so no ViT.
        KeyError: queries without keys or values.
    """
    prefixes = [match[1] for name in weights if (match := PATCH_EMBED.fullmatch(name))]
    if not prefixes:
        found = f"it has no patch_embed.proj.weight, but {first_names(list(weights))}"
        raise MapetError(f"{source}: not a ViT in a layout that is known: {found}")
    prefix = next((prefix for prefix in prefixes if "teacher" in prefix), prefixes[0])
    unexpected, unsupported = [name for name in weights if not name.startswith(prefix)], set()
    renamed = {}
    for name, tensor in weights.items():
        if not name.startswith(prefix) or name.endswith("relative_position_index"):  # the index follows from the grid
            continue
        key = name.removeprefix(prefix)
        for pattern, replacement in KEY_RENAMES.items():
            key = re.sub(pattern, replacement, key)
        parts = [part for part, pattern in UNSUPPORTED.items() if pattern.search(key)]
        unsupported.update(parts)
        if not parts:
            renamed[key] = tensor
    merged = _merge_qkv(renamed)
    encoder = {name: tensor for name, tensor in merged.items() if VIT_KEYS.fullmatch(name)}
    others = merged.keys() - encoder.keys()
    unsupported.update(name for name in others if name.startswith("blocks."))
    unexpected += [name for name in others if not name.startswith("blocks.")]
    return encoder, tuple(sorted(unexpected)), tuple(sorted(unsupported))


def _merge_qkv(weights: Weights) -> Weights:
    """Concatenate queries, keys and values, as timm has them. Keys of BEiT have no bias: it would change no softmax."""
    merged = dict(weights)
    for name, query in weights.items():
        if match := re.fullmatch(r"(blocks\.\d+\.attn)\.q\.(weight|bias)", name):
            attn, kind = match.groups()
            rest = ["kv"] if f"{attn}.kv.{kind}" in weights else ["k", "v"]
            if kind == "bias" and rest == ["k", "v"]:
                merged.setdefault(f"{attn}.k.bias", torch.zeros_like(query))
            merged[f"{attn}.qkv.{kind}"] = torch.cat([merged.pop(f"{attn}.{part}.{kind}") for part in ("q", *rest)])
    return merged


def _infer_model_args(weights: Weights) -> dict[str, Any]:
    """Infer timm's keywords of the VisionTransformer that the weights are of, without its positions."""
    patches = weights["patch_embed.proj.weight"]
    if patches.ndim != 4 or patches.shape[2] != patches.shape[3]:
        raise ValueError(f"its patch embedding has the shape {tuple(patches.shape)}; only square patches are known")
    width, channels, patch, _ = patches.shape
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    if not depth:
        raise KeyError("blocks.0")
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    ratio = hidden / width
    class_token, fc_norm = "cls_token" in weights, "fc_norm.weight" in weights
    return {
        "embed_dim": width, "depth": depth, "num_heads": NUM_HEADS.get(width), "patch_size": patch, "in_chans": channels,
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,  # timm rounds down
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights, "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,
        "class_token": class_token, "reg_tokens": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "pre_norm": "norm_pre.weight" in weights, "final_norm": "norm.weight" in weights or fc_norm, "fc_norm": fc_norm,
        "global_pool": "avg" if fc_norm or not class_token else "token", "num_classes": 0,
    }  # fmt: skip


def _infer_grid(
    weights: Weights, args: dict[str, Any], overrides: Mapping[str, Any], img_size: tuple[int, int] | None
) -> tuple[int, int]:
    """Infer the (rows, columns) of patches, and add `overrides` and what positions tell to `args`.

    Where the class token alone has a position (DINOv2 with registers), it is added to the token: timm has positions for all
    prefix tokens or none.
    """
    args |= overrides
    patch, class_tokens = args["patch_size"], int(args["class_token"])
    if "pos_embed" not in weights:
        args["pos_embed"] = "none"
        height, width = args.setdefault("img_size", (14 * patch, 14 * patch))
        return height // patch, width // patch
    count, num_prefix = weights["pos_embed"].shape[1], class_tokens + args["reg_tokens"]
    size = args.get("img_size", img_size)
    known = (size[0] // patch, size[1] // patch) if size else None
    numbers = dict.fromkeys((num_prefix, class_tokens, 0))  # prefix tokens that may have a position
    squares = [((side, side), n) for n in numbers if (side := math.isqrt(max(count - n, 0))) and side**2 == count - n]
    fits = [(known, n) for n in numbers if known and math.prod(known) == count - n]
    if "img_size" not in args:
        fits = squares + fits
    if not fits:
        wanted = f"grid of {format_size(known)}" if known else "square of patches"
        hint = "give the size in pixels that they are for: img_size"
        raise ValueError(f"it has {count} positions, which fit no {wanted}; {hint}")
    grid, embedded = fits[0]
    args |= {"img_size": (grid[0] * patch, grid[1] * patch), "no_embed_class": num_prefix > 0 and embedded == 0}
    if args["reg_tokens"] and embedded == class_tokens == 1:
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
        args["no_embed_class"] = True
    return grid


def adapt_state_dict(checkpoint: PretrainedViT, vit: VisionTransformer, source: object) -> tuple[Weights, list[str]]:
    """Make the state dict with which `vit` computes what the pre-trained ViT does.

    The ViT gets its input as all of mapet does, normalized with `input_mean_std`: another normalization goes into the patch
    embedding. A classifier is kept where it fits.

    Returns:
        (state dict, notes on what was changed)

    Raises:
        MapetError: another network: width, depth, MLP or norms differ.
    """
    weights = {name: tensor.detach().float() for name, tensor in checkpoint.state_dict.items()}
    own, notes = vit.state_dict(), list[str]()
    _adapt_patch_embed(weights, checkpoint, vit, notes)
    _adapt_pos_embed(weights, checkpoint, vit, notes)
    if not any(map(LAYER_SCALE.fullmatch, own)) and any(map(LAYER_SCALE.fullmatch, weights)):
        notes.append("LayerScale multiplied into the layers before it: the same function")
        weights = fold_layer_scale(weights)
    if missing := [name for name in own if LAYER_SCALE.fullmatch(name) and name not in weights]:
        notes.append("LayerScale starts at 1, as the file has none: the same function")
        weights |= {name: torch.ones_like(own[name]) for name in missing}
    for name, tensor in own.items():
        if name.endswith("attn.qkv.bias"):
            weights.setdefault(name, torch.zeros_like(tensor))
    for here, there, change in (("norm", "fc_norm", "after it to before"), ("fc_norm", "norm", "before it to after")):
        if f"{here}.weight" in own and f"{there}.weight" in weights.keys() - own.keys():
            weights |= {f"{here}.{part}": weights.pop(f"{there}.{part}") for part in ("weight", "bias")}
            notes.append(f"the last norm moved relative to the pooling: from {change}")
    for name in ("head.weight", "head.bias"):
        kept = weights.pop(name, None)
        if name in own:
            weights[name] = kept if kept is not None and kept.shape == own[name].shape else own[name]
    if mismatch := describe_mismatch(dict(sorted(weights.items())), dict(sorted(own.items()))):
        args = checkpoint.model_args
        size = f"width {args['embed_dim']}, depth {args['depth']}" if args else checkpoint.model
        raise MapetError(f"the weights of {source} ({size}) don't fit this ViT: {mismatch}")
    return weights, notes


def _adapt_patch_embed(weights: Weights, checkpoint: PretrainedViT, vit: VisionTransformer, notes: list[str]) -> None:
    """Fit the patch embedding to `vit`'s normalization, channels and patch size."""
    weight = weights["patch_embed.proj.weight"]
    if weight.shape[0] != vit.embed_dim:  # reported with the other shapes
        return
    before, after = weight.shape[1], vit.in_chans
    mean, std = map(torch.tensor, checkpoint.mean_std or input_mean_std(before))
    new_mean, new_std = map(torch.tensor, input_mean_std(after))
    has_bias = vit.patch_embed.proj.bias is not None
    if has_bias:
        weights.setdefault("patch_embed.proj.bias", torch.zeros(len(weight)))
    if before != after or not (torch.allclose(mean, new_mean) and torch.allclose(std, new_std)):
        # w (x - m) / s = (w / s) x - w m / s: first for pixels as they are, then for those that we give it.
        raw = weight / std.view(-1, 1, 1)
        offset = -(raw.sum(dim=(2, 3)) * mean).sum(1)
        raw = adapt_input_conv(after, raw, base_chans=before)
        offset += (raw.sum(dim=(2, 3)) * new_mean).sum(1)
        weight = raw * new_std.view(-1, 1, 1)
        if has_bias:
            weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"] + offset
        elif "pos_embed" in weights:
            position = weights["pos_embed"].clone()
            position[:, -math.prod(checkpoint.grid) :] += offset
            weights["pos_embed"] = position
        else:
            raise MapetError("its patch embedding has no bias to take another normalization into")
        takes = "takes pixels normalized with ImageNet's mean and standard deviation"
        made_of = f"for {after} channels made of one for {before}"
        notes.append(f"patch embedding {made_of if before != after else takes}")
    size = tuple(vit.patch_embed.patch_size)
    if tuple(weight.shape[2:]) != size:
        notes.append(f"patch embedding resampled from {format_size(weight.shape[2:])} to {format_size(size)} px")
        weight = resample_patch_embed(weight, list(size))
    weights["patch_embed.proj.weight"] = weight


def _adapt_pos_embed(weights: Weights, checkpoint: PretrainedViT, vit: VisionTransformer, notes: list[str]) -> None:
    """Fit class and register tokens and all positions; where `vit` has none for tokens, these are added to the tokens."""
    own, positions = vit.state_dict(), weights.pop("pos_embed", None)
    num_positions = 0 if positions is None else positions.shape[1]
    embedded = max(0, num_positions - math.prod(checkpoint.grid))  # prefix tokens with a position
    start, prefix = 0, list[Tensor]()
    for name, label in (("cls_token", "class token"), ("reg_token", "register tokens")):
        token, new = weights.pop(name, None), own.get(name)
        count = 0 if token is None else token.shape[1]
        if new is None:
            if count:
                notes.append(f"{label} left out: this ViT has none")
        elif token is None or count != new.shape[1]:
            notes.append(f"{label} new: the file has {count or 'none'}")
            weights[name] = new
            prefix.append(torch.zeros_like(new))
        else:
            position = positions[:, start : start + count] if positions is not None and embedded else 0 * token
            weights[name] = token + position if vit.no_embed_class else token
            prefix.append(position)
        start += count
    if vit.pos_embed is None:
        if positions is not None:
            raise MapetError("the weights have learned positions and this ViT has no place for them")
    elif positions is None:
        weights["pos_embed"] = own["pos_embed"]
        notes.append("positions are new: the file has none")
    else:
        old_grid, new_grid = checkpoint.grid, tuple(vit.patch_embed.grid_size)
        if new_grid != old_grid:
            notes.append(f"positions resampled from {format_size(old_grid)} to {format_size(new_grid)} patches")
        patches = resample_abs_pos_embed(positions[:, embedded:], list(new_grid), list(old_grid), num_prefix_tokens=0)
        weights["pos_embed"] = patches if vit.no_embed_class else torch.cat([*prefix, patches], dim=1)


def fold_layer_scale(weights: Weights) -> Weights:
    """Return weights of the same function without LayerScale: gamma goes into the linear layer before it."""
    folded = dict(weights)
    for name in weights:
        if match := LAYER_SCALE.fullmatch(name):
            gamma, layer = folded.pop(name), match[1] + {"1": "attn.proj", "2": "mlp.fc2"}[match[2]]
            folded[f"{layer}.weight"] = weights[f"{layer}.weight"] * gamma[:, None]
            if f"{layer}.bias" in weights:
                folded[f"{layer}.bias"] = weights[f"{layer}.bias"] * gamma
    return folded
