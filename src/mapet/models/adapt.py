"""Weights of one ViT -> those of another of the same width and depth: other grid, patch, channels, normalisation, tokens.

What can be the same function stays it; what can't is said.
"""

import re

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.errors import MapetError, by
from mapet.models.checkpoint_conversion import Published, Stats, shortly

IMAGENET: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def input_mean_std(channels: int) -> Stats:
    """Mean and standard deviation of each channel in [0, 1]: ImageNet's for RGB, 0.5 and 0.25 otherwise."""
    return IMAGENET if channels == 3 else ((0.5,) * channels, (0.25,) * channels)


def adapted(published: Published, vit: VisionTransformer, source: object) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of `vit` that makes it compute what the published ViT does, and what of that could not be, in words.

    The ViT gets its input as all of mapet does, normalised with `input_mean_std`: another normalisation goes into the patch
    embedding.

    Raises:
        MapetError: another network: width, depth, MLP or norms differ.
    """
    weights = {name: tensor.detach().float() for name, tensor in published.weights.items()}
    own = vit.state_dict()
    said: list[str] = []
    _pixels(weights, published, vit, said)
    _tokens(weights, published, vit, own, said)
    _layer_scale(weights, own, said)
    _final_norm(weights, own, said)
    for name in [name for name in own if name.endswith("attn.qkv.bias") and name not in weights]:
        weights[name] = torch.zeros_like(own[name])
    for name in ("head.weight", "head.bias"):
        if name in own:
            fits = name in weights and weights[name].shape == own[name].shape
            weights[name] = weights[name] if fits else own[name]
        else:
            weights.pop(name, None)
    faults = {
        "missing": own.keys() - weights.keys(),
        "without a place": weights.keys() - own.keys(),
        "of another shape": {n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape},
    }
    if any(faults.values()):
        what = "; ".join(f"{what}: {shortly(sorted(names))}" for what, names in faults.items() if names)
        size = f"width {published.args['embed_dim']}, depth {published.args['depth']}" if published.args else ""
        raise MapetError(f"the weights of {source} ({size or published.model}) don't fit this ViT: {what}")
    return weights, said


def _pixels(weights: dict[str, Tensor], published: Published, vit: VisionTransformer, said: list[str]) -> None:
    """Patch embedding: of pixels normalised as ours are, of as many channels, in patches of the right size."""
    weight = weights["patch_embed.proj.weight"]
    if weight.shape[0] != vit.embed_dim:  # said by whoever compares shapes
        return
    before, after = weight.shape[1], vit.in_chans
    mean, std = map(torch.tensor, published.stats or input_mean_std(before))
    new_mean, new_std = map(torch.tensor, input_mean_std(after))
    if before != after or not (torch.allclose(mean, new_mean) and torch.allclose(std, new_std)):
        # w (x - m) / s = (w / s) x - w m / s: first for pixels as they are, then for those that we give it.
        raw = weight / std.view(-1, 1, 1)
        offset = -(raw.sum(dim=(2, 3)) * mean).sum(1)
        raw = adapt_input_conv(after, raw, base_chans=before)
        offset += (raw.sum(dim=(2, 3)) * new_mean).sum(1)
        weight = raw * new_std.view(-1, 1, 1)
        if vit.patch_embed.proj.bias is not None:
            weights["patch_embed.proj.bias"] = weights.get("patch_embed.proj.bias", torch.zeros_like(offset)) + offset
        elif "pos_embed" in weights:
            patches = published.grid[0] * published.grid[1]
            position = weights["pos_embed"].clone()
            position[:, position.shape[1] - patches :] += offset
            weights["pos_embed"] = position
        else:
            raise MapetError("its patch embedding has no bias to take another normalisation into")
        if before != after:
            said.append(f"patch embedding for {after} channels made of one for {before}")
        else:
            said.append("patch embedding takes pixels normalised with ImageNet's mean and standard deviation")
    if vit.patch_embed.proj.bias is not None and "patch_embed.proj.bias" not in weights:
        weights["patch_embed.proj.bias"] = torch.zeros(len(weight))
    size = tuple(vit.patch_embed.patch_size)
    if tuple(weight.shape[2:]) != size:
        said.append(f"patch embedding resampled from {by(weight.shape[2:])} to {by(size)} px")
        weight = resample_patch_embed(weight, list(size))
    weights["patch_embed.proj.weight"] = weight


def _tokens(
    weights: dict[str, Tensor], published: Published, vit: VisionTransformer, own: dict[str, Tensor], said: list[str]
) -> None:
    """Class and register tokens and all positions."""
    positions = weights.pop("pos_embed", None)
    embedded = 0 if positions is None else positions.shape[1] - published.grid[0] * published.grid[1]
    start = 0
    prefix: list[Tensor] = []
    for name, words in (("cls_token", "class token"), ("reg_token", "register tokens")):
        token, wanted = weights.pop(name, None), own.get(name)
        number = 0 if token is None else token.shape[1]
        if wanted is None:
            if number:
                said.append(f"{words} left out: this ViT has none")
        elif token is None or number != wanted.shape[1]:
            said.append(f"{words} new: the file has {number or 'none'}")
            weights[name] = wanted
            prefix.append(torch.zeros_like(wanted))
        else:
            position = torch.zeros_like(token)
            if embedded and positions is not None:
                position = positions[:, start : start + number]
            weights[name] = token + position if vit.no_embed_class else token
            prefix.append(position)
        start += number
    if vit.pos_embed is None:
        if positions is not None:
            raise MapetError("the weights have learned positions and this ViT has no place for them")
    elif positions is None:
        weights["pos_embed"] = own["pos_embed"]
        said.append("positions are new: the file has none")
    else:
        old, new = published.grid, tuple(vit.patch_embed.grid_size)
        patches = positions[:, embedded:]
        if new != old:
            said.append(f"positions resampled from {by(old)} to {by(new)} patches")
            patches = resample_abs_pos_embed(patches, list(new), list(old), num_prefix_tokens=0)
        weights["pos_embed"] = patches if vit.no_embed_class else torch.cat([*prefix, patches], dim=1)


def _layer_scale(weights: dict[str, Tensor], own: dict[str, Tensor], said: list[str]) -> None:
    gammas = [name for name in own if re.search(r"\.ls[12]\.gamma$", name)]
    missing = [name for name in gammas if name not in weights]
    for name in missing:
        weights[name] = torch.ones_like(own[name])
    if missing:
        said.append("LayerScale starts at 1, as the file has none: the same function")
    if not gammas and any(name.endswith(".gamma") for name in weights):
        folded = fold_layer_scale(weights)
        weights.clear()
        weights.update(folded)
        said.append("LayerScale multiplied into the layers before it: the same function")


def fold_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function without LayerScale: gamma goes into the linear layer before it."""
    folded = dict(weights)
    for name, gamma in weights.items():
        if match := re.fullmatch(r"(blocks\.\d+\.)ls([12])\.gamma", name):
            layer = match[1] + {"1": "attn.proj", "2": "mlp.fc2"}[match[2]]
            folded[f"{layer}.weight"] = weights[f"{layer}.weight"] * gamma[:, None]
            if f"{layer}.bias" in weights:
                folded[f"{layer}.bias"] = weights[f"{layer}.bias"] * gamma
            del folded[name]
    return folded


def _final_norm(weights: dict[str, Tensor], own: dict[str, Tensor], said: list[str]) -> None:
    """A norm before or after the pooling."""
    for here, there in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{here}.weight" in own and f"{there}.weight" in weights and f"{there}.weight" not in own:
            for part in ("weight", "bias"):
                weights[f"{here}.{part}"] = weights.pop(f"{there}.{part}")
            order = ("after", "before") if here == "norm" else ("before", "after")
            said.append(f"the last norm, which stood {order[0]} the pooling, now stands {order[1]} it")
