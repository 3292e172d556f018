"""A step whose numbers are not finite, kept so that it can be computed again."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from mapet import distributed
from mapet.config.shared import TrainerConfig
from mapet.data.dataset import EpochSampler
from mapet.errors import MapetError, option, shell_command
from mapet.files import atomic, check_format, read_sealed, write_sealed, write_tensors
from mapet.training.sharding import full_state_dict
from mapet.training.step import ForwardBackward
from mapet.training.task import LossModule, Task

BUNDLE = "bundle.json"
FORMAT = 1


class NonFiniteError(MapetError):
    """Too many updates in a row had to be left out, or the trained model gives numbers that are not finite."""

    def __init__(self, what: str, bundle: Path | None, config: TrainerConfig, kept: bool = False) -> None:
        """Say how to look at it and how to go on.

        Args:
            kept: the newest checkpoint is from before.
        """
        look = f" See why with: {shell_command('debug-step', bundle)}." if bundle else ""
        before = f". What was learned before: `{shell_command('export', '--backbone', config.out, '--out', 'NEW')}`, for {option('init_from')} NEW"
        super().__init__(
            f"{what}.{look} Then start again, in a new {option('out')}, with a lower {option('lr')} (now {config.lr:.2g}), "
            f"{option('precision')} float32 or {option('max_rollbacks')} 1{before if kept else ''}"
        )


def save_debug_bundle(task: Task, sampler: EpochSampler, last_step: int, count: int) -> Path:
    """Keep the weights, which those steps have left as they were, and the images of the `count` steps up to `last_step`.

    Steps are counted as the log does: the first is step 1.
    """
    first = last_step - count + 1
    folder: Path = task.config.out / "debug" / f"step-{first:08d}"
    weights = full_state_dict(task.model)
    if distributed.rank() == 0 and not folder.exists():
        with atomic(folder) as temporary:
            temporary.mkdir()
            write_tensors(temporary / "model.safetensors", weights)
            images = {str(step): _images(task, sampler, step) for step in range(first, last_step + 1)}
            write_sealed(temporary / BUNDLE, {"format_version": FORMAT, "seed": task.config.seed, "images": images})
    return folder


def _images(task: Task, sampler: EpochSampler, step: int) -> list[str]:
    return [task.dataset.images.id(index) for _, index in sampler.batch(step - 1)]


def load_debug_bundle(bundle: Path, task: Task, sampler: EpochSampler) -> list[int]:
    """Put a bundle's weights into the model; returns its steps.

    Raises:
        MapetError: not a bundle, damaged, or of other images or another model.
    """
    content = read_sealed(bundle / BUNDLE, "replay bundle")
    try:
        check_format(content.get("format_version"), FORMAT, "replay bundle", bundle)
        task.model.load_state_dict(load_file(bundle / "model.safetensors"))
        for step, names in content["images"].items():
            if _images(task, sampler, int(step)) != names:
                raise ValueError(f"the images of step {step} are others now")
        return [int(step) for step in content["images"]]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise MapetError(f"{bundle}: cannot be replayed: {str(error).splitlines()[0]}") from None


class StepReport(NamedTuple):
    """What a step did.

    Attributes:
        loss: of the whole batch.
        norm: of its gradient.
        losses: (image id, loss) of each image, largest first.
        module: the first whose output was not finite, '' if none.
        parameters: whose gradients are not finite.
    """

    step: int
    loss: float
    norm: float
    losses: list[tuple[str, float]]
    module: str
    parameters: list[str]


def debug_step(task: Task, sampler: EpochSampler, step: int) -> StepReport:
    """Compute a step's loss and gradient as the run did, without an update."""
    model = task.model
    batch = task.dataset.batch(sampler.batch(step - 1))
    if not len(batch):
        raise MapetError(f"none of the {len(batch.bad)} images of step {step} can be read")
    forward_backward = ForwardBackward(LossModule(task), task.compute, task.config.micro_batch_size or len(batch))
    names, nonfinite = {module: name for name, module in model.named_modules() if name}, []

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if module in names and isinstance(output, Tensor) and not output.isfinite().all():
            nonfinite.append(names[module])

    model.zero_grad(set_to_none=True)
    with register_module_forward_hook(look):
        outputs = forward_backward(task.prepare(batch, step - 1), step - 1)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss, norm = sum(output.loss for output in outputs), torch.nn.utils.get_total_norm(gradients.values())
    each = torch.cat([output.loss_per_image for output in outputs])
    order = each.nan_to_num(torch.inf).argsort(descending=True).tolist()
    losses = [(task.dataset.images.id(int(batch.image_index[i])), float(each[i])) for i in order]
    parameters = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    return StepReport(step, float(loss), float(norm), losses, next(iter(nonfinite), ""), parameters)
