"""What can be said of features without labels: rank, spread, collapse; and how well their clusters agree with classes."""

from math import isfinite

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from mapet.tokenizers.kmeans import assign, kmeans

DEAD = 1e-3
"""A dimension is dead if its standard deviation is below this share of the mean one."""


def diagnostics(features: Float[Tensor, "n D"], views: Float[Tensor, "n D"] | None = None) -> dict[str, float]:
    """Rank, spread and collapse of features.

    RankMe: exp of the entropy of the singular values' shares (Garrido et al. 2023, arXiv 2210.02885), of the features as
    they are. Effective rank: the same of the centred ones (Roy & Vetterli 2007), which a common offset does not lower. Both are at most
    min(n, D).
    Spread: mean standard deviation of the dimensions of length-1 features times sqrt(D): near 1 where directions are used evenly, 0 where all
    features point one way (SimSiam, arXiv 2011.10566, section 4.1).
    Mean cosine: of two different images.
    Uniformity and alignment on the unit sphere: Wang & Isola 2020 (arXiv 2005.10242); lower is better for both.

    Args:
        views: features of other views of the same images, for the alignment.

    Returns:
        Of what so few images have: one has no spread.
    """
    x = features.double()
    unit = F.normalize(x, dim=1)
    deviations = x.std(0)
    width, count = x.shape[1], len(x)
    total = unit.sum(0).square().sum()
    pairs = unit[:4096]
    close = torch.pdist(pairs).square() if len(pairs) > 1 else torch.zeros(1)
    found = {
        "RankMe": entropy_rank(x),
        "effective rank": entropy_rank(x - x.mean(0)),
        "dimensions": float(width),
        "dead dimensions": float((deviations <= DEAD * deviations.mean()).double().mean()),
        "spread": float(unit.std(0).mean()) * width**0.5,
        "mean cosine": float((total - count) / (count * (count - 1))) if count > 1 else 1.0,
        "uniformity": float((-2 * close).exp().mean().log()),
    }
    if views is not None:
        found["alignment"] = float((unit - F.normalize(views.double(), dim=1)).square().sum(1).mean())
    return {name: value for name, value in found.items() if isfinite(value)}


def entropy_rank(x: Float[Tensor, "n D"]) -> float:
    """exp of the entropy of the singular values' shares: how many directions are used evenly."""
    x = x.double()  # squares lose half of the digits
    values = torch.linalg.eigvalsh(x.T @ x if x.shape[1] <= len(x) else x @ x.T).clamp_min(0).sqrt()
    if float(values.sum()) == 0:
        return 1.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def clusters(features: Float[Tensor, "n D"], num_clusters: int, seed: int) -> Int[np.ndarray, " n"]:
    """Spherical k-means++, the best of 3 starts: the cluster of each row."""
    unit = F.normalize(features - features.mean(0), dim=1)
    found = kmeans(unit, num_clusters, max_iter=30, n_init=3, seed=seed, init="k-means++", metric="cosine")
    return assign(unit, found.centroids)[0].numpy()


def agreement(found: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """How well a partition agrees with the classes.

    Accuracy: of the best one-to-one matching of clusters and classes (Hungarian). NMI: mutual information over the mean of
    both entropies. ARI: pairs, corrected for chance (Hubert & Arabie 1985).
    """
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((found.max() + 1, labels.max() + 1), np.int64)
    np.add.at(table, (found, labels), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {
        "accuracy": float(table[rows, columns].sum() / len(labels)),
        "NMI": float(normalized_mutual_info_score(labels, found)),
        "ARI": float(adjusted_rand_score(labels, found)),
    }
