"""Forward and backward of one step: products in the fast precision, a few images at a time, gradients in float32."""

from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._triton import has_triton

from mapet.compute import Compute
from mapet.model.pretrainer import Prediction, Pretrainer, Targets


class GradientStep:
    """Adds a batch's gradients to those of a float32 model.

    In bfloat16 everything between input and loss is computed with a bfloat16 copy of the weights, as FSDP's mixed
    precision does: there is nothing left to cast between operations, as there is under autocast. Its gradients are
    added to the float32 model's after each micro-batch; weights, optimiser and sums stay float32.

    Args:
        model: float32, from `on_device`. Its gradients are what the step makes.
        micro_batch: images at a time. The gradient is that of the whole batch; what changes is memory and speed.
        compile: compile the forward and backward pass (some minutes at the start).
    """

    def __init__(self, model: Pretrainer, compute: Compute, micro_batch: int, compile: bool = False) -> None:
        self.model, self.dtype, self.micro_batch = model, compute.dtype, micro_batch
        low = compute.dtype != torch.float32
        self.worker = deepcopy(model).to(compute.dtype) if low else model
        if compile:
            self.worker.encode = torch.compile(self.worker.encode, dynamic=False)  # type: ignore[method-assign]
        self._pairs = list(zip(model.parameters(), self.worker.parameters(), strict=True)) if low else []

    def __call__(
        self,
        images: Float[Tensor, "B C H W"],
        targets: Targets,
        permutation: Int[Tensor, "B N"],
        num_context: int | None = None,
    ) -> Prediction:
        """What `Pretrainer.forward` gives for the whole batch; gradients are added to `model`'s."""
        self.worker.train()
        with torch.no_grad():
            for master, copy in self._pairs:
                copy.copy_(master)
        parts = []
        for part in zip(
            *(x.split(self.micro_batch) for x in (images.to(self.dtype), targets, permutation)), strict=True
        ):
            prediction = self.worker(*part, num_context)
            share = len(part[0]) / len(images)
            (prediction.loss * share).backward()
            self._collect()
            parts.append(Prediction(prediction.loss.detach() * share, prediction.correct, prediction.targets))
        losses, corrects, predicted = zip(*parts, strict=True)
        correct = None if corrects[0] is None else torch.stack(corrects).sum()
        return Prediction(torch.stack(losses).sum(), correct, torch.cat(predicted))

    def _collect(self) -> None:
        for master, copy in self._pairs:
            if copy.grad is not None:
                gradient = copy.grad.to(master.dtype)  # on CPUs sums of two dtypes are slow: convert first
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                copy.grad = None


def automatic_compile(wanted: bool | None, compute: Compute) -> bool:
    """Whether to compile: by default on CUDA, if its compiler is there (docs/performance.md has the measurements)."""
    return (compute.device.type == "cuda" and has_triton()) if wanted is None else wanted
