"""Protocols of places in images: segmentation on frozen feature maps, and detection by a Faster R-CNN on the backbone's last one."""

import contextlib
import importlib.util
import io
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN, anchor_utils
from torchvision.ops import MultiScaleRoIAlign, box_convert

from mapet.data.readers import ImageDecodeError
from mapet.data.views import View, render_view
from mapet.device import num_workers
from mapet.errors import MapetError, install_hint
from mapet.evaluation.datasets import IGNORE_INDEX, DetectionSet, SegmentationSet
from mapet.evaluation.eval_context import EvalContext, MetricValue, ProtocolResult, bootstrap_ci, protocol
from mapet.evaluation.features import BackboneWrapper
from mapet.evaluation.probes import descend

WIDTH = 128
"""Channels of the decoder and of the pyramid."""
HEAD_LEARNING_RATES, HEAD_WEIGHT_DECAY = {"linear": 1e-2, "decoder": 1e-3}, 1e-4
"""AdamW's for the heads of segmentation."""
DETECTOR_LR, DETECTOR_WEIGHT_DECAY = 5e-4, 0.05
"""AdamW's."""
BOX_BATCH_SIZE_PER_IMAGE = 128
"""Proposals of an image that a step learns from: a quarter of torchvision's, for a short training."""
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The first of COCO's metrics, in its order."""


def _at_size(context: EvalContext, copy_weights: bool = False) -> BackboneWrapper:
    """Take the backbone at the largest of the sizes asked for, or at its own."""
    size = max(context.options.eval_image_sizes or [0])
    return context.backbone.with_image_size((size, size) if size else context.backbone.image_size, copy_weights)


class AnnotatedImages(Dataset[Any]):
    """What `read` makes of each image; None in place of an unreadable one.

    Attributes:
        max_batch_size: images a step.
    """

    max_batch_size: int

    def __init__(self, context: EvalContext, backbone: BackboneWrapper, data: Any) -> None:
        self.data, self.size, self.channels = data, backbone.image_size, backbone.channels
        self.options, self.batch_size = context.options, min(context.cache.batch_size, self.max_batch_size)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(index)
        except ImageDecodeError:
            return None

    def read(self, index: int) -> Any:
        """Read an image and what is known of it."""
        raise NotImplementedError

    def batches(self, seed: int | None = None) -> Iterator[list[Any]]:
        """Yield batches of the images that can be read, in the order that a seed draws.

        Raises:
            MapetError: none can be read.
        """
        shuffled, generator = seed is not None, None if seed is None else torch.Generator().manual_seed(seed)
        options = {"shuffle": shuffled, "generator": generator, "num_workers": num_workers(), "collate_fn": list}
        none_read = True
        for batch in DataLoader(self, self.batch_size, **options):  # type: ignore[arg-type]
            if readable := [one for one in batch if one is not None]:
                none_read = False
                yield readable
        if none_read:
            raise MapetError(f"none of the {len(self)} annotated images in {self.data.images.root} can be read")

    def train(
        self, optimizer: torch.optim.Optimizer, compute_loss: Callable[[list[Any]], Tensor], gently: bool = False
    ) -> None:
        """Take a step down the loss of each batch for `dense_epochs`; `gently`: with a warmup and clipped gradients."""

        def losses() -> Iterator[Tensor]:
            for epoch in range(self.options.dense_epochs):
                seed = self.options.seed * 100_003 + epoch
                torch.manual_seed(seed)  # of the detector's samples of anchors and boxes
                for batch in self.batches(seed):
                    if bool((loss := compute_loss(batch)).isfinite()):
                        yield loss

        num_steps = self.options.dense_epochs * math.ceil(len(self) / self.batch_size)
        descend(optimizer, losses(), num_steps, num_steps // 20 if gently else 0, 1.0 if gently else None)


# ---- segmentation


def make_heads(width: int, classes: int) -> dict[str, nn.Module]:
    """Make a linear classifier of standardized patches, and a decoder: two 3 x 3 convolutions, each at twice the size before."""

    def up() -> list[nn.Module]:
        convolution = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        return [nn.Upsample(scale_factor=2, mode="bilinear"), convolution, nn.BatchNorm2d(WIDTH), nn.GELU()]

    linear = nn.Sequential(nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, classes, 1))
    first = nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, WIDTH, 1)
    return {"linear": linear, "decoder": nn.Sequential(*first, *up(), *up(), nn.Conv2d(WIDTH, classes, 1))}


class Scenes(AnnotatedImages):
    """Whole images, stretched to the backbone's size, and the class of each pixel, at the mask's own size."""

    max_batch_size = 16

    def read(self, index: int) -> tuple[UInt8[Tensor, "C H W"], Int[Tensor, "h w"]]:
        picture = self.data.images.open(index, self.channels)
        height, width = picture.size
        whole = View(0, 0, height, width, flip=False)
        return render_view(picture, whole, self.size), torch.from_numpy(self.data.class_map(index))


@protocol("masks")
def segmentation(context: EvalContext) -> ProtocolResult:
    """Measure mIoU, at the masks' own size, of a linear head and of a decoder, trained together on one pass of features."""
    assert context.data.masks is not None
    (train, test), backbone = context.data.masks, _at_size(context)
    heads = _train_heads(context, backbone, train)
    result = ProtocolResult()
    for name, counts in zip(heads, _count_pixels(context, backbone, list(heads.values()), test), strict=True):
        for metric, of in (("miou", mean_iou), ("pixel_accuracy", pixel_accuracy)):
            result.metrics[f"segmentation_{name}_{metric}"] = bootstrap_ci(partial(of, counts), len(counts))
        areas = counts[:, :2].sum(0).astype(int).T.tolist()
        result.per_class[f"segmentation_{name}"] = dict(zip(test.classes, map(tuple, areas), strict=True))
    result.details = {"train_images": len(train), "test_images": len(test), "size": list(backbone.image_size)}
    return result


def mean_iou(counts: Float[np.ndarray, "n 3 K"], weights: Float[np.ndarray, " n"]) -> float:
    """Average over classes the intersection over union, each summed over all images first; classes in no image don't count.

    Args:
        counts: of each image and class the pixels of intersection, union and truth.
        weights: how often each image counts.
    """
    intersection, union, _ = np.tensordot(weights, counts, 1)
    return float((intersection[union > 0] / union[union > 0]).mean()) if union.any() else 0.0


def pixel_accuracy(counts: Float[np.ndarray, "n 3 K"], weights: Float[np.ndarray, " n"]) -> float:
    """Compute the fraction of pixels that are labeled correctly, of those that count."""
    intersection, _, truth = np.tensordot(weights, counts, 1)
    return float(intersection.sum() / max(truth.sum(), 1))


def pixel_counts(predicted: Int[Tensor, "H W"], truth: Int[Tensor, "H W"], classes: int) -> Float[np.ndarray, "3 K"]:
    """Count pixels of intersection, union and truth of each class, where the truth counts."""
    predicted, truth = predicted[truth != IGNORE_INDEX], truth[truth != IGNORE_INDEX]
    parts = truth[truth == predicted], predicted, truth
    hits, guessed, true = (torch.bincount(part, minlength=classes).double().numpy() for part in parts)
    return np.stack([hits, guessed + true - hits, true])


def _train_heads(context: EvalContext, backbone: BackboneWrapper, data: SegmentationSet) -> dict[str, nn.Module]:
    """Train both heads, on masks at the backbone's size."""
    size, compute = backbone.image_size, backbone.compute
    torch.manual_seed(context.options.seed)
    heads = make_heads(backbone.map_shape[0], len(data.classes))
    groups = [
        {"params": list(head.to(compute.device).train().parameters()), "lr": HEAD_LEARNING_RATES[name]}
        for name, head in heads.items()
    ]

    def compute_loss(batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        features = backbone.last_layer(torch.stack([pixels for pixels, _ in batch])).clone()  # out of inference mode
        resized = [F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0] for _, mask in batch]
        masks = compute.to(torch.stack(resized).long())
        logits = [F.interpolate(head(features), size, mode="bilinear") for head in heads.values()]
        return torch.stack([F.cross_entropy(each, masks, ignore_index=IGNORE_INDEX) for each in logits]).sum()

    optimizer = torch.optim.AdamW(groups, weight_decay=HEAD_WEIGHT_DECAY)
    Scenes(context, backbone, data).train(optimizer, compute_loss)
    return {name: head.eval() for name, head in heads.items()}


@torch.inference_mode()
def _count_pixels(
    context: EvalContext, backbone: BackboneWrapper, heads: list[nn.Module], data: SegmentationSet
) -> list[Float[np.ndarray, "n 3 K"]]:
    """Compute `pixel_counts` of every test image, for each head."""
    found: list[list[np.ndarray]] = [[] for _ in heads]
    for batch in Scenes(context, backbone, data).batches():
        features = backbone.last_layer(torch.stack([pixels for pixels, _ in batch]))
        for head, counts in zip(heads, found, strict=True):
            for logits, (_, truth) in zip(head(features), batch, strict=True):
                full = F.interpolate(logits[None], truth.shape, mode="bilinear")
                counts.append(pixel_counts(full[0].argmax(0).cpu(), truth, len(data.classes)))
    return [np.stack(counts) for counts in found]


# ---- detection


class SimpleFeaturePyramid(nn.Module):
    """Four maps, 4, 2, 1 and 1/2 times as fine as the backbone's last one, all made from that (ViTDet, arXiv 2203.16527)."""

    def __init__(self, backbone: BackboneWrapper, trained: bool) -> None:
        super().__init__()
        self.backbone, self.model, self.trained = backbone, backbone.model.requires_grad_(trained), trained
        self.out_channels, width = WIDTH, backbone.map_shape[0]

        def up(depth: int) -> nn.Module:
            return nn.ConvTranspose2d(depth, WIDTH, 2, stride=2)

        def smooth() -> nn.Module:
            convolution = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
            return nn.Sequential(nn.GroupNorm(1, WIDTH), convolution, nn.GroupNorm(1, WIDTH))

        finest = nn.Sequential(up(width), nn.GroupNorm(1, WIDTH), nn.GELU(), up(WIDTH))
        fine, same = up(width), nn.Conv2d(width, WIDTH, 1)
        coarse = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(width, WIDTH, 1))
        self.scales = nn.ModuleList([finest, fine, same, coarse])
        self.smooth = nn.ModuleList([smooth() for _ in self.scales])

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


def make_detector(backbone: BackboneWrapper, classes: int, trained: bool) -> FasterRCNN:
    """Build a Faster R-CNN whose anchors are 8 cells of each map wide, as usual."""
    height, width = backbone.image_size
    cell = height / backbone.map_shape[1]
    torch.manual_seed(0)
    sizes = tuple((max(1, round(8 * cell * scale)),) for scale in (0.25, 0.5, 1, 2))
    return FasterRCNN(
        SimpleFeaturePyramid(backbone, trained), classes + 1,  # 0 is the background
        image_mean=list(backbone.mean), image_std=list(backbone.std),
        min_size=min(height, width), max_size=max(height, width), fixed_size=(width, height), size_divisible=1,
        rpn_anchor_generator=anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_batch_size_per_image=BOX_BATCH_SIZE_PER_IMAGE,
        box_roi_pool=MultiScaleRoIAlign([str(index) for index in range(len(sizes))], output_size=7, sampling_ratio=2),
    ).to(backbone.compute.device)  # fmt: skip


@protocol("annotations", expensive=True)
def detection(context: EvalContext, trained: bool = False) -> ProtocolResult:
    """Measure COCO's AP of boxes after a short training of the detector on the frozen backbone.

    Args:
        trained: train a copy of the backbone, too.

    Raises:
        MapetError: pycocotools is not installed.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise MapetError(f"protocol 'detection' needs pycocotools: {install_hint('detection')}")
    assert context.data.boxes is not None
    (train, test), backbone = context.data.boxes, _at_size(context, copy_weights=True)
    detector = make_detector(backbone, len(train.classes), trained)
    _train_detector(context, detector, backbone, train)
    boxes = _detect(context, detector, backbone, test)
    prefix, over = "detection_finetune" if trained else "detection", f"{len(test):,} images"
    return ProtocolResult(
        {f"{prefix}_{name}": MetricValue(value, over=over) for name, value in coco_metrics(test, boxes).items()},
        details={"train_images": len(train), "boxes_found": len(boxes), "size": list(backbone.image_size)},
    )


@protocol("annotations", expensive=True)
def detection_finetune(context: EvalContext) -> ProtocolResult:
    """Measure COCO's AP of boxes where the backbone is trained with the detector."""
    return detection(context, trained=True)


class Pictures(AnnotatedImages):
    """Indices and whole images at their own size."""

    max_batch_size = 8

    def read(self, index: int) -> tuple[int, UInt8[Tensor, "C H W"]]:
        return index, self.data.images.open(index, self.channels).read()


def _train_detector(context: EvalContext, detector: nn.Module, backbone: BackboneWrapper, data: DetectionSet) -> None:
    to = backbone.compute.to
    detector.train()

    def compute_loss(batch: list[tuple[int, Tensor]]) -> Tensor:
        targets = [
            {"boxes": to(torch.from_numpy(data.boxes[i]).float()), "labels": to(torch.from_numpy(data.labels[i]) + 1)}
            for i, _ in batch
        ]
        return torch.stack(list(detector([to(pixels).float() / 255 for _, pixels in batch], targets).values())).sum()

    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, DETECTOR_LR, weight_decay=DETECTOR_WEIGHT_DECAY)
    Pictures(context, backbone, data).train(optimizer, compute_loss, gently=True)


@torch.inference_mode()
def _detect(
    context: EvalContext, detector: nn.Module, backbone: BackboneWrapper, data: DetectionSet
) -> list[dict[str, Any]]:
    """Find boxes, in COCO's format of results."""
    detector.eval()
    found = []
    for batch in Pictures(context, backbone, data).batches():
        results = detector([backbone.compute.to(pixels).float() / 255 for _, pixels in batch])
        for (index, _), result in zip(batch, results, strict=True):
            boxes = box_convert(result["boxes"].double().cpu(), "xyxy", "xywh").tolist()
            for box, label, score in zip(boxes, result["labels"].tolist(), result["scores"].tolist(), strict=True):
                image, category = data.image_ids[index], data.category_ids[label - 1]
                found.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    return found


def coco_metrics(data: DetectionSet, boxes: list[dict[str, Any]]) -> dict[str, float]:
    """Compute COCO's own metrics of boxes found in these images; those of sizes that no box has are left out."""
    if not boxes:
        return dict.fromkeys(COCO_METRICS[:3], 0.0)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        truth = COCO()
        truth.dataset = {"info": {}} | data.record
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(boxes), "bbox")
        evaluation.params.imgIds = data.image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(COCO_METRICS, evaluation.stats, strict=False) if value >= 0}
