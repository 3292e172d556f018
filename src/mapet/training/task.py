"""What a training run learns: a task gives model, data and loss, the trainer does the rest."""

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mapet.config.shared import TrainerConfig
from mapet.data.dataset import Batch, ViewDataset
from mapet.device import ComputeContext

C = TypeVar("C", bound=TrainerConfig)
R = TypeVar("R")


class StepOutput(NamedTuple):
    """Result of a forward pass over a micro-batch, or over a step's whole batch.

    Attributes:
        loss: mean over the images; nothing else has a gradient.
        loss_per_image: by it a warning names images.
        means: further means over the images, by the name of their metric.
        counts: how often each token, code or class occurred, to be added up.
        rows: tensors with one row per image that `Task.after_step` needs of the whole batch.
    """

    loss: Float[Tensor, ""]
    loss_per_image: Float[Tensor, " B"]
    means: Mapping[str, Float[Tensor, ""]] = {}
    counts: Int[Tensor, " K"] | None = None
    rows: Mapping[str, Tensor] = {}


class Task(Generic[C, R]):
    """One kind of training. A task sees neither ranks nor precision, and no files but its product.

    `build` sets these attributes:
        config: with automatic values that depend on model and data resolved, `batch_size` at least.
        model: float32, on the device. Its parameters are trained.
        dataset: of the training images.
        indices: of the images to train on.
        hashes: sha256 of what the run is made of, by name; a checkpoint is resumed with the same ones only.
        bad: images that are known to be unreadable, with reasons.
        stateful: what else changes as it trains and has a state dict.
        facts: what else run.json says of it, JSON.
        description: the run in one line.

    and may set others, which have defaults:
        base_lr, base_batch_size, min_auto_lr: of the automatic learning rate, see `Trainer`.
        warmup_fraction: of the epochs.
        logs_per_epoch: lines of metrics.
        betas: of Adam and AdamW.
        layer_decay: learning-rate factor from each block to the one before.
        mean_names, sum_names, num_counts: what `StepOutput.means` has, what `after_step` returns, K of `StepOutput.counts`.
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

    def __init__(self) -> None:
        self.bad: dict[int, str] = {}
        self.stateful: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}

    def build(self, config: C, compute: ComputeContext) -> None:
        """Open the data and build the model from its seed; a collective call."""
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """Build what `evaluate` and `finish` take, for weights of `product_module` that are loaded into it."""
        raise NotImplementedError

    @property
    def product_module(self) -> nn.Module:
        """The part of the model that `evaluate` and `finish` take."""
        return self.model

    def auto_micro_batch(self, local_batch_size: int) -> int:
        """Return the images at a time within a step."""
        return local_batch_size

    def start(self) -> None:
        """Initialize, before the first step of a new run, what needs the data."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Turn views into inputs and targets on the device."""
        raise NotImplementedError

    def loss(self, batch: Batch, step: int) -> StepOutput:
        """Compute the loss of a prepared micro-batch."""
        raise NotImplementedError

    def after_step(self, output: StepOutput, step: int) -> dict[str, Tensor]:
        """Update, after the optimizer, what follows the model (an EMA, a codebook); returns metrics to be added up.

        Args:
            output: of the whole batch.
        """
        return {}

    def summarize(self, counts: Int[Tensor, " K"], total_counts: Int[Tensor, " K"]) -> dict[str, float]:
        """Return metrics of the counts since the last line, and since the run began."""
        return {}

    @staticmethod
    def format_metrics(metrics: dict[str, float]) -> str:
        """Return the metrics that a progress line shows."""
        return f"loss {metrics['loss']:.3f}"

    def evaluate(self, module: Any, epoch: int) -> dict[str, float]:
        """Return scores after an epoch; {} if it is not the time for any."""
        return {}

    @staticmethod
    def format_scores(scores: dict[str, float]) -> str:
        """Return the scores of `evaluate` as a progress line shows them."""
        return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())

    @torch.inference_mode()
    def is_usable(self, module: Any) -> bool:
        """Return whether the trained weights, and what `infer` makes of a few images, are finite."""
        batch = self.dataset.batch([(0, int(index)) for index in self.indices[:8]])
        outputs = list(module.parameters())
        if len(batch):
            outputs += self.infer(module.eval(), batch.to(self.compute.device))
        return all(bool(output.isfinite().all()) for output in outputs)

    def infer(self, module: Any, batch: Batch) -> list[Tensor]:
        """Return what the product gives for a batch as it is read; [] if its weights tell enough."""
        return []

    def finish(self, module: Any) -> R:
        """Evaluate and save the product; returns what the command returns."""
        raise NotImplementedError


class LossModule(nn.Module):
    """A task's loss as a module of its model's parameters, for DistributedDataParallel and low precision."""

    def __init__(self, task: "Task") -> None:
        super().__init__()
        self.model = task.model
        self._loss = task.loss

    def forward(self, batch: Batch, step: int) -> StepOutput:
        return self._loss(batch, step)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model in its own way."""
        self.model.compile(*args, **kwargs)


def merge_outputs(outputs: list[StepOutput], fraction: float) -> StepOutput:
    """Join the outputs of micro-batches, whose losses are weighted already, into that of the whole local batch.

    Args:
        fraction: of the step's images that are in this batch; loss and means are that fraction of the batch's.
    """
    loss, each, means, counts, rows = zip(*outputs, strict=True)
    weights = [fraction * len(part) / sum(map(len, each)) for part in each]
    mean = {
        name: torch.stack([weight * part[name] for weight, part in zip(weights, means, strict=True)]).sum()
        for name in means[0]
    }
    count = None if counts[0] is None else torch.stack(counts).sum(dim=0)
    row = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    return StepOutput(torch.stack(loss).sum(), torch.cat(each), mean, count, row)
