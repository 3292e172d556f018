"""Few-label splits that are the same for everybody: a function of the images' ids and a seed, in any language.

An image's number is the first 8 bytes, little-endian, of the BLAKE2b digest (8 bytes long) of the UTF-8 text `SEED:ID`, the id being its path
below the data set's folder with forward slashes (`CLASS/image.jpg`). Of each class the images of smallest number are taken. So
smaller splits are parts of larger ones, and adding or removing an image moves no other one.
"""

import hashlib

import numpy as np
from jaxtyping import Int

from mapet.errors import MapetError, counted
from mapet.evaluation.features import LabelledSet


def few_labels(data: LabelledSet, amount: float, seed: int) -> Int[np.ndarray, " m"]:
    """Sorted indices of the images of a split.

    Args:
        amount: below 1 a share of each class (at least one image), else so many images of each class.

    Raises:
        MapetError: a class has fewer images.
    """
    numbers = np.fromiter((_number(data.images.id_bytes(i), seed) for i in range(len(data.labels))), np.uint64)
    kept = []
    for label, members in enumerate(data.by_class(np.lexsort((numbers, data.labels)))):
        count = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        if count > len(members):
            raise MapetError(
                f"class '{data.classes[label]}' has {counted(len(members), 'image')} to learn from, fewer than the {count:,} asked for"
            )
        kept.append(members[:count])
    return np.sort(np.concatenate(kept))


def name_of(amount: float) -> str:
    """'1 %' or '5 a class'."""
    return f"{100 * amount:g} %" if amount < 1 else f"{amount:g} a class"


def _number(name: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(b"%d:" % seed + name, digest_size=8).digest(), "little")
