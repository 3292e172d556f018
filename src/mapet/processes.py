"""What the processes of torch.distributed tell each other; one process that is alone tells nobody anything.

Each function is a collective call: every process of the default group makes it, in the same order. It is the caller who
initialises that group; without one they return what they are given.
"""

from torch import Tensor, distributed


def number() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if _together() else 0


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same to the bit in each."""
    if not _together():
        return tensor
    shared = _where_it_travels(tensor).clone()
    distributed.all_reduce(shared)
    return shared.to(tensor.device)


def of_the_first(tensor: Tensor) -> Tensor:
    """The tensor of rank 0: for what follows from equal numbers, but whose rounding may depend on the processor."""
    if not _together():
        return tensor
    shared = _where_it_travels(tensor).clone()
    distributed.broadcast(shared, 0)
    return shared.to(tensor.device)


def stacked(tensor: Tensor) -> Tensor:
    """(processes, ...) the tensors of all processes, which have one shape."""
    rows = tensor.new_zeros(number(), *tensor.shape)
    rows[rank()] = tensor
    return total(rows)


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _where_it_travels(tensor: Tensor) -> Tensor:
    return tensor.to("cuda" if distributed.get_backend() == "nccl" else tensor.device).contiguous()
