"""K-means in torch: full or mini-batch, L2 or spherical, over points that are streamed and may be spread over several ranks."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from mapet import distributed
from mapet.errors import Interrupted, MapetError, describe_key_error, option
from mapet.files import atomic_write, check_same_options, write_tensors
from mapet.tokenizers.feature_store import DistributedPoints, FeatureStore, Metric, points_per_block, stratified_sample

Init = Literal["random", "k-means++"]
COLUMNS = 128
"""The number of centroids is padded to a multiple of it, so that the search for the nearest one is vectorized."""
FLOAT64_TOLERANCE = 1e-12
"""Fraction of the squared norms by which float64 distances may differ and count as equal."""
TIE_TOLERANCE = 2.0**-18
"""Float32 products of other shapes differ by less than this fraction of the squared norms; closer distances are compared in float64."""
CANDIDATES_PER_CLUSTER = 16
"""Points per cluster among which k-means++ chooses."""
DRAWS_PER_PASS = 128
"""Points that k-means++ draws before it computes distances again."""
MAX_RESTARTS = 1009
"""More than there are runs of one seed, so that all runs of all seeds draw different points."""
SAVE_EVERY_S = 60
"""Seconds between checkpoints."""
DEAD_AFTER = 10
"""A mini-batch centroid that won none of the last DEAD_AFTER x K points is dead; an average one would have won DEAD_AFTER of them."""
DIGEST_ROWS = 1024
"""Points whose values identify the data of a checkpoint."""
MIN_PATCHES_PER_CODE, MAX_DEFAULT_VOCAB_SIZE = 64, 8192
"""The default vocabulary has at least so many patches per code, and at most the paper's size."""


class HalfSquaredDistances:
    """Half the squared distances of points to fixed centroids, by one matrix product.

    |x - c|^2 / 2 = [x, |x|^2 / 2, 1] . [-c, 1, |c|^2 / 2]: with the norms as columns of the product the sum is rounded once,
    relative to the distance itself. Each norm takes three columns, whose sum holds it to float32 precision even in bfloat16.
    """

    def __init__(self, centroids: Float[Tensor, "K F"], dtype: torch.dtype) -> None:
        """Build the centroids' factor of the product, [-c, 1, |c|^2 / 2], and allocate the points' factor and the result.

        K is padded to a multiple of `COLUMNS` with centroids at an infinite distance.

        Args:
            centroids: float32; later changes of them have no effect.
            dtype: float32 or bfloat16, the type of the product and of its result.
        """
        norms = _split_in_three(_half_sq_norms(centroids), dtype)
        right = torch.cat([-centroids.to(dtype), torch.ones_like(norms), norms], 1)
        self.right = pad(right, (0, 0, 0, -len(right) % COLUMNS))
        self.right[len(right) :, -1] = torch.inf  # padding is infinitely far from every point
        # Memory that is new to the process costs a CPU as much as a product: it is allocated once.
        block_size = points_per_block(centroids.device)
        self.left = torch.ones(block_size, self.right.shape[1], dtype=dtype, device=centroids.device)
        self.table = torch.empty(block_size, len(self.right), dtype=dtype, device=centroids.device)

    def __call__(self, points: Float[Tensor, "n F"]) -> Float[Tensor, "n padded_K"]:
        """Return half the squared distance of each point to each centroid, in `dtype`; the next call overwrites the result.

        Rounding can make the distance of nearly equal points slightly negative. Columns K and above, the padding, are inf.

        Args:
            points: at most `points_per_block` of them.
        """
        count, width = points.shape
        left = self.left[:count]
        left[:, :width] = points
        left[:, width : width + 3] = _split_in_three(_half_sq_norms(points), left.dtype)
        return torch.mm(left, self.right.T, out=self.table[:count])


def _half_sq_norms(vectors: Float[Tensor, "n F"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(vectors, dim=1).square() / 2


def _split_in_three(values: Float[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n 3"]:
    """Return three numbers of `dtype` for each float32 value, whose sum is that value to float32 precision."""
    first = values.to(dtype)
    second = (values - first).to(dtype)
    return torch.stack([first, second, (values - first - second.float()).to(dtype)], 1)


def find_nearest(
    table: Float[Tensor, "n padded_K"],
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Find the nearest centroid of each point in a table of distances; it is `table.argmin(1)`, but several times as fast on a CPU.

    torch finds the smallest value of a vector with all SIMD lanes of a CPU, but the index of that value with one lane. So each row of
    the table is seen as a grid of padded_K / `COLUMNS` rows and `COLUMNS` columns: `amin` finds the minimum of each column of the grid,
    and `argmin` searches these few minima, then the entries of the one column that holds the smallest.

    Args:
        table: distances of n points to padded_K centroids, float32 or bfloat16, non-negative up to rounding, without NaN. padded_K is a
            multiple of `COLUMNS`; the padding is inf. It is not changed.

    Returns:
        (index of the nearest centroid, which is a column of the table; its distance; the distance of the second nearest), the distances
        in the table's dtype. Which of equally near centroids is returned is not defined; the two distances are then equal.
    """
    dtype = table.dtype
    if dtype == torch.bfloat16:
        table = table.view(torch.int16)  # non-negative numbers sort as their bits do; integers are 8 times as fast
    grid = table.view(len(table), table.shape[1] // COLUMNS, COLUMNS)
    points = torch.arange(len(table), device=table.device)
    column_minima = grid.amin(1)  # (n, COLUMNS)
    grid_column = column_minima.argmin(1)
    column_values = grid[points, :, grid_column]  # (n, rows of the grid), a copy
    grid_row = column_values.argmin(1)
    smallest = column_minima[points, grid_column]
    # The second smallest is the minimum of another column, or another entry of the same column.
    excluded = torch.iinfo(torch.int16).max if dtype == torch.bfloat16 else torch.inf
    column_minima[points, grid_column] = column_values[points, grid_row] = excluded
    second = torch.minimum(column_minima.amin(1), column_values.amin(1))
    return grid_row * COLUMNS + grid_column, smallest.view(dtype), second.view(dtype)


class NearestCentroid:
    """The nearest centroid of each point: the one definition of a token.

    A point's id depends on the point and the centroids alone: products of other shapes (a smaller batch) may differ in their last
    bits, so points whose two nearest centroids are about equally far are decided in float64, and ties go to the lower id.
    """

    def __init__(self, centroids: Float[Tensor, "K F"]) -> None:
        """Precompute what the assignment of points to these centroids needs, in float32, and allocate its buffers."""
        self.mean = centroids.mean(0)
        self.centroids = centroids - self.mean  # smaller norms: less cancellation in the distances
        self.max_sq_norm = 2 * _half_sq_norms(self.centroids).max()
        self.half_sq_dist_to = HalfSquaredDistances(self.centroids, torch.float32)
        self.buffer = torch.empty(points_per_block(centroids.device), centroids.shape[1], device=centroids.device)

    def __call__(self, points: Float[Tensor, "n F"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Return the index of each point's nearest centroid and the squared distance to it; any number of points, at least one."""
        ids, sq_dist = zip(*map(self._assign_block, points.split(len(self.buffer))), strict=True)
        return torch.cat(ids), torch.cat(sq_dist)

    def _assign_block(self, points: Float[Tensor, "b F"]) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
        """Return the ids and squared distances of at most `points_per_block` points; see `__call__`.

        Points and centroids are both moved by the mean of the centroids, which leaves distances as they are.
        """
        points = torch.sub(points, self.mean, out=self.buffer[: len(points)])
        ids, half_sq_dist, second = find_nearest(self.half_sq_dist_to(points))
        tolerance = TIE_TOLERANCE * (2 * _half_sq_norms(points) + self.max_sq_norm)
        undecided = (second - half_sq_dist <= tolerance).nonzero().squeeze(1)
        if len(undecided):
            ids[undecided] = self._assign_float64(points[undecided])
        return ids, 2 * half_sq_dist.clamp_min(0)

    def _assign_float64(self, points: Float[Tensor, "m F"]) -> Int[Tensor, " m"]:
        """Return each point's nearest centroid by float64 distances; among those equal up to rounding, the lowest index.

        Args:
            points: minus the mean of the centroids, as `self.centroids` are.
        """
        device = torch.device("cpu") if points.device.type == "mps" else points.device  # Apple's GPUs have no float64
        x, c = (tensor.to(device, torch.float64) for tensor in (points, self.centroids))
        table = torch.addmm(c.square().sum(1) / 2, x, c.T, alpha=-1)  # half squared distances, less |x|^2 / 2
        limit = table.amin(1, keepdim=True) + FLOAT64_TOLERANCE * (
            x.square().sum(1, keepdim=True) + float(self.max_sq_norm)
        )
        # `argmax` of 0 and 1 is the first 1, so the first centroid within the limit.
        return (table <= limit).to(torch.uint8).argmax(1).to(points.device)


def assign(
    points: Float[Tensor, "n F"], centroids: Float[Tensor, "K F"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the id of each point's nearest centroid and the squared distance to it; see `NearestCentroid`."""
    return NearestCentroid(centroids)(points)


class KMeansResult(NamedTuple):
    """Centroids, and how they fit the points.

    Attributes:
        counts: points of each cluster.
        mean_sq_dist: mean squared distance of the points to their nearest centroid.
        total_variance: mean squared distance of the points to their mean.
    """

    centroids: Float[Tensor, "K F"]
    counts: Int[Tensor, " K"]
    mean_sq_dist: float
    total_variance: float


class KMeansState(NamedTuple):
    """The state between two rounds, the iterations of k-means; its fields are the entries of a checkpoint.

    A point is visited by a round that assigns it to its nearest centroid, which wins the point.

    Attributes:
        rounds: rounds done, of all runs together.
        error: mean squared distance of the points to their centroids, as the last round measured it.
        best_error: error of the best finished run; inf before the first run is finished.
        centroids: current centroids, minus the mean of all points.
        best: centroids of the best finished run, minus the mean of all points.
        visits: points that each centroid has won in mini-batches since the run began, or since it was re-seeded.
        idle: points visited by mini-batches since each centroid last won one.
    """

    rounds: int
    error: float
    best_error: float
    centroids: Float[Tensor, "K F"]
    best: Float[Tensor, "K F"]
    visits: Int[Tensor, " K"]
    idle: Int[Tensor, " K"]


@dataclass(frozen=True)
class KMeans:
    """Lloyd's algorithm or its mini-batch form, run `n_init` times from different first centroids.

    Attributes:
        vocab_size: K, number of clusters.
        max_iter: rounds of a run, at least one.
        n_init: runs, of which the one with the smallest error is kept.
        seed: of the first centroids and the mini-batches.
        dtype: float32 or bfloat16, type of the matrix products while centroids move; bfloat16 is faster, at an error up to 0.2 %
            higher. Sums and means are float32 (on CUDA added in no fixed order: repeated fits may differ in the last bits); counts and
            error of the result are those of the exact float32 assignment.
        init: 'random' points, or 'k-means++'; see `kmeans_plusplus_init`.
        batch_size: points that a round visits, on all ranks together (Sculley 2010). The last round of a run visits all points: it puts
            each centroid at the mean of its cluster and measures the error of the run. None: every round visits all points.
        metric: 'cosine' scales points and centroids to length 1 (spherical k-means, Dhillon & Modha 2001); squared distances are
            2 - 2 cos there.
    """

    vocab_size: int
    max_iter: int = 20
    n_init: int = 1
    seed: int = 0
    dtype: torch.dtype = torch.float32
    init: Init = "random"
    batch_size: int | None = None
    metric: Metric = "l2"

    def fit(self, points: FeatureStore | Float[Tensor, "n F"], checkpoint: Path | None = None) -> KMeansResult:
        """Cluster the points and return the clusters of the best run.

        Every rank of a process group calls it with its shard of the points; all return the same clusters, fitted to all shards together.
        Memory holds a block of points, a few copies of the centroids and one number per point, so the points may be larger than memory.

        Args:
            points: this rank's shard, at least one point. A tensor is copied to float16.
            checkpoint: file that rank 0 saves the state to every `SAVE_EVERY_S` seconds and on Ctrl-C, and that the same call resumes
                from, bit-exactly. All ranks must be able to read it. It is not removed at the end. None: nothing is saved.

        Returns:
            The clusters of the run with the smallest error.

        Raises:
            MapetError: more clusters than points, a rank without points, or a checkpoint that is damaged or of another call.
            Interrupted: Ctrl-C, after the state was saved.
            KeyboardInterrupt: Ctrl-C, without a checkpoint or before the first round ended.
        """
        if not isinstance(points, FeatureStore):
            points = FeatureStore.from_tensor(points)
        data = DistributedPoints(points, self.metric)
        if self.vocab_size > len(data):
            problem = f"{option('vocab_size')} {self.vocab_size:,} exceeds the {len(data):,} patches to fit codes to"
            raise MapetError(f"{problem}: lower it, or give more images")
        config = asdict(self) | {"dtype": str(self.dtype), "world_size": distributed.world_size()}
        centroids = torch.zeros(self.vocab_size, points.num_features, device=data.device)
        counts = torch.zeros(self.vocab_size, dtype=torch.int64, device=data.device)
        state = KMeansState(0, torch.inf, torch.inf, centroids, centroids, counts, counts)
        if checkpoint:
            config["points"] = _hash_points(data)
            state = load_state(checkpoint, config, state)
        saved_at, total = time.monotonic(), self.n_init * self.max_iter
        try:
            with tqdm(desc="k-means", total=total, initial=state.rounds, unit="round", disable=None) as bar:
                while state.rounds < total:
                    state = self._next_round(data, state)
                    if checkpoint and time.monotonic() - saved_at >= SAVE_EVERY_S:
                        save_state(checkpoint, config, state)
                        saved_at = time.monotonic()
                    bar.set_postfix(error=f"{state.error:.4g}", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            if not checkpoint or not state.rounds:
                raise
            save_state(checkpoint, config, state)
            raise Interrupted(f"{state.rounds} of {total} rounds of k-means are saved in {checkpoint}") from None
        return _evaluate(data, state.best)

    def _next_round(self, points: DistributedPoints, state: KMeansState) -> KMeansState:
        """Run the next round of k-means, and return the state after it; all ranks call it together and return the same.

        A round assigns points to their nearest centroids, moves the centroids, and re-seeds the dead ones: a dead centroid is put at one of
        the visited points that are farthest from their centroids. The first round of a run draws new centroids before; its last round makes
        the run the best one if its error is the smallest so far.

        A round visits all points if `batch_size` is None or not below their number, and as the last round of a run. This is Lloyd's
        algorithm: a centroid becomes the mean of its cluster, `error` is the mean squared distance of all points to the moved centroid of
        their cluster, and a centroid without points is dead. Another round visits a mini-batch of random points: a centroid becomes the mean
        of all points that it has won in this run (Sculley's learning rate, 1 / their number), `error` is the mean squared distance of the
        batch to the nearest centroids before they moved, and `DEAD_AFTER` defines which are dead.

        Random draws depend on the seed and the number of the round alone, so a fit that is resumed gives the same centroids.

        Args:
            points: the points of all ranks.
            state: state after the round before, which is not changed. Its centroids are minus the mean of all points, for precision.

        Returns:
            The state after this round.
        """
        run, round_of_run = divmod(state.rounds, self.max_iter)
        is_last_round = round_of_run == self.max_iter - 1
        mean, variance = points.moments  # of all points; the variance is the mean squared distance to the mean
        _, _, best_error, centroids, best, visits, idle = state
        if round_of_run == 0:
            choose = random_init if self.init == "random" else kmeans_plusplus_init
            centroids = points.take(choose(points, self.vocab_size, self.seed, run)) - mean
            visits, idle = torch.zeros_like(visits), torch.zeros_like(idle)
        batch = None  # indices of the points to visit; None: all
        if not is_last_round and self.batch_size is not None and self.batch_size < len(points):
            rng = np.random.default_rng([self.seed, run, round_of_run])
            batch = stratified_sample(len(points), self.batch_size, rng)
        sums, counts, half_sq_dist = _sum_clusters(points, centroids, batch, self.dtype)
        if batch is None:
            # `apply_metric` takes vectors with the mean added, as cosine k-means scales those to unit length.
            moved = points.apply_metric(sums / counts.clamp_min(1)[:, None] + mean) - mean
            # With x and c minus the mean: mean |x - c|^2 = mean |x|^2 - mean (2 x.c - |c|^2) = variance - explained.
            explained = (2 * (sums * moved).sum(1) - counts * moved.square().sum(1)).sum() / len(points)
            error = variance - float(distributed.broadcast(explained))
            dead = counts == 0
        else:
            visits = visits + counts
            # With the learning rate counts / visits, a centroid stays the mean of all points that it has won.
            moved = centroids + (sums - counts[:, None] * centroids) / visits.clamp_min(1)[:, None]
            moved = points.apply_metric(moved + mean) - mean
            error = 2 * float(distributed.all_reduce(half_sq_dist.float().sum())) / len(batch)
            idle = torch.where(counts > 0, 0, idle + len(batch))
            dead = idle >= DEAD_AFTER * len(centroids)
        if num_dead := int(dead.sum()):
            farthest = _farthest_points(points, half_sq_dist, num_dead, batch)  # fewer than `num_dead` in a small batch
            reseeded = dead.nonzero().flatten()[: len(farthest)]
            moved = moved.index_copy(0, reseeded, points.take(farthest) - mean)
            visits, idle = visits.index_fill(0, reseeded, 0), idle.index_fill(0, reseeded, 0)
        centroids, error = distributed.broadcast(moved), max(0.0, error)  # ranks may round differently
        if is_last_round and error < best_error:
            best_error, best = error, centroids
        return KMeansState(state.rounds + 1, error, best_error, centroids, best, visits, idle)


def _sum_clusters(
    points: DistributedPoints, centroids: Float[Tensor, "K F"], batch: Int[Tensor, " b"] | None, dtype: torch.dtype
) -> tuple[Float[Tensor, "K F"], Int[Tensor, " K"], Float[Tensor, " n"]]:
    """Assign points to their nearest centroids, and return the sum and the number of the points of each cluster.

    Args:
        points: the points of all ranks.
        centroids: minus the mean of all points.
        batch: ascending indices of the points to visit, of all ranks; None: all.
        dtype: float32 or bfloat16, type of the matrix products.

    Returns:
        (sum of each cluster's points, each minus the mean of all points; number of points of each cluster), both over all ranks; half the
        squared distances, in `dtype`, of the n visited points of this rank to their nearest centroids, in the order of the points.
    """
    sums = torch.zeros_like(centroids)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
    num_visited = len(points.store) if batch is None else len(points.local_rows(batch))
    half_sq_dist = torch.empty(num_visited, dtype=dtype, device=centroids.device)
    half_sq_dist_to = HalfSquaredDistances(centroids, dtype)
    for start, block in points.blocks(batch):
        block -= points.moments[0]
        ids, half_sq_dist[start : start + len(block)], _ = find_nearest(half_sq_dist_to(block))
        sums.index_add_(0, ids, block)
        counts += torch.bincount(ids, minlength=len(centroids))
    return distributed.all_reduce(sums), distributed.all_reduce(counts), half_sq_dist


def _farthest_points(
    points: DistributedPoints, half_sq_dist: Float[Tensor, " n"], count: int, batch: Int[Tensor, " b"] | None
) -> Int[Tensor, " m"]:
    """Return the indices of the visited points of all ranks that are farthest from their centroids, the farthest first.

    Equally far points come in the order of their indices, so that all ranks return the same.

    Args:
        points: the points of all ranks.
        half_sq_dist: half the squared distance of each visited point of this rank to its centroid, in the order of the points.
        count: m, number of indices to return, or fewer if fewer points were visited.
        batch: ascending indices of the visited points, of all ranks; None: all points.
    """
    local = half_sq_dist.float().sort(descending=True, stable=True)
    rows = local.indices[:count].cpu()  # among this rank's visited points
    indices = points.first + (rows if batch is None else points.local_rows(batch)[rows])
    padding = (0, count - len(rows))  # every rank gathers `count` entries; -inf marks those that are none
    distances = distributed.all_gather(pad(local.values[:count], padding, value=-torch.inf)).flatten()
    num_points = min(count, int(distances.isfinite().sum()))
    order = distances.sort(descending=True, stable=True).indices[:num_points]
    return distributed.all_gather(pad(indices, padding)).flatten()[order.cpu()]


def _evaluate(points: DistributedPoints, best: Float[Tensor, "K F"]) -> KMeansResult:
    """Assign all points exactly, by `NearestCentroid`, and return the centroids with the size of their clusters and the error.

    Args:
        points: the points of all ranks.
        best: centroids minus the mean of all points; the result's have the mean added, and unit length if the metric is cosine.
    """
    mean, variance = points.moments
    centroids = points.apply_metric(best + mean)
    assign_exactly = NearestCentroid(centroids)
    counts, total = torch.zeros(len(centroids), dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    for _, block in points.blocks():
        ids, sq_dist = assign_exactly(block)
        counts += torch.bincount(ids, minlength=len(centroids)).cpu()
        total += float(sq_dist.sum())
    mean_sq_dist = float(distributed.all_reduce(total)) / len(points)
    return KMeansResult(centroids, distributed.all_reduce(counts), mean_sq_dist, variance)


def _hash_points(points: DistributedPoints) -> str:
    """Return a sha256 (hexadecimal) that identifies the points of all ranks: of their number, mean, variance and a sample.

    The sample are `DIGEST_ROWS` stratified points, always the same: reading all points again would take too long.
    """
    mean, variance = points.moments
    rows = points.take(stratified_sample(len(points), DIGEST_ROWS, np.random.default_rng(0)))
    content = [np.array([len(points), variance]), mean.cpu().numpy(), rows.cpu().numpy()]
    return hashlib.sha256(b"".join(array.tobytes() for array in content)).hexdigest()


def save_state(path: Path, config: dict[str, Any], state: KMeansState) -> None:
    """Write the state to `path`, a safetensors file, in place of an older one; only rank 0 writes.

    Args:
        config: JSON values that identify the fit: the fields of `KMeans`, number of ranks, hash of the points. `load_state` compares them.
        state: each field becomes the tensor of that name.
    """
    if distributed.rank() > 0:
        return
    tensors = {  # numbers as int64 or float64 scalars; tensors that share memory cannot be written
        name: value.clone() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        for name, value in state._asdict().items()
    }
    with atomic_write(path) as temporary:
        write_tensors(temporary, tensors, {"config": json.dumps(config)})


def load_state(path: Path, config: dict[str, Any], initial: KMeansState) -> KMeansState:
    """Return the state that `save_state` wrote to `path`, or `initial` if there is no such file.

    Args:
        path: of the checkpoint.
        config: JSON values that identify the fit; the checkpoint must have been saved with the same.
        initial: state before the first round; tensors are loaded to its device.

    Raises:
        MapetError: the checkpoint is damaged, was saved with another config, or ranks read different ones.
    """
    state = initial
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                saved_config = dict(json.loads(file.metadata()["config"]))
                tensors = [file.get_tensor(name).to(initial.centroids.device) for name in KMeansState._fields]
            # Scalars become numbers.
            state = KMeansState(*(tensor if tensor.ndim else tensor.item() for tensor in tensors))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise MapetError(
                f"{path}: damaged k-means checkpoint ({describe_key_error(error)}): delete it to restart the fit"
            ) from None
        check_same_options(path, saved_config, config)
    distributed.check_same(state.rounds, path)
    return state


def random_init(points: DistributedPoints, num_clusters: int, seed: int = 0, restart: int = 0) -> Int[Tensor, " K"]:
    """Return the indices of `num_clusters` different random points of all ranks, to be the first centroids of a run.

    Args:
        points: the points of all ranks, at least `num_clusters`.
        restart: index of the run; each run of a seed draws other points.
    """
    generator = torch.Generator().manual_seed(seed * MAX_RESTARTS + restart)
    return torch.randperm(len(points), generator=generator)[:num_clusters]


def kmeans_plusplus_init(
    points: DistributedPoints, num_clusters: int, seed: int = 0, restart: int = 0
) -> Int[Tensor, " K"]:
    """Return the indices of points chosen by k-means++ (Arthur & Vassilvitskii, SODA 2007), to be the first centroids.

    Each point is chosen with probability proportional to D^2, its squared distance to the nearest point chosen before. The candidates
    are all points, or `CANDIDATES_PER_CLUSTER` x K stratified ones if there are more. The choice is exact, but a pass over the
    candidates serves several choices, by rejection (the idea of Cohen-Addad et al., arXiv 2012.11891): `DRAWS_PER_PASS` points are
    drawn by the D^2 of the last pass, and each is accepted with the fraction of its D^2 that the points accepted since then leave.
    Where K is large nearly all are accepted: the whole costs about one float32 round over the candidates, 1/32 of a round over
    fit-tokenizer's 512 points per centroid. Every rank holds all candidates: 16 K F numbers in float32, 2 GB for 8192 x 4096.

    If there are fewer different points than centroids, the rest is chosen at random.

    Args:
        points: the points of all ranks, at least `num_clusters`.
        num_clusters: K, number of indices to return, all different.
        restart: index of the run; each run of a seed draws other points.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, restart])
    candidates = stratified_sample(len(points), CANDIDATES_PER_CLUSTER * num_clusters, rng)
    rows = points.take(candidates)
    sq_dist = torch.full((len(rows),), torch.inf, dtype=torch.float64)  # of each candidate to the nearest chosen point
    # Indices into `candidates`: all chosen so far, and those accepted in the last pass.
    chosen = accepted = torch.from_numpy(rng.integers(len(rows), size=1))
    while len(chosen) < num_clusters:
        sq_dist = torch.minimum(sq_dist, assign(rows, rows[accepted])[1].cpu().double()).index_fill_(0, chosen, 0)
        cumulative = sq_dist.cumsum(0)
        if cumulative[-1] == 0:  # every candidate equals a chosen one
            unchosen = torch.ones(len(rows)).index_fill(0, chosen, 0).nonzero().flatten()
            accepted = unchosen[torch.from_numpy(rng.permutation(len(unchosen)))]
        else:  # draw in proportion to `sq_dist`, by the inverse of the cumulative sum
            quantiles = torch.from_numpy(rng.random(DRAWS_PER_PASS)) * cumulative[-1]
            candidate_rows = torch.searchsorted(cumulative, quantiles, right=True).clamp_max(len(rows) - 1)
            accepted = candidate_rows[_accept(rows[candidate_rows], sq_dist[candidate_rows], rng)]
        chosen = torch.cat([chosen, accepted])[:num_clusters]
    return distributed.broadcast(candidates[chosen])  # ranks may round differently


def _accept(points: Float[Tensor, "m F"], sq_dist: Float[Tensor, " m"], rng: np.random.Generator) -> Bool[Tensor, " m"]:
    """Decide, one after the other, which of the points that k-means++ has drawn are accepted as centroids.

    The points were drawn by their distances to the centroids chosen in earlier passes. Each is accepted with probability
    D^2 / `sq_dist`, where D^2 is its squared distance to the nearest of those centroids and of the points accepted before it in this
    call: so the accepted points are distributed as if drawn one at a time. A point that is drawn twice is accepted once.

    Args:
        points: the points, in the order in which they were drawn.
        sq_dist: squared distance of each to the nearest centroid of earlier passes, float64 on the CPU.

    Returns:
        A mask of the accepted points, on the CPU.
    """
    rows = points.cpu().double()
    # Computed from differences, not by a matrix product: the distance of equal points is exactly 0.
    between = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    remaining, accepted = sq_dist.numpy().copy(), np.zeros(len(rows), dtype=bool)
    for index, threshold in enumerate(rng.random(len(rows)) * remaining):
        if threshold < remaining[index]:
            accepted[index] = True
            np.minimum(remaining, between[index], out=remaining)
    return torch.from_numpy(accepted)


def default_vocab_size(num_patches: int) -> int:
    """Return the default V, the largest power of two up to 8192 that leaves at least 64 patches per code, but at least 2.

    Args:
        num_patches: of all images. For fewer than 2 patches the result is 1, as V may not exceed their number.
    """
    if num_patches < 2:
        return 1
    exponent = (num_patches // MIN_PATCHES_PER_CODE).bit_length() - 1
    return min(MAX_DEFAULT_VOCAB_SIZE, 2 ** max(1, exponent))
