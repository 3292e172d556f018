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

from mapet.data.readers.base import BadImage
from mapet.data.views import View, render
from mapet.errors import MapetError
from mapet.evaluation.annotated.masks import NOWHERE, MaskedSet
from mapet.evaluation.bench import Bench, Outcome
from mapet.evaluation.encoder import Encoder
from mapet.evaluation.intervals import bootstrap

LEARNING_RATES = {"linear": 1e-2, "decoder": 1e-3}
"""AdamW's."""
WEIGHT_DECAY, WIDTH, MOST_AT_ONCE = 1e-4, 128, 16
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


class MaskedImages(Dataset[tuple[Tensor | None, Tensor | None]]):
    """Whole images at the encoder's size, and class indices: at that size for training, else at the masks' own."""

    def __init__(self, data: MaskedSet, encoder: Encoder, training: bool) -> None:
        self.data, self.size, self.channels, self.training = data, encoder.image_size, encoder.channels, training

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "C H W"] | None, Int[Tensor, "h w"] | None]:
        pixels = whole_image(self.data, index, self.channels, self.size)
        if pixels is None:
            return None, None
        mask = torch.from_numpy(self.data.classes_of(index))
        if self.training:
            mask = F.interpolate(mask[None, None].float(), self.size, mode="nearest-exact")[0, 0].long()
        return pixels, mask


def whole_image(data: MaskedSet, index: int, channels: int, size: tuple[int, int]) -> UInt8[Tensor, "C H W"] | None:
    """Stretched to `size`, nothing cut off; None for an unreadable one."""
    try:
        picture = data.images.open(index, channels)
        return render(picture, View(0, 0, *picture.size, False), size)
    except BadImage:
        return None


def segmentation(bench: Bench) -> Outcome:
    """mIoU of the linear head and of the decoder, trained together on one pass of features."""
    assert bench.sets.masks is not None
    train, test = bench.sets.masks
    size = bench.options.dense_size
    encoder = bench.encoder if size is None else bench.encoder.at_size(size)
    heads = _train(bench, encoder, train)
    outcome = Outcome()
    for (name, _), counts in zip(heads.items(), _counts(bench, encoder, list(heads.values()), test), strict=True):
        intersections, unions = counts[:, 0].sum(0), counts[:, 1].sum(0)
        for measure, of in (("mIoU", mean_iou), ("pixel accuracy", pixel_accuracy)):
            outcome.figures[f"segmentation, {name}: {measure}"] = bootstrap(partial(of, counts), len(counts))
        outcome.per_class[f"segmentation, {name}"] = {
            label: (int(i), int(u)) for label, i, u in zip(test.classes, intersections, unions, strict=True)
        }
    outcome.details = {"train_images": len(train), "test_images": len(test), "size": list(encoder.image_size)}
    return outcome


def mean_iou(counts: Float[np.ndarray, "n 3 K"], weights: Float[np.ndarray, " n"] | None = None) -> float:
    """Mean over classes of intersection over union, each summed over all images first; classes in no image don't count.

    Args:
        counts: of each image and class the pixels of intersection, union and truth.
        weights: how often each image counts.
    """
    total = np.tensordot(np.ones(len(counts)) if weights is None else weights, counts, 1)
    present = total[1] > 0
    return float((total[0][present] / total[1][present]).mean()) if present.any() else 0.0


def pixel_accuracy(counts: Float[np.ndarray, "n 3 K"], weights: Float[np.ndarray, " n"] | None = None) -> float:
    """Share of pixels that are labelled rightly, of those that count."""
    total = np.tensordot(np.ones(len(counts)) if weights is None else weights, counts, 1)
    return float(total[0].sum() / max(total[2].sum(), 1))


def pixel_counts(predicted: Int[Tensor, "H W"], truth: Int[Tensor, "H W"], classes: int) -> Float[np.ndarray, "3 K"]:
    """Pixels of intersection, union and truth of each class, where the truth is not void."""
    counted = truth != NOWHERE
    predicted, truth = predicted[counted], truth[counted]
    hits, guessed, true = (
        torch.bincount(part, minlength=classes).double().numpy()
        for part in (truth[truth == predicted], predicted, truth)
    )
    return np.stack([hits, guessed + true - hits, true])


def _train(bench: Bench, encoder: Encoder, data: MaskedSet) -> dict[str, nn.Module]:
    heads: dict[str, nn.Module] = {}
    optimizer: torch.optim.Optimizer | None = None
    epochs = bench.options.dense_epochs
    total, step = epochs * math.ceil(len(data) / min(bench.place.batch_size, MOST_AT_ONCE)), 0
    for epoch in range(epochs):
        for pixels, truths in _batches(bench, encoder, data, bench.options.seed * 100_003 + epoch):
            features = encoder.tokens(pixels).clone()  # of inference mode no gradients can be taken
            masks = bench.compute.to(torch.stack(truths))
            if optimizer is None:
                torch.manual_seed(bench.options.seed)
                makers = {"linear": LinearHead, "decoder": Decoder}
                heads = {
                    name: make(features.shape[1], len(data.classes)).to(bench.compute.device)
                    for name, make in makers.items()
                }
                groups = [
                    {"params": list(head.parameters()), "peak": LEARNING_RATES[name]} for name, head in heads.items()
                ]
                optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
            if bool((masks == NOWHERE).all()):
                continue
            loss = torch.zeros((), device=bench.compute.device)
            for head in heads.values():
                logits = F.interpolate(head.train()(features), encoder.image_size, mode="bilinear")
                loss = loss + F.cross_entropy(logits, masks, ignore_index=NOWHERE)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            optimizer.step()
            step += 1
    if not heads:
        raise MapetError(f"none of the {len(data)} images with masks in {data.images.root} can be read")
    return {name: head.eval() for name, head in heads.items()}


@torch.inference_mode()
def _counts(
    bench: Bench, encoder: Encoder, heads: list[nn.Module], data: MaskedSet
) -> list[Float[np.ndarray, "n 3 K"]]:
    """`pixel_counts` of every test image, for each head."""
    found: list[list[np.ndarray]] = [[] for _ in heads]
    for pixels, truths in _batches(bench, encoder, data):
        features = encoder.tokens(pixels)
        for head, kept in zip(heads, found, strict=True):
            for logits, truth in zip(head(features), truths, strict=True):
                full = F.interpolate(logits[None], truth.shape, mode="bilinear")
                kept.append(pixel_counts(full[0].argmax(0).cpu(), truth, len(data.classes)))
    return [np.stack(kept) for kept in found]


def _batches(
    bench: Bench, encoder: Encoder, data: MaskedSet, seed: int | None = None
) -> Iterator[tuple[UInt8[Tensor, "B C H W"], list[Tensor]]]:
    """Images and masks; with a seed those of training, in the order that it draws."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    loader = DataLoader(
        MaskedImages(data, encoder, training=seed is not None), min(bench.place.batch_size, MOST_AT_ONCE),
        shuffle=seed is not None, generator=generator, num_workers=bench.place.workers, collate_fn=list,
    )  # fmt: skip
    for batch in loader:
        pairs = [(pixels, mask) for pixels, mask in batch if pixels is not None and mask is not None]
        if pairs:
            yield torch.stack([pixels for pixels, _ in pairs]), [mask for _, mask in pairs]
