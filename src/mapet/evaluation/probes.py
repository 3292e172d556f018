"""Classifiers on frozen features: weighted k-NN, SGD linear probes, the attentive probe; `logistic_regression` has the linear probe."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.config.shared import DEFAULT_POOL, GroupBy, Pool
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.evaluation.datasets import HELD_OUT, LabeledSet, split_train_test
from mapet.evaluation.features import BackboneWrapper, CacheConfig, FeatureCache, PatchTokenCache
from mapet.evaluation.imbalance import name_rows, score_classifier
from mapet.evaluation.logistic_regression import FEW_PER_CLASS, fit_logistic, warn_at_edge

log = logging.getLogger("mapet")
KNN_K, KNN_TEMPERATURE = 20, 0.07
"""Neighbors, and temperature of their votes: DINO's (arXiv 2104.14294, appendix F.1)."""
SGD_LEARNING_RATES, SGD_BASE_BATCH_SIZE = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), 256
"""Learning rates that SGD probes choose from, for that batch size; they are scaled in proportion to the batch size."""
MIN_BATCH_SIZE, MAX_BATCH_SIZE, MIN_STEPS_PER_EPOCH = 64, 1024, 32
"""Batches of SGD probes: as large as leaves `MIN_STEPS_PER_EPOCH`, within these bounds."""
ATTENTIVE_LEARNING_RATES, ATTENTIVE_WEIGHT_DECAY, ATTENTIVE_EPOCHS = (3e-4, 1e-3, 3e-3), 0.05, 30
"""AdamW's, of the attentive probe."""
QUERY_BATCH_SIZE = 1024
"""Queries of k-NN that are compared with a block of rows at once."""
SGD_MOMENTUM, SEED_STRIDE = 0.9, 100_003
"""Momentum of SGD probes; and the distance of the seeds of two runs, so that their epochs have different orders."""
BATCH_NORM_EPS, WEIGHT_STD, QUERY_STD = 1e-6, 0.01, 0.02
"""Of batch norm as in MAE; standard deviation of the initial weights of classifiers, and of the attentive probe's queries."""
HEAD_DIM = 64
"""Width of an attention head of the attentive probe."""
MIN_IMAGES = 10
"""Training images that the probes that choose a learning rate need at least."""
MAX_TRAIN, MAX_TEST = 2000, 1000
"""Images of the online probe, at most."""


def probe_accuracy(train: FeatureCache, test: FeatureCache) -> dict[str, float]:
    """Measure the accuracy of logistic regression and of weighted k-NN on features.

    Args:
        train: features and labels of training images.
        test: features and labels of test images, of the same layers.

    Returns:
        'logistic' and 'knn' (of `KNN_K` neighbors) -> top-1 accuracy on the readable test images, 0 to 1; on imbalanced ones each after
        'logistic_balanced_accuracy', 'logistic_auroc', ..., see `score_classifier`.
    """
    features, num_classes = test.layer_features(), int(train.labels.max()) + 1
    logits = fit_logistic(train.layer_features(), train.labels, num_classes)(features)
    votes = knn_logits(train, num_classes, *nearest_neighbors(train.blocks(), features, KNN_K, fit_scaler(train)))
    scores = {name: score_classifier(each, test.labels) for name, each in (("logistic", logits), ("knn", votes))}
    return {row: score for name, by_kind in scores.items() for row, score in name_rows(name, by_kind).items()}


def fit_scaler(cache: FeatureCache) -> StandardScaler:
    """Fit scikit-learn's StandardScaler, mean and standard deviation, on the features of all rows, block by block."""
    scaler = StandardScaler()
    for _, block in cache.blocks():
        scaler.partial_fit(block.numpy())
    return scaler


# ---- k nearest neighbors


def nearest_neighbors(
    blocks: Iterable[tuple[int, Float[Tensor, "b D"]]],
    queries: Float[Tensor, "m D"],
    k: int,
    scaler: StandardScaler | None,
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Find the `k` rows nearest to each query by cosine similarity, among rows that may be too many for memory.

    Probes standardize features first: otherwise a common offset, as that of raw pixels, or a few features of large variance decide the
    cosine. DINO does not.

    Args:
        blocks: consecutive blocks of rows, each (index of the block's first row, its rows); they need not be normalized.
        queries: feature vectors to find neighbors of; they need not be normalized.
        k: number of neighbors; with fewer rows, all of them are returned.
        scaler: fitted on the rows, see `fit_scaler`: its mean is subtracted from rows and queries, which are then divided by its scale.
            None: the cosine is that of the vectors as they are given, as in `mapet search`.

    Returns:
        (cosine similarities, row indices) of the nearest rows of each query, nearest first; with fewer than `k` rows, (m, rows).
    """
    mean, scale = torch.zeros(1), torch.ones(1)
    if scaler is not None:
        mean, scale = (torch.from_numpy(part).float() for part in (scaler.mean_, scaler.scale_))
    mean, scale = mean.to(queries.device), scale.to(queries.device)
    queries = F.normalize((queries - mean) / scale, dim=1)
    similarity, index = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
    for first_row, block in blocks:
        block = F.normalize((block - mean) / scale, dim=1)
        # Few queries at a time, which bounds the memory of the similarities.
        nearest = [(part @ block.T).topk(min(k, len(block)), dim=1) for part in queries.split(QUERY_BATCH_SIZE)]
        similarity = torch.cat([similarity, torch.cat([part.values for part in nearest])], 1)
        index = torch.cat([index, torch.cat([part.indices for part in nearest]) + first_row], 1)
        # Keep the nearest of this block and all blocks before.
        similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
        index = index.gather(1, best)
    return similarity, index


def knn_logits(
    train: FeatureCache, num_classes: int, similarity: Float[Tensor, "m k"], rows: Int[Tensor, "m k"]
) -> Float[Tensor, "m K"]:
    """Compute the logits of weighted k-NN: logs of the neighbors' votes, weighted by exp(similarity / `KNN_TEMPERATURE`), as in DINO.

    Args:
        train: cache of the training images, whose `labels` has the class of each row.
        num_classes: number of classes, K.
        similarity: cosine similarities of m queries to their k neighbors, as `nearest_neighbors` returns them.
        rows: rows of the neighbors in `train`.

    Returns:
        (m, K) logs of the sums of weights, float64; their softmax is each class's fraction of the votes. A class without votes has the
        log of the smallest positive number.
    """
    votes = torch.zeros(len(similarity), num_classes)
    votes.scatter_add_(1, train.labels[rows], (similarity / KNN_TEMPERATURE).exp())
    return votes.double().clamp_min(torch.finfo(torch.float64).tiny).log()


# ---- probes trained by gradient descent


Batches = Iterable[tuple[Tensor, Int[Tensor, " B"]]]
"""Features and classes of some images, on the device."""


def minimize(
    optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], num_steps: int, warmup_steps: int = 0,
    clip_grad: float | None = None,
) -> None:  # fmt: skip
    """Run a training loop: backward pass and optimizer step for each loss.

    The learning rate of each parameter group is its peak times a half cosine, which falls from 1 to 0 over all steps, and times a
    factor that rises linearly to 1 during the warmup.

    Args:
        optimizer: its learning rates are the peak of the schedule.
        losses: scalar losses with a gradient. It must be lazy, such as a generator: each loss is computed after the optimizer step of
            the one before.
        num_steps: length of the schedule: the number of losses, or a little more.
        warmup_steps: steps over which the learning rate rises; 0: none.
        clip_grad: gradient-norm clipping threshold over all parameters; None: no clipping.
    """

    def lr_factor(step: int) -> float:
        """Return the fraction of the peak learning rate at a step, counted from 0."""
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
    """Compute the logits and mean cross-entropies of several probes on one batch.

    Args:
        probes: modules that map `x` to logits (B, K), of one classifier, or (r, B, K), of r classifiers.
        x: features of a batch, as the probes take them.
        y: class index of each image.

    Returns:
        The logits of each probe, (r, B, K) with r = 1 for one classifier; and the losses of all R classifiers, in the same order.
    """
    logits = [output.view(-1, *output.shape[-2:]) for output in (probe(x) for probe in probes)]
    losses = [F.cross_entropy(part.flatten(0, 1), y.repeat(len(part)), reduction="none") for part in logits]
    return logits, torch.cat([loss.view(-1, len(y)).mean(1) for loss in losses])


@torch.inference_mode()
def _val_scores(probes: Sequence[nn.Module], batches: Batches) -> list[tuple[float, float]]:
    """Score the classifiers of all probes on held-out images; the better one has the larger pair.

    Args:
        probes: as `_logits_and_losses` takes them; they are set to eval mode.
        batches: features and class indices of the held-out images, on the device.

    Returns:
        For each classifier (accuracy in [0, 1], negative mean cross-entropy), so that the loss decides between equal accuracies; both
        are -inf if its training has diverged.
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
    """Raise MapetError if there are fewer training images than `MIN_IMAGES`: a fifth of them is held out to choose a learning rate.

    Args:
        count: number of training images.
        probe: name of the protocol that trains the probe, for the message.
    """
    if count < MIN_IMAGES:
        hint = f"add images, or omit '{probe}' from {option('protocols')}"
        raise MapetError(f"found {count} training images, but protocol '{probe}' needs {MIN_IMAGES}: {hint}")


def hold_out(labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Return which rows are held out: every fifth of the rows sorted by class, so that a class has a fifth of its rows, give or take one.

    Within a class rows keep their order, which has to be random.
    """
    is_val, every = torch.zeros(len(labels), dtype=torch.bool), round(1 / HELD_OUT)
    is_val[labels.argsort(stable=True)[every - 1 :: every]] = True
    return is_val


def choose_rate(accuracies: Sequence[float], num_images: int) -> int:
    """Return the index of the first accuracy that is within one standard error, sqrt(p (1 - p) / n), of the best one, p.

    It is the one-standard-error rule (see `one_standard_error_rule`) for a single held-out set.

    Args:
        accuracies: by learning rate in ascending order, on the n = `num_images` held-out images; -inf if its training has diverged.
    """
    best = max(0.0, *accuracies)
    threshold = best - math.sqrt(best * (1 - best) / num_images)
    return next((i for i, accuracy in enumerate(accuracies) if accuracy >= threshold), 0)


class LinearClassifiers(nn.Module):
    """Linear classifiers of one layer's features, or of all layers', side by side: one for each of R learning rates.

    With `batch_norm` features are standardized first, without scale and shift, as in MAE (arXiv 2111.06377, appendix A.1).

    Args:
        layer: name of the layer, or of all, in `FeatureCache.columns`.
        columns: the layer's columns in a row of features of all layers.
        num_classes: number of classes, K.
        rates: R learning rates, for a batch of `SGD_BASE_BATCH_SIZE`; the caller scales the loss of each classifier by its rate.
        batch_norm: standardize features first.
    """

    def __init__(
        self, layer: str, columns: slice, num_classes: int, rates: tuple[float, ...], batch_norm: bool
    ) -> None:
        """Make the classifiers, see the class."""
        super().__init__()
        self.layer, self.columns, self.rates = layer, columns, rates
        width = columns.stop - columns.start
        self.norm: nn.Module = nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS) if batch_norm else nn.Identity()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(len(rates), width, num_classes, generator=generator) * WEIGHT_STD)
        self.bias = nn.Parameter(torch.zeros(len(rates), 1, num_classes))

    def forward(self, features: Float[Tensor, "B W"]) -> Float[Tensor, "R B K"]:
        """Compute the logits of each of the R classifiers, from rows of the features of all layers; only the columns of `layer` are used."""
        x = self.norm(features[:, self.columns])
        return torch.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight)

    @property
    def at_edge(self) -> bool:
        """Return whether the one learning rate is the smallest or largest of `SGD_LEARNING_RATES`."""
        return self.rates[0] in (SGD_LEARNING_RATES[0], SGD_LEARNING_RATES[-1])

    @property
    def selected(self) -> str:
        """Return layer and learning rate, for the tables, e.g. 'layer 3, lr 0.1' or 'layer 3, lr 100 (edge of the grid)'."""
        edge = " (edge of the grid)" if self.at_edge else ""
        return f"layer {self.layer}, lr {self.rates[0]:g}{edge}"

    @torch.inference_mode()
    def predict(self, cache: FeatureCache) -> Float[Tensor, "n K"]:
        """Compute the logits of the first classifier, of learning rate `rates[0]`, for every row of the cache in order, on the CPU.

        Batch norm uses its running mean and variance if the module is in eval mode, as `fit_linear_sgd` returns it.
        """
        return torch.cat([self(block.to(self.weight.device))[0].cpu() for _, block in cache.blocks()])


def _row_batches(
    cache: FeatureCache, selected: Bool[Tensor, " n"], compute: ComputeContext, size: int, seeds: Iterable[int | None]
) -> Batches:
    """Yield (features, labels) of the rows where `selected` is True, an epoch per seed.

    Args:
        cache: features and labels of n images.
        selected: the rows that are used.
        compute: device that batches are moved to.
        size: rows of a batch, at most.
        seeds: of the order of the rows; None keeps the order. With a seed a batch of a single row is omitted: batch norm needs two.
    """
    for seed in seeds:
        for rows, features in cache.batches(0, len(cache), size, seed):
            if int((keep := selected[rows]).sum()) > (seed is not None):
                yield compute.to(features[keep]), compute.to(cache.labels[rows[keep]])


def _train_sgd(
    probes: list[LinearClassifiers], cache: FeatureCache, selected: Bool[Tensor, " n"], compute: ComputeContext, epochs: int,
    seed: int,
) -> None:  # fmt: skip
    """Train probes in place by SGD, all on the same batches.

    Args:
        probes: linear classifiers, each with its learning rates.
        cache: features and labels of n images.
        selected: the rows to train on.
        compute: device that the probes are moved to.
        epochs: epochs of training.
        seed: of the order of the rows.
    """
    size = min(MAX_BATCH_SIZE, max(MIN_BATCH_SIZE, len(cache) // MIN_STEPS_PER_EPOCH))
    parameters = nn.ModuleList(probes).to(compute.device).train().parameters()
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=SGD_MOMENTUM)
    # All classifiers share one optimizer of lr 1. An SGD step is linear in the loss, so that scaling a classifier's loss is the
    # same as scaling its learning rate.
    rates = [rate for probe in probes for rate in probe.rates]
    scales = torch.tensor(rates, device=compute.device) * size / SGD_BASE_BATCH_SIZE
    first_seed = seed * SEED_STRIDE
    steps = _row_batches(cache, selected, compute, size, range(first_seed, first_seed + epochs))
    losses = ((_logits_and_losses(probes, x, y)[1] * scales).sum() for x, y in steps)
    minimize(optimizer, losses, epochs * math.ceil(len(cache) / size))


def fit_linear_sgd(
    cache: FeatureCache, num_classes: int, compute: ComputeContext, epochs: int, seed: int = 0
) -> dict[str, tuple[LinearClassifiers, dict[str, float]]]:
    """Train linear probes on cached features by SGD: without batch norm ('linear_sgd') and with it ('linear_sgd_bn', as in MAE).

    First, a probe for each layer, or of several also for all concatenated, each of `SGD_LEARNING_RATES` and both kinds is trained on
    four fifths of the rows, all at once on the same batches, and compared on a stratified fifth (`hold_out`). Then a probe of each kind
    with its best layer and the learning rate of `choose_rate` is trained on all rows; a warning names a rate at an edge of the
    candidates. With fewer than `FEW_PER_CLASS` rows a class the best rate is taken: the standard error of so few held-out rows is large.
    SGD has momentum 0.9, cosine decay to 0 and no weight decay.

    Args:
        cache: features of some layers and labels of the readable training images; rows are in random order.
        num_classes: number of classes.
        compute: device on which probes are trained.
        epochs: epochs of both trainings.
        seed: of the order of the rows within blocks.

    Returns:
        'linear_sgd' and 'linear_sgd_bn' -> (the probe, in eval mode, with one learning rate; layer -> accuracy on the held-out
        fifth with the best learning rate of that layer).

    Raises:
        MapetError: there are fewer than `MIN_IMAGES` rows.
    """
    _check_enough_images(len(cache), "linear-sgd")
    is_val = hold_out(cache.labels)
    kinds = {"linear_sgd": False, "linear_sgd_bn": True}
    candidates = [
        LinearClassifiers(layer, columns, num_classes, SGD_LEARNING_RATES, batch_norm)
        for (layer, columns), batch_norm in product(cache.columns.items(), kinds.values())
    ]
    _train_sgd(candidates, cache, ~is_val, compute, epochs, seed)
    # One score per classifier, in the order of `candidates` (layers, then kinds) and of the learning rates within each.
    scores = _val_scores(candidates, _row_batches(cache, is_val, compute, MAX_BATCH_SIZE, [None]))
    by_choice = dict(zip(product(cache.columns, kinds.values(), SGD_LEARNING_RATES), scores, strict=True))
    probes = {}
    for name, batch_norm in kinds.items():
        scores_by_choice = {(layer, rate): score for (layer, bn, rate), score in by_choice.items() if bn == batch_norm}
        layer, rate = max(scores_by_choice, key=lambda choice: scores_by_choice[choice])
        if len(cache) >= FEW_PER_CLASS * num_classes:
            by_rate = [scores_by_choice[layer, each][0] for each in SGD_LEARNING_RATES]
            rate = SGD_LEARNING_RATES[choose_rate(by_rate, int(is_val.sum()))]
        probe = LinearClassifiers(layer, cache.columns[layer], num_classes, (rate,), batch_norm)
        warn_at_edge(f"the learning rate of the probe {name},", rate, SGD_LEARNING_RATES)
        _train_sgd([probe], cache, torch.ones_like(is_val), compute, epochs, seed)
        accuracies = {
            layer: max(scores_by_choice[layer, rate] for rate in SGD_LEARNING_RATES)[0] for layer in cache.columns
        }
        probes[name] = probe.eval(), accuracies
    return probes


class AttentivePool(nn.Module):
    """One query in several heads attends to the patches of an image (CAE, arXiv 2202.03026; AIM, arXiv 2401.08541, section 4).

    Tokens are standardized; keys and values are linear maps of them. With a single query the key map is redundant
    (q . W x = (W'q) . x), and values may be mapped after pooling: the same functions, at the cost of one product per token.

    Args:
        width: of a token, D. The number of heads is the largest divisor of it up to `width // HEAD_DIM`, at least 1.
        num_classes: number of classes, K.
        seed: of the initial weights.
    """

    def __init__(self, width: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        heads = next(h for h in range(max(1, width // HEAD_DIM), 0, -1) if width % h == 0)
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS)
        self.query = nn.Parameter(torch.randn(heads, width, generator=generator) * QUERY_STD)
        self.value = nn.Parameter(torch.randn(heads, width, width // heads, generator=generator) * width**-0.5)
        self.head = nn.Linear(width, num_classes)
        self.head.weight = nn.Parameter(torch.randn(num_classes, width, generator=generator) * WEIGHT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        """Compute logits from the N patch tokens of each image: attention pooling with a query per head, then a linear classifier."""
        x = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        attention = (x @ self.query.T).softmax(dim=1)  # (B, N, heads), over patches
        pooled = torch.einsum("bnh,bnd->bhd", attention, x)
        return self.head(torch.einsum("bhd,hde->bhe", pooled, self.value).flatten(1))


def fit_attentive(
    cache: PatchTokenCache, num_classes: int, compute: ComputeContext, seed: int = 0
) -> tuple[AttentivePool, float]:
    """Train the attentive probe (`AttentivePool`) on patch tokens for `ATTENTIVE_EPOCHS` epochs, by AdamW with cosine decay.

    First, a probe for each of `ATTENTIVE_LEARNING_RATES` is trained on a random four fifths of the images, and compared on the others.
    Then a probe with the best learning rate is trained on all images.

    Args:
        cache: patch tokens of the last layer of the readable training images; `cache.data` has their labels.
        num_classes: number of classes.
        compute: device on which probes are trained.
        seed: of the initial weights and of the split.

    Returns:
        (the probe, in eval mode; its learning rate).

    Raises:
        MapetError: there are fewer than `MIN_IMAGES` images, or more than half of them are unreadable.
    """
    labels = torch.from_numpy(cache.data.labels)
    _check_enough_images(len(labels), "attentive")

    def batches(selected: Bool[Tensor, " n"], epochs: int = 1, min_images: int = 1) -> Batches:
        """Yield (tokens, labels) on the device, of the images where `selected` is True, `epochs` times.

        Batches with fewer than `min_images` of these images are skipped.
        """
        for _ in range(epochs):
            for index, tokens in cache.epoch():
                if int((keep := selected[index]).sum()) >= min_images:
                    yield compute.to(tokens[keep]), compute.to(labels[index[keep]])

    def train(selected: Bool[Tensor, " n"], rates: tuple[float, ...]) -> list[AttentivePool]:
        """Train a probe for each learning rate on the images where `selected` is True, all on the same batches; return them in eval mode."""
        width = cache.backbone.map_shape[0]
        probes = [AttentivePool(width, num_classes, seed).to(compute.device) for _ in rates]
        groups = [{"params": list(probe.parameters()), "lr": rate} for probe, rate in zip(probes, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=ATTENTIVE_WEIGHT_DECAY)
        steps = batches(selected, ATTENTIVE_EPOCHS, min_images=2)  # batch norm needs two images
        losses = (_logits_and_losses(probes, x, y)[1].sum() for x, y in steps)
        minimize(optimizer, losses, ATTENTIVE_EPOCHS * math.ceil(len(labels) / cache.config.batch_size))
        return [probe.eval() for probe in probes]

    is_val = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < HELD_OUT
    scores = _val_scores(train(~is_val, ATTENTIVE_LEARNING_RATES), batches(is_val))
    _, best_rate = max(zip(scores, ATTENTIVE_LEARNING_RATES, strict=True))
    return train(torch.ones_like(is_val), (best_rate,))[0], best_rate


# ---- while pre-training


def sample_for_probe(data: LabeledSet, group_by: GroupBy | None = None) -> tuple[LabeledSet, LabeledSet]:
    """Choose (training images, test images) for the probe during pre-training, at most `MAX_TRAIN` and `MAX_TEST`.

    A fifth of the images is the test set, with whole groups by `group_by`. All choices are by hashes of the image ids: the same ones every time.

    Raises:
        MapetError: no class has a second image, so that no test set can be held out.
    """
    train, test = split_train_test(data, group_by)
    return train.sample(MAX_TRAIN), test.sample(MAX_TEST)


def extract_features(
    vit: VisionTransformer, data: LabeledSet, compute: ComputeContext, layers: Sequence[int] = (-1,), pool: Pool = DEFAULT_POOL
) -> FeatureCache:  # fmt: skip
    """Compute the features of the images by a ViT, in float32; unreadable images are excluded.

    Args:
        vit: on `compute.device`; it is in eval mode meanwhile, and afterwards in the mode that it was in.
        data: images with labels; without labels all are 0.
        compute: device; its precision is that of training, and not used: bfloat16 would round small differences between images away.
        layers, pool: see `pooled_features`.

    Raises:
        MapetError: a feature is NaN or infinite, or more than half of the images are unreadable.
    """
    backbone = BackboneWrapper.from_vit(vit, replace(compute, dtype=torch.float32))
    return FeatureCache.extract(backbone, data, CacheConfig(progress=False), layers, pool)


def online_probe(
    vit: VisionTransformer, train: LabeledSet, test: LabeledSet, compute: ComputeContext, layers: Sequence[int] = (-1,),
    pool: Pool = DEFAULT_POOL,
) -> dict[str, float]:  # fmt: skip
    """Measure a ViT's frozen features during pre-training by logistic regression and k-NN on them.

    The ViT is in eval mode meanwhile, and not changed.

    Args:
        vit: on `compute.device`.
        train: labeled images that the probes are fitted on.
        test: labeled images of the same classes.
        compute: device and precision.
        layers, pool: of the features, see `pooled_features`.

    Returns:
        Names 'probe/logistic', ... of what `probe_accuracy` returns -> value, 0 to 1.

    Raises:
        MapetError: a feature is NaN or infinite, or more than half of the images of a set are unreadable.
    """
    train_cache, test_cache = (extract_features(vit, data, compute, layers, pool) for data in (train, test))
    return {f"probe/{name}": value for name, value in probe_accuracy(train_cache, test_cache).items()}
