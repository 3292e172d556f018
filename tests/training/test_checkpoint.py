"""The optimizer's state in a checkpoint: by parameter name, and as exact as in an uninterrupted run."""

import pytest
import torch
from timm.optim import get_optimizer_class, list_optimizers
from torch import nn

from mapet.training.checkpoint import OtherInputsError, checkpoint_tensors, load_checkpoint, save_checkpoint
from mapet.training.step import UNSUPPORTED, create_optimizer
from tests.refused import refused

CLASSES = {
    get_optimizer_class(name, bind_defaults=False): name for name in list_optimizers(exclude_filters=["bnb*", "fused*"])
}
"""Optimizer class -> one of its names."""
NAMES = sorted(name for kind, name in CLASSES.items() if kind.__name__ not in UNSUPPORTED)


class Net(nn.Module):
    """A parameter of each kind: 4 dimensions, 2, 1, a token, and one that the loss does not use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 4)
        self.token, self.unused = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.ones(4))

    def forward(self, images):
        return self.head(self.norm(self.conv(images).mean((2, 3)) + self.token[0, 0]))


def train(net, optimizer, steps):
    for step in steps:
        images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        net(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def make(opt="adamw"):
    net = Net()
    return net, create_optimizer(net, opt, 1e-2, 0.1)


@pytest.mark.parametrize("opt", NAMES)
def test_resumes_exactly_with_other_order_of_parameters(opt, tmp_path):
    """An uninterrupted run is the definition; the resumed one has its groups, and the parameters in them, the other way round."""
    whole, optimizer = make(opt)
    train(whole, optimizer, range(8))
    net, optimizer = make(opt)
    train(net, optimizer, range(4))
    save_checkpoint(tmp_path, 4, checkpoint_tensors(net, optimizer), {}, keep=1)
    resumed, optimizer = make(opt)
    optimizer.param_groups.reverse()
    for group in optimizer.param_groups:
        group["params"].reverse()
    load_checkpoint(tmp_path, resumed, optimizer)
    train(resumed, optimizer, range(4, 8))
    for (name, expected), result in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(result, expected), name


def test_names_and_states(tmp_path):
    net, optimizer = make()
    train(net, optimizer, range(2))
    tensors = checkpoint_tensors(net, optimizer)["optimizer"]
    used = {name for name, _ in net.named_parameters() if name != "unused"}
    assert tensors.keys() == {f"{name}/{state}" for name in used for state in ("step", "exp_avg", "exp_avg_sq")}
    assert torch.equal(tensors["head.bias/exp_avg"], optimizer.state[net.head.bias]["exp_avg"])


@pytest.mark.parametrize(
    ("key", "replacement"),
    [
        ("head.weight/exp_avg", {"haed.weight/exp_avg": torch.zeros(4, 4)}),
        ("head.weight/exp_avg", {"head.weight/exp_avg": torch.zeros(4, 5)}),
        ("head.weight/exp_avg", {"0.exp_avg": torch.zeros(4, 4)}),  # as earlier versions named them
    ],
)
def test_names_and_shapes_of_another_model_are_refused(key, replacement, tmp_path):
    net, optimizer = make()
    train(net, optimizer, range(1))
    parts = checkpoint_tensors(net, optimizer)
    del parts["optimizer"][key]
    save_checkpoint(tmp_path, 1, parts | {"optimizer": parts["optimizer"] | replacement}, {}, keep=1)
    net, optimizer = make()
    with refused(tmp_path / "step-00000001" / "optimizer.safetensors", *replacement, kind=OtherInputsError):
        load_checkpoint(tmp_path, net, optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("opt", ["kron", "adahessian"])
def test_optimizers_that_no_run_could_resume_are_refused(opt):
    with refused(opt, field="opt", value=opt):
        make(opt)
