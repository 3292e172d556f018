"""What frozen features find: the nearest images of some, and which classes a linear probe takes for which."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.data.dataset import ViewDataset
from mapet.data.image_list import ImageList
from mapet.data.views import ViewSpec
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.classifiers import linear_predictions, nearest_neighbours
from mapet.evaluation.features import LabelledSet, extract_features, labelled, split, unlabelled
from mapet.evaluation.online import MOST_TEST, MOST_TRAIN, fixed_sample


class Retrieval(NamedTuple):
    """Of a fixed sample of images, a fifth of them held out.

    Attributes:
        rows: of (pixels, name): a held-out image, then those of the others nearest to it, best first.
        classes: [] without labels.
        confusion: images of each true class (row) by the class that the probe gave them; None without labels.
    """

    rows: list[list[tuple[UInt8[Tensor, "C H W"], str]]]
    classes: list[str]
    confusion: Int[np.ndarray, "K K"] | None


def retrieve(
    vit: VisionTransformer, images: ImageList, compute: Compute, workers: int = 0, queries: int = 6, nearest: int = 7
) -> Retrieval:
    """Run the backbone over the sample.

    Raises:
        MapetError: too few images to hold some out, or too many that can't be read.
    """
    train, test = split(labelled(images) if images.classes() else unlabelled(images))
    train, test = fixed_sample(train, MOST_TRAIN), fixed_sample(test, MOST_TEST)
    (bank, kept), (asked, held) = (_features_and_index(vit, data, compute, workers) for data in (train, test))
    confusion = None
    if train.classes:
        labels, true = torch.from_numpy(train.labels)[kept], torch.from_numpy(test.labels)[held]
        found = linear_predictions(bank, labels, asked, strength=0.1, max_iterations=100)
        number = len(train.classes)
        confusion = torch.bincount(true * number + found, minlength=number**2).view(number, number).numpy()
    chosen = np.linspace(0, len(held) - 1, min(queries, len(held))).round().astype(int)
    _, neighbours = nearest_neighbours([(0, bank)], asked[chosen], nearest)
    rows = [
        [_shown(vit, test, int(held[query]))] + [_shown(vit, train, int(kept[other])) for other in others]
        for query, others in zip(chosen, neighbours, strict=True)
    ]
    return Retrieval(rows, train.classes, confusion)


def _features_and_index(
    vit: VisionTransformer, data: LabelledSet, compute: Compute, workers: int
) -> tuple[Float[Tensor, "n D"], Int[Tensor, " n"]]:
    """Features of the images that can be read, and which those are."""
    numbered = LabelledSet(data.images, data.classes, np.arange(len(data.labels)))
    return extract_features(vit, numbered, compute, workers=workers, show=False)


def _shown(vit: VisionTransformer, data: LabelledSet, index: int) -> tuple[UInt8[Tensor, "C H W"], str]:
    height, width = vit.patch_embed.img_size
    view = ViewDataset(data.images, ViewSpec(image_size=(height, width)), vit.in_chans, (height, width))
    sample = view[0, index]
    if sample.images is None:
        raise MapetError(f"{data.images.id(index)!r} could be read before and can't be now: {sample.bad[0][1]}")
    return sample.images[0], data.title(index)
