"""Optimizer and cosine schedule, by timm."""

import inspect
import logging
import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import CosineLRScheduler
from torch import nn

from mapet.errors import MapetError, counted, option

log = logging.getLogger("mapet")


def auto_lr(batch_size: int, base_lr: float, base_batch_size: int) -> float:
    """Scale a learning rate by the square root of the batch.

    Adam's step does not grow with the gradient, so its rule is the square root, not SGD's linear one (Malladi et al.,
    arXiv 2205.10287); linear scaling would starve small batches.
    """
    return base_lr * math.sqrt(batch_size / base_batch_size)


def effective_batch_size(batch_size: int, num_images: int) -> int:
    """Return the images of a step: of a batch larger than all images, all; a warning says so. Learning rates are chosen for these."""
    if batch_size > num_images:
        log.warning(
            f"{option('batch_size')} %s is more than the %s there are: every step sees all of them, and the learning rate is for so many. "
            "Leave it out, or give less, for more steps",
            f"{batch_size:,}",
            counted(num_images, "image"),
        )
    return min(batch_size, num_images)


def create_optimizer(
    model: nn.Module,
    opt: str,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    betas: tuple[float, float] | None = None,
) -> torch.optim.Optimizer:
    """Create any of timm's optimizers; no decay on biases, norms, positions and tokens.

    PyTorch's own are fused: their `found_inf` leaves out a step without the CPU having to know.

    Args:
        betas: of Adam and AdamW, if not their defaults.

    Raises:
        MapetError: timm has no optimizer of this name.
    """
    try:
        parameters = inspect.signature(get_optimizer_class(opt, bind_defaults=False)).parameters
    except ValueError:
        raise MapetError(
            f"timm has no optimizer '{opt}' ({option('opt')}): e.g. adamw, lion, muon, lamb, sgd"
        ) from None
    options: dict[str, Any] = {"fused": True} if "fused" in parameters else {}
    if betas and opt in ("adam", "adamw"):
        options["betas"] = betas
    return create_optimizer_v2(model, opt, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **options)


def create_scheduler(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int, min_lr: float, warmup_lr: float = 1e-6
) -> CosineLRScheduler:
    """Create a linear warm-up, then one cosine to `min_lr`, neither of them above the peak.

    Call `step_update(step)` before each step: the rate depends on it alone.
    """
    warmup_steps, peak = min(warmup_steps, total_steps), optimizer.param_groups[0]["lr"]
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(2, total_steps - warmup_steps),  # of 1 timm warns; the rate of its only step is the same
        lr_min=min(min_lr, peak),
        warmup_t=warmup_steps,
        warmup_lr_init=min(warmup_lr, peak),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    schedule.step_update(0)
    return schedule
