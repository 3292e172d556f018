"""The pictures of a run, by name: what `inspect` saves and the report shows."""

import logging
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from mapet.data.image_list import ImageList
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.look import Look, principal_colors
from mapet.evaluation.retrieval import retrieve
from mapet.models.pretraining import ViTForPreTraining
from mapet.reports import pictures

log = logging.getLogger("mapet")


def pictures_of(
    look: Look, model: ViTForPreTraining, images: ImageList, compute: Compute, workers: int = 0
) -> dict[str, Figure]:
    """All there are of a run's weights: of a sample, and of what its features find among all images."""
    figures = figures_of(look, model)
    try:
        found = retrieve(model.vit, images, compute, workers)
    except MapetError as error:
        log.warning("no neighbours: %s", error)
    else:
        figures["neighbours"] = pictures.neighbour_panel(found.rows, labelled=bool(found.classes))
        if found.confusion is not None:
            figures["confusion"] = confusion_matrix(found.confusion, found.classes)
    return figures


def figures_of(look: Look, model: ViTForPreTraining) -> dict[str, Figure]:
    """What can be drawn of a sample of images."""
    grid, vocab_size, shown = look.grid, look.vocab_size, slice(0, look.shown)
    patches = pictures.patchify(look.images, grid).flatten(0, 1)
    sample = look.images[shown], look.tokens[shown]
    layout = model.layout()
    figures = {
        "token_maps": pictures.token_maps(*sample, grid, vocab_size),
        "words": pictures.code_montage(patches, look.tokens.flatten(), vocab_size),
        "visibility": pictures.visibility_table(layout.attn_mask, layout.segment_lengths, model.objective.name),
        "features": feature_colors(look.images[shown], principal_colors(look.features), grid),
    }
    if look.logits is not None:
        prototypes = pictures.mean_patches(patches, look.tokens.flatten(), vocab_size)
        figures["predictions"] = pictures.predictions(*sample, look.permutation, look.logits, prototypes, grid)
    if look.attention is not None:
        figures["cls_attention"] = pictures.cls_attention(look.images[shown], look.attention, grid)
    return figures


def feature_colors(images: UInt8[Tensor, "B C H W"], colors: Float[Tensor, "B N 3"], grid: tuple[int, int]) -> Figure:
    """Each image above the colours of its patches."""
    figure, axes = pictures.panels(2, len(images))
    for column, (image, own) in enumerate(zip(images, colors, strict=True)):
        axes[0][column].imshow(pictures.to_picture(image), interpolation="nearest")
        axes[1][column].imshow(own.view(*grid, 3).numpy(), interpolation="nearest")
    axes[0][0].set_ylabel("image")
    axes[1][0].set_ylabel("features")
    figure.suptitle("Principal components of the patches' features as colours")
    return figure


def confusion_matrix(counts: Int[np.ndarray, "K K"], classes: Sequence[str]) -> Figure:
    """Rows: true classes, columns: predicted ones; shares of the row, written out where there is room."""
    number = len(classes)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = min(12.0, max(4.0, 0.45 * number + 2))
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if number <= 20:
        for row, column in np.argwhere(counts > 0):
            color = "white" if shares[row, column] > 0.6 else "black"
            axis.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=color)
    if number <= 60:
        names = [name[:16].replace("$", r"\$") for name in classes]
        axis.set_xticks(range(number), names, rotation=90, fontsize=7)
        axis.set_yticks(range(number), names, fontsize=7)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    axis.set_title(
        f"Linear probe: {np.trace(counts) / max(1, counts.sum()):.1%} of {counts.sum():,} images", fontsize=10
    )
    return figure
