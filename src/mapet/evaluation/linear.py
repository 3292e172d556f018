"""The linear probe: SGD heads of every layer, learning rate and normalisation, trained together in one pass over features."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.average_precision import mean_average_precision
from mapet.evaluation.bank import Bank

LEARNING_RATES = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""For batches of 256, in proportion for others."""
HELD_OUT, FEWEST = 0.2, 10
Task = Literal["classes", "several"]
"""One class an image, or any number of them."""


@dataclass(frozen=True)
class Choice:
    """What a head is made of."""

    layer: int
    batch_norm: bool
    lr: float

    def __str__(self) -> str:
        return f"layer {self.layer}, lr {self.lr:g}"


class Head(nn.Module):
    """Linear classifiers of one layer, side by side: one for each learning rate.

    With `batch_norm` features are standardised first, without scale and shift, as in MAE (arXiv 2111.06377, appendix A.1).
    """

    def __init__(self, columns: slice, outputs: int, count: int, batch_norm: bool) -> None:
        super().__init__()
        self.columns = columns
        width = columns.stop - columns.start
        self.norm: nn.Module = nn.BatchNorm1d(width, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(count, width, outputs, generator=generator) * 0.01)
        self.bias = nn.Parameter(torch.zeros(count, 1, outputs))

    def forward(self, features: Float[Tensor, "B W"]) -> Float[Tensor, "R B K"]:
        return self.classify(features[:, self.columns])

    def classify(self, own: Float[Tensor, "B D"]) -> Float[Tensor, "R B K"]:
        """Logits of the features of this layer alone."""
        x = self.norm(own)
        return torch.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight)


@dataclass
class LinearProbe:
    """A trained linear classifier of one layer's pooled features.

    Attributes:
        choice: layer, learning rate and normalisation, chosen on a fifth of the training images.
        held_out: best score there of each layer, by its number.
    """

    head: Head
    choice: Choice
    held_out: dict[int, float]

    @torch.inference_mode()
    def __call__(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of the layer's own features."""
        return self.head.classify(features)[0]

    @torch.inference_mode()
    def predict(self, bank: Bank) -> Float[Tensor, "n K"]:
        """Logits of every row."""
        device = self.head.weight.device
        return torch.cat([self.head(block.to(device))[0].cpu() for _, block in bank.blocks()])


def linear_probes(
    bank: Bank, targets: Tensor, outputs: int, compute: Compute, epochs: int, task: Task = "classes", seed: int = 0
) -> dict[str, LinearProbe]:
    """The best probe without and with batch norm: 'linear' and 'linear, batch norm'.

    All layers and learning rates are trained on four fifths of the rows and judged on the last fifth; the best of each
    kind (of equals, the one with the smaller loss there) is trained anew on all rows. Test images have no say.

    Args:
        targets: (n,) classes, or for `task` 'several' (n, K) of 0 and 1.
        epochs: passes; SGD with momentum 0.9, cosine decay, no weight decay.

    Raises:
        MapetError: fewer than 10 rows.
    """
    if len(bank) < FEWEST:
        raise MapetError(
            f"{len(bank)} training images are too few for a linear probe and its choices: {FEWEST} at least"
        )
    edge = len(bank) - max(1, round(HELD_OUT * len(bank)))
    rates = list(LEARNING_RATES)
    kinds = list(product(bank.columns, (False, True)))
    heads = [Head(bank.columns[layer], outputs, len(rates), norm) for layer, norm in kinds]
    train_heads(heads, [rates] * len(heads), bank, targets, edge, epochs, compute, task, seed)
    judged = _judge(heads, bank, targets, edge, compute, task)
    scores = {
        Choice(layer, norm, lr): judged[i][r] for i, (layer, norm) in enumerate(kinds) for r, lr in enumerate(rates)
    }
    found = {}
    for name, norm in (("linear", False), ("linear, batch norm", True)):
        own = {choice: score for choice, score in scores.items() if choice.batch_norm == norm}
        best = max(own, key=own.__getitem__)
        head = Head(bank.columns[best.layer], outputs, 1, norm)
        train_heads([head], [[best.lr]], bank, targets, len(bank), epochs, compute, task, seed)
        by_layer = {layer: max(s for c, (s, _) in own.items() if c.layer == layer) for layer in bank.columns}
        found[name] = LinearProbe(head.eval(), best, by_layer)
    return found


def train_heads(
    heads: list[Head],
    rates: list[list[float]],
    bank: Bank,
    targets: Tensor,
    rows: int,
    epochs: int,
    compute: Compute,
    task: Task,
    seed: int,
) -> None:
    """Train on the first `rows` rows, all heads on the same batches."""
    size = min(1024, max(64, rows // 32))
    modules = nn.ModuleList(heads).to(compute.device).train()
    scales = [torch.tensor(r, device=compute.device).view(-1, 1, 1) * size / 256 for r in rates]
    optimizer = torch.optim.SGD(modules.parameters(), lr=1.0, momentum=0.9)
    total = epochs * math.ceil(rows / size)
    step = 0
    for epoch in range(epochs):
        for index, features in bank.batches(0, rows, size, seed * 100_003 + epoch):
            x, y = compute.to(features), compute.to(targets[index])
            loss = torch.stack([_losses(head(x), y, task).sum() for head in heads]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for head, scale in zip(heads, scales, strict=True):  # each classifier's own rate, the schedule is shared
                for parameter in (head.weight, head.bias):
                    assert parameter.grad is not None
                    parameter.grad.mul_(scale)
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            optimizer.step()
            step += 1


def _losses(logits: Float[Tensor, "R B K"], targets: Tensor, task: Task) -> Float[Tensor, " R"]:
    count = len(logits)
    if task == "several":
        wanted = targets.float().expand(count, -1, -1)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(2).mean(1)
    each = F.cross_entropy(logits.flatten(0, 1), targets.repeat(count), reduction="none")
    return each.view(count, -1).mean(1)


@torch.inference_mode()
def _judge(
    heads: list[Head], bank: Bank, targets: Tensor, edge: int, compute: Compute, task: Task
) -> list[list[tuple[float, float]]]:
    """Score and negative loss of each classifier of each head on the rows from `edge` on; score -1 where the learning rate was too high.

    Accuracies are counted as the rows go by: the logits of a million images would not fit.
    """
    modules = nn.ModuleList(heads).eval()
    sums, losses = ([torch.zeros(len(head.weight)) for head in heads] for _ in range(2))
    finite = [torch.ones(len(head.weight), dtype=torch.bool) for head in heads]
    kept: list[list[Tensor]] = [[] for _ in heads]
    for start, block in bank.blocks():
        first = max(start, edge)
        for part in block[first - start :].split(1024) if first < start + len(block) else ():
            y = targets[first : first + len(part)]
            x = compute.to(part)
            for i, head in enumerate(modules):
                logits = head(x).cpu()
                finite[i] &= logits.isfinite().all(dim=2).all(dim=1)
                losses[i] += _losses(logits, y, task) * len(y)
                if task == "several":
                    kept[i].append(logits)
                else:
                    sums[i] += (logits.argmax(2) == y).sum(1)
            first += len(part)
    if task == "several":
        wanted = targets[edge:]
        sums = [torch.tensor([mean_average_precision(one, wanted) for one in torch.cat(k, 1)]) for k in kept]
    else:
        sums = [correct / (len(bank) - edge) for correct in sums]
    return [
        list(zip(torch.where(ok, score, -1.0).tolist(), torch.where(ok, -loss, -torch.inf).tolist(), strict=True))
        for ok, score, loss in zip(finite, sums, losses, strict=True)
    ]
