"""What is saved of a run's state: checkpoints, and bundles of the steps whose numbers were not finite.

Each is a folder of safetensors and JSON, complete or absent.
"""

import errno
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer

from mapet import distributed
from mapet.config.shared import TrainerConfig
from mapet.data.dataset import EpochBatchSampler
from mapet.errors import MapetError, NewerFormatError, option, shell_command
from mapet.files import (
    atomic_write,
    check_format,
    file_hash,
    read_checksummed_json,
    write_checksummed_json,
    write_tensors,
)
from mapet.training.sharding import distribute_like, full_state_dict, full_tensor, load_full_state_dict
from mapet.training.step import ForwardBackward
from mapet.training.task import LossModule, Task

log = logging.getLogger("mapet")
STATE, FORMAT = "trainer_state.json", 1
BUNDLE, BUNDLE_FORMAT = "bundle.json", 1


def save_checkpoint(
    folder: Path, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> None:
    """Write `folder/step-00000000` atomically, read it back, and only then remove all but the newest `keep`.

    Args:
        parts: named tensors of each file, see `checkpoint_tensors`.
        state: JSON of everything else that the run needs to go on.

    Raises:
        MapetError: the disk is full, or does not hold what was written; the checkpoints before are intact.
    """
    target, before = folder / f"step-{step:08d}", checkpoints(folder)
    if target.exists():
        return
    try:
        with atomic_write(target) as temporary:
            temporary.mkdir()
            digests = {}
            for name, tensors in parts.items():
                file = temporary / f"{name}.safetensors"
                write_tensors(file, tensors)
                _verify(file, tensors)
                digests[file.name] = file_hash(file)
            write_checksummed_json(
                temporary / STATE, {"format_version": FORMAT, "step": step, "sha256": digests, **state}
            )
    except (OSError, MapetError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        size = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
        raise MapetError(
            f"cannot write checkpoint {target}: {error}. It takes {size:,} bytes, the disk has {shutil.disk_usage(folder).free:,} "
            f"free; {f'the last one, {before[0].name}, is intact' if before else 'there is none before it'}. Make room and go "
            f"on with {option('resume', True)}"
        ) from None
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def _verify(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises MapetError: the file does not hold the tensors, bit for bit (NaN equals itself)."""
    written = load_file(path)
    for name, tensor in tensors.items():
        found, expected = (t.contiguous().flatten().view(torch.uint8) for t in (written[name], tensor.cpu()))
        if not found.equal(expected):
            raise MapetError(f"{path.name} does not hold what was written, '{name}' differs: is the disk failing?")


def checkpoint_tensors(model: nn.Module, optimizer: Optimizer, **others: Any) -> dict[str, dict[str, Tensor]]:
    """The parts of a checkpoint, to be saved by the first process; a collective call.

    Args:
        others: whatever else has a state dict; they are one part.
    """
    steps = optimizer.state_dict()["state"].items()
    moments = {f"{i}.{name}": full_tensor(torch.as_tensor(v)) for i, values in steps for name, v in values.items()}
    progress = {f"{name}.{key}": value for name, other in others.items() for key, value in other.state_dict().items()}
    return {"model": full_state_dict(model), "optimizer": moments} | ({"metrics_state": progress} if progress else {})


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return [state.parent for state in sorted(folder.glob(f"step-*/{STATE}"), reverse=True)]


def check_fingerprints(folder: Path, now: Mapping[str, str]) -> None:
    """Raise MapetError if the newest readable checkpoint in `folder` is of another tokenizer, or other images, than there are now."""
    state: dict[str, Any] = {}
    for path in checkpoints(folder):
        with suppress(MapetError):
            state = state or read_checksummed_json(path / STATE, "checkpoint")
    for name, digest in now.items():
        if state.get(name, digest) != digest:
            raise MapetError(
                f"{folder.parent} was trained with other {name.removesuffix('_hash')} than are found now: their hash was "
                f"{state[name][:12]}, now it is {digest[:12]}. Has the run, or what it was made of, been moved or changed? Put "
                "back what there was"
            )


def checkpoint_step(path: Path) -> int:
    """Of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer | None = None, **others: Any
) -> dict[str, Any]:
    """Load the newest intact checkpoint of a run; a damaged one is passed over with a warning.

    Args:
        folder: of checkpoints, or one of them.

    Returns:
        The state that was saved with it, `step` included.

    Raises:
        MapetError: none is intact, or one was made by a newer version.
    """
    found = [folder] if (folder / STATE).exists() else checkpoints(folder)
    for path in found:
        try:
            state, parts = _read(path)
            load_full_state_dict(model, parts["model"])
            if optimizer is not None:
                _restore(optimizer, parts["optimizer"])
            if "metrics_state" in parts:  # absent in what version 0.1 wrote
                for name, other in others.items():
                    progress, prefix = parts["metrics_state"].items(), f"{name}."
                    other.load_state_dict({k.removeprefix(prefix): v for k, v in progress if k.startswith(prefix)})
            return state
        except NewerFormatError:  # the one before would silently lose what the newer version learned
            raise
        except (MapetError, OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            log.warning("checkpoint %s cannot be used: %s", path, str(error).splitlines()[0])
    raise MapetError(f"no usable checkpoint in {folder} ({len(found)} found): start again with a new {option('out')}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Raises ValueError and its like: a file is damaged."""
    state = read_checksummed_json(path / STATE, "checkpoint")
    check_format(state.get("format_version"), FORMAT, "checkpoint", path)
    if state["step"] != checkpoint_step(path):
        raise ValueError(f"{STATE} says step {state['step']}")
    for name, digest in state["sha256"].items():
        if file_hash(path / name) != digest:
            raise ValueError(f"{name} is damaged (its sha256 differs)")
    return state, {name.removesuffix(".safetensors"): load_file(path / name) for name in state["sha256"]}


def _restore(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = distribute_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ---- steps whose numbers are not finite


class NonFiniteError(MapetError):
    """Too many updates in a row had to be left out, or the trained model gives numbers that are not finite."""

    def __init__(self, what: str, bundle: Path | None, config: TrainerConfig, kept: bool = False) -> None:
        """Say how to look at it and how to go on.

        Args:
            kept: the newest checkpoint is from before.
        """
        look = f" See why with: {shell_command('debug-step', bundle)}." if bundle else ""
        export = shell_command("export", "--backbone", config.out, "--out", "NEW")
        before = f". What was learned before: `{export}`, for {option('init_from')} NEW" if kept else ""
        super().__init__(
            f"{what}.{look} Then start again, in a new {option('out')}, with a lower {option('lr')} (now {config.lr:.2g}), "
            f"{option('precision')} float32 or {option('max_rollbacks')} 1{before}"
        )


def save_debug_bundle(task: Task, sampler: EpochBatchSampler, last_step: int, count: int) -> Path:
    """Keep the weights, which those steps have left as they were, and the images of the `count` steps up to `last_step`.

    Steps are counted as the log does: the first is step 1.
    """
    first = last_step - count + 1
    folder: Path = task.config.out / "debug" / f"step-{first:08d}"
    weights = full_state_dict(task.model)
    if distributed.rank() == 0 and not folder.exists():
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            write_tensors(temporary / "model.safetensors", weights)
            images = {str(step): _images(task, sampler, step) for step in range(first, last_step + 1)}
            write_checksummed_json(
                temporary / BUNDLE, {"format_version": BUNDLE_FORMAT, "seed": task.config.seed, "images": images}
            )
    return folder


def _images(task: Task, sampler: EpochBatchSampler, step: int) -> list[str]:
    return [task.dataset.images.id(index) for _, index in sampler.batch(step - 1)]


def load_debug_bundle(bundle: Path, task: Task, sampler: EpochBatchSampler) -> list[int]:
    """Put a bundle's weights into the model; returns its steps.

    Raises:
        MapetError: not a bundle, damaged, or of other images or another model.
    """
    content = read_checksummed_json(bundle / BUNDLE, "replay bundle")
    try:
        check_format(content.get("format_version"), BUNDLE_FORMAT, "replay bundle", bundle)
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


def debug_step(task: Task, sampler: EpochBatchSampler, step: int) -> StepReport:
    """Compute a step's loss and gradient as the run did, without an update."""
    model = task.model
    batch = task.dataset.batch(sampler.batch(step - 1))
    if not len(batch):
        raise MapetError(f"none of the {len(batch.unreadable)} images of step {step} can be read")
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
