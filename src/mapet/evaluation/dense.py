"""Protocols on feature maps: segmentation on frozen ones, and detection by a Faster R-CNN on the backbone's last one."""

import contextlib
import importlib.util
import io
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, anchor_utils
from torchvision.ops import Conv2dNormActivation, MultiScaleRoIAlign, box_convert

from mapet.data.loader import load
from mapet.data.readers.image import ImageDecodeError
from mapet.data.readers.read_each import read_each
from mapet.data.views import View, render_view
from mapet.errors import MapetError, install_hint
from mapet.evaluation.datasets import IGNORE_INDEX, AnyImageSet, DetectionSet, SegmentationSet
from mapet.evaluation.eval_context import EvalContext, MetricValue, ProtocolResult, bootstrap_ci, protocol
from mapet.evaluation.features import BackboneWrapper
from mapet.evaluation.probes import SEED_STRIDE, minimize

WIDTH = 128
"""Channels of the segmentation decoder and of the detector's pyramid."""
HEAD_LEARNING_RATES, HEAD_WEIGHT_DECAY = {"linear": 1e-2, "decoder": 1e-3}, 1e-4
"""AdamW options of the segmentation heads."""
DETECTOR_LR, DETECTOR_WEIGHT_DECAY = 5e-4, 0.05
"""AdamW options of the detector."""
BOX_BATCH_SIZE_PER_IMAGE = 128
"""Proposals per image that a training step uses: a quarter of torchvision's, for a short training."""
ANCHOR_CELLS, ASPECT_RATIOS, ROI_SIZE = 8, (0.5, 1.0, 2.0), 7
"""Side of an anchor in cells of its map and its aspect ratios, as in FPN; rows and columns that a proposal's features are pooled to."""
PYRAMID_CELLS = (0.25, 0.5, 1, 2)
"""Side of a cell of each map of the pyramid, in patches."""
WARMUP_FRACTION = 0.05
"""Fraction of the detector's steps in which its learning rate rises."""
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The first of COCO's metrics, in its order."""
Item = TypeVar("Item")


def _resize_backbone(context: EvalContext, copy_weights: bool = False) -> BackboneWrapper:
    """Return the context's backbone with square inputs of the largest side in the option `eval_image_sizes`, or at its own size.

    Args:
        context: the backbone, its data and the options of `mapet evaluate`.
        copy_weights: return a copy even if the size is the same, so that its weights may be trained.

    Raises:
        MapetError: the backbone cannot take that size.
    """
    size = max(context.options.eval_image_sizes or [0])
    return context.backbone.with_image_size((size, size) if size else context.backbone.image_size, copy_weights)


class AnnotatedImages(Generic[AnyImageSet, Item]):
    """Batches of annotated images (masks or boxes), read in worker processes, and training on them. Subclasses implement `read`.

    Attributes:
        max_batch_size: largest batch, set by the subclass.
        data: the images and their annotations.
        size: (height, width) of the backbone's input, pixels.
        channels: number of the backbone's input channels.
        options: of `mapet evaluate`; `seed` and `dense_epochs` are used.
        batch_size: images per batch: the smaller of the inference batch size and `max_batch_size`.
    """

    max_batch_size: int

    def __init__(self, context: EvalContext, backbone: BackboneWrapper, data: AnyImageSet) -> None:
        self.data, self.size, self.channels = data, backbone.image_size, backbone.channels
        self.options, self.batch_size = context.options, min(context.cache.batch_size, self.max_batch_size)

    def read(self, index: int) -> Item:
        """Read the item of one image, what a batch holds of it: see the subclass.

        Args:
            index: of the image in `self.data`.

        Raises:
            ImageDecodeError: the image is unreadable; it is skipped then.
            MapetError: an annotation, such as the mask, is unreadable; this ends the command.
        """
        raise NotImplementedError

    def _read_readable(self, indices: Int[Tensor, " B"]) -> list[Item]:
        """Return what `read` returns for each index, without unreadable images."""
        outcomes = read_each(self.read, indices.tolist(), self.data.images.id)
        return [item for item in outcomes if not isinstance(item, ImageDecodeError)]

    def batches(self, seed: int | None = None) -> Iterator[list[Item]]:
        """Yield batches for one epoch: lists of what `read` returns, without unreadable images.

        A batch has at most `self.batch_size` images, fewer where some are unreadable; batches without a readable image are skipped.
        Unreadable images are skipped without a warning, however many they are, unless all are.

        Args:
            seed: of the order of the images; None keeps the order of the data set.

        Raises:
            MapetError: no image is readable, or an annotation, such as a mask, is not.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)

        def index_batches() -> Iterator[Int[Tensor, " B"]]:
            """Yield the images of each batch; the order is drawn after the workers' seeds."""
            order = torch.arange(len(self.data))
            order = order if seed is None else torch.randperm(len(self.data), generator=generator)
            yield from order.split(self.batch_size)

        loader = load(self._read_readable, index_batches(), generator=generator)
        batches = filter(None, loader)  # without empty batches
        first = next(batches, None)
        if first is None:
            raise MapetError(
                f"no annotated image in {self.data.images.root} is readable: `mapet check` lists why; replace the images"
            )
        yield first
        yield from batches

    def train(
        self, optimizer: torch.optim.Optimizer, compute_loss: Callable[[list[Item]], Tensor],
        warmup_fraction: float = 0.0, clip_grad: float | None = None,
    ) -> None:  # fmt: skip
        """Train for `dense_epochs` epochs over shuffled images: an optimizer step per batch, with a cosine learning-rate schedule.

        A batch whose loss is NaN or Inf is skipped.

        Args:
            optimizer: of the parameters to train; its learning rates are the peak of the schedule.
            compute_loss: takes the items of a batch, as `read` returns them, and returns the scalar loss.
            warmup_fraction: fraction of the steps in which the learning rate rises linearly.
            clip_grad: gradient-norm clipping threshold; None: no clipping.

        Raises:
            MapetError: no image is readable, or an annotation is not.
        """

        def losses() -> Iterator[Tensor]:
            """Yield the finite losses, lazily: each is computed after the optimizer step of the one before."""
            for epoch in range(self.options.dense_epochs):
                seed = self.options.seed * SEED_STRIDE + epoch
                torch.manual_seed(seed)  # torchvision's detector samples anchors and boxes with the global generator
                yield from filter(torch.isfinite, map(compute_loss, self.batches(seed)))

        num_steps = self.options.dense_epochs * math.ceil(len(self.data) / self.batch_size)
        minimize(optimizer, losses(), num_steps, int(num_steps * warmup_fraction), clip_grad)


# ---- segmentation

Scene = tuple[UInt8[Tensor, "C H W"], Int[Tensor, "h w"]]
"""An image, stretched to the backbone's size, and the class index of each pixel, at the mask's own size."""


class SegmentationImages(AnnotatedImages[SegmentationSet, Scene]):
    """Whole images and their masks."""

    max_batch_size = 16

    def read(self, index: int) -> Scene:
        """Read an image, whole and stretched to the backbone's input size, and its class map, (h, w) at the mask's own size.

        In the class map, pixels without a class are `IGNORE_INDEX` (-1).

        Raises:
            ImageDecodeError: the image is unreadable.
            MapetError: the mask is unreadable.
        """
        image = self.data.images.open(index, self.channels)
        view = View(0, 0, *image.size, flip=False)
        return render_view(image, view, self.size), torch.from_numpy(self.data.class_map(index))


def make_heads(width: int, num_classes: int) -> nn.ModuleDict:
    """Make the two segmentation heads, which map feature maps (B, width, h, w) to logits.

    Both standardize features first, by a batch norm without scale and shift.

    Args:
        width: channels of the feature map.
        num_classes: number of classes.

    Returns:
        Heads by name. 'linear': a linear classifier of each patch, logits (B, num_classes, h, w). 'decoder': a projection to `WIDTH`
        channels, then twice an upsampling by 2 and a 3 x 3 convolution, logits (B, num_classes, 4 h, 4 w).
    """

    def project(channels: int) -> list[nn.Module]:
        """Return the standardization and a linear map to `channels`."""
        return [nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, channels, 1)]

    def upsample() -> list[nn.Module]:
        """Return layers that double the resolution."""
        convolution = Conv2dNormActivation(WIDTH, WIDTH, 3, activation_layer=nn.GELU, inplace=None)
        return [nn.Upsample(scale_factor=2, mode="bilinear"), convolution]

    linear = nn.Sequential(*project(num_classes))
    decoder = nn.Sequential(*project(WIDTH), *upsample(), *upsample(), nn.Conv2d(WIDTH, num_classes, 1))
    return nn.ModuleDict({"linear": linear, "decoder": decoder})


@protocol("masks")
def segmentation(context: EvalContext) -> ProtocolResult:
    """Measure semantic segmentation by a linear head and a convolutional decoder, both trained on the frozen last layer's feature map.

    Unreadable images are skipped. The input is square with the largest side in the option `eval_image_sizes`, else the backbone's own.

    Args:
        context: the backbone, images with masks and the options of `evaluate`.

    Returns:
        Metrics 'segmentation_HEAD_miou' and 'segmentation_HEAD_pixel_accuracy' for the heads 'linear' and 'decoder', 0 to 1, at the
        masks' own size, with 95 % bootstrap intervals over test images. `per_class['segmentation_HEAD']`: class -> pixels of
        (intersection, union), summed over test images. `details`: 'train_images' and 'test_images', counted with unreadable ones, and
        the input 'size', [height, width] in pixels.

    Raises:
        MapetError: the backbone cannot take the size, no image of a set is readable, or a mask is unreadable.
    """
    assert context.data.masks is not None
    backbone = _resize_backbone(context)
    train, test = (SegmentationImages(context, backbone, data) for data in context.data.masks)
    heads = _train_heads(backbone, train)
    details = {"train_images": len(train.data), "test_images": len(test.data), "size": list(backbone.image_size)}
    result = ProtocolResult(details=details)
    for name, counts in _count_pixels(backbone, heads, test).items():  # counts: (images, 3, classes)
        for metric, compute in (("miou", mean_iou), ("pixel_accuracy", pixel_accuracy)):
            result.metrics[f"segmentation_{name}_{metric}"] = bootstrap_ci(partial(compute, counts), len(counts))
        intersections, unions, _ = counts.sum(0).astype(int).tolist()
        pairs = zip(intersections, unions, strict=True)
        result.per_class[f"segmentation_{name}"] = dict(zip(test.data.classes, pairs, strict=True))
    return result


def mean_iou(counts: Float[np.ndarray, "n 3 K"], weights: Float[np.ndarray, " n"]) -> float:
    """Return mIoU in [0, 1]: the mean over classes of intersection over union, both summed over all images first.

    Classes that neither the masks nor the predictions contain are excluded; 0 if no class is left.

    Args:
        counts: for each image and class, pixels of intersection, union and truth, as `pixel_counts` returns them.
        weights: how often each image counts: all ones, or the counts of a bootstrap resample.
    """
    intersection, union, _ = np.tensordot(weights, counts, 1)
    return float((intersection[union > 0] / union[union > 0]).mean()) if union.any() else 0.0


def pixel_accuracy(counts: Float[np.ndarray, "n 3 K"], weights: Float[np.ndarray, " n"]) -> float:
    """Return the fraction, in [0, 1], of the pixels with a class that are classified correctly.

    Args:
        counts: for each image and class, pixels of intersection, union and truth, as `pixel_counts` returns them.
        weights: how often each image counts: all ones, or the counts of a bootstrap resample.
    """
    intersection, _, truth = np.tensordot(weights, counts, 1)
    return float(intersection.sum() / max(truth.sum(), 1))


def pixel_counts(predicted: Int[Tensor, "H W"], truth: Int[Tensor, "H W"], classes: int) -> Float[np.ndarray, "3 K"]:
    """Count one image's pixels for each class, without pixels whose true class is `IGNORE_INDEX` (-1).

    Args:
        predicted: predicted class index of each pixel.
        truth: true class index of each pixel.
        classes: number of classes, K.

    Returns:
        Rows: pixels of the intersection of prediction and truth, of their union, and of the truth.
    """
    predicted, truth = predicted[truth != IGNORE_INDEX], truth[truth != IGNORE_INDEX]
    parts = truth[truth == predicted], predicted, truth
    hits, guesses, truths = (torch.bincount(part, minlength=classes).double().numpy() for part in parts)
    return np.stack([hits, guesses + truths - hits, truths])


def _train_heads(backbone: BackboneWrapper, images: SegmentationImages) -> nn.ModuleDict:
    """Train the heads 'linear' and 'decoder' of `make_heads` on the same batches of frozen features.

    Args:
        backbone: gives the features; logits and masks are resized to its input size for the loss.
        images: training images and masks; `images.options` has `seed` and `dense_epochs`.

    Returns:
        The heads by name, in eval mode, on the backbone's device; the backbone is not changed.
    """
    size, compute = backbone.image_size, backbone.compute
    torch.manual_seed(images.options.seed)
    heads = make_heads(backbone.map_shape[0], len(images.data.classes)).to(compute.device).train()
    groups = [{"params": [*head.parameters()], "lr": HEAD_LEARNING_RATES[name]} for name, head in heads.items()]

    def compute_loss(batch: list[Scene]) -> Tensor:
        """Return the sum of both heads' mean cross-entropies over the pixels that are not ignored."""
        # Autograd cannot save tensors made in inference mode; a clone made outside of it is a normal tensor.
        features = backbone.last_layer(torch.stack([pixels for pixels, _ in batch])).clone()
        resized = [F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0] for _, mask in batch]
        masks = compute.to(torch.stack(resized).long())
        logits = [F.interpolate(head(features), size, mode="bilinear") for head in heads.values()]
        return torch.stack([F.cross_entropy(each, masks, ignore_index=IGNORE_INDEX) for each in logits]).sum()

    optimizer = torch.optim.AdamW(groups, weight_decay=HEAD_WEIGHT_DECAY)
    images.train(optimizer, compute_loss)
    return heads.eval()


@torch.inference_mode()
def _count_pixels(
    backbone: BackboneWrapper, heads: nn.ModuleDict, images: SegmentationImages
) -> dict[str, Float[np.ndarray, "n 3 K"]]:
    """Segment the images with each head, and count pixels of intersection, union and truth by class; see `pixel_counts`.

    Args:
        backbone: gives the features.
        heads: by name; map a feature map to logits, which are resized to each mask's own size.
        images: images and masks to segment.

    Returns:
        For each head, by name, the counts of the n readable images, in the order of the data set.
    """
    counts: dict[str, list[np.ndarray]] = {name: [] for name in heads}
    for batch in images.batches():
        features = backbone.last_layer(torch.stack([pixels for pixels, _ in batch]))
        for name, head in heads.items():
            for logits, (_, truth) in zip(head(features), batch, strict=True):
                full_size = F.interpolate(logits[None], truth.shape, mode="bilinear")[0]
                counts[name].append(pixel_counts(full_size.argmax(0).cpu(), truth, len(images.data.classes)))
    return {name: np.stack(each) for name, each in counts.items()}


# ---- detection


class SimpleFeaturePyramid(nn.Module):
    """Four feature maps of 4, 2, 1 and 1/2 times the resolution of the backbone's last one, computed from it (ViTDet, arXiv 2203.16527).

    Attributes:
        out_channels: of each map; torchvision's FasterRCNN reads it.
    """

    def __init__(self, backbone: BackboneWrapper, trained: bool) -> None:
        """Build the layers of the four scales, in `self.scales`; `self.model` is the backbone's model, not a copy.

        Args:
            backbone: gives the last feature map; `requires_grad` of its weights is set to `trained`.
            trained: whether the backbone is trained with the pyramid; else it stays frozen and in eval mode.
        """
        super().__init__()
        self.backbone, self.model, self.trained = backbone, backbone.model.requires_grad_(trained), trained
        self.out_channels, width = WIDTH, backbone.map_shape[0]

        def upsample(depth: int) -> nn.Module:
            """Return a layer that doubles the resolution, from `depth` channels."""
            return nn.ConvTranspose2d(depth, WIDTH, 2, stride=2)

        def smooth() -> nn.Module:
            """Return a normalized 3 x 3 convolution."""
            return nn.Sequential(nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(1, WIDTH))

        # Of 4, 2, 1 and 1/2 times the backbone's resolution, WIDTH channels each.
        finest = nn.Sequential(upsample(width), nn.GroupNorm(1, WIDTH), nn.GELU(), upsample(WIDTH))
        fine, same = upsample(width), nn.Conv2d(width, WIDTH, 1)
        coarse = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(width, WIDTH, 1))
        self.scales = nn.ModuleList(nn.Sequential(scale, smooth()) for scale in (finest, fine, same, coarse))

    def forward(self, images: Float[Tensor, "B C H W"]) -> "OrderedDict[str, Tensor]":
        """Compute the four feature maps of normalized images at the backbone's input size.

        The backbone is set to training mode if it is trained and the pyramid is in training mode, else to eval mode.

        Returns:
            '0' (4 times the backbone's resolution), '1' (2 times), '2' (the same) and '3' (half) -> (B, WIDTH, h, w), as torchvision's
            FasterRCNN takes them.
        """
        self.model.train(self.training and self.trained)
        features = self.backbone.forward_intermediates(images, [-1])[0][0].float()
        return OrderedDict((str(index), scale(features)) for index, scale in enumerate(self.scales))


def make_detector(backbone: BackboneWrapper, num_classes: int, trained: bool) -> FasterRCNN:
    """Build torchvision's Faster R-CNN on the `SimpleFeaturePyramid` of a backbone, on the backbone's device.

    The detector normalizes images and stretches them to the backbone's input size itself. The anchors of each map have a side of 8
    of its cells, as in FPN, and aspect ratios 0.5, 1 and 2. Initial weights are always the same; torch's global random generators are left
    as they are.

    Args:
        backbone: gives the feature maps; `requires_grad` of its weights is set to `trained`.
        num_classes: classes of the data; the detector's label 0 is the background, its label i + 1 the data's class i.
        trained: whether the backbone is trained, too.

    Returns:
        The detector, in training mode.
    """
    height, width = backbone.image_size
    patch_height = height / backbone.map_shape[1]
    # Sides of the anchors of each map, pixels; a map's cell is `scale` patches high.
    sizes = tuple((max(1, round(ANCHOR_CELLS * patch_height * scale)),) for scale in PYRAMID_CELLS)
    pool = MultiScaleRoIAlign([str(index) for index in range(len(sizes))], ROI_SIZE, sampling_ratio=2)
    with torch.random.fork_rng(devices=[]):  # torchvision draws the weights, on the CPU, by the global generator
        torch.default_generator.manual_seed(0)
        detector = FasterRCNN(
            SimpleFeaturePyramid(backbone, trained), num_classes + 1,
            image_mean=list(backbone.mean), image_std=list(backbone.std),
            min_size=min(height, width), max_size=max(height, width), fixed_size=(width, height), size_divisible=1,
            rpn_anchor_generator=anchor_utils.AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes)),
            box_batch_size_per_image=BOX_BATCH_SIZE_PER_IMAGE, box_roi_pool=pool,
        )  # fmt: skip
    return detector.to(backbone.compute.device)


@protocol("annotations", is_expensive=True)
def detection(context: EvalContext, trained: bool = False) -> ProtocolResult:
    """Measure COCO's box AP of a Faster R-CNN that is trained for a few epochs on the backbone.

    Args:
        context: the backbone, images with boxes and the options.
        trained: train the weights of a copy of the backbone, too; else they stay frozen. The context's backbone never changes.

    Returns:
        Metrics 'detection_AP', 'detection_AP50', 'detection_AP75', 'detection_APs', 'detection_APm' and 'detection_APl' in [0, 1],
        without intervals ('detection_finetune_AP', ... if `trained`); see `coco_metrics`. `details`: 'train_images', 'boxes_found' in
        the test images, and the input 'size', [height, width] in pixels. Unreadable training images are skipped; an unreadable test
        image counts as one without detected boxes.

    Raises:
        MapetError: pycocotools is not installed, the backbone cannot take the size of the option `eval_image_sizes`, or no image of a set
            is readable.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise MapetError(f"protocol 'detection' needs pycocotools: {install_hint('detection')}")
    assert context.data.boxes is not None
    (train, test), backbone = context.data.boxes, _resize_backbone(context, copy_weights=True)
    detector = make_detector(backbone, len(train.classes), trained)
    _train_detector(detector, backbone, DetectionImages(context, backbone, train))
    boxes = _detect(detector, backbone, DetectionImages(context, backbone, test))
    prefix, over = "detection_finetune" if trained else "detection", f"{len(test):,} images"
    metrics = {f"{prefix}_{k}": MetricValue(value, over=over) for k, value in coco_metrics(test, boxes).items()}
    details = {"train_images": len(train), "boxes_found": len(boxes), "size": list(backbone.image_size)}
    return ProtocolResult(metrics, details=details)


@protocol("annotations", is_expensive=True)
def detection_finetune(context: EvalContext) -> ProtocolResult:
    """Measure COCO's box AP as `detection` does, but with a copy of the backbone trained together with the detector.

    Args:
        context: the backbone, images with boxes and the options of `evaluate`.

    Returns:
        Metrics 'detection_finetune_AP', 'detection_finetune_AP50', ...; `details` as those of `detection`.
    """
    return detection(context, trained=True)


IndexedImage = tuple[int, UInt8[Tensor, "C H W"]]
"""The index of an image in its data set, and the whole image at its own size."""


CocoBox = dict[str, Any]
"""A detected box in COCO's format of results: 'image_id' and 'category_id' of the annotation file, 'bbox' (left, top, width,
height in pixels of the image) and 'score' in [0, 1]."""


class DetectionImages(AnnotatedImages[DetectionSet, IndexedImage]):
    """Whole images; `DetectionSet` has their boxes."""

    max_batch_size = 8

    def read(self, index: int) -> IndexedImage:
        """Return (index, uint8 pixels) of the whole image at its own size; `_train_detector` looks up its boxes by the index.

        Raises:
            ImageDecodeError: the image is unreadable.
        """
        return index, self.data.images.open(index, self.channels).read()


def _train_detector(detector: nn.Module, backbone: BackboneWrapper, images: DetectionImages) -> None:
    """Train a detector in place, by AdamW, for `images.options.dense_epochs` epochs; the first 5 % of the steps are warmup.

    Args:
        detector: torchvision's Faster R-CNN; parameters that require no gradient stay as they are.
        backbone: whose device the detector is on.
        images: training images; `images.data` has their boxes.
    """
    data, to = images.data, backbone.compute.to
    detector.train()

    def compute_loss(batch: list[IndexedImage]) -> Tensor:
        """Return the sum of the detector's four losses: objectness, proposals, classes and boxes.

        The detector takes images in [0, 1] and for each image its boxes (left, top, right, bottom, pixels) and labels; label 0 is the
        background, so that class i is label i + 1.
        """
        targets = [
            {"boxes": to(torch.from_numpy(data.boxes[i]).float()), "labels": to(torch.from_numpy(data.labels[i]) + 1)}
            for i, _ in batch
        ]
        return torch.stack(list(detector([to(pixels).float() / 255 for _, pixels in batch], targets).values())).sum()

    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, DETECTOR_LR, weight_decay=DETECTOR_WEIGHT_DECAY)
    images.train(optimizer, compute_loss, warmup_fraction=WARMUP_FRACTION, clip_grad=1.0)


@torch.inference_mode()
def _detect(detector: nn.Module, backbone: BackboneWrapper, images: DetectionImages) -> list[CocoBox]:
    """Detect boxes in all readable images, and return the boxes of all images in one list, in COCO's format of results (`CocoBox`).

    Args:
        detector: torchvision's Faster R-CNN; it is set to eval mode.
        backbone: whose device the detector is on.
        images: the images; `images.data` has the annotation file's ids of images and categories.
    """
    data = images.data
    detector.eval()
    detections = []
    for batch in images.batches():
        results = detector([backbone.compute.to(pixels).float() / 255 for _, pixels in batch])
        for (index, _), result in zip(batch, results, strict=True):
            boxes = box_convert(result["boxes"].double().cpu(), "xyxy", "xywh").tolist()
            for box, label, score in zip(boxes, result["labels"].tolist(), result["scores"].tolist(), strict=True):
                image, category = data.image_ids[index], data.category_ids[label - 1]  # label 0 is the background
                detections.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    return detections


def coco_metrics(data: DetectionSet, boxes: list[CocoBox]) -> dict[str, float]:
    """Compute COCO's box metrics with pycocotools.

    Args:
        data: the images in which boxes were detected, with their annotations; an image without boxes counts as one without detections.
        boxes: all detected boxes, in COCO's format of results.

    Returns:
        'AP', 'AP50', 'AP75', 'APs', 'APm' and 'APl' (small, medium and large boxes) -> average precision in [0, 1]; a metric for which
        there are no annotated boxes is omitted. Without detected boxes, only the first three, all 0.
    """
    if not boxes:
        return dict.fromkeys(COCO_METRICS[:3], 0.0)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # hide what pycocotools prints
        truth = COCO()
        truth.dataset = {"info": {}} | data.record
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(boxes), "bbox")
        evaluation.params.imgIds = data.image_ids  # the JSON file may list other images, too: of the training set
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # A value of -1 means that there are no annotated boxes of that size.
    return {name: float(value) for name, value in zip(COCO_METRICS, evaluation.stats, strict=False) if value >= 0}
