"""The protocols of `mapet evaluate` on features of whole images; `dense` has those on feature maps.

A protocol is a function from an `EvalContext` to a `ProtocolResult`; the decorator `protocol` registers it by name. Where test images are
imbalanced (`is_imbalanced`), METRIC_balanced_accuracy and METRIC_auroc stand before every METRIC that is a top-1 accuracy.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
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
from mapet.evaluation.datasets import NUM_CLASSES_SHOWN, LabeledSet, few_shot_split
from mapet.evaluation.eval_context import NUM_SHOWN, PROTOCOLS, EvalContext, Protocol, ProtocolResult, protocol
from mapet.evaluation.features import PatchTokenCache
from mapet.evaluation.imbalance import Statistic, balanced_accuracy, is_imbalanced, name_rows, score_classifier
from mapet.evaluation.logistic_regression import fit_logistic

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
CLUSTER_STARTS, CLUSTER_ITERS = 3, 30
"""Starts of the k-means that clusters features, and iterations of each, at most."""
SIZE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Default input sizes of `resolution`, as factors of the trained one."""


def _concatenate(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """Concatenate batches, tuples of k tensors each, by position in the tuple: yield k tensors, the first of all batches, the second, ..."""
    return map(torch.cat, zip(*batches, strict=True))


# ---- classes


@protocol("labels")
def logistic(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe: logistic regression on the standardized features of the training images.

    Unreadable training and test images are excluded.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        Metric 'logistic': top-1 accuracy on the test images, 0 to 1, with its 95 % interval and the selected C; `per_class` has
        (correct, all) test images of each class.

    Raises:
        MapetError: features are NaN or infinite, or more than half of the images of a set are unreadable.
    """
    logits, selected = context.logistic(context.test.layer_features()), context.logistic.selected
    return ProtocolResult().add_accuracy("logistic", logits, context.test.labels, context.classes, selected)


@protocol("labels")
def knn(context: EvalContext) -> ProtocolResult:
    """Evaluate weighted k-NN by cosine similarity of standardized features, else as in DINO.

    Unreadable training and test images are excluded.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        Metric 'knn': top-1 accuracy on the test images, 0 to 1, with its 95 % interval and k (fewer than `KNN_K` if training images are
        fewer); `per_class` has (correct, all) test images of each class.

    Raises:
        MapetError: features are NaN or infinite, or more than half of the images of a set are unreadable.
    """
    logits = probes.knn_logits(context.train, len(context.classes), *context.test_neighbors)
    selected = f"k {context.test_neighbors[1].shape[1]}"
    return ProtocolResult().add_accuracy("knn", logits, context.test.labels, context.classes, selected)


@protocol("labels")
def linear_sgd(context: EvalContext) -> ProtocolResult:
    """Evaluate linear probes trained by SGD, whose learning rate is selected on held-out training images, as is the layer.

    Of several `layers`, each alone and all of them concatenated are tried.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        Metrics 'linear_sgd' (without batch norm) and 'linear_sgd_bn' (with it): top-1 accuracy on the test images, 0 to 1, with its 95 %
        interval and the selected layer and learning rate; `per_class` has (correct, all) test images of each class.
        `details[METRIC]['val_accuracy_by_layer']`: index of a layer, '0+3' for several -> accuracy on held-out training images.

    Raises:
        MapetError: there are fewer than `probes.MIN_IMAGES` readable training images.
    """
    result, options, compute = ProtocolResult(), context.options, context.backbone.compute
    fitted_probes = probes.fit_linear_sgd(
        context.train, len(context.classes), compute, options.linear_epochs, options.seed
    )
    for name, (probe, by_layer) in fitted_probes.items():
        logits = probe.predict(context.test)
        result.add_accuracy(name, logits, context.test.labels, context.classes, probe.selected)
        result.details[name] = {"val_accuracy_by_layer": by_layer}
    return result


@protocol("labels")
def attentive(context: EvalContext) -> ProtocolResult:
    """Evaluate the attentive probe, attention pooling and a linear classifier, on the last layer's patch tokens.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        Metric 'attentive': top-1 accuracy on the readable test images, 0 to 1, with its 95 % interval and the selected learning rate;
        `per_class` has (correct, all) test images of each class.

    Raises:
        MapetError: there are fewer than `probes.MIN_IMAGES` training images.
    """
    backbone, compute, test = context.backbone, context.backbone.compute, context.data.test
    train_tokens = PatchTokenCache(backbone, context.data.train, context.cache)
    probe, lr = probes.fit_attentive(train_tokens, len(context.classes), compute, context.options.seed)
    batches = PatchTokenCache(backbone, test, context.cache).epoch()
    with torch.inference_mode():
        index, logits = _concatenate((rows, probe(compute.to(tokens)).cpu()) for rows, tokens in batches)
    labels = torch.from_numpy(test.labels)[index]
    return ProtocolResult().add_accuracy("attentive", logits, labels, context.classes, f"lr {lr:g}")


@protocol("labels")
def few_shot(context: EvalContext) -> ProtocolResult:
    """Evaluate the linear probe with few labels: fit it on a few training images of each class, and test it on all test images.

    The option `few_shot` lists amounts: below 1 a fraction of each class, else images per class. For each amount `num_seeds` splits
    are drawn, always the same ones (`few_shot_split`). Features are standardized with mean and standard deviation of all training
    images, which needs no labels. Unreadable images of a split are excluded.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        For each amount a metric, mean top-1 accuracy over seeds, 0 to 1, with its 95 % interval: 'few_shot_10pct' for 0.1, 'few_shot_5'
        for 5 images per class. `details` has, by the same name, the list of the accuracies of all seeds.

    Raises:
        MapetError: a class has fewer training images than an amount.
    """
    result = ProtocolResult()
    train, test_features = context.train, context.test.layer_features()
    # Features of readable images are in random order, `train.index[row]` being the image of a row: the inverse, -1 for unreadable ones.
    row_of_image = torch.full((len(context.data.train),), -1)
    row_of_image[train.index] = torch.arange(len(train))
    for amount in context.options.few_shot:
        name = f"few_shot_{100 * amount:g}pct" if amount < 1 else f"few_shot_{amount:g}"
        by_seed = []
        for seed in range(context.options.num_seeds):
            rows = row_of_image[torch.from_numpy(few_shot_split(context.data.train, amount, seed))]
            rows = rows[rows >= 0]
            x, y = train.layer_features(rows), train.labels[rows]
            probe = fit_logistic(x, y, len(context.classes), scaler=context.scaler)
            by_seed.append(name_rows(name, score_classifier(probe(test_features), context.test.labels)))
        result.details |= {row: [scores[row] for scores in by_seed] for row in by_seed[0]}
        result.metrics |= {row: eval_context.mean_over_seeds(result.details[row]) for row in by_seed[0]}
    return result


def average_precisions(
    scores: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " K"]:
    """Compute the average precision of each class, in [0, 1]: the area under its precision-recall curve, without interpolation.

    Args:
        scores: of each image (row) and class (column), on the CPU; higher is more likely.
        targets: 1 where an image shows a class, else 0.
        weights: how often each image counts: all ones, or the counts of a bootstrap resample.

    Returns:
        (K,); NaN for classes that no image of positive weight shows.
    """
    columns = zip(scores.T.numpy(), targets.T.numpy(), strict=True)
    each = [average_precision_score(y, s, sample_weight=weights) if weights @ y > 0 else np.nan for s, y in columns]
    return np.array(each)


@protocol("annotations")
def multi_label(context: EvalContext) -> ProtocolResult:
    """Evaluate multi-label classification of images with boxes: one logistic regression per class predicts whether an image shows it.

    The regressions are fitted on the features of the training images, standardized by mean and standard deviation of all
    training images. Unreadable images are excluded.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        Metric 'multi_label_map', the average precision, 0 to 1, averaged over the classes that test images show, with a 95 % bootstrap
        interval over test images; `details['ap']`: class -> its average precision, None for a class that no test image shows.

    Raises:
        MapetError: features are NaN or infinite, or more than half of the images of a set are unreadable.
    """
    assert context.data.boxes is not None
    train, test = context.data.boxes
    train_targets = torch.from_numpy(train.image_labels)[context.train.index]
    targets = torch.from_numpy(test.image_labels)[context.test.index]
    x, test_x = context.train.layer_features(), context.test.layer_features()
    logits = [fit_logistic(x, target, 2, scaler=context.scaler)(test_x) for target in train_targets.T]
    # Logit that the class is shown. It is infinite if all training images show the class, or none; `nan_to_num` makes it finite.
    scores = torch.stack([pair[:, 1] - pair[:, 0] for pair in logits], 1).nan_to_num()

    def mean_average_precision(weights: Float[np.ndarray, " n"]) -> float:
        """Return the mean over classes that an image shows; `weights` is how often each test image counts."""
        precisions = average_precisions(scores, targets, weights)
        return float(np.nanmean(precisions)) if np.isfinite(precisions).any() else 0.0

    precisions = average_precisions(scores, targets, np.ones(len(targets))).tolist()
    by_class = zip(train.classes, precisions, strict=True)
    details = {"ap": {name: round(value, 4) if isfinite(value) else None for name, value in by_class}}
    metric = eval_context.bootstrap_ci(mean_average_precision, len(targets))
    return ProtocolResult({"multi_label_map": metric}, details=details)


# ---- without labels


def feature_stats(features: Float[Tensor, "n D"]) -> dict[str, float]:
    """Measure rank, spread and collapse of features.

    Args:
        features: a feature vector of width D for each of n images; for the uniformity, the pairs of the first `MAX_PAIRED` are used.

    Returns:
        Metrics by name, without those that are NaN or Inf for so few images:
        rankme: exp of the entropy of the normalized singular values (Garrido et al. 2023, arXiv 2210.02885), of the features as
            they are; at most min(n, D).
        effective_rank: the same of the centered features (Roy & Vetterli 2007), which a common offset does not lower.
        dimensions: D.
        dead_dimensions: fraction of the dimensions whose standard deviation is at most `DEAD_FRACTION` (0.1 %) of the mean one.
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
    """Return the alignment of two views of each image: the mean squared distance of their features at length 1, 0 to 4.

    Args:
        features: of one view of each image.
        views: of another view of the same images, in the same order (Wang & Isola 2020, arXiv 2005.10242).
    """
    units = F.normalize(features.double(), dim=1), F.normalize(views.double(), dim=1)
    return float((units[0] - units[1]).square().sum(1).mean())


def entropy_rank(x: Float[Tensor, "n D"]) -> float:
    """Return the effective rank: exp of the entropy of the singular values, normalized to sum 1; at most min(n, D), 1 if all are 0.

    The rows are not centered. Roy & Vetterli 2007; RankMe (arXiv 2210.02885).
    """
    # Singular values are square roots of the eigenvalues of the smaller Gram matrix, which has half the digits: hence double.
    x = x.double()
    values = torch.linalg.eigvalsh(x.T @ x if x.shape[1] <= len(x) else x @ x.T).clamp_min(0).sqrt()
    if float(values.sum()) == 0:
        return 1.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


@protocol("images")
def feature_rank(context: EvalContext) -> ProtocolResult:
    """Measure rank, spread and collapse of the features of training images, without labels.

    Up to `MAX_RANK_IMAGES` readable training images are used, a random sample of them that is the same for every backbone.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        The metrics of `feature_stats`, and 'alignment' (`measure_alignment`), 0 to 4: how far apart the features of center views and of
        random crops of up to `MAX_VIEW_IMAGES` of the images are; all without intervals.

    Raises:
        MapetError: features are NaN or infinite, or more than half of the images of a set are unreadable.
    """
    train, backbone = context.train, context.backbone
    features = train.layer_features(torch.arange(min(MAX_RANK_IMAGES, len(train))))
    images = context.data.train.images.subset(train.index[:MAX_VIEW_IMAGES].numpy())
    spec = ViewSpec(kind="random-crop", image_size=backbone.image_size)
    batches = backbone.batches(images, context.cache, "views", spec=spec)
    # `rows` are indices in `images`, which are the first rows of `features`, so that `features[rows]` are of the same images.
    rows, views = _concatenate((rows, context.pooled(backbone, pixels)) for rows, pixels in batches)
    stats = feature_stats(features) | {"alignment": measure_alignment(features[rows], views)}
    over = f"{len(features):,} images"
    values = {k: eval_context.MetricValue(value, over=over + BETTER_DIRECTION.get(k, "")) for k, value in stats.items()}
    return ProtocolResult(values)


def cluster_features(features: Float[Tensor, "n D"], num_clusters: int, seed: int) -> Int[np.ndarray, " n"]:
    """Cluster features by k-means on their directions: centered, then scaled to length 1.

    Args:
        features: of all images, on the CPU.
        num_clusters: number of clusters.
        seed: of k-means++; the best of `CLUSTER_STARTS` starts, of at most `CLUSTER_ITERS` iterations each, is taken.

    Returns:
        The cluster index of each row.
    """
    unit = F.normalize(features - features.mean(0), dim=1)
    return KMeans(num_clusters, n_init=CLUSTER_STARTS, max_iter=CLUSTER_ITERS, random_state=seed).fit_predict(
        unit.numpy()
    )


def clustering_scores(clusters: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Compare clusters with classes.

    Args:
        clusters: cluster index of each image.
        labels: class index of each image.

    Returns:
        accuracy: of the best one-to-one matching of clusters and classes (Hungarian method), 0 to 1; on imbalanced images after
            balanced_accuracy: the mean recall of the classes, of the matching for which it is highest.
        nmi: normalized mutual information: mutual information over the mean of both entropies, 0 to 1.
        ari: adjusted Rand index: agreement on pairs, corrected for chance (Hubert & Arabie 1985), -0.5 to 1.
    """
    table = contingency_matrix(clusters, labels)
    recalls = table / table.sum(0) / table.shape[1]  # of each class in each cluster, over the number of classes
    accuracies = {"balanced_accuracy": recalls} if is_imbalanced(labels) else {}
    accuracies |= {"accuracy": table / len(labels)}
    return {
        name: float(each[linear_sum_assignment(each, maximize=True)].sum()) for name, each in accuracies.items()
    } | {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


@protocol("labels")
def cluster(context: EvalContext) -> ProtocolResult:
    """Compare k-means clusters of the test images' features, as many as there are classes, with the classes.

    Up to `MAX_CLUSTER_IMAGES` readable test images are used, a random sample of them.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        Metrics 'cluster_accuracy' (clusters matched one-to-one to classes, 0 to 1; on imbalanced images after
        'cluster_balanced_accuracy'), 'cluster_nmi' (0 to 1) and 'cluster_ari' (-0.5 to 1): means over k-means with the seeds 0 to
        `num_seeds` - 1, with 95 % intervals; see `clustering_scores`.
    """
    features, labels = (part[:MAX_CLUSTER_IMAGES] for part in (context.test.layer_features(), context.test.labels))
    clusters = (cluster_features(features, len(context.classes), seed) for seed in range(context.options.num_seeds))
    scores = [clustering_scores(each, labels.numpy()) for each in clusters]
    result = ProtocolResult()
    for name in scores[0]:
        lowest = -0.5 if name == "ari" else 0.0  # where its interval is cut off
        result.metrics[f"cluster_{name}"] = eval_context.mean_over_seeds([each[name] for each in scores], lowest)
    return result


@protocol("images")
def nearest_neighbors(context: EvalContext) -> ProtocolResult:
    """Find the training images nearest to `NUM_QUERIES` test images by cosine similarity of standardized features, for a figure.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        No metrics. `details` has 'queries', indices of readable test images; 'nearest', for each query the indices of its nearest
        readable training images, up to `NUM_SHOWN`, nearest first; and 'similarity', their cosine similarities.

    Raises:
        MapetError: features are NaN or infinite, or more than half of the images of a set are unreadable.
    """
    keys = context.data.test.images.subset(context.test.index.numpy()).keys()
    selected = np.argsort(keys)[:NUM_QUERIES]  # the same test images for every backbone
    similarity, rows = (part[selected, :NUM_SHOWN] for part in context.test_neighbors)
    details = {"queries": context.test.index[selected], "nearest": context.train.index[rows]}
    details["similarity"] = similarity.double().round(decimals=4)
    return ProtocolResult(details={name: values.tolist() for name, values in details.items()})


# ---- other images than those of training


@protocol("ood")
def ood(context: EvalContext) -> ProtocolResult:
    """Measure accuracy on each folder of the option `ood_images` (out of distribution), on its images of classes that training has too.

    Only the shared classes can be predicted, as is usual for ImageNet-A and -R, which have 200 of the 1,000 classes.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        For each folder NAME the metrics 'ood_NAME_knn' and 'ood_NAME_own_classifier' (if the backbone has a classifier with class
        names, else 'ood_NAME_logistic'): top-1 accuracy on its readable images, 0 to 1, with its 95 % interval. `per_class` has
        (correct, all) images of each class; `details[NAME]` counts the shared 'classes' and the readable 'images'.

    Raises:
        MapetError: a folder shares no class with the training images, or more than half of its images are unreadable.
    """
    result, classes, backbone = ProtocolResult(), context.classes, context.backbone
    for name, labeled_set in context.data.ood.items():
        is_shared, data = shared_classes(labeled_set, classes, name)
        batches = backbone.batches(data.images, context.cache)
        parts = ((rows, context.classify(backbone, x), context.pooled(backbone, x)) for rows, x in batches)
        index, logits, features = _concatenate(parts)
        labels = torch.from_numpy(data.labels)[index]
        neighbors = probes.nearest_neighbors(context.train.blocks(), features, probes.KNN_K, context.scaler)
        votes = probes.knn_logits(context.train, len(classes), *neighbors)
        is_missing = ~torch.from_numpy(is_shared)
        logits[:, is_missing] = votes[:, is_missing] = -torch.inf
        classifier = "own_classifier" if backbone.classes else "logistic"
        result.add_accuracy(f"ood_{name}_{classifier}", logits, labels, classes, context.classifier)
        result.add_accuracy(f"ood_{name}_knn", votes, labels, classes, f"k {neighbors[1].shape[1]}")
        result.details[name] = {"classes": int(is_shared.sum()), "images": len(labels)}
    return result


def shared_classes(data: LabeledSet, names: list[str], set_name: str) -> tuple[Bool[np.ndarray, " K"], LabeledSet]:
    """Select the images of classes that are among `names`, the K classes of the training images.

    Args:
        data: labeled images with other classes, in another order.
        names: class names, in the order of the training labels.
        set_name: name that the user gave `data`, for the error.

    Returns:
        (whether `data` has each of `names`; the selected images, with labels that are indices into `names`).

    Raises:
        MapetError: `data` has none of `names`.
    """
    index_of = {name: index for index, name in enumerate(names)}
    labels = np.array([index_of.get(name, -1) for name in data.classes])[data.labels]  # -1: not among `names`
    images = data.images.subset(np.flatnonzero(labels >= 0))
    if not len(images):
        raise MapetError(
            f"{option('ood_images')} {set_name} ({data.images.root}) shares no class with the training images: it has "
            f"{', '.join(data.classes[:NUM_CLASSES_SHOWN])}, ..., they have {', '.join(names[:NUM_CLASSES_SHOWN])}, ...: give folders of the same "
            "class the same name"
        )
    return np.isin(names, data.classes), LabeledSet(images, names, labels[labels >= 0])


@protocol("labels", is_expensive=True)
def corruptions(context: EvalContext) -> ProtocolResult:
    """Measure accuracy of `context.classify` under 15 corruptions at 5 severities; `add_mce` adds the mCE when all backbones are done.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        Metrics 'corruption_clean', top-1 accuracy without corruption, with Wilson's 95 % interval, and 'corruption_mean', the mean
        accuracy over all 75 (no AUROC), with a 95 % bootstrap interval over images; both 0 to 1, on the same readable test images, up to
        `MAX_CORRUPTED_IMAGES`. `details['errors']`: corruption -> list of the error rates, 0 to 1, at severities 1 to 5.

    Raises:
        MapetError: the backbone takes neither gray nor RGB images, or more than half of the images are unreadable.
    """
    backbone, data = context.backbone, context.data.test.sample(MAX_CORRUPTED_IMAGES)
    if backbone.channels not in (1, 3):
        problem = f"{backbone.name} takes images of {backbone.channels} channels, protocol 'corruptions' needs 1 or 3"
        raise MapetError(f"{problem}: omit this protocol from {option('protocols')}")
    selected, (logits, labels) = context.classifier, context.classify_images(backbone, data)
    metrics = name_rows("corruption_clean", eval_context.measure_classifier(logits, labels, selected))
    correct: dict[str, Float[Tensor, "5 n"]] = {}
    for kind, name in enumerate(CORRUPTIONS):  # the seed differs for each corruption and severity
        options = [{"augment": Corruption(name, severity), "seed": kind * 10 + severity} for severity in SEVERITIES]
        predicted = [context.classify_images(backbone, data, **each)[0].argmax(1) for each in options]
        correct[name] = (torch.stack(predicted) == labels).double()
    per_image, truth = torch.cat(list(correct.values())).mean(0).numpy(), labels.numpy()
    means: dict[str, Statistic] = {"corruption_mean": lambda weights: float(np.average(per_image, weights=weights))}
    if is_imbalanced(truth):
        means = {"corruption_mean_balanced_accuracy": partial(balanced_accuracy, per_image, truth)} | means
    metrics |= {name: eval_context.bootstrap_ci(mean, len(truth), selected=selected) for name, mean in means.items()}
    return ProtocolResult(metrics, details={"errors": {k: (1 - each.mean(1)).tolist() for k, each in correct.items()}})


def add_mce(results: Mapping[str, Mapping[str, ProtocolResult]]) -> None:
    """Add mCE, the mean corruption error (Hendrycks & Dietterich 2019, section 4.1), to each backbone's result of `corruptions`, in place.

    The error of a corruption (CE) is the sum of error rates over severities, divided by the same sum of the first backbone, where the
    paper has AlexNet: 1 is as bad as the first backbone. A corruption under which the first backbone makes no error has no CE. mCE is
    the mean of the CEs, NaN without any. Results get the metric 'mce' and `details['corruption_errors']`: corruption -> CE.

    Args:
        results: backbone -> protocol -> result, in the order of the option `backbone`; backbones without `corruptions` are skipped.
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
    """Measure accuracy of `context.classify` at other input sizes, with interpolated position embeddings.

    The sizes are squares of the sides in the option `eval_image_sizes`, else `SIZE_FACTORS` times the trained size, rounded to whole
    patches.

    Args:
        context: the backbone, its data and the options of `evaluate`.

    Returns:
        Metrics 'resolution_SIDE' or, if the size is not square, 'resolution_HEIGHTxWIDTH', in pixels: top-1 accuracy on the readable test
        images, 0 to 1, with its 95 % interval.

    Raises:
        MapetError: the backbone cannot take a size.
    """
    result, backbone = ProtocolResult(), context.backbone
    step, trained = backbone.patch_size, backbone.image_size
    scaled = [tuple(max(1, round(side * f / step)) * step for side in trained) for f in SIZE_FACTORS]
    squares = [(side, side) for side in context.options.eval_image_sizes or ()]
    for height, width in dict.fromkeys(squares or scaled):
        logits, labels = context.classify_images(backbone.with_image_size((height, width)), context.data.test)
        name = f"resolution_{height}" if height == width else f"resolution_{height}x{width}"
        selected = context.classifier + (" (trained size)" if (height, width) == trained else "")
        result.metrics |= name_rows(name, eval_context.measure_classifier(logits, labels, selected))
    return result
