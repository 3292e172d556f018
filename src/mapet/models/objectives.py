"""Pre-training objectives as tables: which segments are packed, who sees whom, where the loss is read.

Patches are first gathered into permutation order, so visibility depends on rank alone and is one constant table for
the whole batch (MaPeT: arXiv 2306.07346, section 3 and figure 1).

Segments, with N patches, c context patches and p = N - c predicted ones:

    mask     p mask tokens                                            mask token + position
    context  prefix tokens (CLS, registers) and the first c patches   embedded content + position
    target   the other p patches                                      embedded content + position
    query    p query tokens                                           the same as `mask`
    next     p patches, each the one before in the order              embedded content + its position + the next one's

Query rows ask and are never seen: they have no column. In this order every row sees one unbroken range of columns
(rank i: the masks after i, the context, the targets up to i), so attention needs few or no masks (`attention.py`).

`next` makes one stream of `target` and `query`: its row i holds the content of the patch before rank i, knows the position
of rank i and predicts it (positions of the target in a causal row: RAR, arXiv 2411.00776; in raster order this is AIM's and
iGPT's causal model). Rank 0 comes after the last context patch, or after a mask token if there is none.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mapet.errors import MapetError, did_you_mean

Segment = Literal["context", "target", "mask", "query", "next"]
Sees = Literal["all", "before", "up to", "from", "after"]
"""Which ranks j a row of rank i sees: all; j < i; j <= i; j >= i; j > i."""


@dataclass(frozen=True)
class Objective:
    """One row of the table of objectives.

    Attributes:
        sees: row segment -> {column segment: which ranks of it}. Its keys, in order, are the packed segments; those that
            nobody sees come last.
        read_at: the segment whose outputs predict the tokens of the p patches.
    """

    name: str
    sees: dict[Segment, dict[Segment, Sees]]
    read_at: Segment

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(self.sees)


MAPET = Objective(
    "mapet",
    sees={
        "mask": {"mask": "all", "context": "all"},
        "context": {"mask": "all", "context": "all"},
        "target": {"mask": "after", "context": "all", "target": "up to"},
        "query": {"mask": "from", "context": "all", "target": "before"},
    },
    read_at="query",
)
PIM = Objective(
    "pim",
    sees={
        "context": {"context": "all"},
        "target": {"context": "all", "target": "up to"},
        "query": {"context": "all", "target": "before"},
    },
    read_at="query",
)
MIM = Objective(
    "mim",
    sees={
        "mask": {"mask": "all", "context": "all"},
        "context": {"mask": "all", "context": "all"},
    },
    read_at="mask",
)
BLIND_CONTENT = Objective(
    "mapet_blind_content",  # ablation: only what predicts sees the positions to come
    sees={
        "mask": {"mask": "all", "context": "all"},
        "context": {"context": "all"},
        "target": {"context": "all", "target": "up to"},
        "query": {"mask": "from", "context": "all", "target": "before"},
    },
    read_at="query",
)
SINGLE_STREAM = Objective(
    "mapet_single_stream",
    sees={
        "mask": {"mask": "all", "context": "all"},
        "context": {"mask": "all", "context": "all"},
        "next": {"mask": "after", "context": "all", "next": "up to"},
    },
    read_at="next",
)
CAUSAL = Objective(
    "causal",  # PIM in a single stream
    sees={
        "context": {"context": "all"},
        "next": {"context": "all", "next": "up to"},
    },
    read_at="next",
)
CAE = Objective(
    "cae",  # the latent regressor's table: `context_autoencoder.py` has the rest
    sees={
        "context": {"context": "all"},
        "mask": {"mask": "all", "context": "all"},
    },
    read_at="mask",
)
OBJECTIVES = {objective.name: objective for objective in (MAPET, PIM, MIM, BLIND_CONTENT, SINGLE_STREAM, CAUSAL, CAE)}


def content_rows(objective: Objective, lengths: dict[Segment, int]) -> int:
    """C, how many of the packed rows are seen by others: they are also the columns of attention."""
    seen = {column for columns in objective.sees.values() for column in columns}
    return sum(length for segment, length in lengths.items() if segment in seen)


def get_objective(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise MapetError(
            f"unknown objective '{name}'{did_you_mean(name, OBJECTIVES) or '.'} Known: {', '.join(OBJECTIVES)}"
        )
    return OBJECTIVES[name]


def num_context_of(predict_ratio: float, num_patches: int) -> int:
    """c for a share of patches to predict; at least one is predicted."""
    return min(num_patches - 1, num_patches - round(predict_ratio * num_patches))


def segment_lengths(objective: Objective, num_prefix: int, num_context: int, num_predicted: int) -> dict[Segment, int]:
    """Rows of each packed segment, in packing order."""
    return {s: num_prefix + num_context if s == "context" else num_predicted for s in objective.segments}


@functools.lru_cache(maxsize=64)
def _visibility(name: str, num_prefix: int, num_context: int, num_predicted: int) -> Bool[Tensor, "R R"]:
    objective = OBJECTIVES[name]
    lengths = segment_lengths(objective, num_prefix, num_context, num_predicted)
    i, j = torch.arange(num_predicted)[:, None], torch.arange(num_predicted)[None, :]
    by_rank = {"before": j < i, "up to": j <= i, "from": j >= i, "after": j > i}
    rows = []
    for row in objective.segments:
        columns = []
        for column in objective.segments:
            rule = objective.sees[row].get(column)
            shape = lengths[row], lengths[column]
            columns.append(by_rank[rule] if rule in by_rank else torch.full(shape, rule == "all"))
        rows.append(torch.cat(columns, dim=1))
    return torch.cat(rows)


def visibility(objective: Objective, num_prefix: int, num_context: int, num_predicted: int) -> Bool[Tensor, "R R"]:
    """True where the row's token may attend to the column's. Rows and columns are the packed segments in order.

    Cached: don't write to it.

    Raises:
        MapetError: a row would see nothing at all (PIM's first query when there is no context and no prefix token).
    """
    table = _visibility(objective.name, num_prefix, num_context, num_predicted)
    if not table.any(dim=1).all():
        raise MapetError(
            f"objective '{objective.name}' needs at least one context patch or a class token: its first query sees nothing"
        )
    return table
