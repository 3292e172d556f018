"""timm's augmentations of labelled training, drawn from seeds of ours."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from mapet.errors import MapetError


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """timm draws from the global generators of Python and NumPy: give them this seed for a while."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 (timm's choice)
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def rand_augment(
    policy: str, size: tuple[int, int], mean: tuple[float, ...]
) -> Callable[[UInt8[Tensor, "3 H W"]], UInt8[Tensor, "3 H W"]]:
    """RandAugment (arXiv 1909.13719) of one RGB image, in timm's words: rand-m9-mstd0.5-inc1.

    Args:
        size: of the image; translations reach 45 % of its shorter side, as in timm's own training.
        mean: of the pixels, 0 to 1: what fills the corners of a turned image.

    Raises:
        MapetError: timm does not know the policy.
    """
    from timm.data.auto_augment import rand_augment_transform

    hparams = {"translate_const": int(min(size) * 0.45), "img_mean": tuple(round(255 * value) for value in mean)}
    try:
        transform = rand_augment_transform(policy, hparams)
    except (AssertionError, ValueError, KeyError):
        raise MapetError(
            f"RandAugment policy '{policy}' is not one of timm's: write it like rand-m9-mstd0.5-inc1"
        ) from None

    def apply(image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 H W"]:
        picture = Image.fromarray(image.movedim(0, -1).contiguous().numpy())
        return torch.from_numpy(np.array(transform(picture))).movedim(-1, 0)

    return apply
