"""L2 k-means in torch: seeded, restarted, empty clusters re-seeded."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapet.errors import MapetError

CHUNK_ELEMENTS = 1 << 26
"""Size of the distance table held at once: 256 MB of float32."""


def assign(
    points: Float[Tensor, "n F"], centroids: Float[Tensor, "K F"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Nearest centroid of each point, and the squared distance to it."""
    half_norms = centroids.square().sum(1) / 2
    ids = torch.empty(len(points), dtype=torch.int64, device=points.device)
    distances = torch.empty(len(points), dtype=points.dtype, device=points.device)
    chunk = max(1, CHUNK_ELEMENTS // len(centroids))
    for start in range(0, len(points), chunk):
        part = points[start : start + chunk]
        # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2): the nearest has the largest bracket.
        best, ids[start : start + chunk] = torch.addmm(-half_norms, part, centroids.T).max(dim=1)
        distances[start : start + chunk] = (part.square().sum(1) - 2 * best).clamp_min(0)
    return ids, distances


def kmeans(
    points: Float[Tensor, "n F"],
    num_clusters: int,
    iterations: int = 20,
    restarts: int = 1,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> tuple[Float[Tensor, "K F"], float]:
    """Lloyd's algorithm from randomly sampled points; the best of `restarts` runs.

    Args:
        progress: called after each iteration with the mean squared distance.

    Returns:
        Centroids and the mean squared distance of the points to them.

    Raises:
        MapetError: more clusters than points.
    """
    if num_clusters > len(points):
        raise MapetError(
            f"K = {num_clusters} visual words need at least as many patches, but there are {len(points)}: lower --vocab-size"
        )
    best: tuple[Tensor, float] | None = None
    mean = points.mean(0)
    points = points - mean  # smaller norms: less cancellation in the distances
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(seed * 1009 + restart)
        start = torch.randperm(len(points), generator=generator)[:num_clusters].to(points.device)
        centroids = points[start].clone()
        for _ in range(iterations):
            ids, distances = assign(points, centroids)
            centroids = _update(points, ids, distances, centroids)
            if progress:
                progress(float(distances.mean()))
        error = float(assign(points, centroids)[1].mean())
        if best is None or error < best[1]:
            best = centroids, error
    assert best is not None
    return best[0] + mean, best[1]


def _update(points: Tensor, ids: Tensor, distances: Tensor, centroids: Tensor) -> Tensor:
    """Means of the clusters; an empty one moves to the worst-served points, one each."""
    counts = torch.bincount(ids, minlength=len(centroids))
    sums = torch.zeros_like(centroids).index_add_(0, ids, points)
    updated = sums / counts.clamp_min(1)[:, None]
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        updated[empty] = points[distances.topk(len(empty)).indices]
    return updated


def automatic_vocab_size(num_patches: int) -> int:
    """The largest power of two that leaves 64 patches for each word, from 2 to the paper's 8192."""
    return min(8192, max(2, 1 << max(1, (num_patches // 64).bit_length() - 1))) if num_patches > 1 else 1
