"""AdamW and the cosine schedule of the recipe, by timm."""

import logging
import math

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from mapet.errors import counted

log = logging.getLogger("mapet")
PAPER_LR, PAPER_BATCH = 1.5e-3, 2048


def automatic_lr(batch_size: int) -> float:
    """The paper's 1.5e-3 at batch 2048, scaled by the square root of the batch.

    Adam's step does not grow with the gradient, so its rule is the square root, not SGD's linear one (Malladi et al.,
    arXiv 2205.10287); linear scaling would starve small batches.
    """
    return PAPER_LR * math.sqrt(batch_size / PAPER_BATCH)


def images_a_step(batch_size: int, num_images: int) -> int:
    """Of a batch that is larger than all images, all; a warning says so. Learning rates are chosen for these."""
    if batch_size > num_images:
        log.warning(
            "--batch-size %s is more than the %s there are: every step sees all of them, and the learning rate is for so many. "
            "Leave it out, or give less, for more steps",
            f"{batch_size:,}",
            counted(num_images, "image"),
        )
    return min(batch_size, num_images)


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float | None = None
) -> torch.optim.Optimizer:
    """AdamW; no decay on biases, norms, positions and tokens.

    PyTorch's fused one: its `found_inf` leaves out a step without the CPU having to know.
    """
    return create_optimizer_v2(model, "adamw", lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int, min_lr: float, warmup_lr: float = 1e-6
) -> CosineLRScheduler:
    """Linear warm-up, then one cosine to `min_lr`, neither of them above the peak. Call `step_update(step)` before each step: the rate
    depends on it alone."""
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
