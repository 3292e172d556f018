"""What a report shows of a run's newest weights: figures by name, and masked patches predicted step by step."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mapet.data.image_list import ImageList
from mapet.device import ComputeContext
from mapet.errors import MapetError
from mapet.evaluation.inspection import Look, principal_colors, retrieve
from mapet.models.objectives import Objective
from mapet.models.pretraining import ViTForPreTraining
from mapet.reports import plots
from mapet.reports.page import image_uri

log = logging.getLogger("mapet")
COLUMNS = 32
"""Mean patches in a row of the step-through's atlas."""
SIDE = 384
"""Largest side of its photographs."""
MAX_HEADS = 6


def plot_run(look: Look, model: ViTForPreTraining, images: ImageList, compute: ComputeContext) -> dict[str, Figure]:
    """Draw what tokenizer and model make of a sample, and what the model's features find among all images."""
    grid, vocab_size, shown = look.grid, look.vocab_size, look.images[: look.shown]
    patches, tokens = plots.patchify(look.images, grid).flatten(0, 1), look.tokens.flatten()
    layout = model.layout()
    figures = {
        "token_maps": plots.plot_token_maps(shown, look.tokens[: look.shown], grid, vocab_size),
        "patches_by_code": plots.plot_patches_by_code(patches, tokens, vocab_size),
        "attention_mask": plots.plot_attention_mask(layout.attn_mask, layout.segment_lengths, model.objective.name),
    }
    if look.logits is not None:
        prototypes, sample = plots.mean_patches(patches, tokens, vocab_size), look.tokens[: look.shown]
        figures["predictions"] = plots.plot_predictions(shown, sample, look.permutation, look.logits, prototypes, grid)
    if look.attention is not None:
        attention = look.attention.unflatten(2, grid).numpy()
        heads = {f"head {head}": attention[:, head] for head in range(min(attention.shape[1], MAX_HEADS))}
        title = "Attention of the class token to the patches, last block"
        figures["cls_attention"] = plots.plot_maps(shown, {"mean": attention.mean(1), **heads}, title)
    colors = principal_colors(look.features).unflatten(1, grid).numpy()
    title = "Principal components of the patches' features as colors"
    figures["features"] = plots.plot_maps(shown, {"features": colors}, title)
    try:
        rows, classes, confusion = retrieve(model.vit, images, compute)
    except MapetError as error:
        log.warning("no neighbors: %s", error)
        return figures
    figures["neighbors"] = plots.plot_neighbors(rows, labeled=bool(classes))
    if confusion is not None:
        figures["confusion"] = plots.plot_confusion(confusion, classes)
    return figures


def step_through(look: Look, names: Sequence[str], objective: Objective) -> dict[str, Any]:
    """JSON of the shown images: pixels, order, tokens, predictions; and the mean patch and color of each token among them.

    `atlas.codes` are the tokens; the i-th is tile i of the picture, row by row. Predictions are in order of rank.
    """
    hidden = 0 if look.logits is None else look.logits.shape[1]
    images: list[dict[str, Any]] = []
    for name, pixels, tokens, order in zip(names, look.images, look.tokens, look.permutation, strict=False):
        picture = _image(pixels)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        one = {"name": name, "src": image_uri(picture), "order": order.tolist(), "tokens": tokens.tolist()}
        if look.logits is not None:
            chance = look.logits[len(images)].float().softmax(-1)
            sure, best = chance.max(-1)
            true = chance.gather(1, tokens[order[-hidden:], None]).flatten()
            shares = torch.stack([sure, true]).double().round(decimals=3).tolist()
            one |= {"predicted": best.tolist(), "sure": shares[0], "chance": shares[1]}
        images.append(one)
    codes = sorted({code for one in images for code in (*one["tokens"], *one.get("predicted", ()))})
    patches = plots.patchify(look.images, look.grid).flatten(0, 1)
    means = plots.mean_patches(patches, look.tokens.flatten(), look.vocab_size)[codes]
    rows = -(-len(codes) // COLUMNS)
    tiles = torch.full((rows * COLUMNS, *means.shape[1:]), plots.HIDDEN * 255)
    tiles[: len(means)] = means
    atlas = _image(plots.unpatchify(tiles, (rows, COLUMNS)).round().to(torch.uint8))
    colors = (255 * plots.code_colors(look.vocab_size)[codes]).round().astype(int)
    hexes = ["#{:02x}{:02x}{:02x}".format(*color) for color in colors.tolist()]
    return {
        "grid": list(look.grid),
        "size": list(look.images.shape[2:]),
        "hidden": hidden,
        "sees_targets": any("target" in row or "next" in row for row in objective.attends_to.values()),
        "sees_positions": "mask" in objective.attends_to,
        "images": images,
        "atlas": {"src": image_uri(atlas), "columns": COLUMNS, "codes": codes, "colors": hexes},
    }


def _image(pixels: UInt8[Tensor, "C H W"]) -> Image.Image:
    return Image.fromarray((255 * plots.to_picture(pixels)).round().astype("uint8"))
