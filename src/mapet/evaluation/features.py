"""Frozen features of a labelled set of images, and the labels to judge them by."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from mapet.data.dataset import Quarantine, ViewDataset, in_order, make_loader
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.data.views import ViewSpec, color_jitter
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.models.adapt import input_mean_std

Pool = Literal["avg", "token"]


@dataclass
class LabelledSet:
    """Images with the class of each.

    Attributes:
        classes: names; `labels` are indices into them.
    """

    images: ImageList
    classes: list[str]
    labels: Int[np.ndarray, " n"]

    def subset(self, indices: Int[np.ndarray, " m"]) -> "LabelledSet":
        return LabelledSet(self.images.subset(indices), self.classes, self.labels[indices])

    def title(self, index: int) -> str:
        """What to write over an image: its class, without labels the name of its file."""
        name = self.classes[self.labels[index]] if self.classes else Path(self.images.id(index)).stem
        return name.encode(errors="replace").decode()

    def by_class(self, order: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " m"]]:
        """Indices, ordered by class, in one piece for each class."""
        return np.split(order, np.cumsum(np.bincount(self.labels, minlength=len(self.classes)))[:-1])


def labelled(images: ImageList) -> LabelledSet:
    """Labels the data set gives, or from class folders.

    Raises:
        MapetError: there are none, and the images do not lie in two or more class folders.
    """
    found = images.classes()
    if found is None:
        stray = [i for i in range(len(images)) if b"/" not in images.id_bytes(i)]
        found_instead = (
            "they all lie in one"
            if not stray
            else f"{images.id(stray[0])!r} lies in none"
            if len(stray) < len(images)
            else ""
        )
        raise MapetError(
            f"{images.root} has no labels: expected every image in one of two or more class folders, CLASS/image.jpg"
            f"{found_instead and f', but {found_instead}'}"
        )
    return LabelledSet(images, *found)


def train_and_test(
    train: str | Path, test: str | Path | None, test_share: float = 0.2
) -> tuple[LabelledSet, LabelledSet]:
    """Two labelled sets, or one split by image id, the same way every time."""
    images = [
        scan(source) for source in (train, test) if source is not None
    ]  # both are there, before labels are asked for
    everything, *others = map(labelled, images)
    if test is None:
        return split(everything, test_share)
    (other,) = others
    if other.classes != everything.classes:
        odd = sorted(set(other.classes) ^ set(everything.classes))
        raise MapetError(
            f"{train} and {test} have different classes: {', '.join(odd[:5])} {'...' if len(odd) > 5 else ''}"
        )
    return everything, other


def split(everything: LabelledSet, test_share: float = 0.2) -> tuple[LabelledSet, LabelledSet]:
    """Training and test set: see `held_out`."""
    test = held_out(everything, test_share)
    return everything.subset(np.flatnonzero(~test)), everything.subset(np.flatnonzero(test))


def unlabelled(images: ImageList) -> LabelledSet:
    """Images without classes; all labels are 0."""
    return LabelledSet(images, [], np.zeros(len(images), np.int64))


def held_out(everything: LabelledSet, test_share: float = 0.2) -> Bool[np.ndarray, " n"]:
    """A fixed share of each class, chosen by a hash of the image id, is for testing."""
    test = np.zeros(len(everything.labels), dtype=bool)
    order = np.lexsort((everything.images.keys(), everything.labels))  # by class, then by key
    for members in everything.by_class(order):
        test[members[: max(1, round(test_share * len(members)))]] = True
    if test.all():
        raise MapetError(
            f"{everything.images.root}: no class has a second image, so that none can be held out for the test; give --test-images"
        )
    return test


def normalize(
    images: UInt8[Tensor, "B C H W"], channels: int, jitter: Float[Tensor, "B 3"] | None = None
) -> Float[Tensor, "B C H W"]:
    """uint8 pixels -> the model's input: colour jitter if given, [0, 1], then each channel's mean and standard deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in input_mean_std(channels))
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    if jitter is not None:
        pixels = color_jitter(pixels, jitter.to(pixels.device, non_blocking=True))
    return pixels.div_(255).sub_(mean).div_(std)


def pool_tokens(vit: VisionTransformer, tokens: Float[Tensor, "B T D"], pool: Pool) -> Float[Tensor, "B D"]:
    """The mean of the patch tokens ('avg') or the class token ('token')."""
    if pool == "token":
        if not vit.has_class_token:
            raise MapetError("this ViT has no class token: use --pool avg")
        return tokens[:, 0]
    return tokens[:, vit.num_prefix_tokens :].mean(dim=1)


def must_be_finite_features(features: Tensor, whose: str = "the backbone") -> None:
    """Raises MapetError for numbers that nothing can be learned from, and that no classifier takes."""
    if not bool(features.isfinite().all()):
        raise MapetError(
            f"{whose} gives features that are not finite: try --precision float32. If that changes nothing its weights are "
            "broken, by a training that diverged perhaps: train again with a lower learning rate"
        )


def centred_batches(
    images: ImageList,
    image_size: tuple[int, int],
    channels: int,
    batches: list[list[tuple[int, int]]],
    workers: int = 0,
    show: str | None = None,
    **dataset: Any,
) -> Iterator[tuple[Int[Tensor, " b"], UInt8[Tensor, "b C H W"]]]:
    """(indices, pixels) of the centred views; unreadable images are left out, up to half of all.

    Args:
        batches: of (number, index), see `in_order`.
        show: name of the progress bar; None shows none.
        dataset: further arguments of `ViewDataset`, such as `augment`.
    """
    options = {"spec": ViewSpec(image_size=image_size)} | dataset
    views = ViewDataset(images, channels=channels, image_size=image_size, **options)
    quarantine = Quarantine(images, max_unreadable=0.5)
    loader = make_loader(views, batches, workers)
    for batch in tqdm(loader, desc=show, unit="batch", disable=None if show else True, leave=False):
        quarantine.add(batch.bad)
        if batch.images is not None:
            yield batch.image_index, batch.images


@torch.inference_mode()
def extract_features(
    vit: VisionTransformer,
    data: LabelledSet,
    compute: Compute,
    pool: Pool = "avg",
    batch_size: int = 128,
    workers: int = 0,
    show: bool = True,
) -> tuple[Float[Tensor, "n D"], Int[Tensor, " n"]]:
    """Pooled features of the centred views, in float32 on the CPU, with labels. Unreadable images are left out.

    Raises:
        MapetError: features that are not finite.
    """
    training = vit.training
    vit.eval()
    height, width = vit.patch_embed.img_size
    features, index = [], []
    order = in_order(len(data.images), batch_size)
    for indices, images in centred_batches(
        data.images, (height, width), vit.in_chans, order, workers, "features" if show else None
    ):
        with compute.autocast():
            tokens = vit.forward_features(normalize(compute.to(images), vit.in_chans))
        features.append(pool_tokens(vit, tokens, pool).float().cpu())
        must_be_finite_features(features[-1])
        index.append(indices)
    vit.train(training)
    return torch.cat(features), torch.from_numpy(data.labels)[torch.cat(index)]
