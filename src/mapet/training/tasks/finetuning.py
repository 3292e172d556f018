"""Supervised fine-tuning in its plain form: mean pooling over the pre-trained norm, a linear head."""

import logging
from dataclasses import replace
from typing import Any, NamedTuple, cast

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
from mapet.data.views import ViewSpec, fork_rng, input_mean_std, normalize, rand_augment
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.evaluation.datasets import LabeledSet, few_shot_split, train_and_test
from mapet.evaluation.features import BackboneWrapper, CacheConfig
from mapet.models.backbone import load_backbone, prepare_for_device, save_backbone
from mapet.training.task import StepOutput, Task

log = logging.getLogger("mapet")
MAX_CPU_BATCH_SIZE = 128
"""Largest automatic batch there; elsewhere `base_batch_size`."""


class FinetuneResult(NamedTuple):
    """Result of a fine-tuning.

    Attributes:
        num_correct, num_test: test images that are classified correctly, and all.
        majority_accuracy: of always predicting the commonest class of the test images.
    """

    num_correct: int
    num_test: int
    train: LabeledSet
    majority_accuracy: float


class FinetuningTask(Task[FinetuneConfig, VisionTransformer, FinetuneResult]):
    """The whole ViT learns the classes of labeled images; the test images say how well about ten times, and choose nothing."""

    command = "finetune"
    base_lr, base_batch_size = 5e-4, 512
    min_auto_lr = 3e-4
    """In few small batches a lower rate gets nowhere, a higher one forgets what pre-training learned."""
    model: VisionTransformer
    _final: tuple[int, int] | None = None

    def build(self, config: FinetuneConfig, compute: ComputeContext) -> None:
        """Read the labels, and load the backbone with a new head."""
        self.compute, self.config = compute, config
        self.train, self.test = _labeled_images(config)
        torch.manual_seed(config.seed)
        self.model = self.build_model()
        self.model_ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        if self.model_ema is not None:
            self.stateful = {"model_ema": self.model_ema}
        size: tuple[int, int] = self.model.patch_embed.img_size
        channels, augment = self.model.in_chans, None
        if config.rand_augment is not None:
            if channels != 3:
                raise MapetError(
                    f"{option('rand_augment')} is for RGB images, this ViT has {channels} channels: leave it out"
                )
            augment = rand_augment(config.rand_augment, size, input_mean_std(3)[0])
        options: dict[str, Any] = {"jitter": config.color_jitter, "augment": augment, "seed": config.seed}
        self.dataset = ViewDataset(
            self.train.images, ViewSpec.from_config(config, size, config.seed), channels, size, **options
        )
        self.indices, self.labels = np.arange(len(self.train.labels)), torch.from_numpy(self.train.labels)
        self.hashes = {"images_hash": self.train.images.hash}
        num_images = len(self.indices)
        most = MAX_CPU_BATCH_SIZE if compute.device.type == "cpu" else self.base_batch_size
        batch_size = config.batch_size or min(max(8, min(most, num_images // 10)), num_images)
        self.config = config.model_copy(update={"batch_size": batch_size})
        self.layer_decay = config.layer_decay
        self.epochs_per_line = self.epochs_per_test = max(1, config.epochs // 10)
        num_classes = len(self.train.classes)
        self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes)
        self.erase = RandomErasing(config.random_erasing, mode="pixel", device=compute.device)
        source = "from scratch" if config.from_scratch else config.backbone
        self.description = f"fine-tuning {source} on {num_images:,} images, {num_classes} classes"

    def build_model(self) -> VisionTransformer:
        """Load the backbone; the norm that pre-training learned stays, before the pooling."""
        config = self.config
        head = {"num_classes": len(self.train.classes), "global_pool": "avg", "fc_norm": False}
        options = head | {"drop_path_rate": config.drop_path}
        vit = load_backbone(config.backbone, pretrained=not config.from_scratch, **options)
        return prepare_for_device(vit, self.compute)

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Normalize and augment the images; labels become targets, after Mixup or CutMix fractions of classes."""
        config, labels = self.config, self.labels[batch.image_index]
        batch = batch.to(self.compute.device)
        assert batch.images is not None
        images, targets = normalize(batch.images, self.model.in_chans, batch.jitter), self.compute.to(labels)
        with fork_rng(config.seed, step):
            if config.random_erasing:
                images = self.erase(images)
            if (config.mixup or config.cutmix) and len(images) > 1:  # in pairs
                batch = batch[: len(images) // 2 * 2]
                images, targets = self.mixup(images[: len(batch)], targets[: len(batch)])
        return replace(batch, images=images, targets=targets)

    def loss(self, batch: Batch, step: int) -> StepOutput:
        """Compute the cross-entropy; targets that Mixup has made are smoothed already."""
        assert batch.images is not None and batch.targets is not None
        logits = self.model(batch.images.to(self.model.head.weight.dtype)).float()
        smoothing = self.config.label_smoothing if batch.targets.ndim == 1 else 0.0
        loss = F.cross_entropy(logits, batch.targets, label_smoothing=smoothing)
        with torch.no_grad():
            each = F.cross_entropy(logits, batch.targets, label_smoothing=smoothing, reduction="none")
        return StepOutput(loss, each)

    def after_step(self, output: StepOutput, step: int) -> dict[str, Tensor]:
        """Update the moving average of the weights."""
        if self.model_ema is not None:
            self.model_ema.update(self.model, step)
        return {}

    def _averaged(self, module: VisionTransformer) -> VisionTransformer:
        return module if self.model_ema is None else cast(VisionTransformer, self.model_ema.module)

    def evaluate(self, module: VisionTransformer, epoch: int) -> dict[str, float]:
        """Measure the accuracy on the test images."""
        last = epoch == self.config.epochs
        if not last and (self.config.out is None or epoch % self.epochs_per_test):
            return {}
        result = compute_accuracy(self._averaged(module), self.test, self.compute)
        module.train()
        self._final = result if last else None
        return {"epoch": epoch, "accuracy": result[0] / result[1]}

    @staticmethod
    def format_scores(scores: dict[str, float]) -> str:
        """Return the accuracy on the test images."""
        return f"test accuracy {scores['accuracy']:.3f}"

    def finish(self, module: VisionTransformer) -> FinetuneResult:
        """Save the model, or its moving average, and measure its accuracy."""
        config, vit = self.config, self._averaged(module)
        final = self._final or compute_accuracy(vit, self.test, self.compute)
        if config.out is not None:
            if not (config.out / "model").exists():
                save_backbone(vit.cpu(), config.out / "model")
            log.info("model in %s", config.out / "model")
        return FinetuneResult(*final, self.train, self.test.majority_accuracy)


def _labeled_images(config: FinetuneConfig) -> tuple[LabeledSet, LabeledSet]:
    """Return the training images that the options grant, and the test images."""
    train, test = train_and_test(config.images, config.test_images)
    if config.labels_per_class:
        try:
            train = train.subset(few_shot_split(train, config.labels_per_class, config.seed))
        except MapetError as error:
            held_out = f"; a fifth of {option('images')} is held out to test on: there are no {option('test_images')}"
            raise MapetError(f"{error}{'' if config.test_images else held_out}") from None
    return train, test


@torch.inference_mode()
def compute_accuracy(vit: VisionTransformer, data: LabeledSet, compute: ComputeContext) -> tuple[int, int]:
    """Return (number classified correctly, number of all) of the centered views."""
    vit.eval()
    backbone, labels = BackboneWrapper.from_vit(vit, compute), torch.from_numpy(data.labels)
    batches = backbone.batches(data.images, CacheConfig(batch_size=256, progress=False))
    correct = torch.cat([backbone.logits(images).argmax(1).cpu() == labels[index] for index, images in batches])
    return int(correct.sum()), len(correct)
