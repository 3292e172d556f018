"""Classifiers on frozen features: logistic regression, weighted k-NN, SGD linear probes, the attentive probe."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.feature_cache import FeatureCache, PatchTokenCache
from mapet.evaluation.features import HELD_OUT

KNN_K, KNN_TEMPERATURE = 20, 0.07
"""DINO's (arXiv 2104.14294, appendix F.1)."""
C_CANDIDATES, C_FEW, FEW_PER_CLASS = (0.01, 0.1, 1.0), 0.1, 10
"""Values of C that logistic regression chooses from, and the one it takes below `FEW_PER_CLASS` training images per class."""
SGD_LEARNING_RATES = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""For batches of 256, in proportion for others."""
ATTENTIVE_LEARNING_RATES, ATTENTIVE_EPOCHS, HEAD_DIM = (3e-4, 1e-3, 3e-3), 30, 64
"""AdamW's; passes over the training images; width of an attention head."""
MIN_IMAGES = 10
"""Training images that the probes with learning rates to choose need at least."""


def probe_accuracy(train: FeatureCache, test: FeatureCache, C: float | None = None) -> dict[str, float]:
    """Measure frozen features: top-1 of the linear probe ('logistic', see `fit_logistic`) and of weighted k-NN ('knn')."""
    features, count = test.layer_features(), int(train.labels.max()) + 1
    scores = {
        "logistic": fit_logistic(train.layer_features(), train.labels, count, C)(features),
        "knn": knn_scores(train, count, *nearest_neighbors(train.layer_blocks(), features, KNN_K)),
    }
    return {name: float((score.argmax(1) == test.labels).double().mean()) for name, score in scores.items()}


# ---- logistic regression


@dataclass(frozen=True)
class LogisticProbe:
    """Multinomial logistic regression on standardized features, as one linear map of K classes.

    Attributes:
        mean, scale: (D,) of the features that it was standardized with.
        weight: (K, D); zero for classes without training images, whose bias is -inf.
        C: inverse strength of the L2 penalty.
    """

    mean: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    weight: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]
    C: float

    def __call__(self, features: Float[Tensor, "n D"]) -> Float[Tensor, "n K"]:
        """Compute logits, on the CPU."""
        return (features.cpu() - self.mean) / self.scale @ self.weight.T + self.bias


def fit_logistic(
    features: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    num_classes: int,
    C: float | None = None,
    scaler: StandardScaler | None = None,
) -> LogisticProbe:
    """Fit the linear probe: multinomial logistic regression on standardized features.

    Args:
        C: scikit-learn's; None takes the best of `C_CANDIDATES` on a held-out fifth of the rows (never on test images), or
            `C_FEW` below `FEW_PER_CLASS` rows per class.
        scaler: fitted on more images than these; None fits one on these.
    """
    scaler = scaler or StandardScaler().fit(features.numpy())
    mean, scale = (torch.from_numpy(part).float() for part in (scaler.mean_, scaler.scale_))

    def fit(rows: Int[Tensor, " m"], C: float, max_iter: int = 300) -> LogisticProbe:
        x, y = (features[rows] - mean) / scale, labels[rows]
        weight, bias = torch.zeros(num_classes, x.shape[1]), torch.full((num_classes,), -torch.inf)
        classes = y.unique()
        bias[classes] = 0.0
        if len(classes) > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = LogisticRegression(C=C, max_iter=max_iter).fit(x.numpy(), y.numpy())
            fitted = classes[-len(model.coef_) :]  # of two classes scikit-learn has the second's logit alone
            weight[fitted], bias[fitted] = (torch.from_numpy(part).float() for part in (model.coef_, model.intercept_))
        return LogisticProbe(mean, scale, weight, bias, C)

    everything = torch.arange(len(features))
    if C is None and len(features) < FEW_PER_CLASS * num_classes:
        C = C_FEW
    if C is None:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        held, rest = order[: max(1, len(order) // 5)], order[len(order) // 5 :]
        probes = [fit(rest, candidate, max_iter=100) for candidate in C_CANDIDATES]
        C = max(probes, key=lambda probe: int((probe(features[held]).argmax(1) == labels[held]).sum())).C
    return fit(everything, C)


def fit_scaler(cache: FeatureCache) -> StandardScaler:
    """Measure mean and standard deviation of the deepest layer's features, a block at a time."""
    scaler = StandardScaler()
    for _, block in cache.layer_blocks():
        scaler.partial_fit(block.numpy())
    return scaler


# ---- k nearest neighbors


def nearest_neighbors(
    bank: Iterable[tuple[int, Float[Tensor, "b D"]]], queries: Float[Tensor, "m D"], k: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Find the `k` nearest rows of a bank by cosine similarity: similarities and indices, nearest first (fewer, if it has fewer).

    Args:
        bank: (index of the first row, rows), a block at a time: the bank may be larger than memory.
    """
    queries = F.normalize(queries, dim=1)
    best, found = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start, block in bank:
        block = F.normalize(block, dim=1)
        merged = []
        for part, old, old_index in zip(queries.split(1024), best.split(1024), found.split(1024), strict=True):
            similarity, index = (part @ block.T).topk(min(k, len(block)), dim=1)
            similarity, index = torch.cat([old, similarity], 1), torch.cat([old_index, index + start], 1)
            top, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
            merged.append((top, index.gather(1, place)))
        best, found = (torch.cat(parts) for parts in zip(*merged, strict=True))
    return best, found


def knn_scores(
    train: FeatureCache, num_classes: int, similarity: Float[Tensor, "m k"], rows: Int[Tensor, "m k"]
) -> Float[Tensor, "m K"]:
    """Sum the neighbors' votes for each class, weighted by exp(s / T)."""
    votes = torch.zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, train.labels[rows], (similarity / KNN_TEMPERATURE).exp())


# ---- probes trained by gradient descent


def descend(
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Tensor],
    num_steps: int,
    warmup_steps: int = 0,
    clip_grad: float | None = None,
) -> None:
    """Take a step down each loss, which the iterator computes when it is asked for the next.

    The learning rate of each group rises linearly over the warmup, and falls on a half cosine to 0 over all steps.
    """

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup_steps)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))

    schedule = LambdaLR(optimizer, factor)
    for loss in losses:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_grad is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_grad)
        optimizer.step()
        schedule.step()


def require_images(count: int, what: str) -> None:
    """Raise MapetError where a fifth of the images is no basis for a choice."""
    if count < MIN_IMAGES:
        raise MapetError(f"{count} training images are too few for {what} and its choices: {MIN_IMAGES} at least")


class LinearClassifiers(nn.Module):
    """Linear classifiers of one layer's features, side by side: one for each learning rate.

    With `batch_norm` features are standardised first, without scale and shift, as in MAE (arXiv 2111.06377, appendix A.1).
    """

    def __init__(
        self, layer: int, columns: slice, num_classes: int, rates: tuple[float, ...], batch_norm: bool
    ) -> None:
        super().__init__()
        self.layer, self.columns, self.rates, self.batch_norm = layer, columns, rates, batch_norm
        width = columns.stop - columns.start
        self.norm: nn.Module = nn.BatchNorm1d(width, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(len(rates), width, num_classes, generator=generator) * 0.01)
        self.bias = nn.Parameter(torch.zeros(len(rates), 1, num_classes))

    def forward(self, features: Float[Tensor, "B W"]) -> Float[Tensor, "R B K"]:
        """Compute each classifier's logits of the features of all layers."""
        x = self.norm(features[:, self.columns])
        return torch.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight)

    def losses(self, features: Float[Tensor, "B W"], labels: Int[Tensor, " B"]) -> Float[Tensor, " R"]:
        """Compute each classifier's mean cross-entropy."""
        logits = self(features)
        each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
        return each.view(len(logits), -1).mean(1)


@dataclass
class LinearProbe:
    """A trained linear classifier of one layer.

    Attributes:
        val_accuracy: best accuracy of each layer on the held-out fifth of the training images.
    """

    classifier: LinearClassifiers
    val_accuracy: dict[int, float]

    @property
    def selected(self) -> str:
        """Name what was chosen."""
        return f"layer {self.classifier.layer}, lr {self.classifier.rates[0]:g}"

    @torch.inference_mode()
    def predict(self, cache: FeatureCache) -> Float[Tensor, "n K"]:
        """Compute the logits of every row."""
        device = self.classifier.weight.device
        return torch.cat([self.classifier(block.to(device))[0].cpu() for _, block in cache.blocks()])


def fit_linear_sgd(
    cache: FeatureCache, num_classes: int, compute: Compute, epochs: int, seed: int = 0
) -> dict[str, LinearProbe]:
    """Train the field's linear probes by SGD, without batch norm ('linear_sgd') and with it ('linear_sgd_bn').

    All layers and learning rates are trained on four fifths of the rows and compared on the last fifth; the best of each kind
    (of equals, the one with the smaller loss there) is trained anew on all rows. Test images have no say. SGD with momentum 0.9,
    cosine decay, no weight decay.

    Raises:
        MapetError: too few rows.
    """
    require_images(len(cache), "a linear probe")
    num_train = len(cache) - max(1, round(HELD_OUT * len(cache)))
    candidates = [
        LinearClassifiers(layer, columns, num_classes, SGD_LEARNING_RATES, batch_norm)
        for (layer, columns), batch_norm in product(cache.columns.items(), (False, True))
    ]
    _train_linear(candidates, cache, num_train, compute, epochs, seed)
    scores = _val_scores(candidates, cache, num_train, compute)
    probes = {}
    for name, batch_norm in (("linear_sgd", False), ("linear_sgd_bn", True)):
        own = {
            (candidate.layer, rate): score
            for candidate, row in zip(candidates, scores, strict=True)
            for rate, score in zip(SGD_LEARNING_RATES, row, strict=True)
            if candidate.batch_norm == batch_norm
        }
        layer, rate = max(own, key=own.__getitem__)
        best = LinearClassifiers(layer, cache.columns[layer], num_classes, (rate,), batch_norm)
        _train_linear([best], cache, len(cache), compute, epochs, seed)
        by_layer = {layer: max(score for (at, _), (score, _) in own.items() if at == layer) for layer in cache.columns}
        probes[name] = LinearProbe(best.eval(), by_layer)
    return probes


def _train_linear(
    candidates: list[LinearClassifiers], cache: FeatureCache, num_rows: int, compute: Compute, epochs: int, seed: int
) -> None:
    """Train on the first rows, all candidates on the same batches."""
    size = min(1024, max(64, num_rows // 32))
    modules = nn.ModuleList(candidates).to(compute.device).train()
    # SGD's step is linear in the loss, so a factor of the loss is a learning rate of its own.
    rates = [torch.tensor(one.rates, device=compute.device) * size / 256 for one in candidates]

    def losses() -> Iterator[Tensor]:
        for epoch in range(epochs):
            for index, features in cache.batches(num_rows, size, seed * 100_003 + epoch):
                x, y = compute.to(features), compute.to(cache.labels[index])
                yield torch.stack(
                    [(one.losses(x, y) * r).sum() for one, r in zip(candidates, rates, strict=True)]
                ).sum()

    optimizer = torch.optim.SGD(modules.parameters(), lr=1.0, momentum=0.9)
    descend(optimizer, losses(), epochs * math.ceil(num_rows / size))


@torch.inference_mode()
def _val_scores(
    candidates: list[LinearClassifiers], cache: FeatureCache, first: int, compute: Compute
) -> list[list[tuple[float, float]]]:
    """Measure accuracy and negative loss of each classifier on the rows from `first` on; -inf where the learning rate was too high.

    Summed as the rows go by: the logits of a million images would not fit.
    """
    nn.ModuleList(candidates).eval()
    sums = torch.zeros(len(candidates), len(SGD_LEARNING_RATES), 2, dtype=torch.float64)
    for start, block in cache.blocks():
        for rows in torch.arange(max(start, first), max(start + len(block), first)).split(1024):
            x, y = compute.to(block[rows - start]), compute.to(cache.labels[rows])
            for total, candidate in zip(sums, candidates, strict=True):
                total[:, 0] += (candidate(x).argmax(2) == y).sum(1).cpu()
                total[:, 1] -= candidate.losses(x, y).cpu() * len(y)
    sums[~sums.isfinite().all(2)] = -torch.inf
    sums[..., 0] /= len(cache) - first
    return [[(accuracy, loss) for accuracy, loss in row] for row in sums.tolist()]


class AttentivePool(nn.Module):
    """One query in several heads attends to the patches of an image (CAE, arXiv 2202.03026; AIM, arXiv 2401.08541, section 4).

    Tokens are standardised, keys and values are linear maps of them. A lone query makes the key's map redundant
    (q . W x = (W'q) . x), and values may be mapped after pooling: the same functions, at a cost of one product a token.
    """

    def __init__(self, width: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        heads = next(h for h in range(max(1, width // HEAD_DIM), 0, -1) if width % h == 0)
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.randn(heads, width, generator=generator) * 0.02)
        self.value = nn.Parameter(torch.randn(heads, width, width // heads, generator=generator) * width**-0.5)
        self.head = nn.Linear(width, num_classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(num_classes, width, generator=generator) * 0.01)
            self.head.bias.zero_()

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        x = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        attention = (x @ self.query.T).softmax(dim=1)  # (B, N, h)
        pooled = torch.einsum("bnh,bnd->bhd", attention, x)
        return self.head(torch.einsum("bhd,hde->bhe", pooled, self.value).flatten(1))


def fit_attentive(
    cache: PatchTokenCache, num_classes: int, compute: Compute, epochs: int | None = None, seed: int = 0
) -> tuple[AttentivePool, float]:
    """Train the attentive probe, and return it with its learning rate.

    The best of three learning rates on a fifth of the training images (of equals, the one with the smaller loss there) is
    trained anew on all. AdamW, weight decay 0.05, cosine decay.

    Args:
        epochs: None takes `ATTENTIVE_EPOCHS`.

    Raises:
        MapetError: too few images.
    """
    labels = torch.from_numpy(cache.data.labels)
    require_images(len(labels), "an attentive probe")

    def train(used: Bool[Tensor, " n"], rates: tuple[float, ...]) -> list[AttentivePool]:
        probes = [AttentivePool(cache.backbone.map_shape[0], num_classes, seed).to(compute.device) for _ in rates]
        groups = [{"params": list(probe.parameters()), "lr": rate} for probe, rate in zip(probes, rates, strict=True)]

        def losses() -> Iterator[Tensor]:
            for _ in range(num_epochs):
                for index, tokens in cache.epoch():
                    keep = used[index]
                    if int(keep.sum()) > 1:  # of one row there is no batch norm
                        x, y = compute.to(tokens[keep]), compute.to(labels[index[keep]])
                        yield torch.stack([F.cross_entropy(probe(x), y) for probe in probes]).sum()

        num_steps = num_epochs * math.ceil(len(labels) / cache.config.batch_size)
        descend(torch.optim.AdamW(groups, weight_decay=0.05), losses(), num_steps)
        return [probe.eval() for probe in probes]

    num_epochs = epochs or ATTENTIVE_EPOCHS
    held = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < HELD_OUT
    candidates = train(~held, ATTENTIVE_LEARNING_RATES)
    scores = torch.zeros(len(candidates), 2, dtype=torch.float64)  # correct ones, and the negative sum of their losses
    for row, probe in zip(scores, candidates, strict=True):
        index, logits = attentive_logits(probe, cache, compute)
        logits, y = logits[held[index]], labels[index[held[index]]]
        row += torch.stack([(logits.argmax(1) == y).sum(), -F.cross_entropy(logits, y, reduction="sum")])
    best = max(zip(scores.tolist(), ATTENTIVE_LEARNING_RATES, strict=True))[1]
    return train(torch.ones_like(held), (best,))[0], best


@torch.inference_mode()
def attentive_logits(
    probe: AttentivePool, cache: PatchTokenCache, compute: Compute
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n K"]]:
    """Compute (indices of images, their logits)."""
    found = [(index, probe(compute.to(tokens)).float().cpu()) for index, tokens in cache.epoch()]
    return torch.cat([index for index, _ in found]), torch.cat([logits for _, logits in found])
