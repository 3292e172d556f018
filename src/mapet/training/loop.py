"""Pre-training: one loop that reads top to bottom."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from mapet import distributed
from mapet.config.pretrain import PretrainConfig
from mapet.data.census import FEW_IMAGES, few_images
from mapet.data.dataset import Batch, Quarantine, make_loader
from mapet.errors import MapetError, by, counted
from mapet.evaluation.features import normalize
from mapet.evaluation.online import OnlineProbe
from mapet.models.backbone import format_num_params, prepare_for_device, save_backbone
from mapet.models.pretraining import ViTForPreTraining
from mapet.run_state import record
from mapet.signals import stop_signals
from mapet.training.build import build_model
from mapet.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    must_be_same,
    read_state,
    save_checkpoint,
    step_of,
    tensors_of,
)
from mapet.training.loss_monitor import Watch
from mapet.training.metrics import Meter
from mapet.training.nonfinite import WentWrong, save_bundle
from mapet.training.optim import automatic_lr, images_a_step, make_optimizer, make_schedule
from mapet.training.progress import Panel
from mapet.training.run_folder import RunFolder, recipe_to_resume, stopped
from mapet.training.sharding import shard, whole, whole_state
from mapet.training.sizing import automatic_micro_batch
from mapet.training.step import ForwardBackward, all_reduce_gradients, auto_compile
from mapet.training.tracking import require
from mapet.training.training_setup import TrainingSetup

log = logging.getLogger("mapet")


def train(config: PretrainConfig) -> Path:
    """Run `mapet pretrain` with a resolved `PretrainConfig`; returns the folder of the exported backbone."""
    given = config
    require(config.track)
    if config.resume:
        config = recipe_to_resume(config)
        distributed.barrier()  # all have looked before one writes

    # ---- what is learned, and from what
    setting = TrainingSetup.from_config(config)
    config, model, sampler, compute = setting.config, setting.model, setting.sampler, setting.compute

    # ---- how long, how fast
    total_steps = len(sampler)
    assert config.batch_size is not None  # resolved by `Setting`
    share_of_batch = -(-config.batch_size // distributed.world_size())
    micro_batch = config.micro_batch_size or automatic_micro_batch(model, share_of_batch, compute)
    if config.fsdp:
        shard(model, compute)
    compile = auto_compile(config.compile, compute, total_steps, same_shapes=not config.varies_context)
    forward_backward = ForwardBackward(model, compute, micro_batch, compile)
    lr = config.lr or automatic_lr(images_a_step(config.batch_size, len(sampler.indices)))
    optimizer = make_optimizer(model, lr, config.weight_decay)
    warmup_epochs = config.epochs / 30 if config.warmup_epochs is None else config.warmup_epochs
    schedule = make_schedule(optimizer, total_steps, round(warmup_epochs * sampler.steps_per_epoch), config.min_lr)
    log_interval = config.log_interval or min(50, -(-sampler.steps_per_epoch // 5))
    probe = OnlineProbe.for_run(config, setting.images, compute)
    chosen = {"micro_batch_size": micro_batch, "lr": lr, "warmup_epochs": warmup_epochs, "log_interval": log_interval}
    config = config.model_copy(update=chosen)

    with RunFolder(config, compute) as run, stop_signals() as stop:
        meter, watch = Meter(setting.tokenizer.vocab_size, compute.device), Watch(setting.images)
        rolled_back = 0
        made_of = {"tokenizer": setting.tokenizer.hash, "images": setting.images.hash}
        if config.resume:
            if checkpoints(run.checkpoints):
                must_be_same(read_state(run.checkpoints), made_of, config.out)
                state = load_checkpoint(run.checkpoints, model, optimizer, meter=meter, watch=watch)
                sampler.first_step, rolled_back = state["step"], state.get("rolled_back", 0)
                same_for_all(sampler.first_step, run.checkpoints)
                if given.micro_batch_size is None:
                    forward_backward.micro_batch = state.get("micro_batch", micro_batch)
            run.rewind(sampler.first_step)
            log.info("resumed at step %d of %d", sampler.first_step, total_steps)
        description = describe(config, model, len(sampler.indices))
        record(config.out, description=description, hashes=made_of)
        record_data(setting, total_steps)
        log.info("%s, %s", description, compute)
        if len(sampler.indices) < FEW_IMAGES:
            log.warning("%s", few_images(len(sampler.indices)))
        if config.tokens is None and config.target == "tokens":
            log.info("without --tokens the teacher runs in every step, on fresh views; `mapet tokenize` runs it once")
        loader = make_loader(setting.dataset, sampler, config.num_workers, pin_memory=compute.device.type == "cuda")
        quarantine = Quarantine(setting.images, config.max_unreadable, dict(setting.bad))
        saved = time.monotonic()
        step = sampler.first_step

        def save() -> None:
            parts = tensors_of(model, optimizer, meter=meter, watch=watch)
            state = {
                "epochs": config.epochs,
                "rolled_back": rolled_back,
                "micro_batch": forward_backward.micro_batch,
                **made_of,
            }
            if distributed.rank() == 0:
                save_checkpoint(run.checkpoints, step, parts, state, config.keep_checkpoints)
                record(config.out, counts={"steps": step})
            distributed.barrier()

        # ---- the loop
        with Panel(total_steps, step) as panel:
            for batch in meter.time_waiting(loader):
                images, fewest = images_of_all(batch, quarantine)
                if images and (fewest or not config.fsdp):  # a sharded model needs all processes
                    torch.manual_seed(step_seed(config.seed, step))  # dropout depends on the step alone
                    schedule.step_update(step)
                    share = len(batch) / images
                    prediction = forward_backward(setting.prepare_batch(batch, step), share) if share else None
                    all_reduce_gradients(model)
                    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf))
                    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # then it does nothing
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    meter.add(prediction, norm, batch.image_index, share)
                step += 1
                panel.advance()

                epoch, epoch_ended = step // sampler.steps_per_epoch, step % sampler.steps_per_epoch == 0
                if window_ends(step, sampler.steps_per_epoch, log_interval):
                    window = meter.read()
                    metrics = window.metrics | {
                        "epoch": step / sampler.steps_per_epoch,
                        "lr": optimizer.param_groups[0]["lr"],
                    }
                    run.record(step, metrics)
                    panel.show(metrics, epoch_ended)
                    watch.judge(window, step)
                    if watch.streak >= config.max_skipped_steps:
                        before = [path for path in checkpoints(run.checkpoints) if step_of(path) <= step - watch.streak]
                        if rolled_back == config.max_rollbacks or not before:
                            what = f"loss or gradient was not finite in {watch.streak} steps in a row"
                            bundle = save_bundle(setting, step, watch.streak, config.out)
                            raise WentWrong(what, bundle, config, kept=bool(before))
                        state = load_checkpoint(before[0], model, optimizer)
                        rolled_back, watch.streak = rolled_back + 1, 0
                        log.warning(
                            "rolled back to the weights of step %d, with the images from step %d on",
                            state["step"],
                            step,
                        )
                        save()
                if probe and epoch_ended and probe.due(epoch, config.epochs):
                    with meter.not_counted():
                        vit = whole_vit(setting)
                        if distributed.rank() == 0:
                            try:
                                scores = probe(vit)
                            except MapetError as error:  # what is learned goes on
                                log.warning("not probed after epoch %d: %s", epoch, error)
                            else:
                                run.record(step, scores)
                                panel.probed(epoch, scores)
                due = time.monotonic() - saved > 60 * config.checkpoint_interval_min
                stopping, due = any_of_all(bool(stop.signal_name), due)
                if stopping or due or step == total_steps:
                    save()
                    saved = time.monotonic()
                if stopping and step < total_steps:
                    raise stopped(stop.signal_name or "another process", step, total_steps, config.out)

        # ---- the product
        backbone, vit = config.out / "backbone", whole_vit(setting)
        (broken,) = any_of_all(distributed.rank() == 0 and not has_features(vit, setting))
        if broken:
            what = "the ViT gives features that are not finite, so that no backbone is written"
            raise WentWrong(what, save_bundle(setting, step, max(1, watch.streak), config.out), config)
        if distributed.rank() == 0 and not backbone.exists():
            save_backbone(vit.eval().cpu(), backbone)
        log.info("backbone saved in %s", backbone)
        return backbone


def record_data(setting: TrainingSetup, total_steps: int) -> None:
    """Write into run.json what the run is made of: images, tokenizer, and the views of its token store."""
    counts = {"images": len(setting.images), "unreadable": len(setting.bad), "total_steps": total_steps}
    results: dict[str, Any] = {"tokenizer": setting.tokenizer.description}
    if store := setting.dataset.store:
        spec = store.view_spec
        results["views"] = {"kind": spec.kind, "min_scale": spec.min_scale, "number": store.num_views}
    record(setting.config.out, counts=counts, results=results)


def describe(config: PretrainConfig, model: ViTForPreTraining, num_images: int) -> str:
    """The run in one line."""
    most = "up to " if config.varies_context else ""
    what = f"from {model.head.out_features} words" if config.target == "tokens" else f"as {config.target}"
    together = f" on {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    return (
        f"{config.model}, {format_num_params(model.vit)}, {config.objective} on {num_images:,} images of "
        f"{by(model.vit.patch_embed.img_size)} px, {most}{model.num_hidden} of {model.num_patches} patches predicted {what}, "
        f"batch {config.batch_size}{together}, lr {config.lr:.2g}, {counted(config.epochs, 'epoch')}"
    )


def window_ends(step: int, steps_per_epoch: int, log_interval: int) -> bool:
    """Whether figures are due: so many equal parts of an epoch that none has more than `log_interval` steps, and none only a few."""
    in_epoch, parts = (step - 1) % steps_per_epoch + 1, -(-steps_per_epoch // log_interval)
    return in_epoch * parts // steps_per_epoch > (in_epoch - 1) * parts // steps_per_epoch


def whole_vit(setting: TrainingSetup) -> VisionTransformer:
    """The ViT as it is, or, in the first process, put together from its shards; a collective call."""
    if not setting.config.fsdp:
        return setting.model.vit
    weights = whole_state(setting.model.vit)
    vit = build_model(setting.config, setting.tokenizer).vit
    vit.load_state_dict(weights, strict=distributed.rank() == 0)
    return prepare_for_device(vit, setting.compute)


@torch.inference_mode()
def has_features(vit: VisionTransformer, setting: TrainingSetup) -> bool:
    """Whether all numbers that it makes of a few images are finite."""
    batch = setting.dataset.batch(setting.sampler.batch(0)[:8])
    if batch.images is None:
        return True
    return bool(vit.eval().forward_features(normalize(setting.compute.to(batch.images), vit.in_chans)).isfinite().all())


def images_of_all(batch: Batch, quarantine: Quarantine) -> tuple[int, int]:
    """How many images all processes have for this step, and the one with fewest; what one couldn't read, all know."""
    images, bad = distributed.all_gather(torch.tensor([len(batch), len(batch.bad)])).unbind(1)
    if bad.any():
        for found in distributed.all_gather_object(batch.bad):
            quarantine.add(found)
    return int(images.sum()), int(images.min())


def any_of_all(*flags: bool) -> list[bool]:
    """Each flag, if it is up in any process."""
    return [count > 0 for count in distributed.all_reduce(torch.tensor(flags, dtype=torch.int64)).tolist()]


def same_for_all(step: int, folder: Path) -> None:
    """Raises MapetError: the processes found different checkpoints."""
    steps = distributed.all_gather(torch.tensor(step)).tolist()
    if len(set(steps)) > 1:
        raise MapetError(
            f"{folder} is not the same for all processes (steps {steps}): put --out where all of them see it"
        )


def step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
