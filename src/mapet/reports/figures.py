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
    """Return all patches of the images whose pixels a sample keeps, image by image in row-major order, and their token ids.

    A sample has the tokens of all its images, but the pixels of the first ones alone.
    """
    patches = plots.patchify(sample.images, sample.grid).flatten(0, 1)
    return patches, sample.ids[: len(sample.images)].flatten()


def plot_tokens(sample: TokenSample, num_shown: int) -> dict[str, Figure]:
    """Draw the token maps of the first `num_shown` images, and patches that share a token.

    Returns:
        "token_maps" and "patches_by_code" (patches of all images whose pixels the sample keeps) -> figure.
    """
    tokens = sample.ids[:num_shown].flatten(1)
    return {
        "token_maps": plots.plot_token_maps(sample.images[:num_shown], tokens, sample.grid, sample.vocab_size),
        "patches_by_code": plots.plot_patches_by_code(*patches_and_tokens(sample), sample.vocab_size),
    }


def plot_tokenizer(sample: TokenSample, centroids: Float[Tensor, "V F"] | None, num_shown: int) -> dict[str, Figure]:
    """Draw the figures of a tokenizer from the tokens of a sample of images.

    Args:
        centroids: of the V codes in the feature space of F dimensions; None for quantizers without centroids (FSQ, LFQ).
        num_shown: images of the token maps.

    Returns:
        "code_usage", "token_maps", "patches_by_code" and, with centroids of several codes, "nearest_codes" -> figure.
    """
    vocab_size = sample.vocab_size
    figures = {"code_usage": plots.plot_code_usage(torch.bincount(sample.ids.flatten(), minlength=vocab_size))}
    figures |= plot_tokens(sample, num_shown)
    if centroids is not None and vocab_size > 1:
        patches, tokens = patches_and_tokens(sample)
        counts = torch.bincount(tokens, minlength=vocab_size)
        codes = plots.sample_codes_by_usage(counts)
        distances, nearest = nearest_codes(centroids.cpu(), codes, NUM_NEAREST)
        prototypes = plots.mean_patches(patches, tokens, vocab_size)
        figures["nearest_codes"] = plots.plot_nearest_codes(prototypes, counts, codes, nearest, distances)
    return figures


def plot_run(
    inspected: ModelInspection, model: ViTForPreTraining, images: ImageList, compute: ComputeContext
) -> dict[str, Figure]:
    """Draw a run's figures: tokens of a sample of images, outputs of the model for them, and retrieval among all images.

    Args:
        inspected: tokens of the sample, and the model's predictions, attention and features of its first images.
        model: on `compute.device`.
        images: all images: for a fixed sample of them, held-out images, their nearest training images and a linear probe are computed.
        compute: device and precision.

    Returns:
        Name -> figure: "token_maps", "patches_by_code", "attention_mask", "features"; "predictions" if the model predicts tokens;
        "cls_attention" if it has a class token; "neighbors" unless the images can't be retrieved (a warning says why); "confusion" if
        the images have labels.
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
        log.warning("the figures of nearest images and of the linear probe are skipped: %s", error)
        return figures
    figures["neighbors"] = plots.plot_neighbors(rows, labeled=bool(classes))
    if confusion is not None:
        figures["confusion"] = plots.plot_confusion(confusion, classes)
    return figures


def step_through(inspected: ModelInspection, names: Sequence[str], objective: Objective) -> dict[str, Any]:
    """Return, as JSON, the data of the step-through: a viewer (step_through.js) of an image's masked patches, predicted one by one.

    Args:
        inspected: tokens of a sample of images, and the model's predictions for its first images.
        names: of the first images of `inspected`, one for each image that is shown.
        objective: of the model; its `attends_to` maps each segment of the packed sequence to the segments that it attends to.

    Returns:
        "grid": rows, columns of patches; "size": height, width in pixels; "num_masked": number of masked patches, 0 if no tokens are
        predicted; "attends_to_targets": whether predictions attend to the true patches predicted before them (segments "target" and "next"
        hold these); "attends_to_positions": whether they attend to mask tokens, which hold the positions of patches not yet predicted;
        "images": see `_image_data`.
    """
    prototypes = plots.mean_patches(*patches_and_tokens(inspected.sample), inspected.sample.vocab_size)
    return {
        "grid": list(inspected.sample.grid),
        "size": list(inspected.images.shape[2:]),
        "num_masked": 0 if inspected.logits is None else inspected.logits.shape[1],
        "attends_to_targets": any("target" in row or "next" in row for row in objective.attends_to.values()),
        "attends_to_positions": "mask" in objective.attends_to,
        "images": [_image_data(inspected, index, name, prototypes) for index, name in enumerate(names)],
    }


def _image_data(
    inspected: ModelInspection, index: int, name: str, prototypes: Float[Tensor, "V C h w"]
) -> dict[str, Any]:
    """Return the data of one image of a step-through, as JSON.

    Args:
        inspected: tokens and predictions of the shown images.
        index: of the image in `inspected`.
        name: of the image, for the user.
        prototypes: mean patch of each code, 0..255.

    Returns:
        "name"; "order": patch indices, in the order of the permutation (context patches, then masked ones); "tokens": token id of each
        patch, row-major; and images as data URIs: "src": the image; "true_src": the mean patch of each patch's token; "colors_src":
        rows x columns pixels, each of its token's color. If the model predicts tokens, also lists over the masked patches, in the order
        of prediction: "predicted": likeliest token id, "sure": its probability, "chance": the true token's probability; and
        "predicted_src": as "true_src", with the predicted tokens at the masked patches.
    """
    grid, tokens, order = inspected.sample.grid, inspected.tokens[index], inspected.permutation[index]

    def draw_tokens(tokens: Int[Tensor, " N"]) -> str:
        """Return the data URI of an image that has the mean patch of each token."""
        return image_uri(plots.to_image(plots.unpatchify(prototypes[tokens], grid).round().to(torch.uint8)))

    image = plots.to_image(inspected.images[index])
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    colors = plots.code_colors(inspected.sample.vocab_size)[tokens.view(grid).numpy()]
    data = {
        "name": name, "order": order.tolist(), "tokens": tokens.tolist(), "src": image_uri(image), "true_src": draw_tokens(tokens),
        "colors_src": image_uri(Image.fromarray((255 * colors).round().astype(np.uint8))),
    }  # fmt: skip
    if inspected.logits is not None:
        masked = order[-inspected.logits.shape[1] :]  # the last p patches are predicted
        probabilities = inspected.logits[index].float().softmax(-1)
        sure, predicted = probabilities.max(-1)
        chance = probabilities.gather(1, tokens[masked, None]).flatten()
        sure, chance = torch.stack([sure, chance]).double().round(decimals=3)
        data |= {"predicted": predicted.tolist(), "sure": sure.tolist(), "chance": chance.tolist()}
        data["predicted_src"] = draw_tokens(tokens.scatter(0, masked, predicted))
    return data
