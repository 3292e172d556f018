"""Supervised fine-tuning in its plain form: mean pooling over the pre-trained norm, a linear head, AdamW, cosine."""

import logging
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from mapet.compute import Compute
from mapet.data.augment import rand_augment, seeded
from mapet.data.dataset import EpochSampler, Quarantine, ViewDataset, in_order, make_loader
from mapet.data.views import ViewSpec
from mapet.errors import MapetError
from mapet.evaluation.features import LabelledSet, centred_batches, normalize, train_and_test
from mapet.evaluation.splits import few_labels
from mapet.model.adapt import pixel_stats
from mapet.model.backbone import load_backbone, on_device
from mapet.training.optim import make_optimizer, make_schedule

log = logging.getLogger("mapet")
PAPER_LR, PAPER_BATCH = 5e-4, 512


def finetune_vit(
    config: Any,
    note: Callable[[dict[str, float]], None] | None = None,
    begin: Callable[[Any], None] | None = None,
) -> tuple[VisionTransformer, tuple[int, int], LabelledSet]:
    """Train on the labels that `FinetuneConfig` grants; returns the model, (right, all) test images and the training set.

    Args:
        note: called after each epoch with its mean loss and the learning rate, and about ten times with the accuracy on the
            test images, which nothing is chosen by.
        begin: called before the first step with the config, its automatic values resolved.
    """
    compute = Compute.choose(config.device, config.precision)
    train, test = train_and_test(config.images, config.test_images)
    if config.labels_per_class or config.label_share < 1:
        train = train.subset(few_labels(train, config.labels_per_class or config.label_share, config.seed))
    torch.manual_seed(config.seed)
    # `fc_norm=False`: the norm that pre-training learned stays, before the pooling.
    options = config.model_args | {
        "num_classes": len(train.classes),
        "global_pool": "avg",
        "fc_norm": False,
        "drop_path_rate": config.drop_path,
    }
    vit = on_device(load_backbone(config.backbone, pretrained=not config.scratch, **options), compute)

    batch_size = config.batch_size or max(
        8, min(PAPER_BATCH if compute.device.type != "cpu" else 128, len(train.labels) // 10)
    )
    sampler = EpochSampler(torch.arange(len(train.labels)).numpy(), batch_size, config.epochs, config.seed)
    lr = config.lr or PAPER_LR * math.sqrt(batch_size / PAPER_BATCH)
    optimizer = make_optimizer(vit, lr, config.weight_decay, config.layer_decay)
    warmup = config.epochs / 10 if config.warmup_epochs is None else config.warmup_epochs
    schedule = make_schedule(optimizer, len(sampler), round(warmup * sampler.steps_per_epoch), config.min_lr)
    config = config.model_copy(update={"batch_size": batch_size, "lr": lr, "warmup_epochs": warmup})
    height, width = vit.patch_embed.img_size
    spec = ViewSpec(kind=config.views, image_size=(height, width), min_scale=config.min_scale, seed=config.seed)
    dataset = ViewDataset(
        train.images,
        spec,
        vit.in_chans,
        image_size=(height, width),
        jitter=config.color_jitter,
        augment=augmentation(config, vit),
        seed=config.seed,
    )
    blend = mixup(config, len(train.classes))
    erase = RandomErasing(config.random_erasing, mode="pixel", device=compute.device) if config.random_erasing else None
    quarantine = Quarantine(train.images, config.max_bad)
    labels = torch.from_numpy(train.labels)
    log.info(
        "fine-tuning %s on %d images, %d classes, batch %d, lr %.2g",
        "from scratch" if config.scratch else config.backbone,
        len(labels),
        len(train.classes),
        batch_size,
        lr,
    )

    if begin:
        begin(config)
    average = ModelEmaV3(vit, decay=config.ema, use_warmup=True) if config.ema else None
    every = max(1, config.epochs // 10)
    losses: list[Tensor] = []
    vit.train()
    loader = make_loader(dataset, sampler, config.num_workers)
    with tqdm(total=len(sampler), desc="fine-tune", unit="step", disable=None, smoothing=0.05) as bar:
        for step, batch in enumerate(loader):
            quarantine.add(batch.bad)
            if batch.image is not None:
                schedule.step_update(step)
                pixels = normalize(compute.to(batch.image), vit.in_chans, batch.jitter)
                targets = compute.to(labels[batch.image_index])
                smoothing = config.label_smoothing
                with seeded(config.seed, step):
                    if erase:
                        pixels = erase(pixels)
                    if blend and len(pixels) > 1:  # in pairs; shares of classes, already smoothed
                        even = len(pixels) // 2 * 2
                        (pixels, targets), smoothing = blend(pixels[:even], targets[:even]), 0.0
                with compute.autocast():
                    logits = vit(pixels)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if average is not None:
                    average.update(vit, step)
                losses.append(loss.detach())
            bar.update()
            if losses and (step + 1) % sampler.steps_per_epoch == 0:
                epoch = (step + 1) // sampler.steps_per_epoch
                row = {
                    "epoch": epoch,
                    "loss": float(torch.stack(losses).mean()),
                    "lr": optimizer.param_groups[-1]["lr"],
                }
                losses.clear()
                if epoch % every == 0:
                    log.info("epoch %d of %d, loss %.3f", epoch, config.epochs, row["loss"])
                if note is None:
                    continue
                if epoch % every == 0 and epoch < config.epochs:
                    right, seen = judge(_judged(vit, average), test, compute, config.num_workers)
                    row["accuracy"] = right / seen
                    vit.train()
                note(row)
    vit = _judged(vit, average)
    return vit, judge(vit, test, compute, config.num_workers), train


def _judged(vit: VisionTransformer, average: ModelEmaV3 | None) -> VisionTransformer:
    """The weights themselves, or their moving average."""
    return vit if average is None else cast(VisionTransformer, average.module)


def augmentation(config: Any, vit: VisionTransformer) -> Any:
    """RandAugment of the training images, or None."""
    if config.rand_augment is None:
        return None
    if vit.in_chans != 3:
        raise MapetError(f"--rand-augment is for RGB images, this ViT takes {vit.in_chans} channels: leave it out")
    return rand_augment(config.rand_augment, vit.patch_embed.img_size, pixel_stats(3)[0])


def mixup(config: Any, num_classes: int) -> Mixup | None:
    """timm's Mixup and CutMix, as in the released recipe; None if neither is wanted."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes)


@torch.inference_mode()
def judge(vit: VisionTransformer, data: LabelledSet, compute: Compute, workers: int) -> tuple[int, int]:
    """(rightly classified, all) of the centred views."""
    vit.eval()
    height, width = vit.patch_embed.img_size
    labels = torch.from_numpy(data.labels)
    correct = seen = 0
    order = in_order(len(labels), 256)
    for index, images in centred_batches(data.images, (height, width), vit.in_chans, order, workers):
        with compute.autocast():
            logits = vit(normalize(compute.to(images), vit.in_chans))
        correct += int((logits.argmax(1).cpu() == labels[index]).sum())
        seen += len(index)
    return correct, seen
