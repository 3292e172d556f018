"""Semantic segmentation on frozen feature maps: a linear head and a small decoder, mIoU at the masks' own size."""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mapet.data.readers import BadImage
from mapet.data.views import View, render
from mapet.device import num_workers
from mapet.errors import MapetError
from mapet.evaluation.annotations import IGNORE_INDEX, SegmentationSet
from mapet.evaluation.backbone_wrapper import BackboneWrapper
from mapet.evaluation.eval_context import EvalContext, ProtocolResult
from mapet.evaluation.intervals import bootstrap
from mapet.evaluation.probes import descend

LEARNING_RATES = {"linear": 1e-2, "decoder": 1e-3}
"""AdamW's."""
WEIGHT_DECAY, WIDTH, MAX_BATCH = 1e-4, 128, 16
"""AdamW's; channels of the decoder; images a step."""


class LinearHead(nn.Sequential):
    """Standardised features and a 1 x 1 convolution: one linear classifier of patches."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, classes, 1))


class Decoder(nn.Sequential):
    """Two 3 x 3 convolutions, each at twice the size of the one before."""

    def __init__(self, width: int, classes: int) -> None:
        parts: list[nn.Module] = [nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, WIDTH, 1)]
        for _ in range(2):
            parts += [
                nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
                nn.BatchNorm2d(WIDTH), nn.GELU(),
            ]  # fmt: skip
        super().__init__(*parts, nn.Conv2d(WIDTH, classes, 1))


class SegmentationDataset(Dataset[tuple[Tensor, Tensor] | None]):
    """Whole images, stretched to the backbone's size, and class indices: at that size for training, else at the masks' own.

    None in place of an unreadable image.
    """

    def __init__(self, data: SegmentationSet, backbone: BackboneWrapper, training: bool) -> None:
        self.data, self.size, self.channels, self.training = data, backbone.image_size, backbone.channels, training

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "C H W"], Int[Tensor, "h w"]] | None:
        try:
            picture = self.data.images.open(index, self.channels)
            pixels = render(picture, View(0, 0, *picture.size, False), self.size)
        except BadImage:
            return None
        mask = torch.from_numpy(self.data.class_map(index))
        if self.training:
            mask = F.interpolate(mask[None, None].float(), self.size, mode="nearest-exact")[0, 0].long()
        return pixels, mask


def segmentation(context: EvalContext) -> ProtocolResult:
    """Measure mIoU of the linear head and of the decoder, trained together on one pass of features."""
    assert context.data.masks is not None
    train, test = context.data.masks
    size = max(context.options.eval_image_sizes or [0])
    backbone = context.backbone.with_image_size((size, size)) if size else context.backbone
    heads = _train(context, backbone, train)
    result = ProtocolResult()
    for name, counts in zip(heads, _count_pixels(context, backbone, list(heads.values()), test), strict=True):
        for metric, of in (("miou", mean_iou), ("pixel_accuracy", pixel_accuracy)):
            result.metrics[f"segmentation_{name}_{metric}"] = bootstrap(partial(of, counts), len(counts))
        intersections, unions = counts[:, 0].sum(0), counts[:, 1].sum(0)
        result.per_class[f"segmentation_{name}"] = {
            label: (int(i), int(u)) for label, i, u in zip(test.classes, intersections, unions, strict=True)
        }
    result.details = {"train_images": len(train), "test_images": len(test), "size": list(backbone.image_size)}
    return result


def mean_iou(counts: Float[np.ndarray, "n 3 K"], weights: Float[np.ndarray, " n"] | None = None) -> float:
    """Average over classes the intersection over union, each summed over all images first; classes in no image don't count.

    Args:
        counts: of each image and class the pixels of intersection, union and truth.
        weights: how often each image counts.
    """
    total = np.tensordot(np.ones(len(counts)) if weights is None else weights, counts, 1)
    present = total[1] > 0
    return float((total[0][present] / total[1][present]).mean()) if present.any() else 0.0


def pixel_accuracy(counts: Float[np.ndarray, "n 3 K"], weights: Float[np.ndarray, " n"] | None = None) -> float:
    """Compute the fraction of pixels that are labelled correctly, of those that count."""
    total = np.tensordot(np.ones(len(counts)) if weights is None else weights, counts, 1)
    return float(total[0].sum() / max(total[2].sum(), 1))


def pixel_counts(predicted: Int[Tensor, "H W"], truth: Int[Tensor, "H W"], classes: int) -> Float[np.ndarray, "3 K"]:
    """Count pixels of intersection, union and truth of each class, where the truth counts."""
    counted = truth != IGNORE_INDEX
    predicted, truth = predicted[counted], truth[counted]
    hits, guessed, true = (
        torch.bincount(part, minlength=classes).double().numpy()
        for part in (truth[truth == predicted], predicted, truth)
    )
    return np.stack([hits, guessed + true - hits, true])


def _train(context: EvalContext, backbone: BackboneWrapper, data: SegmentationSet) -> dict[str, nn.Module]:
    """Train both heads.

    Raises:
        MapetError: no image can be read.
    """
    epochs, seed, width = context.options.dense_epochs, context.options.seed, backbone.map_shape[0]
    torch.manual_seed(seed)
    heads: dict[str, nn.Module] = {
        "linear": LinearHead(width, len(data.classes)), "decoder": Decoder(width, len(data.classes)),
    }  # fmt: skip
    groups = [
        {"params": list(head.to(context.compute.device).train().parameters()), "lr": LEARNING_RATES[name]}
        for name, head in heads.items()
    ]
    num_batches = 0

    def losses() -> Iterator[Tensor]:
        nonlocal num_batches
        for epoch in range(epochs):
            for pixels, truths in _batches(context, backbone, data, seed * 100_003 + epoch):
                num_batches += 1
                features = backbone.last_layer(pixels).clone()  # of inference mode no gradients can be taken
                masks = context.compute.to(torch.stack(truths))
                if not bool((masks == IGNORE_INDEX).all()):
                    logits = [F.interpolate(h(features), backbone.image_size, mode="bilinear") for h in heads.values()]
                    yield torch.stack([F.cross_entropy(own, masks, ignore_index=IGNORE_INDEX) for own in logits]).sum()

    num_steps = epochs * math.ceil(len(data) / min(context.cache.batch_size, MAX_BATCH))
    descend(torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY), losses(), num_steps)
    if not num_batches:
        raise MapetError(f"none of the {len(data)} images with masks in {data.images.root} can be read")
    return {name: head.eval() for name, head in heads.items()}


@torch.inference_mode()
def _count_pixels(
    context: EvalContext, backbone: BackboneWrapper, heads: list[nn.Module], data: SegmentationSet
) -> list[Float[np.ndarray, "n 3 K"]]:
    """Compute `pixel_counts` of every test image, for each head."""
    found: list[list[np.ndarray]] = [[] for _ in heads]
    for pixels, truths in _batches(context, backbone, data):
        features = backbone.last_layer(pixels)
        for head, counts in zip(heads, found, strict=True):
            for logits, truth in zip(head(features), truths, strict=True):
                full = F.interpolate(logits[None], truth.shape, mode="bilinear")
                counts.append(pixel_counts(full[0].argmax(0).cpu(), truth, len(data.classes)))
    return [np.stack(counts) for counts in found]


def _batches(
    context: EvalContext, backbone: BackboneWrapper, data: SegmentationSet, seed: int | None = None
) -> Iterator[tuple[UInt8[Tensor, "B C H W"], list[Tensor]]]:
    """Yield images and masks; with a seed those of training, in the order that it draws."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    loader = DataLoader(
        SegmentationDataset(data, backbone, training=seed is not None), min(context.cache.batch_size, MAX_BATCH),
        shuffle=seed is not None, generator=generator, num_workers=num_workers(), collate_fn=list,
    )  # fmt: skip
    for batch in loader:
        if pairs := [pair for pair in batch if pair is not None]:
            yield torch.stack([pixels for pixels, _ in pairs]), [mask for _, mask in pairs]
