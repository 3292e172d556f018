"""Forward and backward pass of a step: products in the fast precision, micro-batches, gradients in float32."""

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mapet import distributed
from mapet.data.dataset import Batch
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.models.pretraining import PreTrainingOutput
from mapet.training.sharding import is_sharded, last_of_step

log = logging.getLogger("mapet")
MIN_COMPILE_STEPS = 1000
"""Steps after which a GPU has won back what compiling took."""


class LowPrecision(nn.Module):
    """A float32 module computed with a low-precision copy of its weights.

    Everything between input and loss is in the low precision, as with FSDP's mixed precision: there is nothing left to cast
    between operations, as there is under autocast. The copy is part of the graph, so that gradients arrive in float32.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any) -> Any:
        weights = {name: parameter.to(self.dtype) for name, parameter in self.module.named_parameters()}
        return functional_call(self.module, weights, args)


class ForwardBackward:
    """Adds a batch's gradient to a float32 model's.

    Args:
        model: from `prepare_for_device`.
        micro_batch: images at a time. The gradient is that of the whole batch; what changes is memory and speed.
        compile: compile the forward and backward pass (about a minute at the start).

    Attributes:
        micro_batch: halved when memory does not suffice.
    """

    def __init__(self, model: nn.Module, compute: Compute, micro_batch: int, compile: bool = False) -> None:
        self.model, self.micro_batch = model, micro_batch
        if compile:
            model.compile()
        low = compute.dtype != torch.float32 and not is_sharded(model)  # a sharded one makes its own copy
        self.compute_model = LowPrecision(model, compute.dtype) if low else model

    def __call__(self, batch: Batch, fraction: float = 1.0) -> PreTrainingOutput:
        """Return the whole batch's output, its loss times `fraction`.

        Args:
            fraction: of the step's images that are in this batch, where several ranks have a part of them.

        Raises:
            MapetError: one image at a time needs more memory than there is.
        """
        self.model.train()
        while True:
            try:
                return self._accumulate(batch, fraction)
            except RuntimeError as error:
                if not _out_of_memory(error) or is_sharded(self.model):  # the others wait for it
                    raise
            self._halve(len(batch))  # here, where the failed pass no longer holds its memory

    def _accumulate(self, batch: Batch, fraction: float) -> PreTrainingOutput:
        outputs: list[PreTrainingOutput] = []
        for start in range(0, len(batch), self.micro_batch):
            part = batch[start : start + self.micro_batch]
            last_of_step(self.model, last=start + self.micro_batch >= len(batch))
            output = self.compute_model(part)
            weight = fraction * len(part) / len(batch)
            (output.loss * weight).backward()
            outputs.append(output._replace(loss=output.loss.detach() * weight))
        losses, corrects, targets, of_images = zip(*outputs, strict=True)
        correct = None if corrects[0] is None else torch.stack(corrects).sum()
        return PreTrainingOutput(torch.stack(losses).sum(), correct, torch.cat(targets), torch.cat(of_images))

    def _halve(self, images: int) -> None:
        failed = min(self.micro_batch, images)
        if failed == 1:
            raise MapetError(
                "out of memory with one image at a time: take a smaller --model or --image-size, or close what else uses the device"
            )
        self.micro_batch = failed // 2
        self.model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "out of memory with %d images at a time: going on with --micro-batch-size %d (the batch and what is learned stay the same)",
            failed,
            self.micro_batch,
        )


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def all_reduce_gradients(model: nn.Module) -> None:
    """Sum the gradients of all ranks in one message; a rank without images has none to add.

    Those of a sharded model are summed already.
    """
    if distributed.world_size() == 1 or is_sharded(model):
        return
    parameters: list[Tensor] = list(model.parameters())
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    parts = distributed.all_reduce(flat).split([p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, parts, strict=True):
        parameter.grad = gradient.view_as(parameter)


def auto_compile(requested: bool | None, compute: Compute, steps: int, same_shapes: bool = True) -> bool:
    """Return whether to compile: by default on CUDA in runs of `MIN_COMPILE_STEPS`, if Triton is there (docs/performance.md).

    Args:
        same_shapes: all steps have as many rows; otherwise each new number would be compiled for itself.
    """
    if requested is not None:
        return requested
    worth = compute.device.type == "cuda" and steps >= MIN_COMPILE_STEPS and same_shapes
    return worth and importlib.util.find_spec("triton") is not None
