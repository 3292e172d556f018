"""Supervised fine-tuning in its plain form: mean pooling over the pre-trained norm, a linear head, AdamW, cosine."""

import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from mapet.config.finetune import FinetuneConfig
from mapet.data.augment import rand_augment, seeded
from mapet.data.dataset import EpochSampler, Quarantine, ViewDataset, in_order, make_loader
from mapet.data.views import ViewSpec
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.features import LabelledSet, centred_batches, normalize, train_and_test
from mapet.evaluation.few_shot import few_shot_split
from mapet.models.adapt import input_mean_std
from mapet.models.backbone import load_backbone, prepare_for_device, save_backbone
from mapet.signals import StopRequest, stop_signals
from mapet.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint, tensors_of
from mapet.training.loop import step_seed
from mapet.training.metrics import must_be_finite
from mapet.training.optim import images_a_step, make_optimizer, make_schedule
from mapet.training.run_folder import RunFolder, stopped
from mapet.training.tracking import require

log = logging.getLogger("mapet")
STAGE = "finetune"
PAPER_LR, PAPER_BATCH = 5e-4, 512
LEAST_LR = 3e-4
"""Of the automatic ones: in few small batches a lower rate gets nowhere, a higher one forgets what pre-training learned."""
KEEP_CHECKPOINTS = 2


class Tuned(NamedTuple):
    """What comes of it.

    Attributes:
        right, seen: test images that are classified rightly, and all.
        guess: share of the test images that are of the commonest class.
        stopped: the signal that asked to stop when there was nothing left to stop, or ''.
    """

    vit: VisionTransformer
    right: int
    seen: int
    train: LabelledSet
    guess: float
    stopped: str


class Losses:
    """Of the steps since the epoch began, on the device so that no step waits for them."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def mean(self) -> float:
        return float(torch.stack(self.values).mean())

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": torch.stack(self.values)} if self.values else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.values = list(state["values"]) if state else []


def finetune_vit(config: FinetuneConfig) -> Tuned:
    """Train on the labels that `FinetuneConfig` grants.

    With `out`, metrics.jsonl gets each epoch's mean loss and learning rate, and about ten times the accuracy on the test
    images, which nothing is chosen by; the model is saved in out/model.
    """
    require(config.track)

    # ---- what is learned, and from what
    compute = Compute.choose(config.device, config.precision)
    train, test = train_and_test(config.images, config.test_images)
    if config.labels_per_class or config.label_fraction < 1:
        try:
            train = train.subset(few_shot_split(train, config.labels_per_class or config.label_fraction, config.seed))
        except MapetError as error:
            held = (
                ""
                if config.test_images
                else "; a fifth of --images is held out to test on, for there are no --test-images"
            )
            raise MapetError(f"{error}{held}") from None
    torch.manual_seed(config.seed)
    # `fc_norm=False`: the norm that pre-training learned stays, before the pooling.
    options = config.model_args | {
        "num_classes": len(train.classes),
        "global_pool": "avg",
        "fc_norm": False,
        "drop_path_rate": config.drop_path,
    }
    vit = prepare_for_device(load_backbone(config.backbone, pretrained=not config.from_scratch, **options), compute)
    height, width = vit.patch_embed.img_size
    spec = ViewSpec(kind=config.views, image_size=(height, width), min_scale=config.min_crop_scale, seed=config.seed)
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
    quarantine = Quarantine(train.images, config.max_unreadable)
    labels = torch.from_numpy(train.labels)

    # ---- how long, how fast
    most = PAPER_BATCH if compute.device.type != "cpu" else 128
    batch_size = config.batch_size or min(max(8, min(most, len(train.labels) // 10)), len(train.labels))
    sampler = EpochSampler(torch.arange(len(train.labels)).numpy(), batch_size, config.epochs, config.seed)
    total_steps = len(sampler)
    lr = config.lr or max(LEAST_LR, PAPER_LR * math.sqrt(images_a_step(batch_size, len(train.labels)) / PAPER_BATCH))
    optimizer = make_optimizer(vit, lr, config.weight_decay, config.layer_decay)
    warmup = config.epochs / 10 if config.warmup_epochs is None else config.warmup_epochs
    schedule = make_schedule(optimizer, total_steps, round(warmup * sampler.steps_per_epoch), config.min_lr)
    average = ModelEmaV3(vit, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    every = max(1, config.epochs // 10)
    config = config.model_copy(update={"batch_size": batch_size, "lr": lr, "warmup_epochs": warmup})

    folder = RunFolder(config, compute, STAGE) if config.out else nullcontext()
    with folder as run, stop_signals() if config.out else nullcontext(StopRequest()) as stop:
        losses = Losses()
        others = {"losses": losses} | ({"average": average} if average is not None else {})
        if run is not None and config.resume:
            if checkpoints(run.checkpoints):
                sampler.first_step = load_checkpoint(run.checkpoints, vit, optimizer, **others)["step"]
            run.rewind(sampler.first_step)
            log.info("resumed at step %d of %d", sampler.first_step, total_steps)
        log.info(
            "fine-tuning %s on %s images, %d classes, batch %d, lr %.2g",
            "from scratch" if config.from_scratch else config.backbone,
            f"{len(labels):,}",
            len(train.classes),
            batch_size,
            lr,
        )
        loader = make_loader(dataset, sampler, config.num_workers)
        saved = time.monotonic()
        step = sampler.first_step

        # ---- the loop
        vit.train()
        with tqdm(total=total_steps, initial=step, desc="fine-tune", unit="step", disable=None, smoothing=0.05) as bar:
            for batch in loader:
                quarantine.add(batch.bad)
                if batch.images is not None:
                    torch.manual_seed(step_seed(config.seed, step))  # what is drawn depends on the step alone
                    schedule.step_update(step)
                    pixels = normalize(compute.to(batch.images), vit.in_chans, batch.jitter)
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
                    losses.values.append(loss.detach())
                step += 1
                bar.update()

                if losses.values and step % sampler.steps_per_epoch == 0:
                    epoch = step // sampler.steps_per_epoch
                    row = {"epoch": epoch, "loss": losses.mean(), "lr": optimizer.param_groups[-1]["lr"]}
                    losses.values.clear()
                    must_be_finite(row["loss"], step, lr)
                    if epoch % every == 0:
                        log.info("epoch %d of %d, loss %.3f", epoch, config.epochs, row["loss"])
                    if run is not None:
                        if epoch % every == 0 and epoch < config.epochs:
                            right, seen = judge(_judged(vit, average), test, compute, config.num_workers)
                            row["accuracy"] = right / seen
                            vit.train()
                        run.record(step, row)
                due = (
                    stop.signal_name
                    or time.monotonic() - saved > 60 * config.checkpoint_interval_min
                    or step == total_steps
                )
                if run is not None and due:
                    save_checkpoint(run.checkpoints, step, tensors_of(vit, optimizer, **others), {}, KEEP_CHECKPOINTS)
                    saved = time.monotonic()
                if stop.signal_name and step < total_steps:
                    raise stopped(stop.signal_name, step, total_steps, config.out or Path(), STAGE)

        # ---- the product
        vit = _judged(vit, average)
        right, seen = judge(vit, test, compute, config.num_workers)
        if run is not None and config.out is not None:
            run.record(total_steps, {"epoch": config.epochs, "accuracy": right / seen})
            if not (config.out / "model").exists():
                save_backbone(vit.cpu(), config.out / "model")
            log.info("model in %s", config.out / "model")
    guess = float(np.bincount(test.labels).max()) / len(test.labels)
    return Tuned(vit, right, seen, train, guess, stop.signal_name)


def _judged(vit: VisionTransformer, average: ModelEmaV3 | None) -> VisionTransformer:
    """The weights themselves, or their moving average."""
    return vit if average is None else cast(VisionTransformer, average.module)


def augmentation(config: FinetuneConfig, vit: VisionTransformer) -> Any:
    """RandAugment of the training images, or None."""
    if config.rand_augment is None:
        return None
    if vit.in_chans != 3:
        raise MapetError(f"--rand-augment is for RGB images, this ViT takes {vit.in_chans} channels: leave it out")
    return rand_augment(config.rand_augment, vit.patch_embed.img_size, input_mean_std(3)[0])


def mixup(config: FinetuneConfig, num_classes: int) -> Mixup | None:
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
