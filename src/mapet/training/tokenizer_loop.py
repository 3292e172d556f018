"""Training a VQ-KD tokenizer (BEiT v2, arXiv 2208.06366): a small sibling of `loop`."""

import logging
import math
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from mapet.config.train_tokenizer import TrainTokenizerConfig
from mapet.data.dataset import Batch, EpochSampler, Quarantine, ViewDataset, in_order, make_loader
from mapet.data.sources import scan
from mapet.data.views import ViewSpec
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.files import atomic, write_json, write_tensors
from mapet.models.backbone import create_vit, format_num_params, prepare_for_device
from mapet.signals import stop_signals
from mapet.tokenizers.codebook import CodebookStats
from mapet.tokenizers.extract import teacher_features
from mapet.tokenizers.kmeans import automatic_vocab_size
from mapet.tokenizers.teacher import Teacher, make_teacher
from mapet.tokenizers.vqkd import DESCRIPTION, FORMAT
from mapet.tokenizers.vqkd_training import Distillation, VQKDTraining
from mapet.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint, tensors_of
from mapet.training.loop import step_seed
from mapet.training.metrics import must_be_finite
from mapet.training.optim import make_optimizer, make_schedule
from mapet.training.run_folder import RunFolder, recipe_to_resume, stopped
from mapet.training.tracking import require

log = logging.getLogger("mapet")
STAGE = "train-tokenizer"
PAPER_LR, PAPER_BATCH, PAPER_BETAS = 2e-4, 512, (0.9, 0.99)
POINTS_PER_CODE = 16
"""Patches that the first codes are k-means centroids of, for each code."""
JUDGED = 10_000
"""Most images that the finished tokenizer is judged on."""


def train_vqkd(config: TrainTokenizerConfig) -> Path:
    """Run `mapet train-tokenizer` with a resolved `TrainTokenizerConfig`; returns the safetensors file."""
    require(config.track)
    if config.resume:
        config = recipe_to_resume(config, STAGE)

    # ---- what is learned, and from what
    compute = Compute.choose(config.device, config.precision)
    images = scan(config.images)
    teacher = make_teacher(
        config.teacher, config.image_size, config.patch_size, config.channels, config.teacher_checkpoint,
        config.teacher_image_size, config.teacher_layer, compute.precision, config.teacher_final_norm,
    ).to(compute.device)  # fmt: skip
    views = ViewSpec(kind=config.views, image_size=config.image_size, min_scale=config.min_crop_scale, seed=config.seed)
    dataset = ViewDataset(
        images, views, config.channels, image_size=config.image_size, teacher_size=teacher.image_size, seed=config.seed
    )
    quarantine = Quarantine(images, config.max_unreadable)
    num_patches = math.prod(teacher.grid)
    vocab_size = config.vocab_size or automatic_vocab_size(num_patches * len(images))
    if vocab_size > num_patches * len(images):
        raise MapetError(f"V = {vocab_size} codes for {num_patches * len(images):,} patches: lower --vocab-size")
    model = prepare_for_device(build_vqkd(config, vocab_size, num_features(teacher, config.channels, compute)), compute)

    # ---- how long, how fast
    sampler = EpochSampler(np.arange(len(images)), config.batch_size, config.epochs, config.seed)
    total_steps = len(sampler)
    lr = config.lr or PAPER_LR * math.sqrt(config.batch_size / PAPER_BATCH)
    optimizer = make_optimizer(model, lr, config.weight_decay)
    for group in optimizer.param_groups:
        group["betas"] = PAPER_BETAS
    warmup_epochs = config.epochs / 10 if config.warmup_epochs is None else config.warmup_epochs
    schedule = make_schedule(optimizer, total_steps, round(warmup_epochs * sampler.steps_per_epoch), config.min_lr)
    log_interval = config.log_interval or min(50, sampler.steps_per_epoch)
    config = config.model_copy(
        update={"vocab_size": vocab_size, "lr": lr, "warmup_epochs": warmup_epochs, "log_interval": log_interval}
    )

    with RunFolder(config, compute, STAGE) as run, stop_signals() as stop:
        if config.resume:
            if checkpoints(run.checkpoints):
                sampler.first_step = load_checkpoint(run.checkpoints, model, optimizer)["step"]
            run.rewind(sampler.first_step)
            log.info("resumed at step %d of %d", sampler.first_step, total_steps)
        log.info(
            "VQ-KD, %s with %s, %d codes, teacher %s, %s images of %d px, batch %d, lr %.2g, %d epochs, %s",
            config.model, format_num_params(model), vocab_size, teacher.name, f"{len(images):,}", config.image_size[0],
            config.batch_size, lr, config.epochs, compute,
        )  # fmt: skip
        if sampler.first_step == 0:
            first = -(-POINTS_PER_CODE * vocab_size // (num_patches * config.batch_size))
            batches = list(islice(sampler, first))
            loader = make_loader(dataset, batches, config.num_workers)
            model.start_codebook(encoded(model, loader, quarantine, compute), config.seed)
            log.info("codebook started by k-means on %d batches", len(batches))
        loader = make_loader(dataset, sampler, config.num_workers, pin_memory=compute.device.type == "cuda")
        meter = CodeMeter(vocab_size, compute.device)
        saved = time.monotonic()
        step, loss = sampler.first_step, torch.zeros(())

        # ---- the loop
        model.train()
        with tqdm(total=total_steps, initial=step, desc=STAGE, unit="step", disable=None, smoothing=0.05) as bar:
            for batch in loader:
                quarantine.add(batch.bad)
                if batch.images is not None:
                    torch.manual_seed(step_seed(config.seed, step))  # for stochastic depth and reborn codes
                    schedule.step_update(step)
                    result = distill(model, teacher, batch, dataset, compute)
                    result.loss.backward()
                    loss = result.loss.detach()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    meter.add(result, model.update_codebook(result.features, result.codes), len(batch.images))
                step += 1
                bar.update()

                if meter.steps and (step % log_interval == 0 or step == total_steps):  # else no image could be read
                    metrics = meter.read() | {"lr": optimizer.param_groups[0]["lr"]}
                    run.record(step, metrics)
                    bar.set_postfix_str(CodeMeter.line(metrics), refresh=False)
                    if bar.disable:
                        log.info("step %d of %d: %s", step, total_steps, CodeMeter.line(metrics))
                    must_be_finite(metrics["loss"], step, lr)
                if (
                    stop.signal_name
                    or time.monotonic() - saved > 60 * config.checkpoint_interval_min
                    or step == total_steps
                ):
                    must_be_finite(float(loss), step, lr)
                    parts = tensors_of(model, optimizer)
                    save_checkpoint(run.checkpoints, step, parts, {"epochs": config.epochs}, config.keep_checkpoints)
                    saved = time.monotonic()
                if stop.signal_name and step < total_steps:
                    raise stopped(stop.signal_name, step, total_steps, config.out, STAGE)

        # ---- the product
        judgement = judge(model, teacher, dataset, quarantine, compute, config)
        log.info("VQ-KD tokenizer: 1 - cosine %.3f; %s", judgement["reconstruction"], judgement["summary"])
        product = config.out / "vqkd"
        if not product.exists():
            save_vqkd(model, product, describe(config, teacher, images.hash, len(images), judgement))
        file = product / "vqkd.safetensors"
        log.info("saved %s: mapet fit-tokenizer --teacher vqkd --teacher-checkpoint %s", product, file)
        return file


def build_vqkd(config: TrainTokenizerConfig, vocab_size: int, feature_size: int) -> VQKDTraining:
    """The untrained model of a config, from its seed."""
    torch.manual_seed(config.seed)
    encoder = create_vit(
        config.model, config.image_size, config.patch_size, config.channels, config.model_args, config.drop_path
    )
    return VQKDTraining(
        encoder,
        vocab_size,
        config.codebook_dim,
        feature_size,
        config.decoder_depth,
        config.ema_decay,
        config.dead_code_threshold,
    )


def num_features(teacher: Teacher, channels: int, compute: Compute) -> int:
    """F of a teacher, from a black image."""
    black = torch.zeros(1, channels, *teacher.image_size, dtype=torch.uint8)
    return teacher(compute.to(black)).shape[1]


def distill(
    model: VQKDTraining, teacher: Teacher, batch: Batch, dataset: ViewDataset, compute: Compute
) -> Distillation:
    """The losses of a batch."""
    assert batch.images is not None
    # A clone: what inference made takes part in no backward pass.
    targets = teacher_features(teacher, batch, dataset.images, compute).clone()
    with compute.autocast():
        return model(pixels(batch, compute), targets)


def pixels(batch: Batch, compute: Compute) -> Float[Tensor, "B C H W"]:
    """The encoder's input, in [0, 1]."""
    assert batch.images is not None
    return compute.to(batch.images).to(torch.float32, memory_format=torch.contiguous_format) / 255


@torch.no_grad()
def encoded(model: VQKDTraining, loader: Any, quarantine: Quarantine, compute: Compute) -> Float[Tensor, "n d"]:
    """The unit vectors of all patches of some batches."""
    model.eval()
    vectors = []
    for batch in tqdm(loader, desc="first codes", unit="batch", disable=None, leave=False):
        quarantine.add(batch.bad)
        if batch.images is not None:
            with compute.autocast():
                vectors.append(model.tokenizer(pixels(batch, compute)).movedim(1, -1).flatten(0, 2))
    return torch.cat(vectors)


@torch.no_grad()
def judge(
    model: VQKDTraining,
    teacher: Teacher,
    dataset: ViewDataset,
    quarantine: Quarantine,
    compute: Compute,
    config: TrainTokenizerConfig,
) -> dict[str, Any]:
    """The finished tokenizer on the centred views of the images it was trained on, at most `JUDGED` of them."""
    model.eval()
    centred = ViewDataset(
        dataset.images, ViewSpec(image_size=config.image_size), config.channels, config.image_size, teacher.image_size
    )
    order = np.random.default_rng(config.seed).permutation(len(dataset))[:JUDGED]
    batches = [[(0, int(order[i])) for _, i in batch] for batch in in_order(len(order), config.batch_size)]
    counts = torch.zeros(model.usage.numel(), dtype=torch.int64, device=compute.device)
    reconstruction, error, mean, patches = 0.0, 0.0, torch.zeros(config.codebook_dim, dtype=torch.float64), 0
    for batch in tqdm(make_loader(centred, batches, config.num_workers), desc="judge", unit="batch", disable=None):
        quarantine.add(batch.bad)
        if batch.images is not None:
            result = distill(model, teacher, batch, centred, compute)
            counts += torch.bincount(result.codes, minlength=len(counts))
            reconstruction += float(result.reconstruction) * len(result.codes)
            error += float(result.commitment) * config.codebook_dim * len(result.codes)
            mean += result.features.sum(0).double().cpu()
            patches += len(result.codes)
    variance = 1 - float((mean / patches).square().sum())  # unit vectors: their mean square is 1
    stats = CodebookStats.from_counts(counts.cpu(), error / patches / variance if variance > 0 else 0.0)
    return {"reconstruction": reconstruction / patches, "codebook_stats": asdict(stats), "summary": str(stats)}


def describe(
    config: TrainTokenizerConfig, teacher: Teacher, images_hash: str, num_images: int, judgement: dict[str, Any]
) -> dict[str, Any]:
    """The content of `vqkd.json`."""
    training = config.model_dump(mode="json", exclude={"images", "out", "resume", "device", "workers"})
    return {
        "format_version": FORMAT,
        "image_size": list(config.image_size),
        "patch_size": config.patch_size,
        "vocab_size": config.vocab_size,
        "code_dim": config.codebook_dim,
        "teacher": teacher.settings,
        "teacher_weights_hash": teacher.weights_hash,
        "teacher_metadata": teacher.metadata,
        "reconstruction": judgement["reconstruction"],
        "codebook_stats": judgement["codebook_stats"],
        "training": training | {"images_hash": images_hash, "num_images": num_images},
    }


def save_vqkd(model: VQKDTraining, folder: Path, description: dict[str, Any]) -> None:
    """Write `vqkd.safetensors` (in the published layout) and `vqkd.json`, both or neither, as a new folder."""
    with atomic(folder) as temporary:
        temporary.mkdir()
        write_tensors(temporary / "vqkd.safetensors", model.weights())
        write_json(temporary / DESCRIPTION, description)


class CodeMeter:
    """Running figures since the last `read`, kept on the device so that steps don't wait for them."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts: Int[Tensor, " K"] = torch.zeros(vocab_size, dtype=torch.int64, device=device)
        self._sums = torch.zeros(4, device=device)
        self._reset()

    def _reset(self) -> None:
        self._counts.zero_()
        self._sums.zero_()
        self.steps = self._images = 0
        self._started = time.monotonic()

    def add(self, result: Distillation, reborn: Tensor, images: int) -> None:
        losses = [result.loss.detach(), result.reconstruction.detach(), result.commitment.detach(), reborn]
        self._sums += torch.stack([value.float() for value in losses])
        self._counts += torch.bincount(result.codes, minlength=len(self._counts))
        self.steps += 1
        self._images += images

    def read(self) -> dict[str, float]:
        """Figures since the last call, in which there was a step.

        loss: of the step. reconstruction: 1 - cosine. commitment: mean square. code_usage: share of the codes that a patch
        had. perplexity: exp of the entropy of the codes' frequencies, K at most. reborn: dead codes that were given a new
        place.
        """
        loss, reconstruction, commitment, reborn = self._sums.tolist()
        share = self._counts.cpu().double() / max(1, int(self._counts.sum()))
        metrics = {
            "loss": loss / self.steps,
            "reconstruction": reconstruction / self.steps,
            "commitment": commitment / self.steps,
            "code_usage": float((share > 0).double().mean()),
            "perplexity": float(torch.special.entr(share).sum().exp()),
            "reborn": reborn,
            "images_per_second": self._images / max(1e-9, time.monotonic() - self._started),
        }
        self._reset()
        return metrics

    @staticmethod
    def line(metrics: dict[str, float]) -> str:
        """The figures a person watches."""
        return (
            f"loss {metrics['loss']:.3f} (1 - cosine {metrics['reconstruction']:.3f}), {metrics['code_usage']:.0%} of codes "
            f"used, perplexity {metrics['perplexity']:.0f}, {metrics['images_per_second']:.0f} img/s"
        )
