"""What frozen features find: the nearest images of some, and which classes the linear probe takes for which."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.data.image_list import ImageList
from mapet.data.views import ViewSpec, draw_view, render
from mapet.device import Compute
from mapet.evaluation.backbone_wrapper import BackboneWrapper
from mapet.evaluation.feature_cache import CacheConfig, FeatureCache
from mapet.evaluation.features import LabelledSet, labelled, split, unlabelled
from mapet.evaluation.online import MAX_TEST, MAX_TRAIN, ONLINE_C
from mapet.evaluation.probes import fit_logistic, nearest_neighbors

Titled = tuple[UInt8[Tensor, "C H W"], str]
"""Pixels of a centred view, and the name of the image."""


class Retrieval(NamedTuple):
    """Of a fixed sample of images, a fifth of them held out.

    Attributes:
        rows: a held-out image, then those of the others nearest to it, best first.
        classes: [] without labels.
        confusion: images of each true class (row) by the class that the probe gave them; None without labels.
    """

    rows: list[list[Titled]]
    classes: list[str]
    confusion: Int[np.ndarray, "K K"] | None


def retrieve(
    vit: VisionTransformer, images: ImageList, compute: Compute, queries: int = 6, nearest: int = 7
) -> Retrieval:
    """Run the backbone over the sample.

    Raises:
        MapetError: too few images to hold some out, or too many that can't be read.
    """
    train, test = split(labelled(images) if images.classes() else unlabelled(images))
    train, test = train.sample(MAX_TRAIN), test.sample(MAX_TEST)
    backbone, config = BackboneWrapper.of_vit(vit, compute), CacheConfig(progress=False)
    fit, check = (FeatureCache.extract(backbone, data, config) for data in (train, test))
    features, confusion = check.layer_features(), None
    if train.classes:
        count = len(train.classes)
        predicted = fit_logistic(fit.layer_features(), fit.labels, count, C=ONLINE_C)(features).argmax(1)
        confusion = torch.bincount(check.labels * count + predicted, minlength=count**2).view(count, count).numpy()
    order = check.index.argsort()
    chosen = order[np.linspace(0, len(order) - 1, min(queries, len(order))).round().astype(int)]
    _, found = nearest_neighbors(fit.layer_blocks(), features[chosen], nearest)
    rows = neighbor_rows(backbone, train, test, check.index[chosen].tolist(), fit.index[found].tolist())
    return Retrieval(rows, train.classes, confusion)


def neighbor_rows(
    backbone: BackboneWrapper, train: LabelledSet, test: LabelledSet, queries: list[int], nearest: list[list[int]]
) -> list[list[Titled]]:
    """Show each query, a test image, and after it its nearest training images."""

    def titled(data: LabelledSet, index: int) -> Titled:
        picture = data.images.open(index, backbone.channels)
        view = draw_view(ViewSpec(image_size=backbone.image_size), picture.size, data.images.key(index), 0)
        return render(picture, view, backbone.image_size), data.title(index)

    return [
        [titled(test, query), *(titled(train, other) for other in others)]
        for query, others in zip(queries, nearest, strict=True)
    ]
