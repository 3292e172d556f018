"""A step: forward and backward pass in the fast precision, micro-batches, gradients in float32; timm's optimizers and schedule."""

import importlib.util
import inspect
import logging
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mapet import distributed
from mapet.data.dataset import Batch
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.training.sharding import is_sharded, set_gradient_sync

log = logging.getLogger("mapet")
MIN_COMPILE_STEPS = 1000
"""Steps that a run must have for a GPU to win back the time that compiling takes."""
MAX_WARMUP_START_LR = 1e-6
"""Learning rate of the first step of a warm-up (or the peak, if that is lower)."""


class LowPrecision(nn.Module):
    """A float32 module computed with a low-precision copy of its weights.

    Everything between input and loss is in the low precision, as with FSDP's mixed precision: there is nothing left to cast
    between operations, as there is under autocast. The copy is part of the graph, so that gradients arrive in float32.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any) -> Any:
        """Call the float32 module with the low-precision weights; return what it returns."""
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
        self.module, self.micro_batch, self._same_shapes = module, micro_batch, same_shapes
        self._sharded = is_sharded(module)
        low = compute.dtype != torch.float32 and not self._sharded  # FSDP makes the low-precision copy itself
        self.compute_module: nn.Module = LowPrecision(module, compute.dtype) if low else module
        self._num_replicas = 1 if self._sharded else distributed.world_size()
        self._rehearsed = self._num_replicas == 1

    def __call__(self, batch: Batch, *args: Any, fraction: float = 1.0) -> list[Any]:
        """Add the batch's gradient, weighted by `fraction`, to the module's; retry with half the micro-batch if memory runs out.

        Args:
            batch: of at least one image.
            args: passed on to the module after the batch.
            fraction: of the step's images over all ranks that are in this rank's batch.

        Returns:
            What the module returned for each micro-batch, with `loss` detached and weighted: the losses add up to `fraction`
            times the batch's loss.

        Raises:
            MapetError: memory does not suffice for one image.
            torch.OutOfMemoryError: memory does not suffice, and other ranks wait for this one's gradient.
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
        """Compute the first step without communication, discard its gradient, then wrap the module in DistributedDataParallel.

        The rehearsal finds a micro-batch that fits this rank's memory, and which parameters a pass uses. From here on gradients
        are summed over ranks during the backward pass; weights become those of rank 0 now, buffers before every pass.
        """
        with torch.random.fork_rng():
            self._accumulate(batch, args, 0.0)
        unused = any(parameter.grad is None for parameter in self.module.parameters())
        self.module.zero_grad(set_to_none=True)
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of a 1 x 1 convolution
        unused = unused or not self._same_shapes
        self.compute_module = DistributedDataParallel(self.compute_module, find_unused_parameters=unused)
        self._rehearsed = True

    def _accumulate(self, batch: Batch, args: tuple[Any, ...], fraction: float) -> list[Any]:
        """Run the forward and backward pass of each micro-batch; see `__call__` for arguments and result.

        Gradients are summed over ranks in the last backward pass, and not at all in the rehearsal.
        """
        outputs = []
        for start in range(0, len(batch), self.micro_batch):
            part = batch[start : start + self.micro_batch]
            sync = self._rehearsed and start + self.micro_batch >= len(batch)
            set_gradient_sync(self.module, sync)
            ddp = self.compute_module
            with ddp.no_sync() if isinstance(ddp, DistributedDataParallel) and not sync else nullcontext():
                output = self.compute_module(part, *args)
                weight = fraction * len(part) / len(batch)
                (output.loss * weight * self._num_replicas).backward()  # DistributedDataParallel takes means, not sums
            outputs.append(output._replace(loss=output.loss.detach() * weight))
        return outputs

    def _halve_micro_batch(self, batch_size: int) -> None:
        """Halve the micro-batch that was too large in a batch of this size; raise MapetError if it was one image."""
        failed = min(self.micro_batch, batch_size)
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


def auto_compile(requested: bool | None, compute: ComputeContext, steps: int, same_shapes: bool = True) -> bool:
    """Return whether to compile: as requested, else on CUDA in runs of `MIN_COMPILE_STEPS` if Triton is there.

    Args:
        requested: the option `compile`; None decides by the other arguments (measured: docs/performance.md).
        same_shapes: all steps have as many rows; otherwise each new number of rows would be compiled for itself.
    """
    if requested is not None:
        return requested
    worth = compute.device.type == "cuda" and steps >= MIN_COMPILE_STEPS and same_shapes
    return worth and importlib.util.find_spec("triton") is not None


def create_optimizer(model: nn.Module, opt: str, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    """Create any of timm's optimizers, without weight decay on biases, norms, position embeddings and tokens.

    PyTorch's own are fused: with their `found_inf` they skip a step without the CPU having to wait for the device.

    Args:
        opt: timm's name.
        lr: peak learning rate.
        options: further keywords of timm's `create_optimizer_v2`, e.g. `layer_decay`; `betas` are used for adam and adamw only.

    Raises:
        MapetError: timm has no optimizer of this name.
    """
    try:
        parameters = inspect.signature(get_optimizer_class(opt, bind_defaults=False)).parameters
    except ValueError:
        problem = f"timm has no optimizer '{opt}' ({option('opt')}): give e.g. adamw, lion, muon, lamb or sgd"
        raise MapetError(problem, field="opt", value=opt) from None
    if opt not in ("adam", "adamw"):
        options.pop("betas", None)
    if "fused" in parameters:
        options["fused"] = True
    return create_optimizer_v2(model, opt, lr=lr, weight_decay=weight_decay, **options)


def create_scheduler(optimizer: Optimizer, total_steps: int, warmup_steps: int, min_lr: float) -> CosineLRScheduler:
    """Create a schedule of a linear warm-up to the optimizer's rate, its peak, then one cosine down to `min_lr`.

    Call `step_update(step)` before each step: the rate depends on the step alone.

    Args:
        warmup_steps: at most `total_steps` of them are used.
        min_lr: at most the peak is used.
    """
    warmup_steps, peak = min(warmup_steps, total_steps), optimizer.param_groups[0]["lr"]
    cosine_steps = max(2, total_steps - warmup_steps)  # of 1 timm warns; the rate of its only step is the same
    warmup = {"warmup_t": warmup_steps, "warmup_lr_init": min(MAX_WARMUP_START_LR, peak), "warmup_prefix": True}
    schedule = CosineLRScheduler(optimizer, cosine_steps, lr_min=min(min_lr, peak), t_in_epochs=False, **warmup)
    schedule.step_update(0)
    return schedule
