"""Classifiers on frozen features: logistic regression, weighted k-NN, SGD linear probes, the attentive probe."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.config.pretraining import PretrainConfig
from mapet.data.image_list import ImageList
from mapet.data.sources import list_images
from mapet.device import ComputeContext
from mapet.errors import MapetError
from mapet.evaluation.datasets import HELD_OUT, LabeledSet, labeled, split
from mapet.evaluation.features import BackboneWrapper, CacheConfig, FeatureCache, PatchTokenCache

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
MAX_TRAIN, MAX_TEST, ONLINE_C = 2000, 1000, 0.1
"""Of the online probe: images; C of its linear probe, fixed, for it is fitted again and again."""


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
    features: Float[Tensor, "n D"], labels: Int[Tensor, " n"], num_classes: int, C: float | None = None,
    scaler: StandardScaler | None = None,
) -> LogisticProbe:  # fmt: skip
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

    if C is None and len(features) < FEW_PER_CLASS * num_classes:
        C = C_FEW
    elif C is None:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        held, rest = order[: max(1, len(order) // 5)], order[len(order) // 5 :]
        probes = [fit(rest, candidate, max_iter=100) for candidate in C_CANDIDATES]
        C = max(probes, key=lambda probe: int((probe(features[held]).argmax(1) == labels[held]).sum())).C
    return fit(torch.arange(len(features)), C)


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
    optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], num_steps: int, warmup_steps: int = 0,
    clip_grad: float | None = None,
) -> None:  # fmt: skip
    """Take a step down each loss, which the iterator computes when it is asked for the next.

    The learning rate of each group rises linearly over the warmup, and falls on a half cosine to 0 over all steps.
    """

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup_steps)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for loss in losses:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_grad is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_grad)
        optimizer.step()
        schedule.step()


Batches = Iterable[tuple[Tensor, Int[Tensor, " B"]]]
"""Features and classes of some images, on the device."""


def _logits_and_losses(
    probe: nn.Module, x: Tensor, y: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "R B K"], Float[Tensor, " R"]]:
    """Compute logits and mean cross-entropy of a probe, or of each of several that are one module."""
    logits = probe(x)
    logits = logits.view(-1, *logits.shape[-2:])
    losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none")
    return logits, losses.view(len(logits), -1).mean(1)


def _losses(probes: Sequence[nn.Module], scales: Sequence[Tensor | float], batches: Batches) -> Iterator[Tensor]:
    """Yield the sum of the losses of probes that are trained side by side, all on the same batches, times their scales."""
    for x, y in batches:
        pairs = zip(probes, scales, strict=True)
        yield torch.stack([(_logits_and_losses(probe, x, y)[1] * scale).sum() for probe, scale in pairs]).sum()


@torch.inference_mode()
def _held_out_scores(probes: Sequence[nn.Module], batches: Batches) -> list[list[tuple[float, float]]]:
    """Measure accuracy and negative loss of each probe's classifiers; -inf where the learning rate was too high.

    Summed as the batches go by: the logits of a million images would not fit.
    """
    sums: list[Tensor] = [torch.zeros(1, 2, dtype=torch.float64) for _ in nn.ModuleList(probes).eval()]
    count = 0
    for x, y in batches:
        count += len(y)
        for i, probe in enumerate(probes):
            logits, losses = _logits_and_losses(probe, x, y)
            sums[i] = sums[i] + torch.stack([(logits.argmax(2) == y).sum(1), -losses * len(y)], 1).cpu()
    for total in sums:
        total[~total.isfinite().all(1)] = -torch.inf
        total[:, 0] /= count
    return [[(accuracy, loss) for accuracy, loss in total.tolist()] for total in sums]


def require_images(count: int, what: str) -> None:
    """Raise MapetError where a fifth of the images is no basis for a choice."""
    if count < MIN_IMAGES:
        raise MapetError(f"{count} training images are too few for {what} and its choices: {MIN_IMAGES} at least")


class LinearClassifiers(nn.Module):
    """Linear classifiers of one layer's features, side by side: one for each learning rate.

    With `batch_norm` features are standardized first, without scale and shift, as in MAE (arXiv 2111.06377, appendix A.1).
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

    @torch.inference_mode()
    def predict(self, cache: FeatureCache) -> Float[Tensor, "n K"]:
        """Compute the first classifier's logits of every row."""
        return torch.cat([self(block.to(self.weight.device))[0].cpu() for _, block in cache.blocks()])


def fit_linear_sgd(
    cache: FeatureCache, num_classes: int, compute: ComputeContext, epochs: int, seed: int = 0
) -> dict[str, tuple[LinearClassifiers, dict[int, float]]]:
    """Train the field's linear probes by SGD, without batch norm ('linear_sgd') and with it ('linear_sgd_bn').

    All layers and learning rates are trained on four fifths of the rows and compared on the last fifth; the best of each kind
    (of equals, the one with the smaller loss there) is trained anew on all rows. Test images have no say. SGD with momentum 0.9,
    cosine decay, no weight decay.

    Returns:
        The probe, with one learning rate, and the best accuracy of each layer on the last fifth.

    Raises:
        MapetError: too few rows.
    """
    require_images(len(cache), "a linear probe")

    def with_labels(batches: Iterable[tuple[Int[Tensor, " b"], Tensor]]) -> Batches:
        return ((compute.to(features), compute.to(cache.labels[rows])) for rows, features in batches)

    def train(probes: list[LinearClassifiers], num_rows: int) -> None:
        size = min(1024, max(64, num_rows // 32))
        # SGD's step is linear in the loss, so a factor of the loss is a learning rate of its own.
        scales = [torch.tensor(probe.rates, device=compute.device) * size / 256 for probe in probes]
        parameters = nn.ModuleList(probes).to(compute.device).train().parameters()
        seeds = range(seed * 100_003, seed * 100_003 + epochs)
        batches = (batch for each in seeds for batch in with_labels(cache.batches(0, num_rows, size, each)))
        optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
        descend(optimizer, _losses(probes, scales, batches), epochs * math.ceil(num_rows / size))

    first = len(cache) - max(1, round(HELD_OUT * len(cache)))
    candidates = [
        LinearClassifiers(layer, columns, num_classes, SGD_LEARNING_RATES, batch_norm)
        for (layer, columns), batch_norm in product(cache.columns.items(), (False, True))
    ]
    train(candidates, first)
    held_out = with_labels(cache.batches(first, len(cache), 1024))
    scores = list(zip(candidates, _held_out_scores(candidates, held_out), strict=True))
    probes = {}
    for name, batch_norm in (("linear_sgd", False), ("linear_sgd_bn", True)):
        found = {
            one.layer: max(zip(row, one.rates, strict=True)) for one, row in scores if one.batch_norm == batch_norm
        }
        layer = max(found, key=lambda layer: found[layer][0])
        best = LinearClassifiers(layer, cache.columns[layer], num_classes, (found[layer][1],), batch_norm)
        train([best], len(cache))
        probes[name] = best.eval(), {layer: accuracy for layer, ((accuracy, _), _) in found.items()}
    return probes


class AttentivePool(nn.Module):
    """One query in several heads attends to the patches of an image (CAE, arXiv 2202.03026; AIM, arXiv 2401.08541, section 4).

    Tokens are standardized, keys and values are linear maps of them. A lone query makes the key's map redundant
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
        self.head.weight = nn.Parameter(torch.randn(num_classes, width, generator=generator) * 0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        x = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        attention = (x @ self.query.T).softmax(dim=1)  # (B, N, h)
        pooled = torch.einsum("bnh,bnd->bhd", attention, x)
        return self.head(torch.einsum("bhd,hde->bhe", pooled, self.value).flatten(1))


def fit_attentive(
    cache: PatchTokenCache, num_classes: int, compute: ComputeContext, seed: int = 0
) -> tuple[AttentivePool, float]:
    """Train the attentive probe, and return it with its learning rate.

    The best of three learning rates on a fifth of the training images (of equals, the one with the smaller loss there) is
    trained anew on all. AdamW, weight decay 0.05, cosine decay.

    Raises:
        MapetError: too few images.
    """
    labels = torch.from_numpy(cache.data.labels)
    require_images(len(labels), "an attentive probe")

    def batches(used: Bool[Tensor, " n"], epochs: int = 1, least: int = 1) -> Batches:
        for _ in range(epochs):
            for index, tokens in cache.epoch():
                if int((keep := used[index]).sum()) >= least:
                    yield compute.to(tokens[keep]), compute.to(labels[index[keep]])

    def train(used: Bool[Tensor, " n"], rates: tuple[float, ...]) -> list[AttentivePool]:
        width = cache.backbone.map_shape[0]
        probes = [AttentivePool(width, num_classes, seed).to(compute.device) for _ in rates]
        groups = [{"params": list(probe.parameters()), "lr": rate} for probe, rate in zip(probes, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
        num_steps = ATTENTIVE_EPOCHS * math.ceil(len(labels) / cache.config.batch_size)
        steps = batches(used, ATTENTIVE_EPOCHS, least=2)  # of one row there is no batch norm
        descend(optimizer, _losses(probes, [1.0] * len(probes), steps), num_steps)
        return [probe.eval() for probe in probes]

    held_out = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < HELD_OUT
    scores = _held_out_scores(train(~held_out, ATTENTIVE_LEARNING_RATES), batches(held_out))
    best = max(zip(scores, ATTENTIVE_LEARNING_RATES, strict=True))[1]
    return train(torch.ones_like(held_out), (best,))[0], best


# ---- while pre-training


def extract_sample(
    vit: VisionTransformer, train: LabeledSet, test: LabeledSet, compute: ComputeContext
) -> tuple[FeatureCache, FeatureCache]:
    """Compute a ViT's features, as it is, of training and test images."""
    backbone, config = BackboneWrapper.of_vit(vit, compute), CacheConfig(progress=False)
    return FeatureCache.extract(backbone, train, config), FeatureCache.extract(backbone, test, config)


class OnlineProbe:
    """Is it learning at all? Linear probe and k-NN on a small fixed sample of labeled images, every few epochs."""

    def __init__(self, config: PretrainConfig, images: ImageList, compute: ComputeContext) -> None:
        train, test = split(labeled(images if config.probe_images is None else list_images(config.probe_images)))
        self.train, self.test, self.compute = train.sample(MAX_TRAIN), test.sample(MAX_TEST), compute
        self.every = config.probe_every or max(1, config.epochs // 5)

    def __call__(self, vit: VisionTransformer) -> dict[str, float]:
        """Measure the accuracy of a ViT's frozen features."""
        caches = extract_sample(vit, self.train, self.test, self.compute)
        return {f"probe/{name}": value for name, value in probe_accuracy(*caches, C=ONLINE_C).items()}
