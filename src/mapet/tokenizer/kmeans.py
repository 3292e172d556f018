"""L2 k-means in torch: seeded, restarted, streamed, empty clusters re-seeded."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mapet.errors import MapetError
from mapet.tokenizer.feature_store import FeatureStore

ROWS = 2048
"""Points at a time: their table of distances to 8192 centroids takes 32 MB in bfloat16."""
COLUMNS = 128
"""Centroids are padded to a multiple of it, so that the search for the nearest vectorises."""
UNSURE = 2.0**-18
"""Float32 products of other shapes may differ by this share of the norms; distances closer than that are told apart in float64."""


class Distances:
    """Half the squared distances of points to fixed centroids, by one matrix product.

    |x - c|^2 / 2 = [x, |x|^2 / 2, 1] . [-c, 1, |c|^2 / 2]: with the norms as columns of the product the sum is rounded once,
    relative to the distance itself. Each norm is split into three columns, whose sum bfloat16 holds as well as float32.
    """

    def __init__(self, centroids: Float[Tensor, "K F"], dtype: torch.dtype) -> None:
        parts = _parts(_half_norms(centroids), dtype)
        right = torch.cat([-centroids.to(dtype), torch.ones_like(parts), parts], 1)
        self.right = pad(right, (0, 0, 0, -len(right) % COLUMNS))
        self.right[len(right) :, -1] = torch.inf  # the padding is nobody's nearest
        # Memory that is new to the process costs a CPU as much as a product: it is taken once.
        self.left = torch.ones(ROWS, self.right.shape[1], dtype=dtype, device=centroids.device)
        self.table = torch.empty(ROWS, len(self.right), dtype=dtype, device=centroids.device)

    def __call__(self, points: Float[Tensor, "n F"]) -> Float[Tensor, "n padded_K"]:
        """The table of at most `ROWS` points; the next call overwrites it."""
        count, width = points.shape
        left = self.left[:count]
        left[:, :width] = points
        left[:, width : width + 3] = _parts(_half_norms(points), left.dtype)
        return torch.mm(left, self.right.T, out=self.table[:count])


def _half_norms(vectors: Float[Tensor, "n F"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(vectors, dim=1).square() / 2


def _parts(values: Float[Tensor, " n"], dtype: torch.dtype) -> Tensor:
    """(n, 3) numbers of `dtype` that add up to `values`."""
    first = values.to(dtype)
    second = (values - first).to(dtype)
    return torch.stack([first, second, (values - first - second.float()).to(dtype)], 1)


def nearest(table: Float[Tensor, "n padded_K"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The column with the smallest entry of each row, that entry and the second smallest.

    In two steps, for torch reduces to a value with all of the CPU's lanes, to an index with one.
    """
    dtype = table.dtype
    if dtype == torch.bfloat16:
        table = table.view(torch.int16)  # distances are positive, and such numbers sort as their bits do: 8x as fast
    table = table.view(len(table), table.shape[1] // COLUMNS, COLUMNS)
    rows = torch.arange(len(table), device=table.device)
    smallest = table.amin(1)
    column = smallest.argmin(1)
    others = table[rows, :, column]
    row = others.argmin(1)
    best = smallest[rows, column]
    smallest[rows, column] = others[rows, row] = torch.iinfo(torch.int16).max if dtype == torch.bfloat16 else torch.inf
    second = torch.minimum(smallest.amin(1), others.amin(1))
    return row * COLUMNS + column, best.view(dtype), second.view(dtype)


class Assignment:
    """The nearest centroid of each point: the one definition of a token.

    A point's id depends on nothing but the point and the centroids: products of other shapes (a smaller batch) may differ
    in their last bits, so points between two centroids are decided in float64, and ties go to the lower id.
    """

    def __init__(self, centroids: Float[Tensor, "K F"]) -> None:
        self.mean = centroids.mean(0)
        self.centroids = centroids - self.mean  # smaller norms: less cancellation in the distances
        self.largest = 2 * _half_norms(self.centroids).max()
        self.distances_to = Distances(self.centroids, torch.float32)
        self.buffer = torch.empty(ROWS, centroids.shape[1], device=centroids.device)

    def __call__(self, points: Float[Tensor, "n F"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Ids, and squared distances to these centroids."""
        blocks = [self._block(points[start : start + ROWS]) for start in range(0, max(1, len(points)), ROWS)]
        ids, distances = zip(*blocks, strict=True)
        return torch.cat(ids), torch.cat(distances)

    def _block(self, points: Tensor) -> tuple[Tensor, Tensor]:
        points = torch.sub(points, self.mean, out=self.buffer[: len(points)])
        ids, half, second = nearest(self.distances_to(points))
        unsure = (second - half <= UNSURE * (2 * _half_norms(points) + self.largest)).nonzero().squeeze(1)
        if len(unsure):
            ids[unsure] = self._exactly(points[unsure])
        return ids, 2 * half.clamp_min(0)

    def _exactly(self, points: Tensor) -> Int[Tensor, " n"]:
        place = torch.device("cpu") if points.device.type == "mps" else points.device  # Apple's GPUs have no float64
        x, c = (tensor.to(place, torch.float64) for tensor in (points, self.centroids))
        table = torch.addmm(c.square().sum(1) / 2, x, c.T, alpha=-1)
        limit = table.amin(1, keepdim=True) + 1e-12 * (x.square().sum(1, keepdim=True) + float(self.largest))
        return (table <= limit).to(torch.uint8).argmax(1).to(points.device)  # the first of those that are equal


def assign(
    points: Float[Tensor, "n F"], centroids: Float[Tensor, "K F"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Nearest centroid of each point, and the squared distance to it; see `Assignment`."""
    return Assignment(centroids)(points)


class Clusters(NamedTuple):
    """What k-means found.

    Attributes:
        centroids: (K, F).
        counts: (K,) points of each.
        error: mean squared distance of the points to their nearest centroid.
        variance: mean squared distance of the points to their mean.
    """

    centroids: Tensor
    counts: Tensor
    error: float
    variance: float


def kmeans(
    points: FeatureStore | Float[Tensor, "n F"],
    num_clusters: int,
    iterations: int = 20,
    restarts: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] | None = None,
) -> Clusters:
    """Lloyd's algorithm from randomly sampled points; the best of `restarts` runs.

    Beside a block of points it holds the ids' counts, the centroids a few times over and one number a point, so the
    points may be larger than memory.

    Args:
        dtype: of the products while centroids move; bfloat16 is faster and costs about 0.03 % of error. Sums and means are
            float32 (on CUDA added in no fixed order: repeats may differ in the last bits), counts and error those of the
            exact float32 assignment at the end.
        progress: called after each iteration with the mean squared distance.

    Raises:
        MapetError: more clusters than points.
    """
    if num_clusters > len(points):
        raise MapetError(
            f"K = {num_clusters} visual words need at least as many patches, but there are {len(points)}: lower --vocab-size"
        )
    if isinstance(points, Tensor):
        points = FeatureStore.of(points)
    mean, variance = _moments(points)
    best: tuple[Tensor, float] | None = None
    for restart in range(restarts):
        centroids = points.take(starting_points(len(points), num_clusters, seed, restart)) - mean
        error = variance
        for _ in range(iterations):
            centroids, error = _lloyd(points, mean, variance, centroids, dtype)
            if progress:
                progress(error)
        if best is None or error < best[1]:
            best = centroids, error
    assert best is not None
    centroids = best[0] + mean
    exact = Assignment(centroids)
    counts, total = torch.zeros(num_clusters, dtype=torch.int64), 0.0
    for _, block in points.blocks(ROWS):
        ids, distances = exact(block)
        counts += torch.bincount(ids, minlength=num_clusters).cpu()
        total += float(distances.sum())
    return Clusters(centroids, counts, total / len(points), variance)


def starting_points(num_points: int, num_clusters: int, seed: int, restart: int = 0) -> Int[Tensor, " K"]:
    """The points that are the first centroids."""
    generator = torch.Generator().manual_seed(seed * 1009 + restart)
    return torch.randperm(num_points, generator=generator)[:num_clusters]


def _moments(points: FeatureStore) -> tuple[Float[Tensor, " F"], float]:
    """The mean of the points and their mean squared distance to it."""
    shift = points.take(torch.tensor([0]))[0]  # near the mean, against cancellation
    first, second = torch.zeros(len(shift), dtype=torch.float64), 0.0
    for _, block in points.blocks(ROWS):
        block -= shift
        first += block.sum(0).cpu()
        second += 2 * float(_half_norms(block).sum())
    mean = first / len(points)
    return shift + mean.to(shift), max(0.0, second / len(points) - float(mean.square().sum()))


def _lloyd(
    points: FeatureStore, mean: Tensor, variance: float, centroids: Float[Tensor, "K F"], dtype: torch.dtype
) -> tuple[Float[Tensor, "K F"], float]:
    """One round: the means of the clusters, and the mean squared distance of their points to them.

    An empty cluster moves to the worst-served points, one each.
    """
    distances_to = Distances(centroids, dtype)
    sums = torch.zeros_like(centroids)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
    served = torch.empty(len(points), dtype=dtype, device=centroids.device)
    for start, block in points.blocks(ROWS):
        block -= mean
        ids, served[start : start + len(block)], _ = nearest(distances_to(block))
        sums.index_add_(0, ids, block)
        counts += torch.bincount(ids, minlength=len(centroids))
    updated = sums / counts.clamp_min(1)[:, None]
    # Steiner: what the means explain of the variance is no longer error.
    explained = float((counts * updated.square().sum(1)).sum()) / len(points)
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        updated[empty] = points.take(served.topk(len(empty)).indices) - mean
    return updated, max(0.0, variance - explained)


def automatic_vocab_size(num_patches: int) -> int:
    """The largest power of two that leaves 64 patches for each word, from 2 to the paper's 8192."""
    return min(8192, max(2, 1 << max(1, (num_patches // 64).bit_length() - 1))) if num_patches > 1 else 1
