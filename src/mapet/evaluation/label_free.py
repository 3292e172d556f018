"""Features without labels: their rank, spread and collapse, their clusters, and the nearest neighbors of some images."""

from math import isfinite

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from mapet.data.views import ViewSpec
from mapet.evaluation.eval_context import NUM_SHOWN, EvalContext, ProtocolResult, protocol
from mapet.evaluation.intervals import MetricValue, over_seeds

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


def feature_stats(features: Float[Tensor, "n D"], views: Float[Tensor, "n D"] | None = None) -> dict[str, float]:
    """Measure rank, spread and collapse of features.

    RankMe: exp of the entropy of the singular values' fractions (Garrido et al. 2023, arXiv 2210.02885), of the features as
    they are. Effective rank: the same of the centred ones (Roy & Vetterli 2007), which a common offset does not lower. Both are at most
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
    views, index = [], []
    for rows, pixels in backbone.batches(few, context.cache, "views", spec=spec):
        views.append(backbone.pooled_features(pixels, [backbone.num_layers], context.options.pool)[0].cpu())
        index.append(rows)
    found = feature_stats(features)
    found["alignment"] = feature_stats(features[torch.cat(index)], torch.cat(views))["alignment"]
    over = f"{len(features):,} images"
    return ProtocolResult({name: MetricValue(v, over=f"{over}{BETTER.get(name, '')}") for name, v in found.items()})


def cluster_features(features: Float[Tensor, "n D"], num_clusters: int, seed: int) -> Int[np.ndarray, " n"]:
    """Assign each row to a cluster by k-means++ of the centred features' directions, the best of 3 starts."""
    unit = F.normalize(features - features.mean(0), dim=1)
    return KMeans(num_clusters, n_init=3, max_iter=30, random_state=seed).fit_predict(unit.numpy())


def clustering_scores(found: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Compare a partition with the classes.

    Accuracy: of the best one-to-one matching of clusters and classes (Hungarian). NMI: mutual information over the mean of
    both entropies. ARI: pairs, corrected for chance (Hubert & Arabie 1985).
    """
    table = np.zeros((found.max() + 1, labels.max() + 1), np.int64)
    np.add.at(table, (found, labels), 1)
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
    return ProtocolResult({f"cluster_{k}": over_seeds([one[k] for one in found], low) for k, low in least.items()})


@protocol("images")
def nearest_neighbors(context: EvalContext) -> ProtocolResult:
    """Find the nearest training images of some test images, for a figure."""
    keys = context.data.test.images.subset(context.test.index.numpy()).keys()
    chosen = np.argsort(keys)[:NUM_QUERIES]
    similarity, rows = (part[chosen, :NUM_SHOWN] for part in context.test_neighbors)
    details = {"queries": context.test.index[chosen], "nearest": context.train.index[rows]}
    details["similarity"] = similarity.double().round(decimals=4)
    return ProtocolResult(details={name: values.tolist() for name, values in details.items()})
