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
from torchvision.ops import MultiScaleRoIAlign, box_convert

from mapet.data.readers import BadImage
from mapet.device import num_workers
from mapet.errors import MapetError, how_to_install
from mapet.evaluation.annotations import DetectionSet
from mapet.evaluation.backbone_wrapper import BackboneWrapper
from mapet.evaluation.eval_context import EvalContext, ProtocolResult
from mapet.evaluation.intervals import MetricValue
from mapet.evaluation.probes import descend

WIDTH, LR, WEIGHT_DECAY, MAX_BATCH = 128, 5e-4, 0.05, 8
"""Channels of the pyramid; AdamW's; images a step."""
BOX_BATCH_SIZE_PER_IMAGE = 128
"""Proposals of an image that a step learns from: a quarter of torchvision's, for a short training."""
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The first of COCO's metrics, in its order."""


class SimpleFeaturePyramid(nn.Module):
    """Four maps, 4, 2, 1 and 1/2 times as fine as the backbone's last one, all made from that (ViTDet, arXiv 2203.16527)."""

    def __init__(self, backbone: BackboneWrapper, trained: bool) -> None:
        super().__init__()
        self.backbone, self.model, self.trained = backbone, backbone.model.requires_grad_(trained), trained
        self.out_channels, width = WIDTH, backbone.map_shape[0]

        def up(depth: int) -> nn.Module:
            return nn.ConvTranspose2d(depth, WIDTH, 2, stride=2)

        self.scales = nn.ModuleList(
            [
                nn.Sequential(up(width), nn.GroupNorm(1, WIDTH), nn.GELU(), up(WIDTH)),
                up(width),
                nn.Conv2d(width, WIDTH, 1),
                nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(width, WIDTH, 1)),
            ]
        )
        self.smooth = nn.ModuleList(
            [
                nn.Sequential(nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(1, WIDTH))
                for _ in self.scales
            ]
        )

    def train(self, mode: bool = True) -> "SimpleFeaturePyramid":
        """Set the mode; a frozen backbone stays as it is in use."""
        super().train(mode)
        if not self.trained:
            self.model.eval()
        return self

    def forward(self, images: Float[Tensor, "B C H W"]) -> "OrderedDict[str, Tensor]":
        with contextlib.nullcontext() if self.trained else torch.no_grad():
            features = self.backbone.forward_intermediates(images, [self.backbone.num_layers])[0][0].float()
        maps = [smooth(scale(features)) for scale, smooth in zip(self.scales, self.smooth, strict=True)]
        return OrderedDict((str(index), one) for index, one in enumerate(maps))


class DetectionDataset(Dataset[tuple[int, Tensor] | None]):
    """(index, (C, H, W) uint8 pixels) of whole images at their own size; None for unreadable ones."""

    def __init__(self, data: DetectionSet, channels: int) -> None:
        self.data, self.channels = data, channels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Tensor] | None:
        try:
            return index, self.data.images.open(index, self.channels).read()
        except BadImage:
            return None


def detection(context: EvalContext, trained: bool = False) -> ProtocolResult:
    """Measure COCO's AP of boxes after a short training of the detector on the frozen backbone.

    Args:
        trained: train a copy of the backbone, too.

    Raises:
        MapetError: pycocotools is not installed.
    """
    cocotools = _cocotools()
    assert context.data.boxes is not None
    train, test = context.data.boxes
    size = max(context.options.eval_image_sizes or [0])
    backbone = context.backbone.with_image_size(
        (size, size) if size else context.backbone.image_size, copy_weights=True
    )
    detector = make_detector(backbone, len(train.classes), trained)
    _fit(context, detector, backbone, train)
    boxes = _detect(context, detector, backbone, test)
    prefix, over = "detection_finetune" if trained else "detection", f"{len(test):,} images"
    return ProtocolResult(
        {f"{prefix}_{k}": MetricValue(v, over=over) for k, v in coco_metrics(cocotools, test.record, boxes).items()},
        details={"train_images": len(train), "boxes_found": len(boxes), "size": list(backbone.image_size)},
    )


def detection_finetune(context: EvalContext) -> ProtocolResult:
    """Measure COCO's AP of boxes where the backbone is trained with the detector."""
    return detection(context, trained=True)


def make_detector(backbone: BackboneWrapper, classes: int, trained: bool) -> FasterRCNN:
    """Build a Faster R-CNN whose anchors are 8 cells of each map wide, as usual."""
    height, width = backbone.image_size
    cell = height / backbone.map_shape[1]
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(backbone, trained)
    sizes = tuple((max(1, round(8 * cell * scale)),) for scale in (0.25, 0.5, 1, 2))
    names = [str(index) for index in range(len(sizes))]
    return FasterRCNN(
        pyramid,
        classes + 1,  # 0 is the background
        image_mean=list(backbone.mean),
        image_std=list(backbone.std),
        min_size=min(height, width),
        max_size=max(height, width),
        fixed_size=(width, height),
        size_divisible=1,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_batch_size_per_image=BOX_BATCH_SIZE_PER_IMAGE,
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
    ).to(backbone.compute.device)


def _fit(context: EvalContext, detector: FasterRCNN, backbone: BackboneWrapper, data: DetectionSet) -> None:
    epochs, seed, to = context.options.dense_epochs, context.options.seed, context.compute.to
    detector.train()

    def losses() -> Iterator[Tensor]:
        for epoch in range(epochs):
            torch.manual_seed(seed * 100_003 + epoch)  # of the samples of anchors and boxes
            for indices, images in _batches(context, backbone, data, seed * 100_003 + epoch):
                boxes = [to(torch.from_numpy(data.boxes[i]).float()) for i in indices]
                labels = [to(torch.from_numpy(data.labels[i]) + 1) for i in indices]
                targets = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
                loss = torch.stack(list(detector(images, targets).values())).sum()
                if bool(loss.isfinite()):
                    yield loss

    num_steps = epochs * math.ceil(len(data) / min(context.cache.batch_size, MAX_BATCH))
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=WEIGHT_DECAY)
    descend(optimizer, losses(), num_steps, max(1, num_steps // 20), clip_grad=1.0)


@torch.inference_mode()
def _detect(
    context: EvalContext, detector: FasterRCNN, backbone: BackboneWrapper, data: DetectionSet
) -> list[dict[str, Any]]:
    """Find boxes, in COCO's format of results."""
    detector.eval()
    found = []
    for indices, images in _batches(context, backbone, data):
        for index, result in zip(indices, detector(images), strict=True):
            boxes = box_convert(result["boxes"].double().cpu(), "xyxy", "xywh").tolist()
            for box, label, score in zip(boxes, result["labels"].tolist(), result["scores"].tolist(), strict=True):
                image, category = data.image_ids[index], data.category_ids[label - 1]
                found.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    return found


def _batches(
    context: EvalContext, backbone: BackboneWrapper, data: DetectionSet, seed: int | None = None
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield indices and images in [0, 1], on the device; with a seed in the order that it draws."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    loader = DataLoader(
        DetectionDataset(data, backbone.channels), min(context.cache.batch_size, MAX_BATCH), shuffle=seed is not None,
        generator=generator, num_workers=num_workers(), collate_fn=list,
    )  # fmt: skip
    for batch in loader:
        if pairs := [pair for pair in batch if pair is not None]:
            yield [index for index, _ in pairs], [context.compute.to(pixels).float() / 255 for _, pixels in pairs]


def coco_metrics(cocotools: Any, record: dict[str, Any], boxes: list[dict[str, Any]]) -> dict[str, float]:
    """Compute COCO's own metrics of boxes; those of sizes that no box has are left out."""
    if not boxes:
        return dict.fromkeys(COCO_METRICS[:3], 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        truth = cocotools.coco.COCO()
        truth.dataset = {"info": {}} | record
        truth.createIndex()
        evaluation = cocotools.cocoeval.COCOeval(truth, truth.loadRes(boxes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(COCO_METRICS, evaluation.stats, strict=False) if value >= 0}


def _cocotools() -> Any:
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
    except ImportError:
        raise MapetError(
            f"protocol 'detection' reports COCO's own metrics by pycocotools: {how_to_install('detection')}"
        ) from None
    return pycocotools
