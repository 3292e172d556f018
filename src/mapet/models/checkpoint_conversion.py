"""Pre-trained ViT weights under others' names -> a plain timm VisionTransformer: names, sizes, and what must be adapted.

Supported layouts, and how they are recognized (`docs/export.md` has the table):

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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.data.views import MeanStd, input_mean_std
from mapet.errors import MapetError, format_size, option
from mapet.weights import describe_mismatch, first_names

Weights = dict[str, Tensor]
PATCH_EMBED = re.compile(r"(.*?)(?:embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.weight")
"""Name of the patch embedding in any layout; group 1 is the prefix of the ViT's names."""
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
"""Names of all tensors that a timm VisionTransformer without a classifier may have."""
UNSUPPORTED = {
    "relative position bias": re.compile(r"relative_position_bias_table"),
    "distillation token": re.compile(r"^dist_token$"),
    "rotary positions": re.compile(r"(^|\.)rope"),
    "gated MLP (SwiGLU)": re.compile(r"^blocks\.\d+\.mlp\.(w12|w3|fc1_g|fc1_x|weights_in|weights_out)\."),
}
"""Parts that a plain ViT lacks, though the weights were learned with them."""
LAYER_SCALE = re.compile(r"(blocks\.\d+\.)ls([12])\.gamma")
NUM_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
"""Embedding dimension of published ViTs -> attention heads, which cannot be inferred from the weights."""
DEFAULT_GRID = 14
"""Rows and columns of patches assumed where nothing tells them: 224 px in patches of 16."""


class PretrainedViT(NamedTuple):
    """A ViT's weights and what is known about it.

    Attributes:
        state_dict: of the encoder, and of a classifier if it has one, under timm's names.
        model: a name for timm's `create_model`, which makes the ViT with `model_args`.
        model_args: keywords of timm's VisionTransformer.
        grid: (rows, columns) of the patches that position embeddings are for.
        mean_std: normalization of its input; None: unknown, taken to be mapet's.
        eps: of its norms; None: the default of `model`.
        unexpected_keys: names in the file that are no part of the encoder.
        unsupported: parts of the encoder that a plain ViT lacks: without them it computes something else.
        read_options: how its training images were read, as mapet's model folders have it; None: unknown.
    """

    state_dict: Weights
    model: str
    model_args: dict[str, Any]
    grid: tuple[int, int]
    mean_std: MeanStd | None = None
    eps: float | None = None
    unexpected_keys: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    read_options: dict[str, Any] | None = None


def from_state_dict(
    weights: Mapping[str, Tensor], source: str | Path, overrides: Mapping[str, Any] = {},
    img_size: tuple[int, int] | None = None,
) -> PretrainedViT:  # fmt: skip
    """Recognize the layout of a file's tensors, rename them to timm's names and infer the ViT's sizes.

    Args:
        weights: tensors by the file's own names.
        source: what they were read from, named by errors.
        overrides: timm keywords known from elsewhere, e.g. {'num_heads': 6, 'img_size': (16, 24)}; they replace what is inferred.
        img_size: (H, W) pixels that the position embeddings may be for, tried where their number is no square. None: only squares.

    Returns:
        The encoder's weights under timm's names, without a classifier, and the keywords of timm's `vit_base_patch16_224` that make their
        ViT. `mean_std` and `eps` are None, as weights do not tell them; `model_args['num_heads']` is None where neither BEiT's table, nor
        the width, nor `overrides` tells it.

    Raises:
        MapetError: the weights are not those of a whole ViT, or sizes contradict each other.
    """
    try:
        encoder, unexpected, unsupported = remap_keys(weights, source)
        args = _infer_model_args(encoder)
        for name, tensor in weights.items():
            if name.endswith("relative_position_bias_table"):  # BEiT's: (distances, heads)
                args["num_heads"] = tensor.shape[1]
        args |= overrides
        grid = _infer_grid(encoder, args, img_size)
    except KeyError as error:
        hint = "give the file with all weights of the encoder"
        raise MapetError(f"{source}: not the weights of a whole ViT: it has no {error.args[0]}: {hint}") from None
    except ValueError as error:
        raise MapetError(f"{source}: {error}") from None
    return PretrainedViT(encoder, "vit_base_patch16_224", args, grid, None, None, unexpected, unsupported)


def remap_keys(weights: Mapping[str, Tensor], source: str | Path) -> tuple[Weights, tuple[str, ...], tuple[str, ...]]:
    """Rename the encoder's tensors to timm's names; of several ViTs in a file (student and teacher) take the teacher.

    Args:
        weights: tensors by the file's own names; they are renamed, not copied.
        source: what they were read from, named by errors.

    Returns:
        (the encoder's tensors, under timm's names; sorted names of tensors that are no part of the encoder; sorted names of the
        encoder's parts that timm's VisionTransformer lacks, keys of `UNSUPPORTED` or names of tensors)

    Raises:
        MapetError: there is no patch embedding, so no ViT.
        KeyError: a block has queries without keys or values; the error's argument is the missing name.
    """
    prefixes = [match[1] for name in weights if (match := PATCH_EMBED.fullmatch(name))]
    if not prefixes:
        names = first_names(list(weights))
        raise MapetError(
            f"{source}: not a ViT in a supported layout: expected patch_embed.proj.weight, found {names}. `docs/export.md` lists the layouts"
        )
    prefix = next((prefix for prefix in prefixes if "teacher" in prefix), prefixes[0])  # of the names of one ViT
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
    # What the ViT lacks in a block changes the encoder's output; other tensors (heads, decoders) do not.
    others = merged.keys() - encoder.keys()
    unsupported.update(name for name in others if name.startswith("blocks."))
    unexpected += [name for name in others if not name.startswith("blocks.")]
    return encoder, tuple(sorted(unexpected)), tuple(sorted(unsupported))


def _merge_qkv(weights: Weights) -> Weights:
    """Concatenate the projections of queries, keys and values to timm's `qkv`.

    BEiT's keys have no bias, which would cancel in the softmax: it is set to zero.

    Args:
        weights: under timm's names, but with `attn.q`, `attn.k` and `attn.v`, or `attn.q` and `attn.kv`; other tensors are kept as they are.

    Returns:
        The merged weights; `weights` is not changed.

    Raises:
        KeyError: a block has queries without keys or values; the error's argument is the missing name.
    """
    merged = dict(weights)
    for name, query in weights.items():
        if match := re.fullmatch(r"(blocks\.\d+\.attn)\.q\.(weight|bias)", name):
            attn, kind = match.groups()
            parts = ("q", "kv") if f"{attn}.kv.{kind}" in weights else ("q", "k", "v")
            if kind == "bias" and "k" in parts:
                merged.setdefault(f"{attn}.k.bias", torch.zeros_like(query))
            merged[f"{attn}.qkv.{kind}"] = torch.cat([merged.pop(f"{attn}.{part}.{kind}") for part in parts])
    return merged


def _infer_model_args(weights: Weights) -> dict[str, Any]:
    """Infer the keywords of timm's VisionTransformer from its weights, but for the image size, which `_infer_grid` infers.

    `num_heads` is that of published ViTs of this width; None for widths not in `NUM_HEADS`.

    Args:
        weights: of the encoder, under timm's names.

    Returns:
        Keyword -> value, for a ViT without classifier; `img_size` is not among them.

    Raises:
        KeyError: there are no blocks, no patch embedding or no MLP; the error's argument is the missing name.
        ValueError: the patch embedding is not of square patches.
    """
    patches = weights["patch_embed.proj.weight"]
    if patches.ndim != 4 or patches.shape[2] != patches.shape[3]:
        shape = " x ".join(map(str, patches.shape))
        raise ValueError(f"its patch embedding has the shape {shape}, expected square patches: give another ViT")
    width, channels, patch, _ = patches.shape
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    if not depth:
        raise KeyError("blocks.0")
    mlp_width = weights["blocks.0.mlp.fc1.weight"].shape[0]
    ratio = mlp_width / width
    class_token, fc_norm = "cls_token" in weights, "fc_norm.weight" in weights
    return {
        "embed_dim": width, "depth": depth, "num_heads": NUM_HEADS.get(width), "patch_size": patch, "in_chans": channels,
        "mlp_ratio": ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width,  # timm rounds down
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights, "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,
        "class_token": class_token, "reg_tokens": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "pre_norm": "norm_pre.weight" in weights, "final_norm": "norm.weight" in weights or fc_norm, "fc_norm": fc_norm,
        "global_pool": "avg" if fc_norm or not class_token else "token", "num_classes": 0,
    }  # fmt: skip


def _infer_grid(weights: Weights, args: dict[str, Any], img_size: tuple[int, int] | None) -> tuple[int, int]:
    """Infer the (rows, columns) of patches from the number of position embeddings.

    Not all prefix tokens (class and register tokens) need have a position: all, the class token alone, and none are tried in this order,
    first with a square grid, unless `args` has an `img_size`.

    Args:
        weights: of the encoder, under timm's names.
        args: keywords of timm's VisionTransformer; an `img_size` among them must fit. Changed in place: `img_size` and `no_embed_class` (whether
            prefix tokens lack positions) are set, or `pos_embed` 'none' and an `img_size` if there are no position embeddings.
        img_size: (H, W) pixels, tried where the position embeddings fit no square; None: only squares. Not used without position
            embeddings. A side that is no multiple of the patch size is rounded down to one.

    Returns:
        (rows, columns) of patches; without position embeddings those of `img_size`, or `DEFAULT_GRID` x `DEFAULT_GRID`.

    Raises:
        ValueError: the number of position embeddings fits no such grid.
    """
    patch, class_tokens = args["patch_size"], int(args["class_token"])
    num_prefix = class_tokens + args["reg_tokens"]
    if "pos_embed" not in weights:
        args["pos_embed"] = "none"
        height, width = args.setdefault("img_size", (DEFAULT_GRID * patch, DEFAULT_GRID * patch))
        return height // patch, width // patch
    num_positions = weights["pos_embed"].shape[1]
    candidates: list[tuple[tuple[int, int], int]] = []  # (grid, prefix tokens that have a position), likeliest first
    embedded_counts = tuple(dict.fromkeys((num_prefix, class_tokens, 0)))
    if "img_size" not in args:
        sides = [math.isqrt(max(num_positions - count, 0)) for count in embedded_counts]
        candidates += [((side, side), count) for side, count in zip(sides, embedded_counts, strict=True)]
    if size := args.get("img_size", img_size):
        candidates += [((size[0] // patch, size[1] // patch), count) for count in embedded_counts]
    fitting = [(grid, count) for grid, count in candidates if math.prod(grid) + count == num_positions]
    if not fitting:
        expected = f"grid of {format_size(candidates[-1][0])}" if size else "square of patches"
        hint = "give the image size (H, W) in pixels that they are for as img_size"
        raise ValueError(f"it has {num_positions} position embeddings, which fit no {expected}; {hint}")
    grid, num_embedded = fitting[0]
    args |= {"img_size": (grid[0] * patch, grid[1] * patch), "no_embed_class": num_embedded < num_prefix}
    return grid


def adapt_state_dict(
    checkpoint: PretrainedViT, vit: VisionTransformer, source: str | Path
) -> tuple[Weights, list[str]]:
    """Adapt pre-trained weights to a ViT, so that with them it computes the same function as far as its sizes allow.

    The ViT's input is normalized with `input_mean_std`: another normalization goes into the patch embedding. A classifier is
    kept where it fits the ViT's.

    Args:
        checkpoint: the pre-trained ViT.
        vit: its own weights stand in for what the checkpoint lacks; it is not changed.
        source: what the checkpoint was read from, named by errors.

    Returns:
        (state dict of `vit`, which `load_state_dict` takes; one note for the log about each change). Tensors are float32, but what
        the checkpoint lacks shares memory with the weights of `vit`, and unchanged float32 tensors with those of the checkpoint.

    Raises:
        MapetError: another network: width, depth, MLP or norms differ; or position embeddings or another normalization have no place
            in `vit`.
    """
    weights = {name: tensor.detach().float() for name, tensor in checkpoint.state_dict.items()}
    target, notes = vit.state_dict(), list[str]()
    for name, tensor in target.items():
        if name.endswith(("attn.qkv.bias", "patch_embed.proj.bias")):
            weights.setdefault(name, torch.zeros_like(tensor))
    _adapt_patch_embed(weights, checkpoint, vit, notes)
    _adapt_pos_embed(weights, checkpoint, vit, notes)
    layer_scales = [name for name in target if LAYER_SCALE.fullmatch(name)]
    if not layer_scales and any(map(LAYER_SCALE.fullmatch, weights)):
        notes.append("LayerScale multiplied into the layers before it: the same function")
        weights = fold_layer_scale(weights)
    if missing := [name for name in layer_scales if name not in weights]:
        notes.append("LayerScale starts at 1, as the file has none: the same function")
        weights |= {name: torch.ones_like(target[name]) for name in missing}
    for new, old, change in (("norm", "fc_norm", "after it to before"), ("fc_norm", "norm", "before it to after")):
        if f"{new}.weight" in target and f"{old}.weight" in weights.keys() - target.keys():
            weights |= {f"{new}.{part}": weights.pop(f"{old}.{part}") for part in ("weight", "bias")}
            notes.append(f"the last norm moved relative to the pooling: from {change}")
    for name in ("head.weight", "head.bias"):
        head = weights.pop(name, None)
        if name in target:
            weights[name] = head if head is not None and head.shape == target[name].shape else target[name]
    if mismatch := describe_mismatch(dict(sorted(weights.items())), dict(sorted(target.items()))):
        args = checkpoint.model_args
        size = f"width {args['embed_dim']}, depth {args['depth']}" if args else checkpoint.model
        hint = f"choose {option('model')} and {option('model_args')} of the same sizes, or other weights"
        raise MapetError(f"the weights of {source} ({size}) don't fit this ViT: {mismatch}: {hint}")
    return weights, notes


def _adapt_patch_embed(weights: Weights, checkpoint: PretrainedViT, vit: VisionTransformer, notes: list[str]) -> None:
    """Adapt the patch embedding to `vit`'s input normalization, channels and patch size.

    For pixels x, mean m and standard deviation s of a channel, w (x - m) / s = (w / s) x - w m / s: the old normalization is
    taken out of weight and bias, then that of mapet for `vit`'s channels (`input_mean_std`) is put in. Where `vit` has no bias, the offset
    is added to the positions of patches.

    Args:
        weights: of the encoder, under timm's names, changed in place; they have a bias if `vit` has one.
        checkpoint: where the weights are from; its `mean_std` (None: mapet's) and `grid` of patches are used.
        vit: which the weights are for; it is not changed.
        notes: a note for the log about each change is appended.

    Raises:
        MapetError: the normalization changes, and there is neither a bias nor position embeddings.
    """
    weight = weights["patch_embed.proj.weight"]
    if weight.shape[0] != vit.embed_dim:  # `adapt_state_dict` reports it with the other shapes
        return
    old_channels, channels = weight.shape[1], vit.in_chans
    old_mean, old_std = map(torch.tensor, checkpoint.mean_std or input_mean_std(old_channels))
    mean, std = map(torch.tensor, input_mean_std(channels))
    has_bias = vit.patch_embed.proj.bias is not None
    if old_channels != channels or not (torch.allclose(old_mean, mean) and torch.allclose(old_std, std)):
        pixel_weight = weight / old_std.view(-1, 1, 1)  # for pixels that are not normalized
        offset = -(pixel_weight.sum(dim=(2, 3)) * old_mean).sum(1)
        pixel_weight = adapt_input_conv(channels, pixel_weight, base_chans=old_channels)
        offset += (pixel_weight.sum(dim=(2, 3)) * mean).sum(1)
        weight = pixel_weight * std.view(-1, 1, 1)
        has_other_channels = old_channels != channels
        change = f"from {old_channels} to {channels} channels" if has_other_channels else "to mapet's normalization"
        if not has_bias and "pos_embed" not in weights:
            reason = "the ViT's patch embedding has no bias, and the weights have no position embeddings"
            hint = "Use other weights, or images with the weights' channels and normalization"
            raise MapetError(f"the weights cannot be adapted {change}: {reason}. {hint}")
        if has_bias:
            weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"] + offset
        else:
            prefix, patches = weights["pos_embed"].tensor_split([-math.prod(checkpoint.grid)], dim=1)
            weights["pos_embed"] = torch.cat([prefix, patches + offset], dim=1)
        notes.append(f"patch embedding adapted {change}")
    size = tuple(vit.patch_embed.patch_size)
    if tuple(weight.shape[2:]) != size:
        notes.append(f"patch embedding resampled from {format_size(weight.shape[2:])} to {format_size(size)} px")
        weight = resample_patch_embed(weight, list(size))
    weights["patch_embed.proj.weight"] = weight


def _adapt_pos_embed(weights: Weights, checkpoint: PretrainedViT, vit: VisionTransformer, notes: list[str]) -> None:
    """Adapt class token, register tokens and position embeddings to those that `vit` has, and to its grid.

    A checkpoint's `pos_embed` may begin with positions of the prefix tokens: of the class token, of class and register tokens, or of
    none. Where `vit` has no positions for prefix tokens (timm's `no_embed_class`), they are added to the tokens instead, so that the
    function stays the same; where `vit` has some that the checkpoint lacks, they are zeros. Patch positions are interpolated if the grids differ.

    Args:
        weights: of the encoder, under timm's names; changed in place: `cls_token`, `reg_token` and `pos_embed` as `vit` needs them.
        checkpoint: where the weights are from; only its `grid`, (rows, columns) of patches, is used.
        vit: which the weights are for; tokens and positions that the checkpoint lacks are taken from its own weights. It is not changed.
        notes: a note for the log about each change is appended.

    Raises:
        MapetError: the checkpoint has position embeddings, and `vit` none.
    """
    target, positions = vit.state_dict(), weights.pop("pos_embed", None)
    # Number of prefix tokens that have a position in the checkpoint.
    num_embedded = 0 if positions is None else positions.shape[1] - math.prod(checkpoint.grid)
    # `start`: where the token's positions begin in the checkpoint, if it has any; `prefix_positions`: those for `vit`.
    start, prefix_positions = 0, list[Tensor]()
    for name, label in (("cls_token", "class token"), ("reg_token", "register tokens")):
        token, new_token = weights.pop(name, None), target.get(name)
        count = 0 if token is None else token.shape[1]
        if new_token is None:
            if count:
                notes.append(f"{label} omitted: this ViT has none")
        elif token is None or count != new_token.shape[1]:
            notes.append(f"{label} new: the file has {count or 'none'}")
            weights[name] = new_token
            prefix_positions.append(torch.zeros_like(new_token))
        else:
            position = torch.zeros_like(token)
            if positions is not None and start + count <= num_embedded:
                position = positions[:, start : start + count]
            weights[name] = token + position if vit.no_embed_class else token
            prefix_positions.append(position)
        start += count
    if vit.pos_embed is None:
        if positions is not None:
            problem = f"the weights have {positions.shape[1]} position embeddings, but this ViT has none"
            raise MapetError(f"{problem}. Choose a ViT with learned position embeddings")
    elif positions is None:
        weights["pos_embed"] = target["pos_embed"]
        notes.append("positions are new: the file has none")
    else:
        old_grid, grid = checkpoint.grid, tuple(vit.patch_embed.grid_size)
        if grid != old_grid:
            notes.append(f"positions resampled from {format_size(old_grid)} to {format_size(grid)} patches")
        patches = resample_abs_pos_embed(positions[:, num_embedded:], list(grid), list(old_grid), num_prefix_tokens=0)
        weights["pos_embed"] = patches if vit.no_embed_class else torch.cat([*prefix_positions, patches], dim=1)


def fold_layer_scale(weights: Weights) -> Weights:
    """Remove LayerScale without changing the function: multiply its gammas into the linear layers before them.

    Args:
        weights: of a ViT, under timm's names; not changed.

    Returns:
        New weights without `ls1.gamma` and `ls2.gamma`; `attn.proj` and `mlp.fc2` of these blocks are scaled.
    """
    folded = dict(weights)
    for name in weights:
        if match := LAYER_SCALE.fullmatch(name):
            gamma, layer = folded.pop(name), match[1] + {"1": "attn.proj", "2": "mlp.fc2"}[match[2]]
            folded[f"{layer}.weight"] = weights[f"{layer}.weight"] * gamma[:, None]
            if f"{layer}.bias" in weights:
                folded[f"{layer}.bias"] = weights[f"{layer}.bias"] * gamma
    return folded
