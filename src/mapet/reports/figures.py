"""Figures of the tokens of a sample and of a run's newest weights, and the data of its step-through."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mapet.data.image_list import ImageList
from mapet.device import ComputeContext
from mapet.errors import MapetError
from mapet.evaluation.inspection import ModelInspection, TokenSample, pca_colors, retrieve_images
from mapet.evaluation.token_metrics import nearest_codes
from mapet.models.objectives import Objective
from mapet.models.pretraining import ViTForPreTraining
from mapet.reports import plots
from mapet.reports.page import image_uri

log = logging.getLogger("mapet")
MAX_SIDE = 384
"""Pixels of the larger side of the step-through's images."""
MAX_HEADS = 6
"""Attention heads that are drawn."""
NUM_NEAREST = 8
"""Codes in a row of the figure of nearest codes."""


def patches_and_tokens(sample: TokenSample) -> tuple[UInt8[Tensor, "n C h w"], Int[Tensor, " n"]]:
    """Return all patches whose pixels a sample keeps, and their tokens."""
    patches = plots.patchify(sample.images, sample.grid).flatten(0, 1)
    return patches, sample.ids[: len(sample.images)].flatten()


def plot_tokens(sample: TokenSample, num_shown: int) -> dict[str, Figure]:
    """Draw the token maps of the first `num_shown` images, and patches that share a token; figures by name."""
    tokens = sample.ids[:num_shown].flatten(1)
    return {
        "token_maps": plots.plot_token_maps(sample.images[:num_shown], tokens, sample.grid, sample.vocab_size),
        "patches_by_code": plots.plot_patches_by_code(*patches_and_tokens(sample), sample.vocab_size),
    }


def plot_tokenizer(sample: TokenSample, centroids: Float[Tensor, "V F"] | None, num_shown: int) -> dict[str, Figure]:
    """Draw the figures of a tokenizer, by name: the use of codes, and those of `plot_tokens`.

    Args:
        centroids: of the codes, for a figure of the nearest codes; None for quantizers without centroids (FSQ, LFQ).
    """
    vocab_size = sample.vocab_size
    figures = {"code_usage": plots.plot_code_usage(torch.bincount(sample.ids.flatten(), minlength=vocab_size))}
    figures |= plot_tokens(sample, num_shown)
    if centroids is not None and vocab_size > 1:
        patches, tokens = patches_and_tokens(sample)
        counts = torch.bincount(tokens, minlength=vocab_size)
        codes = plots.sample_codes_by_frequency(counts)
        distances, nearest = nearest_codes(centroids.cpu(), codes, NUM_NEAREST)
        prototypes = plots.mean_patches(patches, tokens, vocab_size)
        figures["nearest_codes"] = plots.plot_nearest_codes(prototypes, counts, codes, nearest, distances)
    return figures


def plot_run(
    inspected: ModelInspection, model: ViTForPreTraining, images: ImageList, compute: ComputeContext
) -> dict[str, Figure]:
    """Draw a run's figures, by name: what tokenizer and model make of a sample, and the nearest images of some images.

    Args:
        inspected: the sample's tokens, and the model's predictions, attention and features.
        images: all images, among which the nearest ones are retrieved.
        compute: where the model is.
    """
    sample, shown, layout = inspected.sample, inspected.images, model.layout()
    mask, lengths = layout.attn_mask, layout.segment_lengths
    figures = plot_tokens(sample, len(shown))
    figures["attention_mask"] = plots.plot_attention_mask(mask, lengths, model.objective.name)
    if inspected.logits is not None:
        prototypes = plots.mean_patches(*patches_and_tokens(sample), sample.vocab_size)
        figures["predictions"] = plots.plot_predictions(
            shown, inspected.tokens, inspected.permutation, inspected.logits, prototypes, sample.grid
        )
    if inspected.attention is not None:
        attention = inspected.attention.unflatten(2, sample.grid).numpy()
        heads = {f"head {head}": attention[:, head] for head in range(min(attention.shape[1], MAX_HEADS))}
        title = "Attention of the class token to the patches, last block"
        figures["cls_attention"] = plots.plot_maps(shown, {"mean": attention.mean(1), **heads}, title)
    colors = pca_colors(inspected.features).reshape(len(shown), *sample.grid, 3)
    title = "Principal components of the patches' features as colors"
    figures["features"] = plots.plot_maps(shown, {"features": colors}, title)
    try:
        rows, classes, confusion = retrieve_images(model.vit, images, compute)
    except MapetError as error:
        log.warning("skipped the figure of nearest images: %s", error)
        return figures
    figures["neighbors"] = plots.plot_neighbors(rows, labeled=bool(classes))
    if confusion is not None:
        figures["confusion"] = plots.plot_confusion(confusion, classes)
    return figures


def step_through(inspected: ModelInspection, names: Sequence[str], objective: Objective) -> dict[str, Any]:
    """Return the data of step_through.js, as JSON.

    Args:
        names: of the shown images.

    Returns:
        "grid": rows, columns; "size": height, width in pixels; "hidden": number of masked patches, 0 if no tokens are
        predicted; "sees_targets", "sees_positions": whether predictions attend to earlier targets, and to the positions of
        patches not yet predicted; "images": see `_image_data`.
    """
    prototypes = plots.mean_patches(*patches_and_tokens(inspected.sample), inspected.sample.vocab_size)
    return {
        "grid": list(inspected.sample.grid),
        "size": list(inspected.images.shape[2:]),
        "hidden": 0 if inspected.logits is None else inspected.logits.shape[1],
        "sees_targets": any("target" in row or "next" in row for row in objective.attends_to.values()),
        "sees_positions": "mask" in objective.attends_to,
        "images": [_image_data(inspected, index, name, prototypes) for index, name in enumerate(names)],
    }


def _image_data(
    inspected: ModelInspection, index: int, name: str, prototypes: Float[Tensor, "V C h w"]
) -> dict[str, Any]:
    """Return the data of one image of a step-through.

    Args:
        index: of the image among those shown.
        prototypes: mean patch of each code, 0..255.

    Returns:
        "name"; "order" of the patch indices; "tokens" of the patches; data URIs: "src" the image, "true_src" its tokens as mean
        patches, "colors_src" a pixel of each token's color. If tokens are predicted, for the masked patches in order: "predicted"
        tokens, their probability "sure", that of the true token "chance"; and "predicted_src", the predicted tokens as mean patches.
    """
    grid, tokens, order = inspected.sample.grid, inspected.tokens[index], inspected.permutation[index]

    def draw_tokens(tokens: Int[Tensor, " N"]) -> str:
        return image_uri(plots.to_image(plots.unpatchify(prototypes[tokens], grid).round().to(torch.uint8)))

    image = plots.to_image(inspected.images[index])
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    colors = plots.code_colors(inspected.sample.vocab_size)[tokens.view(grid).numpy()]
    data = {
        "name": name, "order": order.tolist(), "tokens": tokens.tolist(), "src": image_uri(image), "true_src": draw_tokens(tokens),
        "colors_src": image_uri(Image.fromarray((255 * colors).round().astype(np.uint8))),
    }  # fmt: skip
    if inspected.logits is not None:
        masked = order[-inspected.logits.shape[1] :]
        probabilities = inspected.logits[index].float().softmax(-1)
        sure, predicted = probabilities.max(-1)
        chance = probabilities.gather(1, tokens[masked, None]).flatten()
        sure, chance = torch.stack([sure, chance]).double().round(decimals=3)
        data |= {"predicted": predicted.tolist(), "sure": sure.tolist(), "chance": chance.tolist()}
        data["predicted_src"] = draw_tokens(tokens.scatter(0, masked, predicted))
    return data
