"""What the commands will cost on this machine, from one batch through teacher and student; FLOPs of a pre-training step."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from mapet.config.data import CheckConfig
from mapet.config.pretraining import PretrainConfig
from mapet.config.tokenizers import FitTokenizerConfig, TeacherOptions
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
from mapet.training.step import ForwardBackward, auto_micro_batch
from mapet.training.tasks.pretraining import activation_bytes_per_image, auto_batch_size, build_model

NUM_BENCHMARK_IMAGES = 16
"""Images of the batch that is timed."""
EPOCHS = PretrainConfig.model_fields["epochs"].default
"""Epochs of a pre-training run unless the user gives another number."""
PATCHES_PER_CODE = FitTokenizerConfig.model_fields["patches_per_code"].default
"""Patches per code that `fit-tokenizer` fits k-means to unless the user gives another number."""


def estimate(config: CheckConfig, images: ImageList, usable: list[int]) -> Iterator[str]:
    """Estimate the cost of `fit-tokenizer`, `tokenize` and `pretrain` on these images and this machine by timing one batch.

    What `config` doesn't say has the default of these commands: epochs, vocabulary size, patches per code, mask ratio, automatic batch.

    In order: build teacher (frozen encoder whose features become tokens) and student (ViT) with random head; time reading the batch, the
    teacher's forward pass and the student's training step; multiply by the number of images of each command. Another process reads at
    the same time, so an image takes the longer of reading and computing. Reading is counted as by one process; a command may have more.

    The student is that of `pretrain` with default options: objective MaPeT, targets tokens, three quarters of the patches masked, automatic
    batch and micro-batch size, `EPOCHS` epochs. The number of codes is the default of `fit-tokenizer` for this number of patches.

    Args:
        config: image size, patch size, channels, and the options of student and teacher; others are not used.
        images: the list that `usable` indexes.
        usable: indices of the readable images, at least one. If they are fewer than the batch has, they are repeated in it.

    Yields:
        Five lines for the console. Setting: device, model, patches of an image, codes V. Reading: images/s of one process. fit-tokenizer:
        time and GB (float16) of the features that k-means is fitted to, without the time of k-means. tokenize: images/s of the teacher
        alone, time, and MB of the tokens. pretrain: images/s of the training step alone, time, batch size, and GB of activations of a
        micro-batch, weights, gradients and Adam's state. All work is done before the first line.

    Raises:
        MapetError: none of the batch's images can be read any more, or an option of model or teacher is wrong.
    """
    compute, num_images = ComputeContext.from_options(), len(usable)
    sizes = config.image_size, config.patch_size, config.channels
    vit = create_vit(config.model, *sizes, config.model_args)
    num_patches, grid = vit.patch_embed.num_patches, tuple(vit.patch_embed.grid_size)
    total_patches = num_images * num_patches
    vocab_size = default_vocab_size(total_patches)
    options = TeacherOptions(**config.model_dump(include=set(TeacherOptions.model_fields)))
    teacher = make_teacher(options, compute.precision).to(compute.device)
    # A quarter of the patches is context, as the other three quarters are masked by default.
    model = prepare_for_device(ViTForPreTraining(vit, vocab_size, MAPET, round(num_patches / 4)), compute)

    # Center crops: of the views of training only their number counts, not which pixels they show.
    spec = ViewSpec(image_size=config.image_size)
    dataset = ViewDataset(images, spec, config.channels, config.image_size, teacher.image_size, grid=grid)
    started = time.monotonic()
    batch = dataset.batch([(0, index) for index in islice(cycle(usable), NUM_BENCHMARK_IMAGES)])
    # Seconds per image, as `teaching` and `training` below.
    reading = (time.monotonic() - started) / NUM_BENCHMARK_IMAGES
    if batch.images is None or batch.teacher_images is None:  # no image could be read
        raise MapetError(f"{option('images', config.images)}: no benchmark image can be read any more. Restore them")
    # Any targets will do: the time does not depend on which tokens they are.
    views, pixels = compute.to(batch.teacher_images), normalize(compute.to(batch.images), config.channels)
    if teacher.is_fitted_to_images:
        teacher.fit(lambda: [views], len(views))
    targets = torch.zeros(len(batch), num_patches, dtype=torch.int64)
    batch = replace(batch, images=pixels, targets=targets).to(compute.device)
    step = ForwardBackward(model, compute, auto_micro_batch(model, NUM_BENCHMARK_IMAGES, compute))
    teaching = _time_call(lambda: teacher(views)) / NUM_BENCHMARK_IMAGES
    training = _time_call(lambda: step(batch)) / NUM_BENCHMARK_IMAGES
    with torch.inference_mode():
        feature_size = teacher(views[:1]).shape[1]

    fit_patches = min(PATCHES_PER_CODE * vocab_size, total_patches)
    # Seconds for the features of `fit-tokenizer`, for all tokens, and for an epoch of pre-training.
    fitting = min(num_images, fit_patches / num_patches) * max(teaching, reading)
    tokenizing, epoch = num_images * max(teaching, reading), num_images * max(training, reading)
    feature_gb, token_mb = 2 * fit_patches * feature_size / 1e9, 2 * total_patches / 1e6  # float16 and uint16: 2 bytes
    batch_size = auto_batch_size(model, num_images, compute)
    activations = auto_micro_batch(model, batch_size, compute) * activation_bytes_per_image(model, compute)
    memory = activations + 16 * num_parameters(model)  # bytes: float32 weight, gradient and Adam's two moments
    yield f"one-batch benchmark on {compute}: {config.model}, {format_num_params(vit)}, {num_patches} patches, V = {vocab_size}"
    yield f"  reading        {1 / reading:,.0f} images/s per process"
    yield f"  fit-tokenizer  about {format_duration(fitting)} for features, {feature_gb:.2f} GB of them ({option('memory_gb')})"
    yield f"  tokenize       {1 / teaching:,.0f} images/s, about {format_duration(tokenizing)}, {token_mb:,.1f} MB on disk"
    yield (
        f"  pretrain       {1 / training:,.0f} images/s, about {format_duration(epoch)} per epoch, {format_duration(EPOCHS * epoch)} for "
        f"{pluralize(EPOCHS, 'epoch')}; automatic batch {batch_size}, about {memory / 1e9:.1f} GB"
    )


def flops_per_image(config: PretrainConfig) -> float:
    """Return the FLOPs of forward and backward pass of the model for one image, counted by PyTorch on the meta device.

    Matrix products, convolutions and attention count, each multiplication with its addition as two. The teacher, which computes tokens,
    and the optimizer are not counted. If the mask ratio is a range, the result is the mean over 8 evenly spaced ratios.

    Args:
        config: of a pre-training run; its `tokenizer` folder must exist, as it tells image size and number of tokens.

    Raises:
        MapetError: the tokenizer cannot be read, or the model cannot be built for it.
    """
    model = build_model(config, load_tokenizer(config.tokenizer, with_teacher=False)).to("meta").train()
    contexts = [model.num_context]
    if config.varies_context:
        low, high = config.mask_ratio
        contexts = [num_context_from_ratio(low + (high - low) * (i + 0.5) / 8, model.num_patches) for i in range(8)]
    return training_flops(model, contexts)


def training_flops(model: ViTForPreTraining, contexts: list[int]) -> float:
    """Count the FLOPs of a forward and backward pass for one image.

    Args:
        model: on the meta device, in training mode, so that no memory and time are spent.
        contexts: numbers of context patches (those that are not masked) of one pass each, at least one.

    Returns:
        The mean over these passes.
    """
    images = torch.empty(1, model.vit.in_chans, *model.vit.patch_embed.img_size)
    permutation = torch.zeros(1, model.num_patches, dtype=torch.int64)
    targets = permutation if model.target == "tokens" else torch.empty(1, model.num_patches, model.head.out_features)
    with FlopCounterMode(display=False) as counter:
        for c in contexts:
            indices = model.sample_target_indices(c, seed=[0])
            batch = Batch(permutation[:, 0], images, None, targets, permutation, num_context=c, target_indices=indices)
            model(batch.to(torch.device("meta"))).loss.backward()
    return counter.get_total_flops() / len(contexts)


def _time_call(function: Callable[[], object]) -> float:
    """Return the seconds of one call of a function without arguments; `Timer` first makes warm-up calls, and waits for the device."""
    # The timer's own default is one thread.
    return Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads()).timeit(1).mean
