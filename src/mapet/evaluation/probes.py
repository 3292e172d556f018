"""Classifiers on frozen features: logistic regression, weighted k-NN, SGD linear probes, the attentive probe."""

import math
import warnings
from collections.abc import Iterable, Sequence
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

from mapet.device import ComputeContext
from mapet.errors import MapetError
from mapet.evaluation.datasets import HELD_OUT, LabeledSet, split_train_test
from mapet.evaluation.features import BackboneWrapper, CacheConfig, FeatureCache, PatchTokenCache

KNN_K, KNN_TEMPERATURE = 20, 0.07
"""Neighbors, and temperature of their votes: DINO's (arXiv 2104.14294, appendix F.1)."""
C_CANDIDATES, C_FEW, FEW_PER_CLASS = (0.01, 0.1, 1.0), 0.1, 10
"""Values of C that logistic regression chooses from, and the one it takes below `FEW_PER_CLASS` training images per class."""
LOGISTIC_ITERATIONS, CHOICE_ITERATIONS = 300, 100
"""Most iterations of logistic regression, and of one that is fitted only to choose C."""
SGD_LEARNING_RATES, SGD_BASE_BATCH_SIZE = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0), 256
"""Learning rates that SGD probes choose from, for that batch size; they are scaled in proportion to the batch size."""
MIN_BATCH_SIZE, MAX_BATCH_SIZE, MIN_STEPS_PER_EPOCH = 64, 1024, 32
"""Batches of SGD probes: as large as leaves `MIN_STEPS_PER_EPOCH`, within these bounds."""
ATTENTIVE_LEARNING_RATES, ATTENTIVE_WEIGHT_DECAY, ATTENTIVE_EPOCHS = (3e-4, 1e-3, 3e-3), 0.05, 30
"""AdamW's, of the attentive probe."""
HEAD_DIM = 64
"""Width of an attention head of the attentive probe."""
MIN_IMAGES = 10
"""Training images that the probes that choose a learning rate need at least."""
MAX_TRAIN, MAX_TEST, ONLINE_C = 2000, 1000, 0.1
"""Images of the online probe, at most; C of its linear probe, fixed so that it is fitted once."""


def probe_accuracy(train: FeatureCache, test: FeatureCache, C: float | None = None) -> dict[str, float]:
    """Measure the top-1 accuracy of the linear probe and of weighted k-NN on the deepest layer's features.

    Args:
        C: of the linear probe; see `fit_logistic`.

    Returns:
        'logistic' and 'knn' -> accuracy, 0 to 1.
    """
    features, num_classes = test.layer_features(), int(train.labels.max()) + 1
    scores = {
        "logistic": fit_logistic(train.layer_features(), train.labels, num_classes, C)(features),
        "knn": knn_scores(train, num_classes, *nearest_neighbors(train.layer_blocks(), features, KNN_K)),
    }
    return {name: float((score.argmax(1) == test.labels).double().mean()) for name, score in scores.items()}


# ---- logistic regression


@dataclass(frozen=True)
class LogisticProbe:
    """Multinomial logistic regression on standardized features, as one linear map to K classes.

    Attributes:
        mean, scale: mean and standard deviation that features are standardized with.
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
        C: inverse strength of the L2 penalty, as in scikit-learn; None chooses the best of `C_CANDIDATES` by accuracy on a fifth of the
            rows, which is held out for that, or takes `C_FEW` below `FEW_PER_CLASS` rows per class.
        scaler: fitted on other features, as all training images where only some have labels; None fits one on these.

    Returns:
        The probe fitted on all rows.
    """
    scaler = scaler or StandardScaler().fit(features.numpy())
    mean, scale = (torch.from_numpy(part).float() for part in (scaler.mean_, scaler.scale_))

    def fit(rows: Int[Tensor, " m"] | slice, C: float, max_iter: int = LOGISTIC_ITERATIONS) -> LogisticProbe:
        x, y = (features[rows] - mean) / scale, labels[rows]
        weight, bias = torch.zeros(num_classes, x.shape[1]), torch.full((num_classes,), -torch.inf)
        classes = y.unique()
        bias[classes] = 0.0
        if len(classes) > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = LogisticRegression(C=C, max_iter=max_iter).fit(x.numpy(), y.numpy())
            fitted = classes[-len(model.coef_) :]  # of two classes scikit-learn gives one logit, that of the second
            weight[fitted], bias[fitted] = (torch.from_numpy(part).float() for part in (model.coef_, model.intercept_))
        return LogisticProbe(mean, scale, weight, bias, C)

    if C is None and len(features) < FEW_PER_CLASS * num_classes:
        C = C_FEW
    elif C is None:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        fifth = len(order) // 5
        val, rest = order[: max(1, fifth)], order[fifth:]
        candidates = [fit(rest, candidate, CHOICE_ITERATIONS) for candidate in C_CANDIDATES]
        C = max(candidates, key=lambda probe: int((probe(features[val]).argmax(1) == labels[val]).sum())).C
    return fit(slice(None), C)


def fit_scaler(cache: FeatureCache) -> StandardScaler:
    """Measure mean and standard deviation of the deepest layer's features, block by block."""
    scaler = StandardScaler()
    for _, block in cache.layer_blocks():
        scaler.partial_fit(block.numpy())
    return scaler


# ---- k nearest neighbors


def nearest_neighbors(
    blocks: Iterable[tuple[int, Float[Tensor, "b D"]]], queries: Float[Tensor, "m D"], k: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Find the `k` rows nearest to each query by cosine similarity, among rows that may be more than memory holds.

    Args:
        blocks: (index of the block's first row, its rows).

    Returns:
        Similarities and row indices, nearest first; fewer than `k` where there are fewer rows.
    """
    queries = F.normalize(queries, dim=1)
    similarity, index = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for first_row, block in blocks:
        block = F.normalize(block, dim=1)
        # In parts, for the similarities of all queries and rows may be more than memory holds.
        nearest = [(part @ block.T).topk(min(k, len(block)), dim=1) for part in queries.split(1024)]
        similarity = torch.cat([similarity, torch.cat([part.values for part in nearest])], 1)
        index = torch.cat([index, torch.cat([part.indices for part in nearest]) + first_row], 1)
        similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
        index = index.gather(1, best)
    return similarity, index


def knn_scores(
    train: FeatureCache, num_classes: int, similarity: Float[Tensor, "m k"], rows: Int[Tensor, "m k"]
) -> Float[Tensor, "m K"]:
    """Sum the neighbors' votes for each class, weighted by exp(similarity / `KNN_TEMPERATURE`).

    Args:
        train: has the label of each row.
        similarity: cosine similarities to the neighbors, as `nearest_neighbors` returns them.
        rows: rows of the neighbors in `train`.
    """
    votes = torch.zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, train.labels[rows], (similarity / KNN_TEMPERATURE).exp())


# ---- probes trained by gradient descent


Batches = Iterable[tuple[Tensor, Int[Tensor, " B"]]]
"""Features and classes of some images, on the device."""


def minimize(
    optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], num_steps: int, warmup_steps: int = 0,
    clip_grad: float | None = None,
) -> None:  # fmt: skip
    """Take an optimizer step for each loss.

    The learning rate of each parameter group rises linearly over the warmup, and falls on a half cosine to 0 over all steps.

    Args:
        losses: scalars with a gradient; each is computed when the iterator is asked for it, after the step before.
        num_steps: number of losses, or a little more.
        clip_grad: largest norm of the gradient of all parameters; None does not clip.
    """

    def lr_factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / max(1, warmup_steps))
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    for loss in losses:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_grad is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_grad)
        optimizer.step()
        schedule.step()


def _logits_and_losses(
    probes: Sequence[nn.Module], x: Tensor, y: Int[Tensor, " B"]
) -> tuple[list[Float[Tensor, "r B K"]], Float[Tensor, " R"]]:
    """Compute the logits and mean cross-entropies of probes on one batch.

    Args:
        probes: their logits are (B, K), or (r, B, K) of r classifiers side by side.

    Returns:
        The logits of each probe, and the losses of the R classifiers of all probes.
    """
    logits = [output.view(-1, *output.shape[-2:]) for output in (probe(x) for probe in probes)]
    losses = [F.cross_entropy(part.flatten(0, 1), y.repeat(len(part)), reduction="none") for part in logits]
    return logits, torch.cat([loss.view(-1, len(y)).mean(1) for loss in losses])


@torch.inference_mode()
def _val_scores(probes: Sequence[nn.Module], batches: Batches) -> list[tuple[float, float]]:
    """Measure (accuracy, negative loss) of each classifier of all probes; both are -inf where training has diverged.

    The better classifier has the larger pair: the accuracy decides, and of equal ones the loss.
    """
    nn.ModuleList(probes).eval()
    sums, count = torch.zeros(1, 2, dtype=torch.float64), 0
    for x, y in batches:
        logits, losses = _logits_and_losses(probes, x, y)
        correct = torch.cat([(part.argmax(2) == y).sum(1) for part in logits])
        sums = sums + torch.stack([correct, -losses * len(y)], 1).cpu()
        count += len(y)
    scores = sums / count
    scores[~scores.isfinite().all(1)] = -torch.inf
    return [(accuracy, negative_loss) for accuracy, negative_loss in scores.tolist()]


def _check_enough_images(count: int, probe: str) -> None:
    """Raise MapetError if a fifth of the images is too few to choose a learning rate by; `probe` names it in the message."""
    if count < MIN_IMAGES:
        raise MapetError(
            f"{count} training images are too few for {probe}, which needs {MIN_IMAGES}: add images, or omit it"
        )


class LinearClassifiers(nn.Module):
    """Linear classifiers of one layer's features, side by side: one for each of R learning rates.

    With `batch_norm` features are standardized first, without scale and shift, as in MAE (arXiv 2111.06377, appendix A.1).

    Args:
        layer: number of the layer, from 1.
        columns: the layer's columns in a row of features of all layers.
        rates: learning rates, for a batch of `SGD_BASE_BATCH_SIZE`.
    """

    def __init__(
        self, layer: int, columns: slice, num_classes: int, rates: tuple[float, ...], batch_norm: bool
    ) -> None:
        super().__init__()
        self.layer, self.columns, self.rates = layer, columns, rates
        width = columns.stop - columns.start
        self.norm: nn.Module = nn.BatchNorm1d(width, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(len(rates), width, num_classes, generator=generator) * 0.01)
        self.bias = nn.Parameter(torch.zeros(len(rates), 1, num_classes))

    def forward(self, features: Float[Tensor, "B W"]) -> Float[Tensor, "R B K"]:
        """Compute each classifier's logits from the features of all layers."""
        x = self.norm(features[:, self.columns])
        return torch.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight)

    @torch.inference_mode()
    def predict(self, cache: FeatureCache) -> Float[Tensor, "n K"]:
        """Compute the first classifier's logits of every row, on the CPU."""
        return torch.cat([self(block.to(self.weight.device))[0].cpu() for _, block in cache.blocks()])


def fit_linear_sgd(
    cache: FeatureCache, num_classes: int, compute: ComputeContext, epochs: int, seed: int = 0
) -> dict[str, tuple[LinearClassifiers, dict[int, float]]]:
    """Train linear probes by SGD, as published methods do: without batch norm ('linear_sgd') and with it ('linear_sgd_bn').

    Probes of all layers and learning rates are trained on four fifths of the rows and compared on the last fifth. Then the best
    layer and learning rate of each kind is trained on all rows. SGD with momentum 0.9, cosine decay, no weight decay.

    Args:
        cache: features of training images; rows are in random order.
        epochs: number of epochs.
        seed: of the order of the rows.

    Returns:
        'linear_sgd' and 'linear_sgd_bn' -> the probe, of one learning rate, and the accuracy on the last fifth of each layer's
        best learning rate.

    Raises:
        MapetError: too few rows.
    """
    _check_enough_images(len(cache), "a linear probe")

    def batches(first: int, last: int, size: int, seeds: Iterable[int | None]) -> Batches:
        for order_seed in seeds:
            for rows, features in cache.batches(first, last, size, order_seed):
                yield compute.to(features), compute.to(cache.labels[rows])

    def train(probes: list[LinearClassifiers], num_rows: int) -> None:
        size = min(MAX_BATCH_SIZE, max(MIN_BATCH_SIZE, num_rows // MIN_STEPS_PER_EPOCH))
        optimizer = torch.optim.SGD(nn.ModuleList(probes).to(compute.device).train().parameters(), lr=1.0, momentum=0.9)
        # SGD's step is linear in the loss: a factor of a classifier's loss is its learning rate.
        rates = [rate for probe in probes for rate in probe.rates]
        scales = torch.tensor(rates, device=compute.device) * size / SGD_BASE_BATCH_SIZE
        first_seed = seed * 100_003  # so that no two seeds share an epoch's order
        steps = batches(0, num_rows, size, range(first_seed, first_seed + epochs))
        losses = ((_logits_and_losses(probes, x, y)[1] * scales).sum() for x, y in steps)
        minimize(optimizer, losses, epochs * math.ceil(num_rows / size))

    first_val = len(cache) - max(1, round(HELD_OUT * len(cache)))
    kinds = {"linear_sgd": False, "linear_sgd_bn": True}
    candidates = [
        LinearClassifiers(layer, columns, num_classes, SGD_LEARNING_RATES, batch_norm)
        for (layer, columns), batch_norm in product(cache.columns.items(), kinds.values())
    ]
    train(candidates, first_val)
    scores = _val_scores(candidates, batches(first_val, len(cache), MAX_BATCH_SIZE, [None]))
    by_choice = dict(zip(product(cache.columns, kinds.values(), SGD_LEARNING_RATES), scores, strict=True))
    probes = {}
    for name, batch_norm in kinds.items():
        own = {(layer, rate): score for (layer, bn, rate), score in by_choice.items() if bn == batch_norm}
        layer, rate = max(own, key=lambda choice: own[choice])
        probe = LinearClassifiers(layer, cache.columns[layer], num_classes, (rate,), batch_norm)
        train([probe], len(cache))
        accuracies = {layer: max(own[layer, rate] for rate in SGD_LEARNING_RATES)[0] for layer in cache.columns}
        probes[name] = probe.eval(), accuracies
    return probes


class AttentivePool(nn.Module):
    """One query in several heads attends to the patches of an image (CAE, arXiv 2202.03026; AIM, arXiv 2401.08541, section 4).

    Tokens are standardized; keys and values are linear maps of them. With a single query the key map is redundant
    (q . W x = (W'q) . x), and values may be mapped after pooling: the same functions, at the cost of one product per token.
    """

    def __init__(self, width: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        # As many heads of about HEAD_DIM as divide the width.
        heads = next(h for h in range(max(1, width // HEAD_DIM), 0, -1) if width % h == 0)
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.randn(heads, width, generator=generator) * 0.02)
        self.value = nn.Parameter(torch.randn(heads, width, width // heads, generator=generator) * width**-0.5)
        self.head = nn.Linear(width, num_classes)
        self.head.weight = nn.Parameter(torch.randn(num_classes, width, generator=generator) * 0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        """Compute logits from patch tokens."""
        x = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        attention = (x @ self.query.T).softmax(dim=1)  # (B, N, heads)
        pooled = torch.einsum("bnh,bnd->bhd", attention, x)
        return self.head(torch.einsum("bhd,hde->bhe", pooled, self.value).flatten(1))


def fit_attentive(
    cache: PatchTokenCache, num_classes: int, compute: ComputeContext, seed: int = 0
) -> tuple[AttentivePool, float]:
    """Train the attentive probe on patch tokens, by AdamW with cosine decay.

    Each of `ATTENTIVE_LEARNING_RATES` is trained on about four fifths of the images, and compared on the others; the best one is trained
    on all images.

    Args:
        seed: of the initial weights and of the split.

    Returns:
        The probe and its learning rate.

    Raises:
        MapetError: too few images.
    """
    labels = torch.from_numpy(cache.data.labels)
    _check_enough_images(len(labels), "an attentive probe")

    def batches(used: Bool[Tensor, " n"], epochs: int = 1, min_images: int = 1) -> Batches:
        """Yield the tokens and classes of used images, without batches of fewer than `min_images` of them."""
        for _ in range(epochs):
            for index, tokens in cache.epoch():
                if int((keep := used[index]).sum()) >= min_images:
                    yield compute.to(tokens[keep]), compute.to(labels[index[keep]])

    def train(used: Bool[Tensor, " n"], rates: tuple[float, ...]) -> list[AttentivePool]:
        """Train a probe for each learning rate on the used images, all on the same batches."""
        width = cache.backbone.map_shape[0]
        probes = [AttentivePool(width, num_classes, seed).to(compute.device) for _ in rates]
        groups = [{"params": list(probe.parameters()), "lr": rate} for probe, rate in zip(probes, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=ATTENTIVE_WEIGHT_DECAY)
        steps = batches(used, ATTENTIVE_EPOCHS, min_images=2)  # batch norm needs two images
        losses = (_logits_and_losses(probes, x, y)[1].sum() for x, y in steps)
        minimize(optimizer, losses, ATTENTIVE_EPOCHS * math.ceil(len(labels) / cache.config.batch_size))
        return [probe.eval() for probe in probes]

    is_val = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < HELD_OUT
    scores = _val_scores(train(~is_val, ATTENTIVE_LEARNING_RATES), batches(is_val))
    _, best_rate = max(zip(scores, ATTENTIVE_LEARNING_RATES, strict=True))
    return train(torch.ones_like(is_val), (best_rate,))[0], best_rate


# ---- while pre-training


def sample_for_probe(data: LabeledSet) -> tuple[LabeledSet, LabeledSet]:
    """Choose at most `MAX_TRAIN` training and `MAX_TEST` test images, by their ids: the same ones every time.

    Raises:
        MapetError: no class has a second image.
    """
    train, test = split_train_test(data)
    return train.sample(MAX_TRAIN), test.sample(MAX_TEST)


def extract_features(vit: VisionTransformer, data: LabeledSet, compute: ComputeContext) -> FeatureCache:
    """Compute a ViT's features of the images, in evaluation mode, without a progress bar."""
    return FeatureCache.extract(BackboneWrapper.from_vit(vit, compute), data, CacheConfig(progress=False))


def online_probe(
    vit: VisionTransformer, train: LabeledSet, test: LabeledSet, compute: ComputeContext
) -> dict[str, float]:
    """Measure a ViT's frozen features while it is trained: 'probe/logistic' and 'probe/knn' -> accuracy, 0 to 1."""
    train_cache, test_cache = (extract_features(vit, data, compute) for data in (train, test))
    return {f"probe/{name}": value for name, value in probe_accuracy(train_cache, test_cache, ONLINE_C).items()}
