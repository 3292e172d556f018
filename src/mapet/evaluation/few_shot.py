"""Few-shot splits that are the same for everybody: a function of the images' ids and a seed, in any language.

An image's number is the first 8 bytes, little-endian, of the BLAKE2b digest (8 bytes long) of the UTF-8 text `SEED:ID`, the id being its path
below the data set's folder with forward slashes (`CLASS/image.jpg`). Of each class the images of smallest number are taken. So
smaller splits are parts of larger ones, and adding or removing an image moves no other one.
"""

import hashlib

import numpy as np
import torch
from jaxtyping import Int

from mapet.errors import MapetError, counted
from mapet.evaluation.eval_context import EvalContext, ProtocolResult
from mapet.evaluation.features import LabelledSet
from mapet.evaluation.intervals import over_seeds
from mapet.evaluation.probes import fit_logistic, fit_scaler


def few_shot_split(data: LabelledSet, amount: float, seed: int) -> Int[np.ndarray, " m"]:
    """Select the images of a split: their sorted indices.

    Args:
        amount: below 1 a fraction of each class (at least one image), else so many images of each class.

    Raises:
        MapetError: a class has fewer images.
    """
    numbers = np.fromiter((_number(data.images.ids[i], seed) for i in range(len(data.labels))), np.uint64)
    kept = []
    for label, members in enumerate(data.by_class(np.lexsort((numbers, data.labels)))):
        count = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        if count > len(members):
            raise MapetError(
                f"class '{data.classes[label]}' has {counted(len(members), 'image')} to learn from, fewer than the {count:,} asked for"
            )
        kept.append(members[:count])
    return np.sort(np.concatenate(kept))


def _number(name: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(b"%d:" % seed + name, digest_size=8).digest(), "little")


def few_shot(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe with few labels, over several fixed splits, standardized with all training images."""
    result = ProtocolResult()
    train, features, scaler = context.train, context.test.layer_features(), fit_scaler(context.train)
    row_of = torch.full((len(context.data.train.labels),), -1)
    row_of[train.index] = torch.arange(len(train))
    for amount in context.options.few_shot:
        scores = []
        for seed in range(context.options.num_seeds):
            rows = row_of[torch.from_numpy(few_shot_split(context.data.train, amount, seed))]
            rows = rows[rows >= 0]  # that could be read
            probe = fit_logistic(train.layer_features(rows), train.labels[rows], len(context.classes), scaler=scaler)
            scores.append(float((probe(features).argmax(1) == context.test.labels).double().mean()))
        name = f"few_shot_{100 * amount:g}pct" if amount < 1 else f"few_shot_{amount:g}"
        result.metrics[name] = over_seeds(scores)
        result.details[name] = scores
    return result
