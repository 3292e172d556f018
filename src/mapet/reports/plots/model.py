"""Figures of a model: who attends to whom, predictions, attention, features."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from mapet.models.objectives import Segment
from mapet.reports.plots.base import HIDDEN, grid_of_axes, one_axis, patchify, show, to_picture, unpatchify

MAX_HEADS = 6


def plot_attention_mask(mask: Bool[Tensor, "R R"], lengths: Mapping[Segment, int], name: str) -> Figure:
    """Draw the attention mask of an objective: rows attend to the dark columns."""
    figure, axis = one_axis(6, 6)
    axis.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    edges = np.cumsum([0, *lengths.values()])
    centres = (edges[1:] + edges[:-1]) / 2 - 0.5
    for edge in edges[1:-1]:
        axis.axhline(edge - 0.5, color="black", linewidth=0.8)
        axis.axvline(edge - 0.5, color="black", linewidth=0.8)
    labels = [f"{segment}\n({length})" for segment, length in lengths.items()]
    axis.set_xticks(centres, labels)
    axis.set_yticks(centres, labels)
    axis.set(xlabel="is attended to", ylabel="attends")
    about = "the context includes the class token; query columns are never attended to"
    axis.set_title(f"Attention mask of '{name}'\n{about}", fontsize=9)
    return figure


def plot_predictions(
    images: UInt8[Tensor, "B C H W"],
    tokens: Int[Tensor, "B N"],
    permutation: Int[Tensor, "B N"],
    logits: Float[Tensor, "B p V"],
    prototypes: Float[Tensor, "V C h w"],
    grid: tuple[int, int],
) -> Figure:
    """Draw what the model predicts for masked patches in a given order, tokens as their mean patch.

    Rows: the image; the context patches alone; the order of prediction; the true tokens; the likeliest tokens; the probability of
    the true token, from 0 (black) to the largest shown.
    """
    num_context = permutation.shape[1] - logits.shape[1]
    true = tokens.gather(1, permutation[:, num_context:])
    chance = logits.float().softmax(-1).gather(2, true[..., None])[..., 0]
    largest = float(chance.max())  # of thousands of tokens even a likely one has a small probability
    names = ["image", "context", "order", "true tokens", "predicted", f"p(true)\n0 to {largest:.2g}"]
    figure, axes = grid_of_axes(names, len(images))
    for b, image in enumerate(images):
        given, masked = permutation[b, :num_context], permutation[b, num_context:]
        truth = prototypes[tokens[b]]
        context = torch.full_like(truth, HIDDEN * 255)
        context[given] = patchify(image[None], grid)[0][given].float()
        predicted = context.clone()
        predicted[masked] = prototypes[logits[b].argmax(-1)]
        rank, probability = torch.full((2, permutation.shape[1]), float("nan"))
        rank[masked], probability[masked] = torch.arange(len(masked)).float(), chance[b]
        show(axes[0][b], to_picture(image))
        for row, patches in ((1, context), (3, truth), (4, predicted)):
            show(axes[row][b], to_picture(unpatchify(patches.round().to(torch.uint8), grid)))
        axes[2][b].imshow(rank.view(grid), cmap="viridis")
        axes[5][b].imshow(probability.view(grid), cmap="magma", vmin=0, vmax=largest)
    figure.suptitle("Masked patches, predicted in the order shown (dark first);\ntokens drawn as their mean patch")
    return figure


def plot_cls_attention(
    images: UInt8[Tensor, "B C H W"], attention: Float[Tensor, "B heads N"], grid: tuple[int, int]
) -> Figure:
    """Draw where the class token looks in the last block: the mean over heads, then single heads."""
    heads = min(attention.shape[1], MAX_HEADS)
    figure, axes = grid_of_axes(["image", "mean", *(f"head {h}" for h in range(heads))], len(images))
    for b, image in enumerate(images):
        show(axes[0][b], to_picture(image))
        for row, values in enumerate([attention[b].mean(0), *attention[b, :heads]], 1):
            axes[row][b].imshow(values.view(grid).numpy(), cmap="inferno")
    figure.suptitle("Attention of the class token to the patches, last block")
    return figure


def plot_features(images: UInt8[Tensor, "B C H W"], colors: Float[Tensor, "B N 3"], grid: tuple[int, int]) -> Figure:
    """Draw each image above the colours of its patches, in 0..1."""
    figure, axes = grid_of_axes(["image", "features"], len(images))
    for column, (image, own) in enumerate(zip(images, colors, strict=True)):
        show(axes[0][column], to_picture(image))
        show(axes[1][column], own.view(*grid, 3).numpy())
    figure.suptitle("Principal components of the patches' features as colours")
    return figure
