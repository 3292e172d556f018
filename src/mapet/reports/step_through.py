"""The data of a report's step-through: an image's hidden patches, predicted one after the other in permutation order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mapet.evaluation.look import Look
from mapet.models.objectives import Objective
from mapet.reports.images import photo_uri, tiles_uri
from mapet.reports.plots.base import HIDDEN, patchify, to_picture
from mapet.reports.plots.tokens import code_colors, mean_patches

COLUMNS = 32
"""Mean patches in a row of the atlas."""


def step_through(look: Look, names: Sequence[str], objective: Objective) -> dict[str, Any]:
    """JSON of the shown images: pixels, order, words, predictions; and the mean patch and colour of each word among them.

    `atlas.codes` are the words; the i-th is tile i of the picture, row by row. Predictions are in order of rank.
    """
    hidden = 0 if look.logits is None else look.logits.shape[1]
    images, used = [], set()
    for i in range(look.shown):
        tokens, order = look.tokens[i], look.permutation[i]
        one: dict[str, Any] = {"name": names[i], "src": photo_uri(_image(look.images[i]))}
        one |= {"order": order.tolist(), "tokens": tokens.tolist()}
        used.update(tokens.tolist())
        if look.logits is not None:
            chance = look.logits[i].float().softmax(-1)
            best = chance.max(-1)
            true = chance.gather(1, tokens[order[-hidden:], None]).flatten()
            one |= {"predicted": best.indices.tolist(), "sure": _rounded(best.values), "chance": _rounded(true)}
            used.update(one["predicted"])
        images.append(one)
    codes = sorted(used)
    patches = patchify(look.images, look.grid).flatten(0, 1)
    means = mean_patches(patches, look.tokens.flatten(), look.vocab_size)[codes]
    colors = (255 * code_colors(look.vocab_size)[codes]).round().astype(int)
    return {
        "grid": list(look.grid),
        "size": list(look.images.shape[2:]),
        "hidden": hidden,
        "sees_targets": any("target" in row or "next" in row for row in objective.attends_to.values()),
        "sees_positions": "mask" in objective.attends_to,
        "images": images,
        "atlas": {
            "src": tiles_uri(_atlas(means)),
            "columns": COLUMNS,
            "codes": codes,
            "colors": ["#{:02x}{:02x}{:02x}".format(*color) for color in colors.tolist()],
        },
    }


def _atlas(tiles: Float[Tensor, "n C h w"]) -> Image.Image:
    """Tiles in rows of `COLUMNS`."""
    count, channels, height, width = tiles.shape
    rows = -(-count // COLUMNS)
    grid = torch.full((rows * COLUMNS, channels, height, width), HIDDEN * 255)
    grid[:count] = tiles
    picture = grid.view(rows, COLUMNS, channels, height, width).permute(2, 0, 3, 1, 4)
    return _image(picture.reshape(channels, rows * height, COLUMNS * width).round().to(torch.uint8))


def _image(pixels: Int[Tensor, "C H W"]) -> Image.Image:
    return Image.fromarray((255 * to_picture(pixels)).round().astype(np.uint8))


def _rounded(values: Float[Tensor, " p"]) -> list[float]:
    return [round(value, 3) for value in values.tolist()]
