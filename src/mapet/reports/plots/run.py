"""The figures of a run, by name, in the order of its report."""

import logging

from matplotlib.figure import Figure

from mapet.data.image_list import ImageList
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.look import Look, principal_colors
from mapet.evaluation.retrieval import retrieve
from mapet.models.pretraining import ViTForPreTraining
from mapet.reports.plots.base import patchify
from mapet.reports.plots.evaluation import plot_confusion, plot_neighbours
from mapet.reports.plots.model import plot_attention_mask, plot_cls_attention, plot_features, plot_predictions
from mapet.reports.plots.tokens import mean_patches, plot_patches_by_code, plot_token_maps

log = logging.getLogger("mapet")


def plot_run(
    look: Look, model: ViTForPreTraining, images: ImageList, compute: Compute, workers: int = 0
) -> dict[str, Figure]:
    """Draw all there is of a run's weights: of a sample, and of what its features find among all images."""
    figures = plot_sample(look, model)
    try:
        found = retrieve(model.vit, images, compute, workers)
    except MapetError as error:
        log.warning("no neighbours: %s", error)
    else:
        figures["neighbours"] = plot_neighbours(found.rows, labelled=bool(found.classes))
        if found.confusion is not None:
            figures["confusion"] = plot_confusion(found.confusion, found.classes)
    return figures


def plot_sample(look: Look, model: ViTForPreTraining) -> dict[str, Figure]:
    """Draw what tokenizer and model make of a sample of images."""
    grid, vocab_size, shown = look.grid, look.vocab_size, slice(0, look.shown)
    patches, tokens = patchify(look.images, grid).flatten(0, 1), look.tokens.flatten()
    sample = look.images[shown], look.tokens[shown]
    layout = model.layout()
    figures = {
        "token_maps": plot_token_maps(*sample, grid, vocab_size),
        "patches_by_code": plot_patches_by_code(patches, tokens, vocab_size),
        "attention_mask": plot_attention_mask(layout.attn_mask, layout.segment_lengths, model.objective.name),
    }
    if look.logits is not None:
        prototypes = mean_patches(patches, tokens, vocab_size)
        figures["predictions"] = plot_predictions(*sample, look.permutation, look.logits, prototypes, grid)
    if look.attention is not None:
        figures["cls_attention"] = plot_cls_attention(look.images[shown], look.attention, grid)
    figures["features"] = plot_features(look.images[shown], principal_colors(look.features), grid)
    return figures
