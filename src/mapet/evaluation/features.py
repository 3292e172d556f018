"""Labelled images, their pixels as a model's input, and pooled features of patch tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mapet.data.dataset import Quarantine, ViewDataset, readable_batches
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.data.views import ViewSpec, color_jitter
from mapet.errors import MapetError, option
from mapet.models.adapt import input_mean_std
from mapet.models.checkpoint_conversion import MeanStd

Pool = Literal["avg", "token", "both"]
MAX_UNREADABLE = 0.5
"""Largest fraction of a set's images that may be unreadable."""
HELD_OUT = 0.2
"""Fraction of a set that is held out where no test set is given."""


@dataclass
class LabelledSet:
    """Images with the class of each.

    Attributes:
        classes: names; `labels` are indices into them. Without labels there are none, and all labels are 0.
    """

    images: ImageList
    classes: list[str]
    labels: Int[np.ndarray, " n"]

    def subset(self, indices: Int[np.ndarray, " m"]) -> "LabelledSet":
        """Select images."""
        return LabelledSet(self.images.subset(indices), self.classes, self.labels[indices])

    def sample(self, count: int) -> "LabelledSet":
        """Select at most `count` images by a hash of their ids: the same ones every time."""
        if len(self.labels) <= count:
            return self
        return self.subset(np.sort(np.argsort(self.images.keys())[:count]))

    def title(self, index: int) -> str:
        """Name an image in a figure: by its class, without labels by the stem of its file."""
        name = self.classes[self.labels[index]] if self.classes else Path(self.images.id(index)).stem
        return name.encode(errors="replace").decode()

    def by_class(self, order: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " m"]]:
        """Split indices that are ordered by class into one piece for each class."""
        return np.split(order, np.cumsum(np.bincount(self.labels, minlength=len(self.classes)))[:-1])

    @property
    def majority_accuracy(self) -> float:
        """Accuracy of always guessing the most frequent class."""
        return float(np.bincount(self.labels).max() / len(self.labels))


def labelled(images: ImageList) -> LabelledSet:
    """Read the labels a data set gives, or those of class folders.

    Raises:
        MapetError: there are none, and the images do not lie in two or more class folders.
    """
    found = images.classes()
    if found is not None:
        return LabelledSet(images, *found)
    stray = [i for i in range(len(images)) if b"/" not in images.ids[i]]
    instead = (
        "" if len(stray) == len(images) else f"{images.id(stray[0])!r} lies in none" if stray else "they all lie in one"
    )
    raise MapetError(
        f"{images.root} has no labels: expected every image in one of two or more class folders, CLASS/image.jpg"
        f"{instead and f', but {instead}'}"
    )


def unlabelled(images: ImageList) -> LabelledSet:
    """Take images without classes."""
    return LabelledSet(images, [], np.zeros(len(images), np.int64))


def train_and_test(train: str | Path, test: str | Path | None) -> tuple[LabelledSet, LabelledSet]:
    """Open two labelled sets, or one split by image id, the same way every time.

    Raises:
        MapetError: no labels, or other classes in the two sets.
    """
    images = [scan(source) for source in (train, test) if source is not None]  # both exist, before labels are needed
    everything, *others = map(labelled, images)
    if not others:
        return split(everything)
    if others[0].classes != everything.classes:
        odd = sorted(set(others[0].classes) ^ set(everything.classes))
        raise MapetError(
            f"{train} and {test} have different classes: {', '.join(odd[:5])} {'...' if len(odd) > 5 else ''}"
        )
    return everything, others[0]


def split(everything: LabelledSet) -> tuple[LabelledSet, LabelledSet]:
    """Split into training and test set: see `held_out`."""
    test = held_out(everything)
    return everything.subset(np.flatnonzero(~test)), everything.subset(np.flatnonzero(test))


def held_out(everything: LabelledSet) -> Bool[np.ndarray, " n"]:
    """Hold out `HELD_OUT` of each class, chosen by a hash of the image id.

    Raises:
        MapetError: no class has a second image.
    """
    test = np.zeros(len(everything.labels), dtype=bool)
    order = np.lexsort((everything.images.keys(), everything.labels))  # by class, then by key
    for members in everything.by_class(order):
        test[members[: max(1, round(HELD_OUT * len(members)))]] = True
    if test.all():
        raise MapetError(
            f"{everything.images.root}: no class has a second image, so that none can be held out for the test; give {option('test_images')}"
        )
    return test


def normalize(
    images: UInt8[Tensor, "B C H W"],
    channels: int,
    jitter: Float[Tensor, "B 3"] | None = None,
    mean_std: MeanStd | None = None,
) -> Float[Tensor, "B C H W"]:
    """Turn uint8 pixels into a model's input: colour jitter if given, [0, 1], then each channel's mean and standard deviation.

    Args:
        mean_std: those of each channel; None takes mapet's own, `input_mean_std`.
    """
    stats = mean_std or input_mean_std(channels)
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in stats)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    if jitter is not None:
        pixels = color_jitter(pixels, jitter.to(pixels.device, non_blocking=True))
    return pixels.div_(255).sub_(mean).div_(std)


def pool_tokens(
    patches: Float[Tensor, "B N D"], class_token: Float[Tensor, "B D"] | None, pool: Pool
) -> Float[Tensor, "B F"]:
    """Pool an image's tokens: the mean of its patches ('avg'), the class token ('token'), or the two concatenated ('both').

    Raises:
        MapetError: there is no class token.
    """
    if pool == "avg":
        return patches.mean(dim=1)
    if class_token is None:
        raise MapetError(f"the backbone has no class token in its layers: use {option('pool')} avg")
    return class_token if pool == "token" else torch.cat([class_token, patches.mean(dim=1)], 1)


def must_be_finite_features(features: Tensor, whose: str = "the backbone") -> None:
    """Raise MapetError for numbers that nothing can be learned from, and that no classifier takes."""
    if not bool(features.isfinite().all()):
        raise MapetError(
            f"{whose} gives features that are not finite: try {option('precision')} float32. If that changes nothing its weights are "
            "broken, by a training that diverged perhaps: train again with a lower learning rate"
        )


def centred_batches(
    images: ImageList,
    image_size: tuple[int, int],
    channels: int,
    batches: list[list[tuple[int, int]]],
    show: str | None = None,
    **dataset: Any,
) -> Iterator[tuple[Int[Tensor, " b"], UInt8[Tensor, "b C H W"]]]:
    """Yield (indices, pixels) of the centred views; unreadable images are left out, up to `MAX_UNREADABLE`.

    Args:
        batches: of (number, index), see `in_order`.
        show: name of the progress bar; None shows none.
        dataset: further arguments of `ViewDataset`, such as `augment`.
    """
    options = {"spec": ViewSpec(image_size=image_size)} | dataset
    views = ViewDataset(images, channels=channels, image_size=image_size, **options)
    quarantine = Quarantine(images, MAX_UNREADABLE)
    for batch in readable_batches(views, batches, quarantine, show):
        assert batch.images is not None
        yield batch.image_index, batch.images
