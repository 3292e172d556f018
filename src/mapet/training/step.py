"""Forward and backward of one step: products in the fast precision, a few images at a time, gradients in float32."""

import logging
from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._triton import has_triton

from mapet import distributed
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.models.pretraining import Prediction, Pretrainer, Ranks, Survival, Targets
from mapet.training.sharding import is_sharded, last_of_step

log = logging.getLogger("mapet")
LONG = 1000
"""Steps after which a GPU has won back what compiling took."""


class GradientStep:
    """Makes the gradients of a batch for a float32 model.

    In bfloat16 everything between input and loss is computed with a bfloat16 copy of the weights, as FSDP's mixed
    precision does: there is nothing left to cast between operations, as there is under autocast. Its gradients are
    added to the float32 model's after each micro-batch; weights, optimiser and sums stay float32.

    Args:
        model: float32, from `prepare_for_device`. Its gradients are what the step makes.
        micro_batch: images at a time. The gradient is that of the whole batch; what changes is memory and speed.
        compile: compile the forward and backward pass (about a minute at the start).

    A model that is `shard`ed makes its own copy.

    Attributes:
        micro_batch: halved when memory does not suffice.
    """

    def __init__(self, model: Pretrainer, compute: Compute, micro_batch: int, compile: bool = False) -> None:
        self.model, self.dtype, self.micro_batch = model, compute.dtype, micro_batch
        low = compute.dtype != torch.float32 and not is_sharded(model)
        self.worker = deepcopy(model).to(compute.dtype) if low else model
        if compile:
            self.worker.compile()
        self._masters: list[Tensor] = [*model.parameters()] if low else []
        self._copies: list[Tensor] = [*self.worker.parameters()] if low else []

    def __call__(
        self,
        images: Float[Tensor, "B C H W"],
        targets: Targets,
        permutation: Int[Tensor, "B N"],
        num_context: int | None = None,
        ranks: Ranks | None = None,
        survival: Survival | None = None,
        share: float = 1.0,
    ) -> Prediction:
        """What `Pretrainer.forward` gives for the whole batch, with the arguments it takes.

        Args:
            share: of this batch in the step's, where several processes have a part of it. The loss is that share of the
                batch's mean, and so are the gradients.

        Raises:
            MapetError: one image at a time needs more memory than there is.
        """
        self.worker.train()
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._masters)  # on a GPU a few kernels for all of them
        whole = {"images": images.to(self.dtype), "targets": targets, "permutation": permutation, "survival": survival}
        while True:
            try:
                return self._accumulate(whole, num_context, ranks, share)
            except RuntimeError as error:
                if not _out_of_memory(error) or is_sharded(self.model):  # the others wait for it
                    raise
            self._halve(len(images))  # here, where the failed pass no longer holds its memory

    def _accumulate(
        self, whole: dict[str, Tensor | None], num_context: int | None, ranks: Ranks | None, share: float
    ) -> Prediction:
        parts = {name: values.split(self.micro_batch) for name, values in whole.items() if values is not None}
        count = sum(map(len, parts["images"]))
        pieces: list[Prediction] = []
        for part in zip(*parts.values(), strict=True):
            last_of_step(self.worker, last=len(pieces) == len(parts["images"]) - 1)
            piece = self.worker(**dict(zip(parts, part, strict=True)), num_context=num_context, ranks=ranks)
            weight = share * len(piece.losses) / count
            (piece.loss * weight).backward()
            self._collect()
            pieces.append(piece._replace(loss=piece.loss.detach() * weight))
        losses, corrects, predicted, of_images = zip(*pieces, strict=True)
        correct = None if corrects[0] is None else torch.stack(corrects).sum()
        return Prediction(torch.stack(losses).sum(), correct, torch.cat(predicted), torch.cat(of_images))

    def _collect(self) -> None:
        masters, found = [], []
        for master, copy in zip(self._masters, self._copies, strict=True):
            if copy.grad is not None:
                masters.append(master)
                found.append(copy.grad)
                copy.grad = None
        if not found:
            return
        gradients = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(gradients, found)  # on CPUs sums of two dtypes are slow: convert first
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def _halve(self, images: int) -> None:
        failed = min(self.micro_batch, images)
        if failed == 1:
            raise MapetError(
                "out of memory with one image at a time: take a smaller --model or --image-size, or close what else uses the device"
            )
        self.micro_batch = failed // 2
        for model in (self.model, self.worker):
            model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "out of memory with %d images at a time: going on with --micro-batch %d (the batch and what is learned stay the same)",
            failed,
            self.micro_batch,
        )


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def sum_gradients(model: nn.Module) -> None:
    """Add up the gradients of all processes in one message; a process without images has none to add.

    Those of a sharded model are summed already.
    """
    if distributed.world_size() == 1 or is_sharded(model):
        return
    parameters = list(model.parameters())
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    parts = distributed.all_reduce(flat).split([p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, parts, strict=True):
        parameter.grad = gradient.view_as(parameter)


def automatic_compile(wanted: bool | None, compute: Compute, steps: int = LONG, same_shapes: bool = True) -> bool:
    """Whether to compile: by default on CUDA in a `LONG` run, if the compiler is there (docs/performance.md has the measurements).

    Args:
        same_shapes: all steps have as many rows; otherwise each new number would be compiled anew.
    """
    worth = compute.device.type == "cuda" and steps >= LONG and same_shapes and has_triton()
    return worth if wanted is None else wanted
