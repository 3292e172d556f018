"""The attentive probe: a trained query pools frozen patch tokens, and a linear classifier reads the pool."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.bank import Place, shuffled
from mapet.evaluation.encoder import Encoder
from mapet.evaluation.features import LabelledSet, centred_batches
from mapet.evaluation.linear import FEWEST, HELD_OUT
from mapet.tokenizers.feature_store import FeatureStore

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
"""AdamW's."""
HEAD_WIDTH = 64


class AttentivePool(nn.Module):
    """One query in several heads attends to the patches of an image (CAE, arXiv 2202.03026; AIM, arXiv 2401.08541, section 4).

    Tokens are standardised, keys and values are linear maps of them. A lone query makes the key's map redundant
    (q . W x = (W'q) . x), and values may be mapped after pooling: the same functions, at a cost of one product a token.
    """

    def __init__(self, width: int, outputs: int, seed: int = 0) -> None:
        super().__init__()
        heads = next(h for h in range(max(1, width // HEAD_WIDTH), 0, -1) if width % h == 0)
        generator = torch.Generator().manual_seed(seed)
        scale = width**-0.5
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.randn(heads, width, generator=generator) * 0.02)
        self.value = nn.Parameter(torch.randn(heads, width, width // heads, generator=generator) * scale)
        self.head = nn.Linear(width, outputs)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(outputs, width, generator=generator) * 0.01)
            self.head.bias.zero_()

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        x = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        attention = (x @ self.query.T).softmax(dim=1)  # (B, N, h)
        pooled = torch.einsum("bnh,bnd->bhd", attention, x)
        return self.head(torch.einsum("bhd,hde->bhe", pooled, self.value).flatten(1))


@dataclass
class TokenBank:
    """Patch tokens of the last layer, kept as float16 where they fit the memory, else computed anew for each pass.

    Rows lie in a random order, as in `Bank`.

    Attributes:
        index: image of each row, in that order.
        shape: (N, D) of an image's tokens.
    """

    encoder: Encoder
    data: LabelledSet
    place: Place
    store: FeatureStore | None = None
    index: Int[Tensor, " n"] | None = None
    shape: tuple[int, int] = (0, 0)

    def passes(self) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b N D"]]]:
        """(indices of images, their tokens), a batch at a time, once through."""
        if self.store is not None and self.index is not None:
            for start, rows in self.store.blocks(self.place.batch_size):
                yield self.index[start : start + len(rows)], rows.unflatten(1, self.shape)
            return
        seen: list[Tensor] = []
        count = len(self.data.images)
        for index, images in centred_batches(
            self.data.images, self.encoder.image_size, self.encoder.channels,
            shuffled(count, self.place.batch_size), self.place.workers, "tokens",
        ):  # fmt: skip
            tokens = self.encoder.tokens(images).flatten(2).transpose(1, 2).cpu()
            self.shape = (tokens.shape[1], tokens.shape[2])
            if not seen and 2 * count * tokens[0].numel() <= self.place.memory:
                self.store = FeatureStore(count, self.place.memory, self.place.scratch)
            if self.store is not None:
                self.store.append(tokens.flatten(1))
            seen.append(index)
            yield index, tokens
        self.index = torch.cat(seen)


def attentive_probe(
    train: TokenBank, labels: Int[Tensor, " n"], outputs: int, compute: Compute, epochs: int, seed: int = 0
) -> tuple[AttentivePool, float]:
    """The best of three learning rates, chosen on a fifth of the training images (of equals, the one with the smaller loss
    there) and trained anew on all; and that rate.

    AdamW, weight decay 0.05, cosine decay.

    Raises:
        MapetError: fewer than 10 images.
    """
    if len(labels) < FEWEST:
        raise MapetError(f"{len(labels)} training images are too few for an attentive probe: {FEWEST} at least")
    held = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < HELD_OUT
    candidates = _train(train, labels, ~held, outputs, list(LEARNING_RATES), compute, epochs, seed)
    judged = torch.zeros(len(candidates), 2, dtype=torch.float64)  # right ones, and the negative sum of their losses
    for index, tokens in train.passes():
        x, y = compute.to(tokens[held[index]]), labels[index[held[index]]]
        if len(y):
            with torch.inference_mode():
                for row, logits in zip(judged, (probe(x).float().cpu() for probe in candidates), strict=True):
                    row += torch.stack([(logits.argmax(1) == y).sum(), -F.cross_entropy(logits, y, reduction="sum")])
    best = max(zip(judged.tolist(), LEARNING_RATES, strict=True))[1]
    everything = torch.ones_like(held)
    return _train(train, labels, everything, outputs, [best], compute, epochs, seed)[0], best


def _train(
    train: TokenBank,
    labels: Tensor,
    used: Tensor,
    outputs: int,
    rates: list[float],
    compute: Compute,
    epochs: int,
    seed: int,
) -> list[AttentivePool]:
    probes: list[AttentivePool] = []
    optimizer: torch.optim.Optimizer | None = None
    total = epochs * math.ceil(len(labels) / train.place.batch_size)
    step = 0
    for _ in range(epochs):
        for index, tokens in train.passes():
            keep = used[index]
            if int(keep.sum()) < 2:
                continue
            x, y = compute.to(tokens[keep]), compute.to(labels[index[keep]])
            if optimizer is None:
                probes = [AttentivePool(x.shape[2], outputs, seed).to(compute.device) for _ in rates]
                groups = [
                    {"params": list(p.parameters()), "lr": r, "peak": r} for p, r in zip(probes, rates, strict=True)
                ]
                optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
            loss = torch.stack([F.cross_entropy(probe(x), y) for probe in probes]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            optimizer.step()
            step += 1
    return [probe.eval() for probe in probes]


@torch.inference_mode()
def attentive_logits(
    probe: AttentivePool, test: TokenBank, compute: Compute
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n K"]]:
    """(indices of images, their logits)."""
    found = [(index, probe(compute.to(tokens)).cpu()) for index, tokens in test.passes()]
    return torch.cat([index for index, _ in found]), torch.cat([logits for _, logits in found])
