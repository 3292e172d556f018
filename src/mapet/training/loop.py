"""Pre-training: one loop that reads top to bottom."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mapet.compute import Compute
from mapet.data.dataset import Batch, EpochSampler, Quarantine, ViewDataset, make_loader
from mapet.data.image_list import ImageList, scan
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec
from mapet.errors import Interrupted, MapetError
from mapet.evaluation.features import normalize
from mapet.evaluation.online import OnlineProbe
from mapet.model.backbone import num_parameters, on_device, save_backbone
from mapet.model.objective import num_context_of
from mapet.model.pretrainer import Pretrainer
from mapet.model.target import normalized_patches
from mapet.tokenizer.codebook import Tokenizer, load_tokenizer
from mapet.training.build import build_model, by
from mapet.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mapet.training.metrics import Meter
from mapet.training.optim import automatic_lr, make_optimizer, make_schedule
from mapet.training.run_folder import RunFolder, recipe_to_resume
from mapet.training.sizing import automatic_batch_size, automatic_micro_batch
from mapet.training.step import GradientStep, automatic_compile

log = logging.getLogger("mapet")


def train(config: Any) -> Path:
    """Run `mapet pretrain` with a resolved `PretrainConfig`; returns the folder of the exported backbone."""
    if config.resume:
        config = recipe_to_resume(config)

    # ---- what is learned, and from what
    compute = Compute.choose(config.device, config.precision)
    images = scan(config.images)
    tokenizer = load_tokenizer(
        config.tokenizer, with_teacher=config.tokens is None or config.target == "features", allow=config.teacher
    ).to(compute.device)
    store = None if config.tokens is None else TokenStore.open(config.tokens, images, tokenizer.hash)
    model = on_device(build_model(config, tokenizer), compute)

    # ---- how long, how fast
    usable = np.setdiff1d(np.arange(len(images)), list(store.bad) if store else [])
    batch_size = config.batch_size or automatic_batch_size(model, len(usable), compute)
    sampler = EpochSampler(usable, batch_size, config.epochs, config.seed)
    total_steps = len(sampler)
    micro_batch = config.micro_batch or automatic_micro_batch(model, batch_size, compute)
    gradient_step = GradientStep(model, compute, micro_batch, automatic_compile(config.compile, compute))
    lr = config.lr or automatic_lr(batch_size)
    optimizer = make_optimizer(model, lr, config.weight_decay)
    warmup_epochs = config.epochs / 30 if config.warmup_epochs is None else config.warmup_epochs
    schedule = make_schedule(optimizer, total_steps, round(warmup_epochs * sampler.steps_per_epoch), config.min_lr)
    log_every = config.log_every or min(50, -(-sampler.steps_per_epoch // 5))
    probe = OnlineProbe.for_run(config, images, compute)
    config = config.model_copy(
        update=resolved(
            config,
            model,
            batch_size=batch_size,
            micro_batch=micro_batch,
            lr=lr,
            warmup_epochs=warmup_epochs,
            log_every=log_every,
        )
    )

    with RunFolder(config, compute) as run, stop_signals() as stop:
        if config.resume:
            if checkpoints(run.checkpoints):
                sampler.first_step = load_checkpoint(run.checkpoints, model, optimizer)["step"]
            run.rewind(sampler.first_step)
            log.info("resumed at step %d of %d", sampler.first_step, total_steps)
        log.info("%s, %s", describe(config, model, len(usable)), compute)
        dataset = training_views(config, images, tokenizer, store, model)
        loader = make_loader(dataset, sampler, config.num_workers, pin_memory=compute.device.type == "cuda")
        quarantine = Quarantine(images, config.max_bad, dict(store.bad) if store else {})
        meter = Meter(tokenizer.vocab_size, compute.device)
        saved = time.monotonic()
        step, norm = sampler.first_step, torch.zeros(())

        # ---- the loop
        with tqdm(
            total=total_steps,
            initial=step,
            desc="pretrain",
            unit="step",
            disable=None,
            smoothing=0.05,
            dynamic_ncols=True,
        ) as bar:
            for batch in meter.time_waiting(loader):
                quarantine.add(batch.bad)
                if batch.image is not None:
                    torch.manual_seed(step_seed(config.seed, step))  # stochastic depth depends on the step alone
                    schedule.step_update(step)
                    inputs = model_input(batch, tokenizer, model, compute)
                    prediction = gradient_step(*inputs, draw_context(config, model, step))
                    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    meter.add(prediction, norm)
                step += 1
                bar.update()

                epoch, epoch_ended = step // sampler.steps_per_epoch, step % sampler.steps_per_epoch == 0
                if step % log_every == 0 or epoch_ended:
                    metrics = meter.read() | {
                        "epoch": step / sampler.steps_per_epoch,
                        "lr": optimizer.param_groups[0]["lr"],
                    }
                    run.record(step, metrics)
                    bar.set_postfix_str(Meter.line(metrics), refresh=False)
                    if bar.disable and epoch_ended:
                        log.info("epoch %d: %s", epoch, Meter.line(metrics))
                    must_be_finite(metrics["loss"], "loss", step, lr)
                if probe and epoch_ended and probe.due(epoch, config.epochs):
                    with meter.not_counted():
                        scores = probe(model.vit)
                    run.record(step, scores)
                    log.info("epoch %d: %s", epoch, OnlineProbe.line(scores))
                due = time.monotonic() - saved > 60 * config.save_minutes
                if stop.asked or due or step == total_steps:
                    must_be_finite(float(norm), "gradient norm", step, lr)
                    save_checkpoint(
                        run.checkpoints, step, model, optimizer, {"epochs": config.epochs}, config.keep_checkpoints
                    )
                    saved = time.monotonic()
                if stop.asked and step < total_steps:
                    recipe = config.out / "config.yaml"
                    raise Interrupted(
                        f"stopped by {stop.asked} at step {step} of {total_steps}, saved. Go on with: mapet pretrain {recipe} --resume"
                    )

        # ---- the product
        backbone = config.out / "backbone"
        if not backbone.exists():
            save_backbone(model.vit.eval().cpu(), backbone)
        log.info("backbone saved in %s", backbone)
        return backbone


def resolved(config: Any, model: Pretrainer, **chosen: Any) -> dict[str, Any]:
    """Values of the options that were automatic, for the run's recipe."""
    patches = model.vit.patch_embed
    return {
        "image_size": tuple(patches.img_size),
        "patch_size": patches.patch_size[0],
        **({} if config.predict_ratio else {"num_context": model.num_context}),
        **chosen,
    }


def describe(config: Any, model: Pretrainer, num_images: int) -> str:
    """The run in one line."""
    most = "up to " if config.predict_ratio and config.predict_ratio[0] < config.predict_ratio[1] else ""
    what = f"from {model.head.out_features} words" if config.target == "tokens" else f"as {config.target}"
    return (
        f"{config.model}, {num_parameters(model.vit) / 1e6:.1f} M parameters, {config.objective} on {num_images:,} images of "
        f"{by(config.image_size)} px, {most}{model.num_predicted} of {model.num_patches} patches predicted {what}, "
        f"batch {config.batch_size}, lr {config.lr:.2g}, {config.epochs} epochs"
    )


def must_be_finite(value: float, name: str, step: int, lr: float) -> None:
    """Stop rather than train on, or save, numbers that went wrong."""
    if not math.isfinite(value):
        raise MapetError(
            f"the {name} is {value} at step {step}: the last checkpoint is from before. Start again with a lower --lr (now "
            f"{lr:.2g}) or --precision float32, --init-from what was learned"
        )


def training_views(
    config: Any, images: ImageList, tokenizer: Tokenizer, store: TokenStore | None, model: Pretrainer
) -> ViewDataset:
    """The student's views, with tokens from the store or the teacher's views to make them of."""
    height, width = model.vit.patch_embed.img_size
    spec = (
        store.view_spec
        if store
        else ViewSpec(kind=config.views, image_size=(height, width), min_scale=config.min_scale, seed=config.seed)
    )
    return ViewDataset(
        images,
        spec,
        channels=model.vit.in_chans,
        image_size=(height, width),
        teacher_size=None if tokenizer.teacher is None else tokenizer.teacher.image_size,
        store=store,
        grid=tuple(model.vit.patch_embed.grid_size),
        order=config.order,
        jitter=config.color_jitter,
        seed=config.seed,
    )


def model_input(
    batch: Batch, tokenizer: Tokenizer, model: Pretrainer, compute: Compute
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normalised images, targets, permutation) on the device."""
    assert batch.image is not None and batch.permutation is not None
    images = normalize(compute.to(batch.image), model.vit.in_chans, batch.jitter)
    views = None if batch.teacher_image is None else compute.to(batch.teacher_image)
    if model.target == "pixels":
        targets = normalized_patches(images, model.vit.patch_embed.grid_size)
    elif model.target == "features":
        assert tokenizer.teacher is not None and views is not None
        targets = tokenizer.teacher(views).flatten(2).transpose(1, 2)
    elif batch.tokens is not None:
        targets = compute.to(batch.tokens)
    else:
        targets = tokenizer(views).flatten(1)
    return images, targets, compute.to(batch.permutation)


def draw_context(config: Any, model: Pretrainer, step: int) -> int:
    """c of a step: fixed, or drawn from (seed, step) alone."""
    low, high = config.predict_ratio or (0.0, 0.0)
    if low == high:
        return model.num_context
    return num_context_of(np.random.default_rng([config.seed, step, 1]).uniform(low, high), model.num_patches)


def step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


class StopRequest:
    """`asked` names the signal that asked the run to stop, '' while none has."""

    asked = ""


@contextmanager
def stop_signals(then: str = "saving after this step") -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one interrupts at once. `then` says what comes first."""
    request = StopRequest()
    old = {}

    def handle(number: int, frame: Any) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = signal.Signals(number).name
        log.warning("%s: %s (again to stop at once)", request.asked, then)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
