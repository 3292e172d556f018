"""What a report shows of a run's newest weights: figures by name, and masked patches predicted step by step."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mapet.data.image_list import ImageList
from mapet.device import ComputeContext
from mapet.errors import MapetError
from mapet.evaluation.inspection import ModelInspection, TokenSample, pca_colors, retrieve_images
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


def patches_and_tokens(sample: TokenSample) -> tuple[UInt8[Tensor, "n C h w"], Int[Tensor, " n"]]:
    """Return all patches whose pixels a sample keeps, and their tokens."""
    patches = plots.patchify(sample.images, sample.grid).flatten(0, 1)
    return patches, sample.ids[: len(sample.images)].flatten()


def plot_tokens(sample: TokenSample, num_shown: int) -> dict[str, Figure]:
    """Draw the token maps of the first `num_shown` images, and patches that share a token."""
    tokens = sample.ids[:num_shown].flatten(1)
    return {
        "token_maps": plots.plot_token_maps(sample.images[:num_shown], tokens, sample.grid, sample.vocab_size),
        "patches_by_code": plots.plot_patches_by_code(*patches_and_tokens(sample), sample.vocab_size),
    }


def plot_run(
    look: ModelInspection, model: ViTForPreTraining, images: ImageList, compute: ComputeContext
) -> dict[str, Figure]:
    """Draw what tokenizer and model make of a sample, and what the model's features find among all images."""
    grid, shown, layout = look.sample.grid, look.images, model.layout()
    figures = plot_tokens(look.sample, len(shown))
    figures["attention_mask"] = plots.plot_attention_mask(
        layout.attn_mask, layout.segment_lengths, model.objective.name
    )
    if look.logits is not None:
        means = plots.mean_patches(*patches_and_tokens(look.sample), look.sample.vocab_size)
        figures["predictions"] = plots.plot_predictions(shown, look.tokens, look.permutation, look.logits, means, grid)
    if look.attention is not None:
        attention = look.attention.unflatten(2, grid).numpy()
        heads = {f"head {head}": attention[:, head] for head in range(min(attention.shape[1], MAX_HEADS))}
        title = "Attention of the class token to the patches, last block"
        figures["cls_attention"] = plots.plot_maps(shown, {"mean": attention.mean(1), **heads}, title)
    colors = pca_colors(look.features).reshape(len(shown), *grid, 3)
    title = "Principal components of the patches' features as colors"
    figures["features"] = plots.plot_maps(shown, {"features": colors}, title)
    try:
        rows, classes, confusion = retrieve_images(model.vit, images, compute)
    except MapetError as error:
        log.warning("no neighbors: %s", error)
        return figures
    figures["neighbors"] = plots.plot_neighbors(rows, labeled=bool(classes))
    if confusion is not None:
        figures["confusion"] = plots.plot_confusion(confusion, classes)
    return figures


def step_through(look: ModelInspection, names: Sequence[str], objective: Objective) -> dict[str, Any]:
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
    vocab_size = look.sample.vocab_size
    means = plots.mean_patches(*patches_and_tokens(look.sample), vocab_size)[codes]
    rows = -(-len(codes) // COLUMNS)
    tiles = torch.full((rows * COLUMNS, *means.shape[1:]), plots.HIDDEN * 255)
    tiles[: len(means)] = means
    atlas = _image(plots.unpatchify(tiles, (rows, COLUMNS)).round().to(torch.uint8))
    colors = (255 * plots.code_colors(vocab_size)[codes]).round().astype(int)
    hexes = ["#{:02x}{:02x}{:02x}".format(*color) for color in colors.tolist()]
    return {
        "grid": list(look.sample.grid),
        "size": list(look.images.shape[2:]),
        "hidden": hidden,
        "sees_targets": any("target" in row or "next" in row for row in objective.attends_to.values()),
        "sees_positions": "mask" in objective.attends_to,
        "images": images,
        "atlas": {"src": image_uri(atlas), "columns": COLUMNS, "codes": codes, "colors": hexes},
    }


def _image(pixels: UInt8[Tensor, "C H W"]) -> Image.Image:
    return Image.fromarray((255 * plots.to_picture(pixels)).round().astype("uint8"))
