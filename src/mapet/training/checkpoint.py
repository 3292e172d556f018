"""Saved states of a run: checkpoints, and debug bundles of steps with a NaN or infinite loss or gradient.

Each is a folder of safetensors and JSON, complete or absent.
"""

import errno
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer

from mapet import distributed, files
from mapet.config.shared import TrainerConfig
from mapet.data.dataset import EpochBatchSampler
from mapet.errors import MapetError, NewerFormatError, describe_key_error, option, shell_command
from mapet.training.sharding import distribute_like, full_state_dict, full_tensor, load_full_state_dict
from mapet.training.step import ForwardBackward
from mapet.training.task import LossModule, Task

log = logging.getLogger("mapet")
STATE, FORMAT = "trainer_state.json", 1
"""Name of a checkpoint's JSON file, which is written last, and version of the checkpoint's format."""
BUNDLE, BUNDLE_FORMAT = "bundle.json", 1
"""The same of a debug bundle: the weights and image ids of skipped steps, for `mapet debug-step`."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""`errno` of an OSError: no space on the disk, the user's quota is used up, the file is larger than the file system allows."""
GROUP_STEP = "group.step"
"""Name in a checkpoint of the step count that some optimizers (timm's lamb, adan) keep for a parameter group, not for each parameter."""
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""Errors that reading a damaged file, or loading its tensors into another model, may raise."""


class OtherInputsError(MapetError):
    """A checkpoint is of another tokenizer, other images, or a model with parameters of other names or shapes than there are now."""


def save_checkpoint(
    folder: Path, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint atomically, read it back, and only then remove all but the newest `keep` checkpoints.

    It is the folder FOLDER/step-NNNNNNNN with one safetensors file for each of `parts` and trainer_state.json, which has the sha256 of
    these files. If there is a checkpoint of this step already, nothing is written or removed. Call it on one rank only.

    Args:
        folder: of all checkpoints of the run; is created.
        step: number of steps that are done, in the checkpoint's name with 8 digits.
        parts: file name without suffix -> name -> tensor, as `checkpoint_tensors` returns them; on any device.
        state: further entries of trainer_state.json, JSON values by name: what a resumed run needs besides tensors.
        keep: number of checkpoints that are kept, the new one included; at least 1.

    Raises:
        MapetError: the disk is full, or does not hold the bytes that were written; earlier checkpoints are intact.
        OSError: another error of the system, e.g. no permission.
    """
    target, earlier = folder / f"step-{step:08d}", checkpoints(folder)
    if target.exists():
        return
    try:
        with files.atomic_write(target) as temporary:
            temporary.mkdir()
            digests = {}
            for name, tensors in parts.items():
                file = temporary / f"{name}.safetensors"
                files.write_tensors(file, tensors)
                _verify(file, tensors)
                digests[file.name] = files.file_hash(file)
            content = {"format_version": FORMAT, "step": step, "sha256": digests, **state}
            files.write_checksummed_json(temporary / STATE, content)
    except (OSError, MapetError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            raise
        size = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
        last = f"the last one, {earlier[0].name}, is intact" if earlier else "there is no earlier one"
        raise MapetError(
            f"cannot write checkpoint {target}: {error}. It takes {size:,} bytes, the disk has "
            f"{shutil.disk_usage(folder).free:,} free; {last}. Free disk space and resume with {option('resume', True)}"
        ) from None
    for old in checkpoints(folder)[keep:]:
        files.remove_dir(old)


def _verify(path: Path, tensors: dict[str, Tensor]) -> None:
    """Check that a safetensors file holds the tensors that were written to it; bytes are compared, so that NaN equals itself.

    Args:
        path: of the file.
        tensors: name -> tensor that was written, on any device; all of them must be in the file.

    Raises:
        MapetError: the bytes of a tensor differ.
        One of `READ_ERRORS`: the file cannot be read, or lacks a tensor.
    """
    written = load_file(path)
    for name, tensor in tensors.items():
        actual, expected = (t.contiguous().flatten().view(torch.uint8) for t in (written[name], tensor.cpu()))
        if not actual.equal(expected):
            raise MapetError(f"tensor '{name}' in {path.name} differs from what was written: check the disk for errors")


def checkpoint_tensors(model: nn.Module, optimizer: Optimizer, **stateful: Any) -> dict[str, dict[str, Tensor]]:
    """Gather the tensors of a checkpoint for rank 0 to save; a collective call.

    Tensors that are not sharded are not copied: they share memory with the live model, optimizer and `stateful`, so save them before the
    next step. The optimizer's options (learning rate, betas, ...) and the schedule are not included: they follow from config and step.

    Args:
        model: may be sharded over ranks (FSDP); its tensors are gathered.
        optimizer: of parameters of the model.
        stateful: further objects whose `state_dict()` is flat, name -> tensor; the keyword is their name in the checkpoint.

    Returns:
        File name without suffix -> name -> tensor: 'model' has the model's state dict, 'optimizer' what `optimizer_tensors` returns, and
        'metrics_state' the states of `stateful` by the names 'OBJECT.NAME'; it is omitted if they have none. With sharding 'model' is
        empty on ranks other than 0.
    """
    other_state: dict[str, Tensor] = {}
    for prefix, stateful_object in stateful.items():
        other_state |= {f"{prefix}.{name}": value for name, value in stateful_object.state_dict().items()}
    parts = {"model": full_state_dict(model), "optimizer": optimizer_tensors(model, optimizer)}
    return parts | {"metrics_state": other_state} if other_state else parts


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state (Adam's moments, ...) by the names of the model's parameters; a collective call.

    Args:
        model: the optimizer's parameters are among its parameters; sharded ones (FSDP) are gathered.
        optimizer: read only.

    Returns:
        'PARAMETER/STATE' -> full tensor, e.g. 'head.weight/exp_avg'. A state that is a Python number becomes a tensor without dimensions,
        of dtype int64, float64 or bool. Where the optimizer counts steps per parameter group, the count is in the state `GROUP_STEP` of
        each of the group's parameters.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        counter = {GROUP_STEP: int(group["step"])} if "step" in group else {}
        for parameter in group["params"]:
            for state, value in (counter | optimizer.state.get(parameter, {})).items():
                exact = torch.float64 if isinstance(value, float) else None
                tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=exact)
                tensors[f"{names[parameter]}/{state}"] = full_tensor(tensor)
    return tensors


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders step-NNNNNNNN in `folder` of checkpoints that were written completely, newest first; they are not read."""
    return [state.parent for state in sorted(folder.glob(f"step-*/{STATE}"), reverse=True)]


def checkpoint_step(path: Path) -> int:
    """Return the number of steps that a checkpoint's folder has in its name: 12 for step-00000012."""
    return int(path.name.removeprefix("step-"))


def remove_newer(folder: Path, step: int) -> None:
    """Remove the checkpoints after a step: they were damaged, as the run resumes from that step, and would count as the newest ones.

    Call it on one rank only.
    """
    for path in checkpoints(folder):
        if checkpoint_step(path) > step:
            log.warning("the damaged checkpoint %s is removed: the run resumes at step %d", path, step)
            files.remove_dir(path)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer | None = None, hashes: Mapping[str, str] = {}, **stateful: Any
) -> dict[str, Any]:
    """Load the newest intact checkpoint of a run into model and optimizer; skip damaged ones with a warning.

    All ranks must call it, and each reads the files. Learning rate and other options of the optimizer stay as they are.

    Args:
        folder: of all checkpoints of a run, or of a single checkpoint.
        model: changed in place; it may be sharded over ranks.
        optimizer: changed in place; None: its state is not loaded.
        hashes: sha256 of the present inputs by name, e.g. {'tokenizer_hash': ...}, which must equal those that were saved in the
            checkpoint's `state`; a name that the checkpoint lacks is not checked.
        stateful: further objects whose `load_state_dict` is called; the keyword is the name that `checkpoint_tensors` got. They are not
            changed if the checkpoint has no file metrics_state.safetensors, as those of version 0.1.

    Returns:
        The content of trainer_state.json: 'step' (number of steps that are done), the entries of `state` of `save_checkpoint`,
        'format_version', and 'sha256' (file name -> hash).

    Raises:
        NewerFormatError: a newer version of mapet wrote the newest one; loading an older one would lose the newer work unnoticed.
        OtherInputsError: the newest intact one was made from other inputs, or its optimizer's state does not fit the model's parameters.
        MapetError: there is no checkpoint, or none is intact. The model may then have tensors of a damaged one.
    """
    candidates = [folder] if (folder / STATE).exists() else checkpoints(folder)
    for path in candidates:
        try:
            state, parts = _read(path, hashes)
            load_full_state_dict(model, parts["model"])
            if optimizer is not None:
                _load_optimizer(model, optimizer, parts["optimizer"], path / "optimizer.safetensors")
            if "metrics_state" in parts:
                for name, stateful_object in stateful.items():
                    tensors, prefix = parts["metrics_state"].items(), f"{name}."
                    stateful_tensors = {
                        key.removeprefix(prefix): value for key, value in tensors if key.startswith(prefix)
                    }
                    stateful_object.load_state_dict(stateful_tensors)
            return state
        except (NewerFormatError, OtherInputsError):
            raise
        except (MapetError, *READ_ERRORS) as error:
            log.warning("checkpoint %s is skipped, as it cannot be used: %s", path, describe_key_error(error))
    message = f"no usable checkpoint in {folder} ({len(candidates)} found): start a new run with a new {option('out')}"
    raise MapetError(message)


def _read(path: Path, hashes: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read the files of one checkpoint onto the CPU, and check step, hashes of the inputs, and sha256 of each file.

    Args:
        path: folder of the checkpoint, in OUT/checkpoints.
        hashes: see `load_checkpoint`.

    Returns:
        (content of trainer_state.json; 'model', 'optimizer' and perhaps 'metrics_state' -> name -> tensor)

    Raises:
        NewerFormatError: a newer version of mapet wrote the checkpoint.
        OtherInputsError: it was made from other inputs.
        MapetError or one of `READ_ERRORS`: a file is missing or damaged.
    """
    state = files.read_checksummed_json(path / STATE, "checkpoint")
    files.check_format(state.get("format_version"), FORMAT, "checkpoint", path)
    if state["step"] != checkpoint_step(path):
        raise ValueError(f"{STATE} has step {state['step']}, expected {checkpoint_step(path)} as in the folder's name")
    for name, digest in hashes.items():
        if state.get(name, digest) != digest:
            expected, actual = (files.abbreviate_hash(value) for value in (state[name], digest))
            raise OtherInputsError(
                f"{path.parent.parent} was trained with other {name.removesuffix('_hash')}: expected hash {expected}, found {actual}. Restore the "
                f"files that were moved or changed, or start a new run with a new {option('out')}"
            )
    for name, digest in state["sha256"].items():
        if (actual := files.file_hash(path / name)) != digest:
            difference = f"expected sha256 {files.abbreviate_hash(digest)}, found {files.abbreviate_hash(actual)}"
            raise ValueError(f"{name} is damaged: {difference}")
    return state, {name.removesuffix(".safetensors"): load_file(path / name) for name in state["sha256"]}


def _load_optimizer(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], path: Path) -> None:
    """Replace all state of an optimizer (Adam's moments, ...) by that of a checkpoint.

    The parameter groups, their order and their options (learning rate, ...) stay as they are.

    Args:
        model: the optimizer's parameters are among its parameters.
        optimizer: changed in place.
        tensors: 'PARAMETER/STATE' -> full tensor on the CPU, see `optimizer_tensors`. Each is sharded as its parameter is.
        path: of the file that `tensors` were read from, for the error.

    Raises:
        OtherInputsError: the optimizer has no parameter of a name in `tensors`, or one of another shape; nothing is changed.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = {parameter: index for index, parameter in enumerate(parameters)}
    names = {name: parameter for name, parameter in model.named_parameters() if parameter in indices}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = names.get(name)
        if parameter is None or not _fits(value, parameter):
            actual = "no such parameter" if parameter is None else f"a parameter of shape {tuple(parameter.shape)}"
            raise OtherInputsError(
                f"{path} has optimizer state '{key}' of shape {tuple(value.shape)}, but the model trains {actual}: another model or an "
                f"earlier version of mapet wrote it. Start a new run with a new {option('out')}"
            )
        is_scalar = value.ndim == 0 and value.dtype in (torch.int64, torch.float64, torch.bool)
        loaded = value.item() if is_scalar else distribute_like(value, parameter)
        state.setdefault(indices[parameter], {})[entry] = loaded
    content = optimizer.state_dict() | {"state": state}
    for group in content["param_groups"]:
        steps = [state[index].pop(GROUP_STEP) for index in group["params"] if GROUP_STEP in state.get(index, {})]
        group |= {"step": steps[0]} if steps else {}
    optimizer.load_state_dict(content)


def _fits(value: Tensor, parameter: Tensor) -> bool:
    """Return whether an optimizer's state may be of this parameter, by its shape.

    Sides must be equal or, where an optimizer averages over a dimension (Adafactor), 1. State of another number of dimensions, such as a
    step count, fits any parameter.
    """
    sizes = zip(value.shape, parameter.shape, strict=False)
    return value.ndim != parameter.ndim or all(side in (1, expected) for side, expected in sizes)


# ---- steps with NaN or Inf


class NonFiniteError(MapetError):
    """Too many steps in a row had a NaN or infinite loss or gradient, or the trained model has NaN or infinite outputs."""

    def __init__(self, problem: str, bundle: Path | None, config: TrainerConfig, has_finite_checkpoint: bool) -> None:
        """Make the message: the problem, then the commands and options that find its cause and avoid it.

        Args:
            problem: what has happened; a sentence without its full stop.
            bundle: folder of the debug bundle (weights and image ids of the skipped steps) that `mapet debug-step` reads; None: there
                is none.
            config: options of the run, of which the message names `out` and `lr`.
            has_finite_checkpoint: whether the newest checkpoint has weights from before the problem. The message then tells how to
                export them and start a new run from them.
        """
        debug = f" Find the cause with: {shell_command('debug-step', bundle)}." if bundle else ""
        export = shell_command("export", "--backbone", config.out, "--out", "NEW")
        reuse = f". To keep the weights from before: `{export}`, then {option('init_from')} NEW"
        super().__init__(
            f"{problem}.{debug} Then start a new run in a new {option('out')} with a lower {option('lr')} (now {config.lr:.2g}), "
            f"{option('precision')} float32 or {option('max_rollbacks')} 1{reuse if has_finite_checkpoint else ''}"
        )


def save_debug_bundle(task: Task, sampler: EpochBatchSampler, last_step: int, num_steps: int) -> Path:
    """Write a debug bundle of the last steps, with which `mapet debug-step` computes them again; a collective call.

    It is the folder OUT/debug/step-NNNNNNNN, named after the first of the steps. It has the model's weights, which are those from before
    the first of the steps, as all of them were skipped, and bundle.json: the seed, and for each step the ids of its images. If the folder
    exists already, it is not changed.

    Args:
        task: its model has the weights; its config has the folder OUT (`out`, not None) and the seed.
        sampler: of the run; gives the images of each step, those of all ranks.
        last_step: the last of the skipped steps, counted from 1 as in the log.
        num_steps: number of skipped steps in a row that end with `last_step`.

    Returns:
        The bundle's folder, on every rank; rank 0 alone writes it.
    """
    first = last_step - num_steps + 1
    folder: Path = task.config.out / "debug" / f"step-{first:08d}"
    weights = full_state_dict(task.model)
    if distributed.rank() == 0 and not folder.exists():
        with files.atomic_write(folder) as temporary:
            temporary.mkdir()
            files.write_tensors(temporary / "model.safetensors", weights)
            images = {str(step): _image_ids(task, sampler, step) for step in range(first, last_step + 1)}
            content = {"format_version": BUNDLE_FORMAT, "seed": task.config.seed, "images": images}
            files.write_checksummed_json(temporary / BUNDLE, content)
    return folder


def _image_ids(task: Task, sampler: EpochBatchSampler, step: int) -> list[str]:
    """Return the ids of the images of a step, those of all ranks, in the order of the batch; `step` counts from 1."""
    return [task.dataset.images.id(index) for _epoch, index in sampler.batch(step - 1)]


def load_debug_bundle(bundle: Path, task: Task, sampler: EpochBatchSampler) -> list[int]:
    """Load the weights of a debug bundle, see `save_debug_bundle`, into the task's model.

    Args:
        bundle: the bundle's folder.
        task: built from the run's config; its model is changed in place.
        sampler: built from the run's config, to check that its steps still have the images of the bundle.

    Returns:
        The bundle's steps, counted from 1, ascending.

    Raises:
        NewerFormatError: a newer version of mapet wrote the bundle.
        MapetError: the folder is not a bundle, is damaged, or belongs to other images or another model. The model may then have the
            bundle's weights, or a part of them, already.
    """
    content = files.read_checksummed_json(bundle / BUNDLE, "debug bundle")
    try:
        files.check_format(content.get("format_version"), BUNDLE_FORMAT, "debug bundle", bundle)
        task.model.load_state_dict(load_file(bundle / "model.safetensors"))
        for step, image_ids in content["images"].items():
            if _image_ids(task, sampler, int(step)) != image_ids:
                raise ValueError(f"step {step} has other images now than in {BUNDLE}: restore the images of the run")
        return [int(step) for step in content["images"]]
    except READ_ERRORS as error:
        raise MapetError(
            f"cannot use the debug bundle {bundle} ({describe_key_error(error)}): restore it, or start the run again"
        ) from None


class StepReport(NamedTuple):
    """Loss and gradient of one step.

    Attributes:
        step: counted from 1.
        loss: mean over the whole batch.
        norm: L2 norm of the gradient of all parameters.
        losses: (image id, loss) of each image, NaN and largest first.
        module: name in `task.model` of the module that computed the first NaN or infinite output; '' if none.
        parameters: names in `task.model` of the parameters with a NaN or infinite gradient.
    """

    step: int
    loss: float
    norm: float
    losses: list[tuple[str, float]]
    module: str
    parameters: list[str]


def debug_step(task: Task, sampler: EpochBatchSampler, step: int) -> StepReport:
    """Compute the loss and gradient of a step as the run did, without an update, and find where NaN and Inf come from.

    Images that cannot be read are skipped. The gradient stays in the `grad` of the model's parameters.

    Args:
        task: built from the run's config, with the weights from before the step; `micro_batch_size` of its config None is the whole batch.
        sampler: built from the run's config for one process, so that it gives the images of all ranks.
        step: counted from 1.

    Returns:
        Loss, gradient norm, losses of the images, and which module and parameters have NaN or Inf; see `StepReport`.

    Raises:
        MapetError: none of the step's images can be read, or the memory of the device is too small for one image.
    """
    model, images = task.model, task.dataset.images
    batch = task.dataset.batch(sampler.batch(step - 1))
    if not len(batch):
        index, reason = batch.unreadable[0]
        problem = f"none of the {len(batch.unreadable)} images of step {step} can be read"
        raise MapetError(f"{problem}, the first, {images.id(index)!r}: {reason}. Restore these images")
    forward_backward = ForwardBackward(LossModule(task), task.compute, task.config.micro_batch_size or len(batch))
    names = {module: name for name, module in model.named_modules() if name}  # all but the model itself
    nonfinite_modules = []  # names of modules with NaN or Inf in their output, in the order of the forward pass

    def record_nonfinite(module: nn.Module, _inputs: object, output: object) -> None:
        """Note the name of a module whose output has NaN or Inf."""
        if module in names and isinstance(output, Tensor) and not output.isfinite().all():
            nonfinite_modules.append(names[module])

    model.zero_grad(set_to_none=True)
    with register_module_forward_hook(record_nonfinite):
        outputs = forward_backward(task.prepare(batch, step - 1), step - 1)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss, norm = sum(output.loss for output in outputs), torch.nn.utils.get_total_norm(gradients.values())
    loss_per_image = torch.cat([output.loss_per_image for output in outputs])
    order = loss_per_image.nan_to_num(torch.inf).argsort(descending=True).tolist()
    losses = [(images.id(int(batch.image_index[i])), float(loss_per_image[i])) for i in order]
    parameters = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    return StepReport(step, float(loss), float(norm), losses, next(iter(nonfinite_modules), ""), parameters)
