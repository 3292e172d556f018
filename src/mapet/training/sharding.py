"""A model sharded across ranks (FSDP2) where it outgrows a device, and its tensors gathered again."""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from mapet import distributed
from mapet.device import ComputeContext
from mapet.errors import MapetError, option


def apply_fsdp(model: nn.Module, compute: ComputeContext) -> None:
    """Shard a model's parameters, gradients and optimizer state across all ranks (FSDP2), in place; a collective call.

    Each transformer block is a group of its own: its weights are gathered, in the precision of matrix products, while the block
    before computes, and its gradients are summed over ranks, in float32, while the backward pass continues. Each block gets a method
    `run(function, *args)`, which calls `function(block, *args)` with the gathered weights.

    Args:
        model: float32; its timm Blocks are the groups, all other parameters are one more group.
        compute: device that the ranks communicate from, and dtype of matrix products: float32 or bfloat16.

    Raises:
        MapetError: there is only one rank.
    """
    if distributed.world_size() == 1:
        raise MapetError(
            f"{option('fsdp', True)} needs two or more processes, found one: start them with torchrun --nproc-per-node N -m mapet ..."
        )
    mesh = init_device_mesh(compute.device.type, (distributed.world_size(),))
    low_precision = None if compute.dtype == torch.float32 else compute.dtype
    policy = MixedPrecisionPolicy(param_dtype=low_precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*(part for part in model.modules() if isinstance(part, Block)), model):
        sharded = fully_shard(part, mesh=mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)  # the ranks' losses are weighted so that they add up to the step's
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
        if part is not model:
            part.run = MethodType(_run, part)  # called by `models.pretraining.run_block`
            register_fsdp_forward_method(part, "run")


def _run(block: nn.Module, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return `function(block, *args)`; as a method of the block, it is a forward method, for which FSDP gathers the block's weights."""
    return function(block, *args)


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Set whether backward passes from now on sum the gradients of a module's sharded parts (FSDP) over ranks.

    With `enabled` False each rank adds up its own gradients, as for all micro-batches but the last. Without sharded parts nothing is done.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(enabled, recurse=False)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module or a part of it is sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (DTensor) on every rank, a collective call; return any other tensor itself, without a copy."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module, with full tensors also where it is sharded (FSDP); a collective call.

    If the module is sharded, rank 0 gets tensors on the CPU, gathered one by one to save memory, and the other ranks get {}. If it is
    not sharded, every rank gets its own state dict, whose tensors share memory with the module.
    """
    if not is_sharded(module):
        return module.state_dict()
    gathered = ((name, full_tensor(tensor).cpu()) for name, tensor in module.state_dict().items())
    return {name: tensor for name, tensor in gathered if distributed.rank() == 0}


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of full tensors into a module that may be sharded; all ranks call this with the same state dict.

    Raises:
        RuntimeError: names or shapes differ from the module's, see `load_state_dict` of torch.
    """
    local_state = module.state_dict()
    module.load_state_dict(
        {name: distribute_like(value, local_state.get(name, value)) for name, value in state.items()}
    )


def distribute_like(value: Tensor, other: Tensor) -> Tensor:
    """Shard a full tensor, which all ranks have, over the ranks in the same way as `other`, on the device of `other`.

    It is returned as it is if `other` is not sharded or has another shape (e.g. an optimizer's step count).
    """
    if not isinstance(other, DTensor) or value.shape != other.shape:
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
