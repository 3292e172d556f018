"""What the stages will cost on this machine: one batch through teacher and student."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mapet.config.data import CheckConfig
from mapet.config.pretraining import PretrainConfig
from mapet.data.dataset import Batch, ViewDataset
from mapet.data.image_list import ImageList
from mapet.data.views import ViewSpec, normalize
from mapet.device import ComputeContext
from mapet.errors import MapetError, option, pluralize
from mapet.models.backbone import create_vit, format_num_params, num_parameters, prepare_for_device
from mapet.models.objectives import MAPET, num_context_from_ratio
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.kmeans import default_vocab_size
from mapet.tokenizers.tokenizer import load_tokenizer, make_teacher
from mapet.training.metrics import format_duration
from mapet.training.step import ForwardBackward
from mapet.training.tasks.pretraining import activation_bytes_per_image, auto_batch_size, auto_micro_batch, build_model

TRIED, EPOCHS = 16, PretrainConfig.model_fields["epochs"].default


def estimate(config: CheckConfig, images: ImageList, usable: list[int]) -> Iterator[str]:
    """Lines of the report, for a resolved `CheckConfig` and the indices of the readable images."""
    compute, count = ComputeContext.from_options(), len(usable)
    sizes = config.image_size, config.patch_size, config.channels
    vit = create_vit(config.model, *sizes, config.model_args)
    num_patches, grid = vit.patch_embed.num_patches, tuple(vit.patch_embed.grid_size)
    vocab_size = default_vocab_size(count * num_patches)
    teacher = make_teacher(config.teacher, *sizes, config.teacher_checkpoint, precision=compute.precision)
    teacher = teacher.to(compute.device)
    model = prepare_for_device(ViTForPreTraining(vit, vocab_size, MAPET, round(num_patches / 4)), compute)
    spec = ViewSpec(image_size=config.image_size)
    dataset = ViewDataset(images, spec, config.channels, config.image_size, teacher.image_size, grid=grid)
    started = time.monotonic()
    batch = dataset.batch([(0, index) for index in (usable * TRIED)[:TRIED]])
    read = (time.monotonic() - started) / TRIED
    if batch.images is None or batch.teacher_images is None:
        raise MapetError("the images of the dry run could not be read a second time: are they changing?")
    views, pixels = compute.to(batch.teacher_images), normalize(compute.to(batch.images), config.channels)
    targets = torch.zeros(len(batch), num_patches, dtype=torch.int64)
    batch = replace(batch, images=pixels, targets=targets).to(compute.device)
    step = ForwardBackward(model, compute, auto_micro_batch(model, TRIED, compute))
    teaching = _seconds(lambda: teacher(views), compute) / TRIED
    training = _seconds(lambda: step(batch), compute) / TRIED
    with torch.inference_mode():
        features = teacher(views[:1]).shape[1]
    batch_size, points = auto_batch_size(model, count, compute), min(512 * vocab_size, count * num_patches)
    memory = auto_micro_batch(model, batch_size, compute) * activation_bytes_per_image(
        model, compute
    ) + 16 * num_parameters(model)
    fitting, tokenizing = (n * max(teaching, read) for n in (min(count, points / num_patches), count))
    epoch = count * max(training, read)
    yield f"dry run on {compute}: {config.model}, {format_num_params(vit)}, {num_patches} patches, V = {vocab_size}"
    yield f"  reading        {1 / read:,.0f} images/s a process"
    yield f"  fit-tokenizer  about {format_duration(fitting)} for features, {points * features * 2 / 1e9:.2f} GB of them ({option('memory_gb')})"
    yield f"  tokenize       {1 / teaching:,.0f} images/s, about {format_duration(tokenizing)}, {count * num_patches * 2 / 1e6:,.1f} MB on disk"
    yield (
        f"  pretrain       {1 / training:,.0f} images/s, about {format_duration(epoch)} an epoch, {format_duration(EPOCHS * epoch)} for "
        f"{pluralize(EPOCHS, 'epoch')}; automatic batch {batch_size}, about {memory / 1e9:.1f} GB"
    )


def flops_per_image(config: PretrainConfig) -> float:
    """Operations of the student's forward and backward pass for one image, counted by PyTorch as they are computed.

    Args:
        config: of a drawn ratio the mean over its range counts.
    """
    model = build_model(config, load_tokenizer(config.tokenizer, with_teacher=False)).to("meta").train()
    contexts = [model.num_context]
    low, high = config.mask_ratio
    if low < high:
        contexts = [num_context_from_ratio(low + (high - low) * (i + 0.5) / 8, model.num_patches) for i in range(8)]
    return training_flops(model, contexts)


def training_flops(model: ViTForPreTraining, contexts: list[int]) -> float:
    """The same of a model on the meta device: the mean over passes with these c."""
    images = torch.empty(1, model.vit.in_chans, *model.vit.patch_embed.img_size)
    permutation = torch.zeros(1, model.num_patches, dtype=torch.int64)
    targets = permutation if model.target == "tokens" else torch.empty(1, model.num_patches, model.head.out_features)
    with FlopCounterMode(display=False) as counter:
        for c in contexts:
            indices = model.sample_target_indices(c, seed=[0])
            batch = Batch(permutation[:, 0], images, None, targets, permutation, num_context=c, target_indices=indices)
            model(batch.to(torch.device("meta"))).loss.backward()
    return counter.get_total_flops() / len(contexts)


def _seconds(work: Callable[[], Any], compute: ComputeContext) -> float:
    """Time of the second call."""
    for _ in range(2):
        started = time.monotonic()
        work()
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
    return time.monotonic() - started
