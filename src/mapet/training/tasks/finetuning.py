"""Supervised fine-tuning in its plain form: mean pooling over the pre-trained norm, a linear head."""

import logging
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor

from mapet.config.evaluation import FinetuneConfig
from mapet.data.dataset import Batch, ViewDataset
from mapet.data.dataset_stats import warn_outside_range
from mapet.data.sources import read_as_trained
from mapet.data.views import ViewSpec, fork_rng, normalize, rand_augment
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.evaluation.calibration import Calibration, fit_temperature
from mapet.evaluation.datasets import LabeledSet, few_shot_split, load_train_test
from mapet.evaluation.eval_context import MetricValue, measure_classifier
from mapet.evaluation.features import BackboneWrapper, CacheConfig
from mapet.evaluation.imbalance import METRIC_NAMES, score_classifier
from mapet.models.backbone import get_read_options, load_backbone, prepare_for_device, save_backbone, set_read_options
from mapet.training.task import StepOutput, Task

log = logging.getLogger("mapet")
MAX_CPU_BATCH_SIZE = 128
"""Largest automatic batch size on a CPU; elsewhere it is `base_batch_size`."""
MIN_BATCH_SIZE, MIN_STEPS_PER_EPOCH = 8, 10
"""Least automatic batch size, and the steps per epoch that larger ones leave."""
NUM_TESTS = 10
"""How often the test images are evaluated during training, about."""


class FinetuneResult(NamedTuple):
    """Result of a fine-tuning.

    Attributes:
        metrics: of the readable test images, see `measure_classifier`.
        num_test: number of these images.
        train: the training images.
        majority_accuracy: accuracy of always predicting the most frequent class of the test images.
        calibration: of the probabilities on the test images, which chose nothing else; None: too few of them.
    """

    metrics: dict[str, MetricValue]
    num_test: int
    train: LabeledSet
    majority_accuracy: float
    calibration: Calibration | None


class FinetuningTask(Task[FinetuneConfig, VisionTransformer, FinetuneResult]):
    """Trains the whole ViT to classify labeled images; test images measure its accuracy about ten times, and choose nothing."""

    command = "finetune"
    base_lr, base_batch_size = 5e-4, 512
    min_auto_lr = 3e-4
    """With few small batches a lower rate learns too little, a higher one forgets what pre-training learned."""
    model: VisionTransformer
    _final: tuple[Tensor, Tensor] | None = None

    def build(self, config: FinetuneConfig, compute: ComputeContext) -> None:
        """Read the labels, load the backbone with a new head, and set up augmentation and the moving average of the weights.

        Sets the attributes that `Task` lists (model, dataset, indices, hashes, config with a resolved `batch_size`, ...); `train` and `test`,
        the labeled images; `labels`, the class index of each training image; `model_ema` (None without `ema_decay`); and `mixup`, `erase` and
        `epochs_per_test` for the methods below.

        Args:
            config: options of `finetune`, some of them None. An automatic `batch_size` leaves `MIN_STEPS_PER_EPOCH` steps per epoch if that
                allows `MIN_BATCH_SIZE`, and is at most `base_batch_size` (on a CPU `MAX_CPU_BATCH_SIZE`) and the number of images.
            compute: device and precision.

        Raises:
            MapetError: backbone or labels can't be read, or an option doesn't fit them.
        """
        self.compute, self.config = compute, config
        self.train, self.test = _load_labeled_images(config)
        torch.manual_seed(config.seed)
        self.model = self.build_model()
        trained = get_read_options(self.model)
        self.train = replace(self.train, images=read_as_trained(self.train.images, config, trained))
        self.test = replace(self.test, images=read_as_trained(self.test.images, config, trained))
        set_read_options(self.model, self.train.images.read_options)
        warn_outside_range(self.train.images, self.model.in_chans)
        self.model_ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.stateful = {"model_ema": self.model_ema} if self.model_ema is not None else {}
        size: tuple[int, int] = self.model.patch_embed.img_size
        images, channels, augment = self.train.images, self.model.in_chans, None
        if config.rand_augment is not None:
            augment = rand_augment(config.rand_augment, size, channels)
        spec = ViewSpec.from_config(config, size, config.seed)
        self.dataset = ViewDataset(
            images, spec, channels, size, jitter=config.color_jitter, augment=augment, seed=config.seed
        )
        num_images, num_classes = len(self.train.labels), len(self.train.classes)
        self.labels = torch.from_numpy(self.train.labels)
        self.indices, self.hashes = np.arange(num_images), {"images_hash": images.hash}
        limit = MAX_CPU_BATCH_SIZE if compute.device.type == "cpu" else self.base_batch_size
        auto = min(max(MIN_BATCH_SIZE, min(limit, num_images // MIN_STEPS_PER_EPOCH)), num_images)
        self.config = config.model_copy(update={"batch_size": config.batch_size or auto})
        self.layer_decay = config.layer_decay
        self.epochs_per_line = self.epochs_per_test = max(1, int(config.epochs / NUM_TESTS))
        # Mixup smooths labels itself; `loss` does so in runs without Mixup and CutMix, and where a batch has a single image.
        self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes)
        self.erase = RandomErasing(config.random_erasing, mode="pixel", device=compute.device)
        source = "from scratch" if config.from_scratch else config.backbone
        self.description = f"fine-tuning {source} on {num_images:,} images, {num_classes} classes"

    def build_model(self) -> VisionTransformer:
        """Return the backbone with a new head, on the device; the norm that pre-training learned stays, before the mean pooling.

        The weights are random if `from_scratch` is set.
        """
        config, num_classes = self.config, len(self.train.classes)
        head = {"num_classes": num_classes, "global_pool": "avg", "fc_norm": False, "drop_path_rate": config.drop_path}
        vit = load_backbone(config.backbone, pretrained=not config.from_scratch, **head)
        return prepare_for_device(vit, self.compute)

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Move a batch to the device, normalize and augment its images, and set its targets.

        Mixup takes images in pairs: of an odd number the last one is omitted, but a single image is kept as it is.
        Random draws depend on the run's seed and `step` alone.

        Args:
            batch: as `ViewDataset` makes it, with uint8 images; `image_index` finds the labels.
            step: counts from 0.

        Returns:
            The batch with float images, and as targets class indices (B,), or class probabilities (B, classes) if Mixup or CutMix
            was applied.
        """
        config, labels = self.config, self.labels[batch.image_index]
        batch = batch.to(self.compute.device)
        assert batch.images is not None
        images, targets = normalize(batch.images, self.model.in_chans, batch.jitter), self.compute.to(labels)
        with fork_rng(config.seed, step):
            if config.random_erasing:
                images = self.erase(images)
            if (config.mixup or config.cutmix) and len(images) > 1:
                batch = batch[: len(images) // 2 * 2]
                images, targets = self.mixup(images[: len(batch)], targets[: len(batch)])
        return replace(batch, images=images, targets=targets)

    def loss(self, batch: Batch, step: int) -> StepOutput:
        """Compute the cross-entropy with label smoothing; targets that are probabilities have been smoothed by Mixup."""
        assert batch.images is not None and batch.targets is not None
        logits = self.model(batch.images.to(self.model.head.weight.dtype)).float()
        smoothing = self.config.label_smoothing if batch.targets.ndim == 1 else 0.0
        losses = F.cross_entropy(logits, batch.targets, label_smoothing=smoothing, reduction="none")
        return StepOutput(losses.mean(), losses.detach())

    def after_step(self, output: StepOutput, step: int) -> dict[str, Tensor]:
        """Update the moving average of the weights."""
        if self.model_ema is not None:
            self.model_ema.update(self.model, step)
        return {}

    def _ema_or_module(self, module: VisionTransformer) -> VisionTransformer:
        """Return the moving average of the weights if there is one, else the module."""
        return module if self.model_ema is None else cast(VisionTransformer, self.model_ema.module)

    def evaluate(self, module: VisionTransformer, epoch: int, is_last: bool) -> dict[str, float]:
        """Measure the accuracy on the test images after the last epoch and, if the run has a folder, about ten times before.

        Args:
            module: the trained ViT, in training mode afterwards; if there is a moving average of its weights, that is measured instead.
            epoch: counted from 1.
            is_last: whether it is the run's last one.

        Returns:
            'epoch' and what `score_classifier` returns (0 to 1); {} after epochs that are not measured. The last epoch's logits are kept
            for `finish`.

        Raises:
            MapetError: too many test images are unreadable; the trainer logs it as a warning.
        """
        if not is_last and (self.config.out is None or epoch % self.epochs_per_test):
            return {}
        logits, labels = classify_images(self._ema_or_module(module), self.test, self.compute)
        module.train()
        self._final = (logits, labels) if is_last else None
        return {"epoch": epoch, **score_classifier(logits, labels)}

    @staticmethod
    def format_scores(scores: dict[str, float]) -> str:
        """Format the accuracy on the test images, on imbalanced ones balanced accuracy and AUROC first."""
        return "test " + ", ".join(
            f"{METRIC_NAMES[kind]} {scores[kind]:.3f}" for kind in METRIC_NAMES if kind in scores
        )

    def finish(self, module: VisionTransformer) -> FinetuneResult:
        """Save the ViT, or the moving average of its weights, in OUT/model, calibrated, and return its accuracy on the test images.

        The accuracy is that of the last epoch's `evaluate`; it is measured now in a run that was resumed after this. A run without `out`
        saves nothing.
        """
        config, vit = self.config, self._ema_or_module(module)
        logits, labels = self._final or classify_images(vit, self.test, self.compute)
        calibration = fit_temperature(logits, labels)
        if config.out is not None:
            if not (config.out / "model").exists():
                temperature = calibration and calibration.temperature
                save_backbone(vit.cpu(), config.out / "model", self.train.classes, temperature)
            log.info("model in %s", config.out / "model")
        metrics, majority_accuracy = measure_classifier(logits, labels), self.test.majority_accuracy
        return FinetuneResult(metrics, len(labels), self.train, majority_accuracy, calibration)


def _load_labeled_images(config: FinetuneConfig) -> tuple[LabeledSet, LabeledSet]:
    """Return (training images, test images) with their labels; of the training images those that `labels_per_class` selects.

    Args:
        config: `images`; `test_images` (None: a fifth of `images` is held out); `labels_per_class` (None: all, below 1 a fraction of each
            class, else a number); `seed`, which selects them.

    Raises:
        MapetError: there are no labels, or a class has too few images.
    """
    train, test = load_train_test(config.images, config.test_images, config, config.group_by)
    if config.labels_per_class:
        try:
            train = train.subset(few_shot_split(train, config.labels_per_class, config.seed))
        except MapetError as error:
            held_out = f"; without {option('test_images')}, a fifth of {option('images')} is held out as test images"
            raise MapetError(f"{error}{'' if config.test_images else held_out}") from None
    return train, test


@torch.inference_mode()
def classify_images(vit: VisionTransformer, data: LabeledSet, compute: ComputeContext) -> tuple[Tensor, Tensor]:
    """Classify the center crops of labeled images; unreadable ones are excluded.

    Args:
        vit: with a classifier; it is put into evaluation mode.
        data: images and the class index of each.
        compute: device and precision.

    Returns:
        Logits (n, K), float32, and class indices (n,) of the images that were read, on the CPU.

    Raises:
        MapetError: too many images are unreadable; see `BackboneWrapper.batches`.
    """
    vit.eval()
    backbone, labels = BackboneWrapper.from_vit(vit, compute), torch.from_numpy(data.labels)
    batches = backbone.batches(data.images, CacheConfig(batch_size=256, progress=False))
    parts = [(backbone.logits(images).float().cpu(), labels[index]) for index, images in batches]
    logits, classes = map(torch.cat, zip(*parts, strict=True))
    return logits, classes
