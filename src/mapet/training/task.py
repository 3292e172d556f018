"""What a training run learns: a task gives model, data and loss, the trainer does the rest."""

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mapet.config.shared import TrainerConfig
from mapet.data.dataset import Batch, UnreadableImages, ViewDataset
from mapet.device import ComputeContext

C = TypeVar("C", bound=TrainerConfig)
M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")


class StepOutput(NamedTuple):
    """Result of a forward pass over a micro-batch, or over a step's whole batch.

    Attributes:
        loss: mean over the images; nothing else has a gradient.
        loss_per_image: for warnings that name images.
        means: further means over the images, by the name of their metric.
        counts: how often each token, code or class occurred; counts of several steps are added.
        rows: tensors with one row per image that `Task.after_step` needs of the whole batch.
    """

    loss: Float[Tensor, ""]
    loss_per_image: Float[Tensor, " B"]
    means: Mapping[str, Float[Tensor, ""]] = {}
    counts: Int[Tensor, " K"] | None = None
    rows: Mapping[str, Tensor] = {}


class Task(Generic[C, M, R]):
    """One kind of training. A task handles neither ranks nor precision, and no files but its product.

    Type parameters:
        C: the command's config.
        M: the product module: the part of the model that is evaluated and saved.
        R: what the command returns.

    `build` sets these attributes:
        config: with automatic values that depend on model and data resolved, `batch_size` at least.
        model: float32, on the device. Its parameters are trained.
        dataset: of the training images.
        indices: of the images to train on.
        hashes: sha256 of the run's inputs, by name; a checkpoint is resumed with the same ones only.
        known_unreadable: images that are known to be unreadable, with reasons.
        stateful: objects with a state dict, other than model and optimizer, that change during training.
        facts: further results for run.json, JSON.
        description: the run in one line.

    The trainer sets `unreadable`, which collects images that can't be read.

    `build` may set others, which have defaults:
        base_lr, base_batch_size, min_auto_lr: of the automatic learning rate, see `Trainer`.
        warmup_fraction: of the epochs.
        logs_per_epoch: lines of metrics.
        betas: of Adam and AdamW.
        layer_decay: learning-rate factor from each block to the one before.
        mean_names, sum_names, num_counts: the keys of `StepOutput.means`, those that `after_step` returns, K of `StepOutput.counts`.
        epochs_per_line: epochs to a line of the log.
        same_shapes: whether all steps compute with tensors of one shape, so that compiling pays.
    """

    command: ClassVar[str]
    base_lr: ClassVar[float]
    base_batch_size: ClassVar[int]
    min_auto_lr: ClassVar[float] = 0.0
    warmup_fraction: ClassVar[float] = 0.1
    logs_per_epoch: ClassVar[int] = 1
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    mean_names: tuple[str, ...] = ()
    sum_names: tuple[str, ...] = ()
    epochs_per_line: int = 1
    layer_decay: float | None = None
    num_counts: int = 0
    same_shapes: bool = True

    config: C
    compute: ComputeContext
    model: nn.Module
    dataset: ViewDataset
    indices: Int[np.ndarray, " n"]
    hashes: dict[str, str]
    description: str
    unreadable: UnreadableImages

    def __init__(self) -> None:
        self.known_unreadable: dict[int, str] = {}
        self.stateful: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}

    def build(self, config: C, compute: ComputeContext) -> None:
        """Open the data, build the model from the config's seed, and set the attributes that the class lists; a collective call."""
        raise NotImplementedError

    def build_model(self) -> M:
        """Build a product module on the device, with any weights: those of the trained one replace them. With FSDP, on rank 0 alone."""
        raise NotImplementedError

    @property
    def product_module(self) -> M:
        """Return the part of the model that `evaluate` and `finish` take."""
        return cast(M, self.model)

    def auto_micro_batch(self, local_batch_size: int) -> int:
        """Return the automatic `micro_batch_size`: images per forward pass. By default all of this rank's part of the batch at once.

        Args:
            local_batch_size: images of a step that this rank gets, at least one.
        """
        return local_batch_size

    def start(self) -> None:
        """Initialize, before the first step of a new run, what needs the data; called on rank 0 alone, whose weights all ranks get."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Turn this rank's views of a step, on the CPU, into inputs and targets on the device; `step` counts from 0."""
        raise NotImplementedError

    def loss(self, batch: Batch, step: int) -> StepOutput:
        """Compute the loss of a micro-batch, a slice of what `prepare` returned; `step` counts from 0."""
        raise NotImplementedError

    def after_step(self, output: StepOutput, step: int) -> dict[str, Tensor]:
        """Update what changes without a gradient (a moving average of the weights, a codebook), after the optimizer.

        It is called under `torch.no_grad`, on every rank, only after steps with a finite gradient, in which the optimizer made its update.
        Without any update to make, do not override it: it costs a wait for the device.

        Args:
            output: of this rank's batch, but `rows` are those of all ranks, in the order of the step's whole batch.
            step: counts from 0.

        Returns:
            Scalar metrics by the names in `sum_names`, the same on all ranks; a log line has their sums over its steps.
        """
        return {}

    def summarize(self, counts: Int[Tensor, " K"], total_counts: Int[Tensor, " K"]) -> dict[str, float]:
        """Return metrics, by name, of how often each token, class or code occurred (`StepOutput.counts`), over all ranks.

        Args:
            counts: since the last log line.
            total_counts: since the start of the run.
        """
        return {}

    @staticmethod
    def format_metrics(metrics: dict[str, float]) -> str:
        """Format the metrics that a progress line shows."""
        return f"loss {metrics['loss']:.3f}"

    def evaluate(self, module: M, epoch: int, is_last: bool) -> dict[str, float]:
        """Return scores, by name, of the product module after an epoch (counted from 1); {} where this epoch is not evaluated.

        It is called after every epoch (`is_last`: of the run), on rank 0 alone. A MapetError becomes a warning, and training continues.
        """
        return {}

    @staticmethod
    def format_scores(scores: dict[str, float]) -> str:
        """Format the scores of `evaluate` for a progress line."""
        return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())

    @torch.inference_mode()
    def is_usable(self, module: M) -> bool:
        """Return whether the trained weights, and the outputs of `infer` for the first 8 training images, have no NaN or Inf.

        It is called after the last step, on rank 0 alone. If none of the 8 images can be read, weights alone are checked.

        Args:
            module: the product module (the part of the model that is evaluated and saved); it is put into evaluation mode.
        """
        batch = self.dataset.batch([(0, int(index)) for index in self.indices[:8]])  # (epoch, image index) pairs
        outputs: list[Tensor] = list(module.parameters())
        if len(batch):
            outputs += self.infer(module.eval(), batch.to(self.compute.device))
        return all(bool(output.isfinite().all()) for output in outputs)

    def infer(self, module: M, batch: Batch) -> list[Tensor]:
        """Return the product's outputs, tensors of any shapes, for a batch of views as `dataset` made it, on the device.

        `is_usable` checks them for NaN and Inf; []: finite weights are enough.

        Args:
            module: the product module, in evaluation mode.
            batch: pixels and other fields, to be normalized first; at least one image.
        """
        return []

    def finish(self, module: M) -> R:
        """Evaluate and save the trained product; return what the command returns. Called once, after `is_usable`, on rank 0 alone."""
        raise NotImplementedError


class LossModule(nn.Module):
    """A task's loss as a module with its model's parameters, for DistributedDataParallel and low precision."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._loss = task.loss

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Return `task.loss` of a prepared micro-batch."""
        return self._loss(batch, step)


def merge_outputs(outputs: list[StepOutput], fraction: float) -> StepOutput:
    """Merge the outputs of micro-batches into one output of this rank's batch.

    Args:
        outputs: of the micro-batches in the order of the batch, at least one, as `ForwardBackward` returns them: each `loss` is
            multiplied already by the fraction of the step's images that the micro-batch has; `means` are not.
        fraction: number of this rank's images over the number of the step's images on all ranks.

    Returns:
        `loss` and `means` are `fraction` times the means over this rank's images, so that their sums over ranks are the means
        over the step's images. `counts` are summed; `loss_per_image` and `rows` have one row per image of the batch.
    """
    losses, per_image, means, counts, rows = zip(*outputs, strict=True)  # the fields of `StepOutput`
    batch_size = sum(len(part) for part in per_image)
    weights = [fraction * len(part) / batch_size for part in per_image]  # of each micro-batch
    merged_means = {}
    for name in means[0]:
        weighted = [weight * part[name] for weight, part in zip(weights, means, strict=True)]
        merged_means[name] = torch.stack(weighted).sum()
    merged_counts = None if counts[0] is None else torch.stack(counts).sum(dim=0)
    merged_rows = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    return StepOutput(torch.stack(losses).sum(), torch.cat(per_image), merged_means, merged_counts, merged_rows)
