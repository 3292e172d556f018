"""Pre-training objectives as a table: which segments are packed, what each attends to, which outputs predict.

Patches are first gathered into permutation order, so that the attention mask depends on positions in the permutation alone and is
one constant for the whole batch (MaPeT: arXiv 2306.07346, section 3 and figure 1). `packing.py` makes the packed sequence and
its attention mask from an `Objective`.

Segments, with N patches, c context patches and p = N - c predicted ones:

    mask     p mask tokens                                            mask token + position
    context  prefix tokens (CLS, registers) and the first c patches   embedded content + position
    target   the other p patches                                      embedded content + position
    query    p query tokens                                           the same as `mask`
    next     p patches, each the one before in the permutation        embedded content + its position + the next one's

Nothing attends to query tokens: they have no column. In this order of segments every row attends to one contiguous range of
columns (position i: the masks after i, the context, the targets up to i), so attention needs few or no masks.

`next` merges `target` and `query` into one stream: its row i holds the content of the patch before position i and the position
embedding of patch i, and predicts patch i (position embedding of the target in a causal row: RAR, arXiv 2411.00776; in raster
order this is AIM's and iGPT's causal model). Before position 0 is the last context patch, or a mask token if there is none.
"""

from dataclasses import dataclass
from typing import Literal

from mapet.errors import MapetError, did_you_mean

Segment = Literal["context", "target", "mask", "query", "next"]
OrderRule = Literal["all", "before", "up to", "from", "after"]
"""Which positions j of a column segment a row at position i attends to: all; j < i; j <= i; j >= i; j > i."""


@dataclass(frozen=True)
class Objective:
    """A pre-training objective.

    Attributes:
        name: value of the option `objective`.
        attends_to: row segment -> {column segment: which positions of it the row attends to}. Its keys, in order, are the
            packed segments; those that nothing attends to come last.
        output_segment: the segment of p rows whose outputs predict the p patches.
    """

    name: str
    attends_to: dict[Segment, dict[Segment, OrderRule]]
    output_segment: Segment


# fmt: off
MAPET = Objective("mapet", output_segment="query", attends_to={
    "mask":    {"mask": "all", "context": "all"},
    "context": {"mask": "all", "context": "all"},
    "target":  {"mask": "after", "context": "all", "target": "up to"},
    "query":   {"mask": "from", "context": "all", "target": "before"},
})
PIM = Objective("pim", output_segment="query", attends_to={
    "context": {"context": "all"},
    "target":  {"context": "all", "target": "up to"},
    "query":   {"context": "all", "target": "before"},
})
MIM = Objective("mim", output_segment="mask", attends_to={
    "mask":    {"mask": "all", "context": "all"},
    "context": {"mask": "all", "context": "all"},
})
# Ablation: of context, target and query tokens, only query tokens attend to the positions of patches not yet predicted.
MAPET_CONTENT_IGNORES_MASKS = Objective("mapet_content_ignores_masks", output_segment="query", attends_to={
    "mask":    {"mask": "all", "context": "all"},
    "context": {"context": "all"},
    "target":  {"context": "all", "target": "up to"},
    "query":   {"mask": "from", "context": "all", "target": "before"},
})
MAPET_SINGLE_STREAM = Objective("mapet_single_stream", output_segment="next", attends_to={
    "mask":    {"mask": "all", "context": "all"},
    "context": {"mask": "all", "context": "all"},
    "next":    {"mask": "after", "context": "all", "next": "up to"},
})
# PIM in a single stream.
CAUSAL = Objective("causal", output_segment="next", attends_to={
    "context": {"context": "all"},
    "next":    {"context": "all", "next": "up to"},
})
# Of the latent regressor but for the class token; `context_autoencoder.ContextAutoencoder` has the model.
CAE = Objective("cae", output_segment="mask", attends_to={
    "context": {"context": "all"},
    "mask":    {"mask": "all", "context": "all"},
})
# fmt: on
OBJECTIVES = {o.name: o for o in (MAPET, PIM, MIM, MAPET_CONTENT_IGNORES_MASKS, MAPET_SINGLE_STREAM, CAUSAL, CAE)}


def get_objective(name: str) -> Objective:
    """Return the objective that the option `objective` names.

    Raises:
        MapetError: there is none of that name; the message suggests a similar one and lists all.
    """
    if name not in OBJECTIVES:
        hint = did_you_mean(name, OBJECTIVES) or "."
        raise MapetError(f"unknown objective '{name}'{hint} Known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def num_context_from_ratio(mask_ratio: float, num_patches: int) -> int:
    """Return c, the number of context patches: those of an image that are given, not predicted.

    Args:
        mask_ratio: fraction of the patches that is predicted, 0 to 1; rounded to whole patches, and at least one patch is predicted.
        num_patches: N, patches of an image.

    Returns:
        0 (all are predicted) to N - 1.
    """
    return min(num_patches - 1, num_patches - round(mask_ratio * num_patches))
