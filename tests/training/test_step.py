"""Weight decay and learning rate of a step, against definitions written here."""

import math

import pytest
import torch
from torch import nn

from mapet.config.tokenizers import TrainTokenizerConfig
from mapet.models.backbone import create_vit
from mapet.models.context_autoencoder import ContextAutoencoder
from mapet.models.objectives import get_objective
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.vqkd import VQKDForTraining
from mapet.training.step import create_optimizer, create_scheduler

ARGUMENTS = {"embed_dim": 64, "depth": 2, "num_heads": 1, "init_values": 0.1}


def vit(**arguments):
    return create_vit("vit_tiny_patch16_224", (8, 8), 4, model_args=ARGUMENTS | arguments)


def classifier():
    model = vit(reg_tokens=2)
    model.reset_classifier(3)
    return model


def vqkd():
    config = TrainTokenizerConfig(images="x", out="y", vocab_size=8, codebook_dim=8, decoder_depth=1)
    return VQKDForTraining(vit(init_values=None), 5, config)


CASES = {
    "pretraining": (
        lambda: ViTForPreTraining(vit(reg_tokens=2), 8, get_objective("mapet"), 1, separate_query_token=True),
        None,
    ),
    "cae": (lambda: ContextAutoencoder(vit(), 8, 1), None),
    "finetuning": (classifier, None),
    "finetuning with layer decay": (classifier, 0.75),
    "vqkd": (vqkd, None),
}


@pytest.mark.parametrize(("build", "layer_decay"), CASES.values(), ids=CASES)
def test_only_weight_matrices_decay(build, layer_decay):
    """AdamW multiplies a parameter without gradient by 1 - lr * weight_decay: of linear and convolution layers the weight alone."""
    model = build()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    create_optimizer(model, "adamw", lr=0.1, weight_decay=0.5, layer_decay=layer_decay).step()
    decayed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, torch.ones_like(parameter))
    }
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert decayed == {f"{name}.weight" for name in layers}


@pytest.mark.parametrize(
    ("total", "warmup", "peak", "min_lr"),
    [(300, 10, 1.5e-3, 1e-5), (100, 20, 5e-4, 1e-6), (50, 0, 1e-3, 0.0), (7, 20, 1e-3, 1e-5), (1, 0, 1e-3, 1e-5)],
)
def test_the_cosine_runs_from_step_0_with_the_warm_up_laid_over_it(total, warmup, peak, min_lr):
    """The first two are the released pre-training and fine-tuning of ViT-B, in epochs."""
    layer = nn.Linear(2, 2)
    optimizer = create_optimizer(layer, "adamw", lr=peak, weight_decay=0.0)
    schedule, rates = create_scheduler(optimizer, total, warmup, min_lr), []
    for step in range(total):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[-1]["lr"])
    rise = min(warmup, total)
    expected = [
        1e-6 + (peak - 1e-6) * step / rise
        if step < rise
        else min_lr + (peak - min_lr) * (1 + math.cos(math.pi * step / total)) / 2
        for step in range(total)
    ]
    assert rates == pytest.approx(expected, rel=1e-9)
