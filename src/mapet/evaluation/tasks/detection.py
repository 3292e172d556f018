"""Detection: torchvision's Faster R-CNN on the backbone's last feature map, through ViTDet's simple pyramid."""

import contextlib
import io
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from mapet.data.readers.base import BadImage
from mapet.errors import MapetError, how_to_install
from mapet.evaluation.annotated.coco import CocoSet
from mapet.evaluation.bench import Bench, Outcome
from mapet.evaluation.encoder import Encoder
from mapet.evaluation.intervals import Figure

WIDTH, LR, WEIGHT_DECAY, MOST_AT_ONCE = 128, 5e-4, 0.05, 8
"""Channels of the pyramid; AdamW's; images a step."""
BOXES = 128
"""Proposals of an image that a step learns from: a quarter of torchvision's, for a short training."""
MEASURES = ("mAP", "mAP 50", "mAP 75", "mAP small", "mAP medium", "mAP large")
"""The first of COCO's figures, in its order."""


class Pyramid(nn.Module):
    """Four maps, 4, 2, 1 and 1/2 times as fine as the backbone's last one, all made from that (ViTDet, arXiv 2203.16527)."""

    def __init__(self, encoder: Encoder, width: int, trained: bool) -> None:
        super().__init__()
        self.encoder, self.model, self.trained = encoder, encoder.model.requires_grad_(trained), trained
        self.out_channels = WIDTH

        def up(depth: int, out: int) -> nn.Module:
            return nn.ConvTranspose2d(depth, out, 2, stride=2)

        self.scales = nn.ModuleList(
            [
                nn.Sequential(up(width, WIDTH), nn.GroupNorm(1, WIDTH), nn.GELU(), up(WIDTH, WIDTH)),
                up(width, WIDTH),
                nn.Conv2d(width, WIDTH, 1),
                nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(width, WIDTH, 1)),
            ]
        )
        self.smooth = nn.ModuleList(
            [
                nn.Sequential(nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(1, WIDTH))
                for _ in range(4)
            ]
        )

    def train(self, mode: bool = True) -> "Pyramid":
        """A frozen backbone stays as it is in use."""
        super().train(mode)
        if not self.trained:
            self.model.eval()
        return self

    def forward(self, images: Float[Tensor, "B C H W"]) -> "OrderedDict[str, Tensor]":
        with contextlib.nullcontext() if self.trained else torch.no_grad():
            features = self.encoder.maps(images, [self.encoder.num_layers])[0][0].float()
        maps = [smooth(scale(features)) for scale, smooth in zip(self.scales, self.smooth, strict=True)]
        return OrderedDict((str(number), one) for number, one in enumerate(maps))


class BoxedImages(Dataset[tuple[int, Tensor] | None]):
    """(index, (C, H, W) uint8 pixels) of whole images at their own size; None for unreadable ones."""

    def __init__(self, data: CocoSet, channels: int) -> None:
        self.data, self.channels = data, channels

    def __len__(self) -> int:
        return len(self.data.image_ids)

    def __getitem__(self, index: int) -> tuple[int, Tensor] | None:
        try:
            return index, self.data.images.open(index, self.channels).read()
        except BadImage:
            return None


def detection(bench: Bench) -> Outcome:
    """COCO's mAP of boxes after a short training of the detector, the backbone frozen unless asked otherwise.

    Raises:
        MapetError: pycocotools is not installed.
    """
    cocotools = _cocotools()
    assert bench.sets.boxes is not None
    train, test = bench.sets.boxes
    size = bench.options.dense_size
    encoder = bench.encoder.copy_at(size or bench.encoder.image_size)
    detector = make_detector(encoder, len(train.classes), bench.options.detection_train_backbone)
    _fit(bench, detector, encoder, train)
    boxes = _detect(bench, detector, encoder, test)
    found = coco_figures(cocotools, test.record, boxes)
    count = f"{len(test.image_ids):,} images"
    return Outcome(
        {f"detection, {name}": Figure(value, of=count) for name, value in found.items()},
        details={"train_images": len(train.image_ids), "boxes_found": len(boxes), "size": list(encoder.image_size)},
    )


def make_detector(encoder: Encoder, classes: int, train_backbone: bool) -> FasterRCNN:
    """Faster R-CNN whose anchors are 8 cells of each map wide, as usual."""
    with torch.no_grad():
        probe = torch.zeros(1, encoder.channels, *encoder.image_size, device=encoder.compute.device)
        found = encoder.maps(probe, [encoder.num_layers])[0][0]
    cell = encoder.image_size[0] / found.shape[2]
    torch.manual_seed(0)
    names = [str(number) for number in range(4)]
    height, width = encoder.image_size
    return FasterRCNN(
        Pyramid(encoder, found.shape[1], train_backbone),
        classes + 1,  # 0 is the ground
        image_mean=list(encoder.mean),
        image_std=list(encoder.std),
        min_size=min(height, width),
        max_size=max(height, width),
        fixed_size=(width, height),
        size_divisible=1,
        rpn_anchor_generator=AnchorGenerator(
            tuple((max(1, round(8 * cell * scale)),) for scale in (0.25, 0.5, 1, 2)), ((0.5, 1.0, 2.0),) * 4
        ),
        box_batch_size_per_image=BOXES,
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
    ).to(encoder.compute.device)


def _fit(bench: Bench, detector: FasterRCNN, encoder: Encoder, data: CocoSet) -> None:
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=WEIGHT_DECAY)
    epochs = bench.options.detection_epochs
    total, step = epochs * math.ceil(len(data.image_ids) / min(bench.place.batch_size, MOST_AT_ONCE)), 0
    warmup = max(1, total // 20)
    detector.train()
    for epoch in range(epochs):
        torch.manual_seed(bench.options.seed * 100_003 + epoch)  # of the samples of anchors and boxes
        for indices, images in _batches(bench, encoder, data, bench.options.seed * 100_003 + epoch):
            targets = [
                {
                    "boxes": bench.compute.to(torch.from_numpy(data.boxes[i]).float()),
                    "labels": bench.compute.to(torch.from_numpy(data.labels[i]) + 1),
                }
                for i in indices
            ]
            losses = detector(images, targets)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            if bool(loss.isfinite()):
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                share = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
                optimizer.param_groups[0]["lr"] = LR * share
                optimizer.step()
            step += 1


@torch.inference_mode()
def _detect(bench: Bench, detector: FasterRCNN, encoder: Encoder, data: CocoSet) -> list[dict[str, Any]]:
    """Boxes in COCO's format of results."""
    detector.eval()
    found = []
    for indices, images in _batches(bench, encoder, data):
        for index, result in zip(indices, detector(images), strict=True):
            corners = result["boxes"].double().cpu()
            sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
            labels, scores = result["labels"].tolist(), result["scores"].tolist()
            found += [
                {
                    "image_id": data.image_ids[index],
                    "category_id": data.category_ids[k - 1],
                    "bbox": box,
                    "score": score,
                }
                for box, k, score in zip(sides, labels, scores, strict=True)
            ]
    return found


def _batches(
    bench: Bench, encoder: Encoder, data: CocoSet, seed: int | None = None
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Indices and images in [0, 1], on the device; with a seed in the order that it draws."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    loader = DataLoader(
        BoxedImages(data, encoder.channels), min(bench.place.batch_size, MOST_AT_ONCE), shuffle=seed is not None,
        generator=generator, num_workers=bench.place.workers, collate_fn=list,
    )  # fmt: skip
    for batch in loader:
        read = [pair for pair in batch if pair is not None]
        if read:
            yield [index for index, _ in read], [bench.compute.to(pixels).float() / 255 for _, pixels in read]


def coco_figures(cocotools: Any, record: dict[str, Any], boxes: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's own figures of boxes; those of sizes that no box has are left out."""
    if not boxes:
        return dict.fromkeys(MEASURES[:3], 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        truth = cocotools.coco.COCO()
        truth.dataset = {"info": {}} | record
        truth.createIndex()
        judge = cocotools.cocoeval.COCOeval(truth, truth.loadRes(boxes), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: float(value) for name, value in zip(MEASURES, judge.stats, strict=False) if value >= 0}


def _cocotools() -> Any:
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
    except ImportError:
        raise MapetError(
            f"protocol 'detection' reports COCO's own figures by pycocotools: {how_to_install('detection')}"
        ) from None
    return pycocotools
