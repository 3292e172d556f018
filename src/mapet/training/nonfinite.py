"""A step whose numbers went wrong, kept so that it can be looked at again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mapet import distributed
from mapet.config.pretrain import PretrainConfig
from mapet.errors import MapetError, shell_command
from mapet.files import atomic, check_format, read_sealed, write_sealed, write_tensors
from mapet.training.sharding import whole_state
from mapet.training.step import ForwardBackward
from mapet.training.training_setup import TrainingSetup

BUNDLE = "replay.json"
FORMAT = 1
log = logging.getLogger("mapet")


class WentWrong(MapetError):
    """Nothing is learned any more: too many updates in a row had to be left out, or no features come out in the end."""

    def __init__(self, what: str, bundle: Path, config: PretrainConfig, kept: bool = False) -> None:
        """`kept`: the newest checkpoint is from before."""
        before = f". What was learned before: `{shell_command('export', '--backbone', config.out, '--out', 'NEW')}`, for --init-from NEW"
        super().__init__(
            f"{what}. See why with: {shell_command('replay', '--bundle', bundle)}. Then start again, in a new --out, with a lower --lr (now "
            f"{config.lr:.2g}), --precision float32 or --max-rollbacks 1{before if kept else ''}"
        )


def save_bundle(setting: TrainingSetup, last_step: int, count: int, run: Path) -> Path:
    """Keep the weights, which those steps have left as they were, and the images of the `count` steps up to `last_step`.

    Steps are counted as the log does: the first is step 1.
    """
    first = last_step - count + 1
    folder = run / "replay" / f"step-{first:08d}"
    weights = whole_state(setting.model)
    if distributed.rank() == 0 and not folder.exists():
        with atomic(folder) as temporary:
            temporary.mkdir()
            write_tensors(temporary / "model.safetensors", weights)
            images = {str(step): _images(setting, step) for step in range(first, last_step + 1)}
            write_sealed(temporary / BUNDLE, {"format": FORMAT, "seed": setting.config.seed, "images": images})
    return folder


def _images(setting: TrainingSetup, step: int) -> list[str]:
    return [setting.images.id(index) for _, index in setting.sampler.batch(step - 1)]


class Look(NamedTuple):
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


def load_bundle(bundle: Path, setting: TrainingSetup) -> list[int]:
    """Put a bundle's weights into the model; returns its steps.

    Raises:
        MapetError: not a bundle, damaged, or of other images or another model.
    """
    content = read_sealed(bundle / BUNDLE, "replay bundle")
    try:
        check_format(content.get("format", 1), FORMAT, "replay bundle", bundle)
        images = {int(step): names for step, names in content["images"].items()}
        setting.model.load_state_dict(load_file(bundle / "model.safetensors"))
        for step, names in images.items():
            if _images(setting, step) != names:
                raise ValueError(f"the images of step {step} are others now")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise MapetError(f"{bundle}: cannot be replayed: {str(error).splitlines()[0]}") from None
    return list(images)


def replay(setting: TrainingSetup, step: int) -> Look:
    """Compute a step's loss and gradient as the run did, without an update."""
    model, config = setting.model, setting.config
    batch = setting.dataset.batch(setting.sampler.batch(step - 1))
    if batch.images is None:
        raise MapetError(f"none of the {len(batch.bad)} images of step {step} can be read")
    batch = setting.prepare_batch(batch, step - 1)
    assert config.micro_batch_size is not None  # resolved when the run began
    forward_backward = ForwardBackward(model, setting.compute, config.micro_batch_size)
    model.zero_grad(set_to_none=True)
    with first_not_finite(model) as found:
        prediction = forward_backward(batch)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    order = prediction.loss_per_image.nan_to_num(torch.inf).argsort(descending=True).tolist()
    losses = [(setting.images.id(int(batch.image_index[i])), float(prediction.loss_per_image[i])) for i in order]
    return Look(step, float(prediction.loss), float(norm), losses, found[0] if found else "", wrong)


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose output was not finite, in the order of computation."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
