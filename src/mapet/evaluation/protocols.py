"""The protocols of `mapet evaluate` on features of whole images; `dense` has those on feature maps.

A protocol is a function from an `EvalContext` to a `ProtocolResult`; the decorator `protocol` registers it by name.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import isfinite

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
from mapet.errors import MapetError, option
from mapet.evaluation import dense, eval_context, probes
from mapet.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from mapet.evaluation.datasets import LabeledSet, few_shot_split
from mapet.evaluation.eval_context import NUM_SHOWN, PROTOCOLS, EvalContext, Protocol, ProtocolResult, protocol
from mapet.evaluation.features import PatchTokenCache

__all__ = ["PROTOCOLS", "Protocol", "dense"]

DEAD_FRACTION = 1e-3
"""A dimension is dead if its standard deviation is below this fraction of the mean standard deviation."""
MAX_RANK_IMAGES, MAX_CLUSTER_IMAGES, MAX_VIEW_IMAGES, MAX_CORRUPTED_IMAGES = 25_600, 50_000, 1000, 1000
"""Images, at most, for the rank (as in the RankMe paper), for k-means, for a second view, and for the 75 corruptions."""
MAX_PAIRED = 4096
"""Images, at most, of which all pairs are compared for the uniformity."""
NUM_QUERIES = 10
"""Test images in the figure of neighbors."""
BETTER_DIRECTION = dict.fromkeys(("rankme", "effective_rank"), ", higher is better")
BETTER_DIRECTION |= dict.fromkeys(("dead_dimensions", "mean_cosine", "uniformity", "alignment"), ", lower is better")
"""Which values of label-free metrics are better; the spread is best near 1. They show collapse, not what features are good for."""
SIZE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Default input sizes of `resolution`, as factors of the trained one."""


def _concatenate(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """Transpose batches and concatenate: yield the concatenation of the first tensors of all batches, then of the second ones, ..."""
    return map(torch.cat, zip(*batches, strict=True))


# ---- classes


@protocol("labels")
def logistic(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe: logistic regression on the last layer's standardized features."""
    predicted, selected = context.logistic(context.test.layer_features()).argmax(1), f"C {context.logistic.C:g}"
    return ProtocolResult().add_accuracy("logistic", predicted, context.test.labels, context.classes, selected)


@protocol("labels")
def knn(context: EvalContext) -> ProtocolResult:
    """Evaluate weighted k-NN on the last layer's features."""
    predicted = probes.knn_scores(context.train, len(context.classes), *context.test_neighbors).argmax(1)
    selected = f"k {context.test_neighbors[1].shape[1]}"
    return ProtocolResult().add_accuracy("knn", predicted, context.test.labels, context.classes, selected)


@protocol("labels")
def linear_sgd(context: EvalContext) -> ProtocolResult:
    """Evaluate linear probes trained by SGD, 'linear_sgd' without and 'linear_sgd_bn' with batch norm.

    The layer and learning rate of each are selected on held-out training images; `details` has the best accuracy there of each layer.
    """
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
    """Evaluate the attentive probe on the last layer's patch tokens: train it, then classify the test images batch by batch."""
    backbone, compute, test = context.backbone, context.backbone.compute, context.data.test
    train_tokens = PatchTokenCache(backbone, context.data.train, context.cache)
    probe, lr = probes.fit_attentive(train_tokens, len(context.classes), compute, context.options.seed)
    batches = PatchTokenCache(backbone, test, context.cache).epoch()
    with torch.inference_mode():
        index, predicted = _concatenate((rows, probe(compute.to(tokens)).argmax(1).cpu()) for rows, tokens in batches)
    labels = torch.from_numpy(test.labels)[index]
    return ProtocolResult().add_accuracy("attentive", predicted, labels, context.classes, f"lr {lr:g}")


@protocol("labels")
def few_shot(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe with few labels: mean top-1 over `num_seeds` fixed splits for each amount in the option `few_shot`.

    Features are standardized with all training images; only the split's labels are used. Unreadable images of a split are excluded.

    Returns:
        Metrics 'few_shot_10pct' for the amount 0.1, 'few_shot_5' for 5 images per class; `details` has the accuracy of each seed.
    """
    result = ProtocolResult()
    train, test_features, scaler = context.train, context.test.layer_features(), probes.fit_scaler(context.train)
    row_of_image = torch.full((len(context.data.train),), -1)  # -1: unreadable
    row_of_image[train.index] = torch.arange(len(train))
    for amount in context.options.few_shot:
        accuracies = []
        for seed in range(context.options.num_seeds):
            rows = row_of_image[torch.from_numpy(few_shot_split(context.data.train, amount, seed))]
            rows = rows[rows >= 0]
            x, y = train.layer_features(rows), train.labels[rows]
            probe = probes.fit_logistic(x, y, len(context.classes), scaler=scaler)
            accuracies.append(float((probe(test_features).argmax(1) == context.test.labels).double().mean()))
        name = f"few_shot_{100 * amount:g}pct" if amount < 1 else f"few_shot_{amount:g}"
        result.metrics[name], result.details[name] = eval_context.mean_over_seeds(accuracies), accuracies
    return result


def average_precisions(
    scores: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " K"]:
    """Return the average precision of each class, in [0, 1]: the area under its precision-recall curve, without interpolation.

    Args:
        scores: higher is more likely.
        targets: 1 where an image shows a class, else 0.
        weights: how often each image counts.

    Returns:
        NaN for classes that no image shows.
    """
    columns = zip(scores.T.numpy(), targets.T.numpy(), strict=True)
    each = [average_precision_score(y, s, sample_weight=weights) if weights @ y > 0 else np.nan for s, y in columns]
    return np.array(each)


@protocol("annotations")
def multi_label(context: EvalContext) -> ProtocolResult:
    """Evaluate linear probes by mean average precision: one logistic regression per class tells whether an image shows the class.

    Returns:
        'multi_label_map' with a bootstrap interval over test images; `details['ap']` has the average precision of each class, None
        for a class that no test image shows.
    """
    assert context.data.boxes is not None
    train, test = context.data.boxes
    train_targets = torch.from_numpy(train.image_labels)[context.train.index]
    targets = torch.from_numpy(test.image_labels)[context.test.index]
    x, test_x, scaler = context.train.layer_features(), context.test.layer_features(), probes.fit_scaler(context.train)
    logits = [probes.fit_logistic(x, target, 2, scaler=scaler)(test_x) for target in train_targets.T]
    # Infinite for a class that all training images show, or none.
    scores = torch.stack([pair[:, 1] - pair[:, 0] for pair in logits], 1).nan_to_num()

    def mean_average_precision(weights: Float[np.ndarray, " n"]) -> float:
        precisions = average_precisions(scores, targets, weights)
        return float(np.nanmean(precisions)) if np.isfinite(precisions).any() else 0.0

    named = zip(train.classes, average_precisions(scores, targets, np.ones(len(targets))).tolist(), strict=True)
    details = {"ap": {name: round(value, 4) if isfinite(value) else None for name, value in named}}
    metric = eval_context.bootstrap_ci(mean_average_precision, len(targets))
    return ProtocolResult({"multi_label_map": metric}, details=details)


# ---- without labels


def feature_stats(features: Float[Tensor, "n D"]) -> dict[str, float]:
    """Measure rank, spread and collapse of features.

    Returns:
        Metrics by name, without those that are NaN or Inf for so few images:
        rankme: exp of the entropy of the normalized singular values (Garrido et al. 2023, arXiv 2210.02885), of the features as
            they are; at most min(n, D).
        effective_rank: the same of the centered features (Roy & Vetterli 2007), which a common offset does not lower.
        dimensions: D. dead_dimensions: the fraction of them that is nearly constant, see `DEAD_FRACTION`.
        spread: mean standard deviation of the dimensions of length-1 features times sqrt(D): near 1 if directions are used
            evenly, 0 if all features point one way (SimSiam, arXiv 2011.10566, section 4.1).
        mean_cosine: mean cosine similarity of two different images.
        uniformity: log of the mean Gaussian potential of pairs on the unit sphere (Wang & Isola 2020, arXiv 2005.10242).
    """
    x = features.double()
    unit = F.normalize(x, dim=1)
    deviations, (count, width) = x.std(0), x.shape
    squared_norm_of_sum = float(unit.sum(0).square().sum())
    distances = torch.pdist(unit[:MAX_PAIRED]) if count > 1 else torch.zeros(1)
    stats = {
        "rankme": entropy_rank(x),
        "effective_rank": entropy_rank(x - x.mean(0)),
        "dimensions": float(width),
        "dead_dimensions": float((deviations <= DEAD_FRACTION * deviations.mean()).double().mean()),
        "spread": float(unit.std(0).mean()) * width**0.5,
        "mean_cosine": (squared_norm_of_sum - count) / (count * (count - 1)) if count > 1 else 1.0,
        "uniformity": float((-2 * distances.square()).exp().mean().log()),
    }
    return {name: value for name, value in stats.items() if isfinite(value)}


def measure_alignment(features: Float[Tensor, "n D"], views: Float[Tensor, "n D"]) -> float:
    """Return the mean squared distance on the unit sphere of features of two views of each image (Wang & Isola 2020), 0 to 4."""
    units = F.normalize(features.double(), dim=1), F.normalize(views.double(), dim=1)
    return float((units[0] - units[1]).square().sum(1).mean())


def entropy_rank(x: Float[Tensor, "n D"]) -> float:
    """Return exp of the entropy of the singular values, normalized to sum 1: how many directions are used evenly."""
    x = x.double()  # squares lose half of the digits
    values = torch.linalg.eigvalsh(x.T @ x if x.shape[1] <= len(x) else x @ x.T).clamp_min(0).sqrt()
    if float(values.sum()) == 0:
        return 1.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


@protocol("images")
def feature_rank(context: EvalContext) -> ProtocolResult:
    """Measure rank, spread and collapse of the last layer's features without labels, and their alignment with random crops."""
    train, backbone = context.train, context.backbone
    features = train.layer_features(torch.arange(min(MAX_RANK_IMAGES, len(train))))
    images = context.data.train.images.subset(train.index[:MAX_VIEW_IMAGES].numpy())
    spec = ViewSpec(kind="random-crop", image_size=backbone.image_size)
    batches = backbone.batches(images, context.cache, "views", spec=spec)
    rows, views = _concatenate((rows, context.pooled(backbone, pixels)) for rows, pixels in batches)
    stats = feature_stats(features) | {"alignment": measure_alignment(features[rows], views)}
    over = f"{len(features):,} images"
    values = {k: eval_context.MetricValue(value, over=over + BETTER_DIRECTION.get(k, "")) for k, value in stats.items()}
    return ProtocolResult(values)


def cluster_features(features: Float[Tensor, "n D"], num_clusters: int, seed: int) -> Int[np.ndarray, " n"]:
    """Return a cluster index for each row, by k-means++ on the centered features' directions, the best of 3 starts."""
    unit = F.normalize(features - features.mean(0), dim=1)
    return KMeans(num_clusters, n_init=3, max_iter=30, random_state=seed).fit_predict(unit.numpy())


def clustering_scores(clusters: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Compare clusters with classes.

    Returns:
        accuracy: of the best one-to-one matching of clusters and classes (Hungarian method), 0 to 1.
        nmi: normalized mutual information: mutual information over the mean of both entropies, 0 to 1.
        ari: adjusted Rand index: agreement on pairs, corrected for chance (Hubert & Arabie 1985), -0.5 to 1.
    """
    table = contingency_matrix(clusters, labels)
    matching = linear_sum_assignment(table, maximize=True)
    return {
        "accuracy": float(table[matching].sum() / len(labels)),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


@protocol("labels")
def cluster(context: EvalContext) -> ProtocolResult:
    """Cluster the test features into as many clusters as classes, with each seed: accuracy after matching, NMI, ARI."""
    features, labels = (part[:MAX_CLUSTER_IMAGES] for part in (context.test.layer_features(), context.test.labels))
    clusters = (cluster_features(features, len(context.classes), seed) for seed in range(context.options.num_seeds))
    scores = [clustering_scores(each, labels.numpy()) for each in clusters]
    minima = {"accuracy": 0.0, "nmi": 0.0, "ari": -0.5}
    means = {name: eval_context.mean_over_seeds([each[name] for each in scores], low) for name, low in minima.items()}
    return ProtocolResult({f"cluster_{name}": mean for name, mean in means.items()})


@protocol("images")
def nearest_neighbors(context: EvalContext) -> ProtocolResult:
    """Find the training images nearest to some test images, for a figure.

    Returns:
        No metrics. `details` has 'queries', indices of test images; 'nearest', for each query the indices of its nearest training
        images, nearest first; and 'similarity', their cosine similarities.
    """
    keys = context.data.test.images.subset(context.test.index.numpy()).keys()
    chosen = np.argsort(keys)[:NUM_QUERIES]  # the same test images for every backbone
    similarity, rows = (part[chosen, :NUM_SHOWN] for part in context.test_neighbors)
    details = {"queries": context.test.index[chosen], "nearest": context.train.index[rows]}
    details["similarity"] = similarity.double().round(decimals=4)
    return ProtocolResult(details={name: values.tolist() for name, values in details.items()})


# ---- other images than those of training


@protocol("ood")
def ood(context: EvalContext) -> ProtocolResult:
    """Measure accuracy on each further labeled folder, for its images of classes that training has too.

    Predictions are among the shared classes alone, as is usual for ImageNet-A and -R, which have 200 of the 1,000 classes.

    Returns:
        For each folder NAME the metrics 'ood_NAME_knn' and 'ood_NAME_own_classifier' (if the backbone has a classifier with class
        names, else 'ood_NAME_logistic'); `details[NAME]` counts the shared 'classes' and the readable 'images'.
    """
    result, classes, backbone = ProtocolResult(), context.classes, context.backbone
    for name, labeled_set in context.data.ood.items():
        is_shared, data = shared_classes(labeled_set, classes, name)
        batches = backbone.batches(data.images, context.cache)
        parts = ((rows, context.classify(backbone, x), context.pooled(backbone, x)) for rows, x in batches)
        index, logits, features = _concatenate(parts)
        labels = torch.from_numpy(data.labels)[index]
        neighbors = probes.nearest_neighbors(context.train.layer_blocks(), features, probes.KNN_K)
        votes = probes.knn_scores(context.train, len(classes), *neighbors)
        is_missing = ~torch.from_numpy(is_shared)
        logits[:, is_missing] = votes[:, is_missing] = -torch.inf
        classifier = "own_classifier" if backbone.classes else "logistic"
        result.add_accuracy(f"ood_{name}_{classifier}", logits.argmax(1), labels, classes, context.classifier)
        result.add_accuracy(f"ood_{name}_knn", votes.argmax(1), labels, classes, f"k {neighbors[1].shape[1]}")
        result.details[name] = {"classes": int(is_shared.sum()), "images": len(labels)}
    return result


def shared_classes(data: LabeledSet, names: list[str], set_name: str) -> tuple[Bool[np.ndarray, " K"], LabeledSet]:
    """Select the images of classes that are among `names`.

    Args:
        names: the K classes of the training images.
        set_name: name of `data` in the error.

    Returns:
        Whether `data` has each of `names`, and the selected images with labels that are indices into `names`.

    Raises:
        MapetError: `data` has none of `names`.
    """
    index_of = {name: index for index, name in enumerate(names)}
    labels = np.array([index_of.get(name, -1) for name in data.classes])[data.labels]
    images = data.images.subset(np.flatnonzero(labels >= 0))
    if not len(images):
        raise MapetError(
            f"{option('ood_images')} {set_name} ({data.images.root}) shares no class with the training images: it has "
            f"{data.classes[:3]} ..., they have {names[:3]} ...; give folders of the same class the same name"
        )
    return np.isin(names, data.classes), LabeledSet(images, names, labels[labels >= 0])


@protocol("labels", is_expensive=True)
def corruptions(context: EvalContext) -> ProtocolResult:
    """Measure accuracy under 15 corruptions in 5 severities; `add_mce` adds mCE.

    Returns:
        'corruption_clean', the accuracy without corruption, and 'corruption_mean', the mean over all 75; `details['errors']` has for
        each corruption the error rate at each severity.

    Raises:
        MapetError: the backbone takes neither gray nor RGB images.
    """
    backbone, data = context.backbone, context.data.test.sample(MAX_CORRUPTED_IMAGES)
    if backbone.channels not in (1, 3):
        needed = f"corruptions need 1 or 3: omit 'corruptions' from {option('protocols')}"
        raise MapetError(f"{backbone.name} takes {backbone.channels} channels, {needed}")
    clean = context.is_correct(backbone, data)
    correct: dict[str, Float[Tensor, "5 n"]] = {}
    for kind, name in enumerate(CORRUPTIONS):
        options = [{"augment": Corruption(name, severity), "seed": kind * 10 + severity} for severity in SEVERITIES]
        correct[name] = torch.stack([context.is_correct(backbone, data, **each) for each in options])
    selected, per_image = context.classifier, torch.cat(list(correct.values())).mean(0).numpy()
    mean = eval_context.bootstrap_ci(lambda w: float(np.average(per_image, weights=w)), len(clean), selected=selected)
    metrics = {"corruption_clean": eval_context.accuracy_with_ci(clean, selected), "corruption_mean": mean}
    return ProtocolResult(metrics, details={"errors": {k: (1 - each.mean(1)).tolist() for k, each in correct.items()}})


def add_mce(results: Mapping[str, Mapping[str, ProtocolResult]]) -> None:
    """Add mCE (Hendrycks & Dietterich, section 4.1) to each backbone's result of `corruptions`, as a fraction.

    The CE of a corruption is the sum of errors over severities, divided by the same sum of the first backbone, which has
    AlexNet's place in the paper, so that 1 is as bad as the first backbone; a corruption under which that makes no error has none.

    Args:
        results: backbone -> protocol -> result, the first backbone first; those without `corruptions` are skipped.
    """
    measured = [protocols["corruptions"] for protocols in results.values() if "corruptions" in protocols]
    for result in measured:
        errors, first = result.details["errors"], measured[0].details["errors"]
        ce = {name: sum(errors[name]) / sum(first[name]) for name in first if sum(first[name]) > 0}
        over = f"{result.metrics['corruption_mean'].over}, relative to the first"
        mce = float(np.mean(list(ce.values()))) if ce else float("nan")
        result.metrics["mce"], result.details["corruption_errors"] = eval_context.MetricValue(mce, over=over), ce


@protocol("labels", is_expensive=True)
def resolution(context: EvalContext) -> ProtocolResult:
    """Measure accuracy at other input sizes, with interpolated positions: `eval_image_sizes`, or multiples of the trained size."""
    result, backbone = ProtocolResult(), context.backbone
    step, trained = backbone.patch_size, backbone.image_size
    scaled = [tuple(max(1, round(side * f / step)) * step for side in trained) for f in SIZE_FACTORS]
    squares = [(side, side) for side in context.options.eval_image_sizes or ()]
    for height, width in dict.fromkeys(squares or scaled):
        correct = context.is_correct(backbone.with_image_size((height, width)), context.data.test)
        name = f"resolution_{height}" if height == width else f"resolution_{height}x{width}"
        selected = context.classifier + (" (trained size)" if (height, width) == trained else "")
        result.metrics[name] = eval_context.accuracy_with_ci(correct, selected)
    return result
