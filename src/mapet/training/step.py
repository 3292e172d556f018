"""A step: forward and backward pass in the fast precision, micro-batches, gradients in float32; timm's optimizers and schedule."""

import importlib.util
import inspect
import logging
import math
import warnings
from contextlib import nullcontext
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mapet import distributed
from mapet.data.dataset import Batch
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.models.pretraining import ViTForPreTraining
from mapet.training.sharding import is_sharded, set_gradient_sync

log = logging.getLogger("mapet")
MIN_COMPILE_STEPS = 1000
"""Steps that a run must have for a GPU to win back the time that compiling takes."""
CPU_CACHE_BYTES = 6 << 20
"""Bytes of one activation that a CPU's caches hold beside what it is made from (measured: python -m benchmarks training_step)."""
MAX_WARMUP_START_LR = 1e-6
"""Learning rate of the first step of a warm-up (or the peak, if that is lower)."""
DECAY_FRACTION = 0.2
"""Fraction of the steps over which the rate of the schedule 'constant' falls (Hägele et al., arXiv 2405.18392, section 3)."""
UNSUPPORTED = {
    "Adahessian": "it needs second derivatives, which a training step does not compute",
    "Kron": "it draws random numbers of its own, so that a resumed run would differ from an uninterrupted one",
}
"""Class of a timm optimizer that is refused -> why."""


class LowPrecision(nn.Module):
    """A float32 module computed with a low-precision copy of its weights.

    Everything between input and loss is in the low precision, as with FSDP's mixed precision: there is nothing left to cast
    between operations, as there is under autocast. The copy is part of the graph, so that gradients arrive in float32.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any) -> Any:
        """Call the float32 module with its parameters cast to `dtype`; return what it returns.

        Its buffers are used as they are. Gradients reach the float32 parameters through the cast.

        Args:
            args: passed on to the module as they are; it casts its inputs itself, to the dtype of its weights.
        """
        weights = {name: parameter.to(self.dtype) for name, parameter in self.module.named_parameters()}
        return functional_call(self.module, weights, args)


class ForwardBackward:
    """Adds a batch's gradient to a float32 module's, summed over all ranks.

    Args:
        module: `module(batch, ...)` returns a named tuple with a `loss`, the mean over the batch's images.
        micro_batch: images per forward pass. The gradient is that of the whole batch; what changes is memory and speed.
        same_shapes: whether all steps compute with tensors of one shape, so that all use the same parameters.

    Attributes:
        micro_batch: halved when memory does not suffice.
    """

    def __init__(self, module: nn.Module, compute: ComputeContext, micro_batch: int, same_shapes: bool = True) -> None:
        """Choose how the module is computed: itself, as a low-precision copy, or sharded (FSDP), which casts by itself.

        Args:
            module: float32, on the device of `compute`, perhaps sharded by `apply_fsdp`; see the class for what it returns.
            compute: device and dtype of matrix products, float32 or bfloat16.
            micro_batch: largest number of images per forward pass.
            same_shapes: whether all steps compute with tensors of one shape, so that the parameters without a gradient in the first
                step have none in any; otherwise DistributedDataParallel looks for them in every step, which takes time.
        """
        self.module, self.micro_batch, self._same_shapes = module, micro_batch, same_shapes
        self._sharded = is_sharded(module)
        low = compute.dtype != torch.float32 and not self._sharded  # FSDP makes the low-precision copy itself
        self.compute_module: nn.Module = LowPrecision(module, compute.dtype) if low else module
        # Number of ranks whose gradients DistributedDataParallel averages, and whether `_rehearse` is done or not needed.
        self._num_replicas = 1 if self._sharded else distributed.world_size()
        self._rehearsed = self._num_replicas == 1

    def __call__(self, batch: Batch, *args: Any, fraction: float = 1.0) -> list[Any]:
        """Compute forward and backward pass of a batch in micro-batches, and add the gradient, summed over ranks, to `module`'s.

        The module is put into training mode. The gradient must be cleared (`grad` None) before, as it is after memory has run out.
        If memory runs out, the batch is computed again with half the micro-batch size. That is not possible while other ranks wait
        for this one's gradient: with several ranks in their first step alone, which is tried without communication, and with
        sharded weights never. With several ranks this is a collective call.

        Args:
            batch: of this rank, at least one image, prepared on the device.
            args: passed on to the module after the batch.
            fraction: number of this rank's images over the number of the step's images on all ranks; 0 for a placeholder image. The
                gradient is weighted by it, so that the sum over ranks is that of the mean loss of all images.

        Returns:
            What the module returned for each micro-batch (a named tuple), but with `loss` detached and weighted, so that the losses add
            up to `fraction` times the mean loss of the batch.

        Raises:
            MapetError: memory does not suffice for one image, or another rank is lost.
            RuntimeError: memory does not suffice, and the batch cannot be computed again; or any other error of the module.
        """
        self.module.train()
        while True:
            try:
                if not self._rehearsed:
                    self._rehearse(batch, args)
                with distributed.translate_comm_errors():
                    return self._accumulate(batch, args, fraction)
            except RuntimeError as error:
                out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if not out_of_memory or self._sharded or (self._num_replicas > 1 and self._rehearsed):
                    raise
            self._halve_micro_batch(len(batch))  # outside `except`, where the failed pass no longer holds its memory

    def _rehearse(self, batch: Batch, args: tuple[Any, ...]) -> None:
        """Try a step without communication, discard its gradient, then wrap the module in DistributedDataParallel.

        The trial shows whether the micro-batch fits this rank's memory, before other ranks wait for this one, and whether a
        pass uses all parameters. From here on gradients are summed over ranks during the backward pass. DistributedDataParallel
        copies rank 0's weights to all ranks now, and its buffers before every pass.

        Args:
            batch, args: see `__call__`.

        Raises:
            RuntimeError: memory does not suffice, or another error of the module; nothing is wrapped.
        """
        with torch.random.fork_rng():  # so that the step itself draws the same random numbers
            self._accumulate(batch, args, 0.0)
        unused = any(parameter.grad is None for parameter in self.module.parameters())
        self.module.zero_grad(set_to_none=True)
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of a 1 x 1 convolution
        unused = unused or not self._same_shapes  # with other shapes a later step may use other parameters
        self.compute_module = DistributedDataParallel(self.compute_module, find_unused_parameters=unused)
        self._rehearsed = True

    def _accumulate(self, batch: Batch, args: tuple[Any, ...], fraction: float) -> list[Any]:
        """Run the forward and backward pass of each micro-batch, and add the gradients to those of `module`.

        Ranks sum their gradients once, in the backward pass of the last micro-batch; before `_rehearse` has ended not at all.

        Args:
            batch: of this rank, at least one image; slices of at most `micro_batch` images are micro-batches.
            args: passed on to the module after the micro-batch.
            fraction: number of this rank's images over the number of the step's images on all ranks.

        Returns:
            The module's output of each micro-batch, with `loss` detached and multiplied by the fraction of the step's images that the
            micro-batch has.
        """
        outputs = []
        for start in range(0, len(batch), self.micro_batch):
            part = batch[start : start + self.micro_batch]
            sync = self._rehearsed and start + self.micro_batch >= len(batch)
            set_gradient_sync(self.module, sync)  # of FSDP
            ddp = self.compute_module
            with ddp.no_sync() if isinstance(ddp, DistributedDataParallel) and not sync else nullcontext():
                output = self.compute_module(part, *args)
                weight = fraction * len(part) / len(batch)
                # DistributedDataParallel divides the sum over ranks by their number.
                (output.loss * weight * self._num_replicas).backward()
            outputs.append(output._replace(loss=output.loss.detach() * weight))
        return outputs

    def _halve_micro_batch(self, batch_size: int) -> None:
        """Halve the micro-batch after memory has run out, clear the gradient and free the device's cached memory.

        Args:
            batch_size: images of this rank's batch that failed. If this is below `micro_batch`, half of it is tried next.

        Raises:
            MapetError: one image at a time was too much already.
        """
        failed = min(self.micro_batch, batch_size)  # images of the pass for which memory did not suffice
        if failed == 1:
            raise MapetError(
                f"out of memory with one image at a time: take a smaller {option('model')} or {option('image_size')}, or "
                f"close other programs that use the device"
            )
        self.micro_batch = failed // 2
        self.module.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = f"out of memory with %d images at a time: continuing with {option('micro_batch_size')} %d (batch and gradient stay the same)"
        log.warning(text, failed, self.micro_batch)


def auto_micro_batch(model: ViTForPreTraining, batch_size: int, compute: ComputeContext) -> int:
    """Return the automatic number of images per forward pass: all of the batch on a GPU; on a CPU as many as its cache holds.

    The widest activation, that between the two layers of an MLP, is then read again from the cache: memory would be slower.

    Args:
        model: for the length of its packed sequence and the width of its MLPs.
        batch_size: images of a step on this rank.
        compute: device and dtype of matrix products.
    """
    if compute.device.type != "cpu":
        return batch_size
    rows = sum(model.layout().segment_lengths.values())
    widest = rows * model.vit.blocks[0].mlp.fc1.out_features * compute.dtype.itemsize
    return max(1, min(batch_size, CPU_CACHE_BYTES // widest))


def auto_compile(requested: bool | None, compute: ComputeContext, steps: int, same_shapes: bool = True) -> bool:
    """Return whether to compile the model by torch.compile.

    Args:
        requested: the option `compile`; True and False are returned as they are, unchecked. None: compile on CUDA, if Triton is installed,
            in runs of at least `MIN_COMPILE_STEPS` steps of one shape, which win back the time that compiling takes
            (measured: docs/performance.md).
        compute: its device decides.
        steps: total steps of the run.
        same_shapes: whether all steps compute with tensors of one shape; each further shape would be compiled again.
    """
    if requested is not None:
        return requested
    worth = compute.device.type == "cuda" and steps >= MIN_COMPILE_STEPS and same_shapes
    return worth and importlib.util.find_spec("triton") is not None


def create_optimizer(model: nn.Module, opt: str, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    """Create any of timm's optimizers, without weight decay on biases, norms, position embeddings and tokens.

    PyTorch's own optimizers are made with `fused=True`: if their attribute `found_inf` is 1, they skip a step without the CPU having
    to wait for the device.

    Args:
        model: its parameters are optimized; its method `no_weight_decay`, if any, names those without weight decay, beside biases and
            norms (parameters with one dimension).
        opt: timm's name, e.g. 'adamw'.
        lr: peak learning rate.
        weight_decay: of the other parameters.
        options: further keywords of timm's `create_optimizer_v2`, e.g. `layer_decay=0.75` (None: without); `betas` are dropped unless
            `opt` is 'adam' or 'adamw', as other optimizers have none or others.

    Raises:
        MapetError: timm has no optimizer of this name, or it is one of `UNSUPPORTED`.
    """
    try:
        optimizer_class: Any = get_optimizer_class(opt, bind_defaults=False)
    except ValueError:
        problem = f"timm has no optimizer '{opt}': give {option('opt')} adamw, lion, muon, lamb, sgd or another of timm's names"
        raise MapetError(problem, field="opt", value=opt) from None
    if optimizer_class.__name__ in UNSUPPORTED:
        problem = f"{option('opt')} {opt}: {UNSUPPORTED[optimizer_class.__name__]}; take adamw, lion, muon, lamb or sgd"
        raise MapetError(problem, field="opt", value=opt)
    if opt not in ("adam", "adamw"):
        options.pop("betas", None)
    if "fused" in inspect.signature(optimizer_class).parameters:
        options["fused"] = True
    return create_optimizer_v2(model, opt, lr=lr, weight_decay=weight_decay, **options)


class ConstantLRScheduler(Scheduler):
    """The peak from the end of a linear warm-up on, until it falls to `min_lr` over the last `DECAY_FRACTION` of the steps.

    Until then a rate does not depend on `total_steps`, which may be changed meanwhile. The decay is 1 - sqrt (Hägele et al.,
    arXiv 2405.18392, section 3).
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_steps: int, min_lr: float, start_lr: float
    ) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.total_steps, self.warmup_steps, self.min_lr, self.start_lr = total_steps, warmup_steps, min_lr, start_lr

    @staticmethod
    def decay_start(total_steps: int) -> int:
        """Return the number of steps before the rate begins to fall."""
        return total_steps - round(DECAY_FRACTION * total_steps)

    def _get_lr(self, t: int) -> list[float]:
        start = self.decay_start(self.total_steps)
        risen = min(1.0, t / max(1, self.warmup_steps))
        fallen = math.sqrt(min(1.0, max(0, t - start) / max(1, self.total_steps - start)))
        return [
            min(self.start_lr + risen * (peak - self.start_lr), peak - fallen * (peak - self.min_lr))
            for peak in self.base_values
        ]


def create_scheduler(
    optimizer: Optimizer, total_steps: int, warmup_steps: int, min_lr: float, kind: Literal["cosine", "constant"] = "cosine"
) -> Scheduler:  # fmt: skip
    """Create a learning-rate schedule with a linear warm-up: a cosine over all steps, down to `min_lr`, or a `ConstantLRScheduler`.

    The warm-up rises from `MAX_WARMUP_START_LR` to the peak and is laid over the beginning; from then on the rate of 'cosine' is that of
    the cosine, which began at step 0 and so is somewhat below the peak already, as in the released code (timm without `warmup_prefix`).
    The rate of step 0 is set here. Call `step_update(step)` before each step, counted from 0: the rate depends on the step alone. The
    rate of a parameter group is multiplied by its `lr_scale`, if it has one (layer decay).

    Args:
        optimizer: its present learning rate, before any `lr_scale`, is the peak; it is changed.
        total_steps: of the run, warm-up included.
        warmup_steps: 0 or more; of a cosine at most `total_steps`.
        min_lr: final rate; if it exceeds the peak, the peak is used.
        kind: option `schedule`.
    """
    peak = optimizer.param_groups[0]["lr"]
    start_lr, min_lr = min(MAX_WARMUP_START_LR, peak), min(min_lr, peak)
    if kind == "constant":
        schedule: Scheduler = ConstantLRScheduler(optimizer, total_steps, warmup_steps, min_lr, start_lr)
    else:
        cosine_steps = max(2, total_steps)  # of 1 timm warns; the rate of its only step is the same
        warmup = {"warmup_t": min(warmup_steps, total_steps), "warmup_lr_init": start_lr}
        schedule = CosineLRScheduler(optimizer, cosine_steps, lr_min=min_lr, t_in_epochs=False, **warmup)
    schedule.step_update(0)
    return schedule
