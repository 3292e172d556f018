"""Weights of one ViT -> those of another of the same width and depth: other grid, patch, channels, normalization, tokens.

What can stay the same function stays it; what can't is noted.
"""

import re

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.errors import MapetError, by
from mapet.models.checkpoint_conversion import MeanStd, PretrainedViT
from mapet.weights import describe_mismatch

LAYER_SCALE = re.compile(r"(blocks\.\d+\.)ls([12])\.gamma")


def input_mean_std(channels: int) -> MeanStd:
    """Mean and standard deviation of each channel in [0, 1]: ImageNet's for RGB, 0.5 and 0.25 otherwise."""
    if channels == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (0.5,) * channels, (0.25,) * channels


def adapt_state_dict(
    checkpoint: PretrainedViT, vit: VisionTransformer, source: object
) -> tuple[dict[str, Tensor], list[str]]:
    """Make the state dict with which `vit` computes what the pre-trained ViT does.

    The ViT gets its input as all of mapet does, normalized with `input_mean_std`: another normalization goes into the patch
    embedding. A classifier is kept where it fits.

    Returns:
        (state dict, notes on what was changed)

    Raises:
        MapetError: another network: width, depth, MLP or norms differ.
    """
    weights = {name: tensor.detach().float() for name, tensor in checkpoint.state_dict.items()}
    own = vit.state_dict()
    notes: list[str] = []
    _adapt_patch_embed(weights, checkpoint, vit, notes)
    _adapt_pos_embed(weights, checkpoint, vit, own, notes)
    weights = _adapt_layer_scale(weights, own, notes)
    _adapt_final_norm(weights, own, notes)
    for name, tensor in own.items():
        if name.endswith("attn.qkv.bias"):
            weights.setdefault(name, torch.zeros_like(tensor))
    for name in ("head.weight", "head.bias"):
        kept = weights.pop(name, None)
        if name in own:
            weights[name] = kept if kept is not None and kept.shape == own[name].shape else own[name]
    if mismatch := describe_mismatch(dict(sorted(weights.items())), dict(sorted(own.items()))):
        args = checkpoint.model_args
        size = f"width {args['embed_dim']}, depth {args['depth']}" if args else checkpoint.model
        raise MapetError(f"the weights of {source} ({size}) don't fit this ViT: {mismatch}")
    return weights, notes


def _adapt_patch_embed(
    weights: dict[str, Tensor], checkpoint: PretrainedViT, vit: VisionTransformer, notes: list[str]
) -> None:
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
            position[:, -checkpoint.grid[0] * checkpoint.grid[1] :] += offset
            weights["pos_embed"] = position
        else:
            raise MapetError("its patch embedding has no bias to take another normalization into")
        notes.append(
            f"patch embedding for {after} channels made of one for {before}"
            if before != after
            else "patch embedding takes pixels normalized with ImageNet's mean and standard deviation"
        )
    size = tuple(vit.patch_embed.patch_size)
    if tuple(weight.shape[2:]) != size:
        notes.append(f"patch embedding resampled from {by(weight.shape[2:])} to {by(size)} px")
        weight = resample_patch_embed(weight, list(size))
    weights["patch_embed.proj.weight"] = weight


def _adapt_pos_embed(
    weights: dict[str, Tensor],
    checkpoint: PretrainedViT,
    vit: VisionTransformer,
    own: dict[str, Tensor],
    notes: list[str],
) -> None:
    """Fit class and register tokens and all positions; where `vit` has none for tokens, these are added to the tokens."""
    positions = weights.pop("pos_embed", None)
    num_patches = checkpoint.grid[0] * checkpoint.grid[1]
    embedded = 0 if positions is None else positions.shape[1] - num_patches  # prefix tokens with a position
    start = 0
    prefix: list[Tensor] = []
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
            notes.append(f"positions resampled from {by(old_grid)} to {by(new_grid)} patches")
        patches = resample_abs_pos_embed(positions[:, embedded:], list(new_grid), list(old_grid), num_prefix_tokens=0)
        weights["pos_embed"] = patches if vit.no_embed_class else torch.cat([*prefix, patches], dim=1)


def _adapt_layer_scale(weights: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Add LayerScale of 1, or fold it into the layers before, as `vit` needs it."""
    scales = [name for name in own if LAYER_SCALE.fullmatch(name)]
    if missing := {name: torch.ones_like(own[name]) for name in scales if name not in weights}:
        notes.append("LayerScale starts at 1, as the file has none: the same function")
        return weights | missing
    if not scales and any(map(LAYER_SCALE.fullmatch, weights)):
        notes.append("LayerScale multiplied into the layers before it: the same function")
        return fold_layer_scale(weights)
    return weights


def fold_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of the same function without LayerScale: gamma goes into the linear layer before it."""
    folded = dict(weights)
    for name in weights:
        if match := LAYER_SCALE.fullmatch(name):
            gamma, layer = folded.pop(name), match[1] + {"1": "attn.proj", "2": "mlp.fc2"}[match[2]]
            folded[f"{layer}.weight"] = weights[f"{layer}.weight"] * gamma[:, None]
            if f"{layer}.bias" in weights:
                folded[f"{layer}.bias"] = weights[f"{layer}.bias"] * gamma
    return folded


def _adapt_final_norm(weights: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]) -> None:
    """Move the last norm before (`norm`) or after (`fc_norm`) the pooling, where `vit` has it."""
    for here, there, change in (("norm", "fc_norm", "after it to before"), ("fc_norm", "norm", "before it to after")):
        if f"{here}.weight" in own and f"{there}.weight" in weights.keys() - own.keys():
            for part in ("weight", "bias"):
                weights[f"{here}.{part}"] = weights.pop(f"{there}.{part}")
            notes.append(f"the last norm moved relative to the pooling: from {change}")
