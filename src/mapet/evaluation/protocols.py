"""The protocols of `mapet evaluate` on features of whole images; `dense` has those on feature maps.

A protocol is a function from a backbone and data to metrics, registered where it is defined.
"""

from collections.abc import Mapping
from math import isfinite, isnan
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, average_precision_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from mapet.data.views import ViewSpec
from mapet.errors import MapetError
from mapet.evaluation import dense, eval_context, probes
from mapet.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from mapet.evaluation.datasets import LabeledSet, few_shot_split
from mapet.evaluation.eval_context import NUM_SHOWN, PROTOCOLS, EvalContext, Protocol, ProtocolResult, protocol
from mapet.evaluation.features import BackboneWrapper, PatchTokenCache

__all__ = ["PROTOCOLS", "Protocol", "dense"]

DEAD = 1e-3
"""A dimension is dead if its standard deviation is below this fraction of the mean one."""
MAX_RANK, MAX_CLUSTER, MAX_VIEWS = 25_600, 50_000, 1000
"""Images for the rank (the RankMe paper's number), for k-means, for other views of the same images."""
NUM_QUERIES = 10
"""Rows of the figure of neighbors."""
BETTER = {"rankme": ", higher is better", "effective_rank": ", higher is better"} | dict.fromkeys(
    ("dead_dimensions", "mean_cosine", "uniformity", "alignment"), ", lower is better"
)
"""Of metrics without labels; the spread is best near 1. They tell whether features collapsed, not what they are good for."""
MAX_CORRUPTED = 1000
"""Test images, at most, that are corrupted in each of 75 ways."""
SIZE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Input sizes that are tried, relative to the trained one."""


# ---- classes


@protocol("labels")
def logistic(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe: logistic regression on the last layer's standardized features."""
    predicted, selected = context.logistic(context.test.layer_features()).argmax(1), f"C {context.logistic.C:g}"
    return ProtocolResult().add_accuracy("logistic", predicted, context.test.labels, context.classes, selected)


@protocol("labels")
def knn(context: EvalContext) -> ProtocolResult:
    """Evaluate weighted k-NN of the last layer's features."""
    predicted = probes.knn_scores(context.train, len(context.classes), *context.test_neighbors).argmax(1)
    selected = f"k {context.test_neighbors[1].shape[1]}"
    return ProtocolResult().add_accuracy("knn", predicted, context.test.labels, context.classes, selected)


@protocol("labels")
def linear_sgd(context: EvalContext) -> ProtocolResult:
    """Evaluate linear probes trained by SGD, plain and with batch norm, over layers and learning rates."""
    result, options, compute = ProtocolResult(), context.options, context.backbone.compute
    fitted = probes.fit_linear_sgd(context.train, len(context.classes), compute, options.linear_epochs, options.seed)
    for name, (probe, by_layer) in fitted.items():
        selected = f"layer {probe.layer}, lr {probe.rates[0]:g}"
        predicted = probe.predict(context.test).argmax(1)
        result.add_accuracy(name, predicted, context.test.labels, context.classes, selected)
        result.details[name] = {"val_accuracy_by_layer": {str(layer): value for layer, value in by_layer.items()}}
    return result


@protocol("labels")
def attentive(context: EvalContext) -> ProtocolResult:
    """Evaluate the attentive probe of the last layer's patch tokens."""
    compute, test = context.backbone.compute, context.data.test
    train = PatchTokenCache(context.backbone, context.data.train, context.cache)
    probe, lr = probes.fit_attentive(train, len(context.classes), compute, context.options.seed)
    tokens = PatchTokenCache(context.backbone, test, context.cache).epoch()
    with torch.inference_mode():
        found = [(index, probe(compute.to(part)).argmax(1).cpu()) for index, part in tokens]
    index, predicted = map(torch.cat, zip(*found, strict=True))
    labels = torch.from_numpy(test.labels)[index]
    return ProtocolResult().add_accuracy("attentive", predicted, labels, context.classes, f"lr {lr:g}")


@protocol("labels")
def few_shot(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe with few labels, over several fixed splits, standardized with all training images."""
    result = ProtocolResult()
    train, features, scaler = context.train, context.test.layer_features(), probes.fit_scaler(context.train)
    row_of = torch.full((len(context.data.train),), -1)
    row_of[train.index] = torch.arange(len(train))
    for amount in context.options.few_shot:
        scores = []
        for seed in range(context.options.num_seeds):
            rows = row_of[torch.from_numpy(few_shot_split(context.data.train, amount, seed))]
            rows = rows[rows >= 0]  # that could be read
            x, y = train.layer_features(rows), train.labels[rows]
            probe = probes.fit_logistic(x, y, len(context.classes), scaler=scaler)
            scores.append(float((probe(features).argmax(1) == context.test.labels).double().mean()))
        name = f"few_shot_{100 * amount:g}pct" if amount < 1 else f"few_shot_{amount:g}"
        result.metrics[name] = eval_context.mean_over_seeds(scores)
        result.details[name] = scores
    return result


def average_precisions(
    scores: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " K"]:
    """Compute the area under each class's precision-recall curve, without interpolation; NaN for a class that no image has.

    Args:
        weights: how often each image counts.
    """
    columns = zip(scores.T.numpy(), targets.T.numpy(), strict=True)
    each = [average_precision_score(y, s, sample_weight=weights) if weights @ y > 0 else np.nan for s, y in columns]
    return np.array(each)


@protocol("annotations")
def multi_label(context: EvalContext) -> ProtocolResult:
    """Evaluate linear probes, one logistic regression a class, by mean average precision."""
    assert context.data.boxes is not None
    train, test = context.data.boxes
    targets = torch.from_numpy(train.image_labels)[context.train.index]
    truth = torch.from_numpy(test.image_labels)[context.test.index]
    fit, check, scaler = context.train.layer_features(), context.test.layer_features(), probes.fit_scaler(context.train)
    logits = [probes.fit_logistic(fit, target, 2, scaler=scaler)(check) for target in targets.T]
    # Infinite where training images show it all, or none.
    scores = torch.stack([own[:, 1] - own[:, 0] for own in logits], 1).nan_to_num()

    def macro_mean(weights: Float[np.ndarray, " n"]) -> float:
        found = average_precisions(scores, truth, weights)
        return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0

    each = zip(train.classes, average_precisions(scores, truth, np.ones(len(truth))).tolist(), strict=True)
    details = {"ap": {label: None if isnan(ap) else round(ap, 4) for label, ap in each}}
    return ProtocolResult({"multi_label_map": eval_context.bootstrap_ci(macro_mean, len(truth))}, details=details)


# ---- without labels


def feature_stats(features: Float[Tensor, "n D"], views: Float[Tensor, "n D"] | None = None) -> dict[str, float]:
    """Measure rank, spread and collapse of features.

    RankMe: exp of the entropy of the singular values' fractions (Garrido et al. 2023, arXiv 2210.02885), of the features as
    they are. Effective rank: the same of the centered ones (Roy & Vetterli 2007), which a common offset does not lower. Both are at most
    min(n, D).
    Spread: mean standard deviation of the dimensions of length-1 features times sqrt(D): near 1 where directions are used evenly, 0 where all
    features point one way (SimSiam, arXiv 2011.10566, section 4.1).
    Mean cosine: of two different images.
    Uniformity and alignment on the unit sphere: Wang & Isola 2020 (arXiv 2005.10242); lower is better for both.

    Args:
        views: features of other views of the same images, for the alignment.

    Returns:
        Those that so few images have: one has no spread.
    """
    x = features.double()
    unit = F.normalize(x, dim=1)
    deviations = x.std(0)
    width, count = x.shape[1], len(x)
    total = unit.sum(0).square().sum()
    pairs = unit[:4096]
    close = torch.pdist(pairs).square() if len(pairs) > 1 else torch.zeros(1)
    found = {
        "rankme": entropy_rank(x),
        "effective_rank": entropy_rank(x - x.mean(0)),
        "dimensions": float(width),
        "dead_dimensions": float((deviations <= DEAD * deviations.mean()).double().mean()),
        "spread": float(unit.std(0).mean()) * width**0.5,
        "mean_cosine": float((total - count) / (count * (count - 1))) if count > 1 else 1.0,
        "uniformity": float((-2 * close).exp().mean().log()),
    }
    if views is not None:
        found["alignment"] = float((unit - F.normalize(views.double(), dim=1)).square().sum(1).mean())
    return {name: value for name, value in found.items() if isfinite(value)}


def entropy_rank(x: Float[Tensor, "n D"]) -> float:
    """Compute exp of the entropy of the singular values' fractions: how many directions are used evenly."""
    x = x.double()  # squares lose half of the digits
    values = torch.linalg.eigvalsh(x.T @ x if x.shape[1] <= len(x) else x @ x.T).clamp_min(0).sqrt()
    if float(values.sum()) == 0:
        return 1.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


@protocol("images")
def feature_rank(context: EvalContext) -> ProtocolResult:
    """Measure rank, spread and collapse of the last layer's features; no labels."""
    train, backbone = context.train, context.backbone
    features = train.layer_features(torch.arange(min(MAX_RANK, len(train))))
    few = context.data.train.images.subset(train.index[:MAX_VIEWS].numpy())
    spec = ViewSpec(kind="random-crop", image_size=backbone.image_size)
    batches = backbone.batches(few, context.cache, "views", spec=spec)
    index, views = map(torch.cat, zip(*((rows, context.pooled(pixels)) for rows, pixels in batches), strict=True))
    found = feature_stats(features)
    found["alignment"] = feature_stats(features[index], views)["alignment"]
    over = f"{len(features):,} images"
    return ProtocolResult(
        {name: eval_context.MetricValue(v, over=f"{over}{BETTER.get(name, '')}") for name, v in found.items()}
    )


def cluster_features(features: Float[Tensor, "n D"], num_clusters: int, seed: int) -> Int[np.ndarray, " n"]:
    """Assign each row to a cluster by k-means++ of the centered features' directions, the best of 3 starts."""
    unit = F.normalize(features - features.mean(0), dim=1)
    return KMeans(num_clusters, n_init=3, max_iter=30, random_state=seed).fit_predict(unit.numpy())


def clustering_scores(found: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Compare a partition with the classes.

    Accuracy: of the best one-to-one matching of clusters and classes (Hungarian). NMI: mutual information over the mean of
    both entropies. ARI: pairs, corrected for chance (Hubert & Arabie 1985).
    """
    table = contingency_matrix(found, labels)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {
        "accuracy": float(table[rows, columns].sum() / len(labels)),
        "nmi": float(normalized_mutual_info_score(labels, found)),
        "ari": float(adjusted_rand_score(labels, found)),
    }


@protocol("labels")
def cluster(context: EvalContext) -> ProtocolResult:
    """Cluster the test features into as many clusters as classes: accuracy after matching, NMI, ARI."""
    features, labels = context.test.layer_features()[:MAX_CLUSTER], context.test.labels[:MAX_CLUSTER].numpy()
    clusters = (cluster_features(features, len(context.classes), seed) for seed in range(context.options.num_seeds))
    found = [clustering_scores(each, labels) for each in clusters]
    least = {"accuracy": 0.0, "nmi": 0.0, "ari": -0.5}
    return ProtocolResult(
        {f"cluster_{k}": eval_context.mean_over_seeds([one[k] for one in found], low) for k, low in least.items()}
    )


@protocol("images")
def nearest_neighbors(context: EvalContext) -> ProtocolResult:
    """Find the nearest training images of some test images, for a figure."""
    keys = context.data.test.images.subset(context.test.index.numpy()).keys()
    chosen = np.argsort(keys)[:NUM_QUERIES]
    similarity, rows = (part[chosen, :NUM_SHOWN] for part in context.test_neighbors)
    details = {"queries": context.test.index[chosen], "nearest": context.train.index[rows]}
    details["similarity"] = similarity.double().round(decimals=4)
    return ProtocolResult(details={name: values.tolist() for name, values in details.items()})


# ---- other images than those of training


@protocol("ood")
def ood(context: EvalContext) -> ProtocolResult:
    """Measure accuracy on other labeled folders, on the classes they share with training; the choice is among those alone.

    So it is done for ImageNet-A and -R, which have 200 of the 1,000 classes.
    """
    result, classes, backbone = ProtocolResult(), context.classes, context.backbone
    for name, everything in context.data.ood.items():
        shared, data = shared_classes(everything, classes, name)
        batches = backbone.batches(data.images, context.cache)
        parts = [(rows, context.classify(images), context.pooled(images)) for rows, images in batches]
        index, logits, features = map(torch.cat, zip(*parts, strict=True))
        labels = torch.from_numpy(data.labels)[index]
        found = probes.nearest_neighbors(context.train.layer_blocks(), features, probes.KNN_K)
        votes = probes.knn_scores(context.train, len(classes), *found)
        for metric, scores, selected in (
            ("own_classifier" if backbone.classes else "logistic", logits, context.classifier),
            ("knn", votes, f"k {found[1].shape[1]}"),
        ):
            scores[:, ~torch.from_numpy(shared)] = -torch.inf
            result.add_accuracy(f"ood_{name}_{metric}", scores.argmax(1), labels, classes, selected)
        result.details[name] = {"classes": int(shared.sum()), "images": len(labels)}
    return result


def shared_classes(data: LabeledSet, names: list[str], what: str) -> tuple[Bool[np.ndarray, " K"], LabeledSet]:
    """Find which of `names` the data has, and its images of those, labeled by their place in `names`.

    Raises:
        MapetError: none is shared.
    """
    place = {name: index for index, name in enumerate(names)}
    labels = np.array([place.get(name, -1) for name in data.classes])[data.labels]
    if not (labels >= 0).any():
        raise MapetError(
            f"'{what}' ({data.images.root}) shares no class with the training images: {', '.join(data.classes[:3])} ... "
            f"beside {', '.join(names[:3])} ...; folders of one class need one name"
        )
    images = data.images.subset(np.flatnonzero(labels >= 0))
    return np.isin(names, data.classes), LabeledSet(images, names, labels[labels >= 0])


@protocol("labels", expensive=True)
def corruptions(context: EvalContext) -> ProtocolResult:
    """Measure accuracy under 15 corruptions in 5 severities; `add_mce` adds mCE."""
    backbone, data = context.backbone, context.data.test.sample(MAX_CORRUPTED)
    if backbone.channels not in (1, 3):
        raise MapetError(f"corruptions are of gray or RGB images, {backbone.name} takes {backbone.channels} channels")
    clean = _is_correct(context, data, backbone)
    readable = ~clean.isnan()

    def under(name: str, severity: int) -> Float[Tensor, " m"]:
        seed = list(CORRUPTIONS).index(name) * 10 + severity
        return _is_correct(context, data, backbone, augment=Corruption(name, severity), seed=seed)[readable]

    correct = {name: torch.stack([under(name, severity) for severity in SEVERITIES]) for name in CORRUPTIONS}
    each = torch.cat(list(correct.values())).mean(0).numpy()
    mean = eval_context.bootstrap_ci(
        lambda weights: float(weights @ each / weights.sum()), len(each), selected=context.classifier
    )
    accuracy = eval_context.accuracy_with_ci(int(clean[readable].sum()), len(each), context.classifier)
    errors = {name: (1 - rows.mean(1)).tolist() for name, rows in correct.items()}
    return ProtocolResult({"corruption_clean": accuracy, "corruption_mean": mean}, details={"errors": errors})


def add_mce(results: Mapping[str, Mapping[str, ProtocolResult]]) -> None:
    """Add mCE (Hendrycks & Dietterich, section 4.1) to each backbone's corruptions, as a fraction (1 is as bad as the first backbone).

    The CE of a corruption is the sum of errors over severities, over the same sum of the first backbone, which has AlexNet's
    place in the paper; a corruption under which that makes no error has none.
    """
    found = [own["corruptions"] for own in results.values() if "corruptions" in own]
    for result in found:
        totals = {name: sum(errors) for name, errors in found[0].details["errors"].items()}
        own = result.details["errors"]
        each = {name: sum(own[name]) / total for name, total in totals.items() if total > 0}
        mean = float(np.mean(list(each.values()))) if each else float("nan")
        over = f"{result.metrics['corruption_mean'].over}, relative to the first"
        result.metrics["mce"], result.details["corruption_errors"] = eval_context.MetricValue(mean, over=over), each


@protocol("labels", expensive=True)
def resolution(context: EvalContext) -> ProtocolResult:
    """Measure accuracy at other input sizes, positions interpolated."""
    result, backbone = ProtocolResult(), context.backbone
    step = backbone.patch_size
    height, width = backbone.image_size
    sizes = [(size, size) for size in context.options.eval_image_sizes or ()] or [
        (max(1, round(height * f / step)) * step, max(1, round(width * f / step)) * step) for f in SIZE_FACTORS
    ]
    for size in dict.fromkeys(sizes):
        correct = _is_correct(context, context.data.test, backbone.with_image_size(size))
        correct = correct[~correct.isnan()]
        name = f"resolution_{size[0]}" if size[0] == size[1] else f"resolution_{size[0]}x{size[1]}"
        trained = " (trained size)" if size == backbone.image_size else ""
        result.metrics[name] = eval_context.accuracy_with_ci(
            int(correct.sum()), len(correct), context.classifier + trained
        )
    return result


def _is_correct(
    context: EvalContext, data: LabeledSet, backbone: BackboneWrapper, **dataset: Any
) -> Float[Tensor, " n"]:
    """1 for each image that is classified correctly, else 0; NaN for unreadable ones."""
    correct, labels = torch.full((len(data),), torch.nan, dtype=torch.float64), torch.from_numpy(data.labels)
    for rows, images in backbone.batches(data.images, context.cache, **dataset):
        correct[rows] = (context.classify(images, backbone).argmax(1) == labels[rows]).double()
    return correct
