"""One model shared out over several processes (FSDP2), where it outgrows a device; and put together again."""

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
    """Let each process hold its part of weights, gradients and optimizer, in place.

    Each transformer block is a group of its own: its weights are gathered, in the precision of products, while the block before
    computes, and its gradients are summed, in float32, while the backward pass goes on.

    Raises:
        MapetError: there is one process.
    """
    if distributed.world_size() == 1:
        raise MapetError(
            f"{option('fsdp', True)} is for several processes: start them with torchrun --nproc-per-node N -m mapet ..."
        )
    mesh = init_device_mesh(compute.device.type, (distributed.world_size(),))
    low = None if compute.dtype == torch.float32 else compute.dtype
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*(part for part in model.modules() if isinstance(part, Block)), model):
        sharded = fully_shard(part, mesh=mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)  # a step's shares add up to 1
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
        if part is not model:
            part.run = MethodType(_run, part)  # what `run_block` calls
            register_fsdp_forward_method(part, "run")


def _run(block: nn.Module, function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(block, *args)


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Sum the gradients of sharded parts over ranks in the next backward pass, or not."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(enabled, recurse=False)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module or a part of it is sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be shared out, put together; a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """`state_dict`, put together one by one in the first process's memory; a collective call, others get nothing."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module.state_dict()
    parts = ((name, full_tensor(tensor).cpu()) for name, tensor in module.state_dict().items())
    return {name: tensor for name, tensor in parts if distributed.rank() == 0}


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a module that may be shared out."""
    own = module.state_dict()
    module.load_state_dict(
        {name: distribute_like(value, own[name]) if name in own else value for name, value in state.items()}
    )


def distribute_like(value: Tensor, other: Tensor) -> Tensor:
    """A tensor that all processes have, shared out as the other of its shape is."""
    if not isinstance(other, DTensor) or value.shape != other.shape:
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
