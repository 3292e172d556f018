"""K-means in torch: full or mini-batch, L2 or spherical, over points that are streamed and may lie in several processes."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from mapet import distributed
from mapet.errors import Interrupted, MapetError, option
from mapet.files import atomic_write, check_same_options, write_tensors
from mapet.tokenizers.feature_store import DistributedPoints, FeatureStore, Metric, rows_at_once, stratified_sample

COLUMNS = 128
"""Centroids are padded to a multiple of it, so that the search for the nearest vectorises."""
TIE_TOLERANCE = 2.0**-18
"""Float32 products of other shapes may differ by this share of the norms; distances closer than that are told apart in float64."""
SAMPLE = 16
"""DistributedPoints for each centroid that k-means++ chooses among."""
SAVE_EVERY_S = 60
"""Seconds between checkpoints."""
DEAD_AFTER = 10
"""A mini-batch centroid is dead when so many times K points went by and it won none: one of average share wins so many."""


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
        rows = rows_at_once(centroids.device)
        self.left = torch.ones(rows, self.right.shape[1], dtype=dtype, device=centroids.device)
        self.table = torch.empty(rows, len(self.right), dtype=dtype, device=centroids.device)

    def __call__(self, points: Float[Tensor, "n F"]) -> Float[Tensor, "n padded_K"]:
        """The table of at most `rows_at_once` points; the next call overwrites it."""
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


class NearestCentroid:
    """The nearest centroid of each point: the one definition of a token.

    A point's id depends on nothing but the point and the centroids: products of other shapes (a smaller batch) may differ
    in their last bits, so points between two centroids are decided in float64, and ties go to the lower id.
    """

    def __init__(self, centroids: Float[Tensor, "K F"]) -> None:
        self.mean = centroids.mean(0)
        self.centroids = centroids - self.mean  # smaller norms: less cancellation in the distances
        self.largest = 2 * _half_norms(self.centroids).max()
        self.distances_to = Distances(self.centroids, torch.float32)
        self.buffer = torch.empty(rows_at_once(centroids.device), centroids.shape[1], device=centroids.device)

    def __call__(self, points: Float[Tensor, "n F"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Ids, and squared distances to these centroids."""
        ids, distances = zip(*map(self._block, points.split(len(self.buffer))), strict=True)
        return torch.cat(ids), torch.cat(distances)

    def _block(self, points: Tensor) -> tuple[Tensor, Tensor]:
        points = torch.sub(points, self.mean, out=self.buffer[: len(points)])
        ids, half, second = nearest(self.distances_to(points))
        unsure = (second - half <= TIE_TOLERANCE * (2 * _half_norms(points) + self.largest)).nonzero().squeeze(1)
        if len(unsure):
            ids[unsure] = self._assign_float64(points[unsure])
        return ids, 2 * half.clamp_min(0)

    def _assign_float64(self, points: Tensor) -> Int[Tensor, " n"]:
        place = torch.device("cpu") if points.device.type == "mps" else points.device  # Apple's GPUs have no float64
        x, c = (tensor.to(place, torch.float64) for tensor in (points, self.centroids))
        table = torch.addmm(c.square().sum(1) / 2, x, c.T, alpha=-1)
        limit = table.amin(1, keepdim=True) + 1e-12 * (x.square().sum(1, keepdim=True) + float(self.largest))
        return (table <= limit).to(torch.uint8).argmax(1).to(points.device)  # the first of those that are equal


def assign(points: Float[Tensor, "n F"], centroids: Float[Tensor, "K F"]) -> tuple[Tensor, Tensor]:
    """(n,) nearest centroid of each point, and (n,) squared distances to it; see `NearestCentroid`."""
    return NearestCentroid(centroids)(points)


class KMeansResult(NamedTuple):
    """Centroids and how they do.

    Attributes:
        centroids: (K, F).
        counts: (K,) points of each.
        mean_sq_dist: mean squared distance of the points to their nearest centroid.
        total_variance: mean squared distance of the points to their mean.
    """

    centroids: Tensor
    counts: Tensor
    mean_sq_dist: float
    total_variance: float


class KMeansState(NamedTuple):
    """K-means after a round.

    Attributes:
        rounds: done, of all runs.
        error: mean squared distance of the round.
        best_error: of the best run that is done; infinite before the first.
        centroids: (K, F), less the points' mean.
        best: (K, F) those of the best run.
        visits: (K,) points that have moved each centroid, in mini-batches.
        idle: (K,) points that went by since each won its last.
    """

    rounds: int
    error: float
    best_error: float
    centroids: Tensor
    best: Tensor
    visits: Tensor
    idle: Tensor


@dataclass(frozen=True)
class KMeans:
    """Lloyd's algorithm or its mini-batch form, run `n_init` times.

    Attributes:
        vocab_size: K, clusters.
        max_iter: rounds of a run, at least one.
        dtype: of the products while centroids move; bfloat16 is faster, at an error up to 0.2 % higher. Sums and means are
            float32 (on CUDA added in no fixed order: repeats may differ in the last bits), counts and error those of the
            exact float32 assignment at the end.
        init: 'random' points, or 'k-means++': see `kmeans_plusplus_init`.
        batch_size: how many points a round visits, of all ranks (Sculley 2010). The last round of a run visits all,
            which puts each centroid in the middle of its points and says what the run's error is. None: all rounds do.
        metric: 'cosine' scales points and centroids to length 1 (spherical k-means, Dhillon & Modha 2001); distances
            are squared there, 2 - 2 cos.
    """

    vocab_size: int
    max_iter: int = 20
    n_init: int = 1
    seed: int = 0
    dtype: torch.dtype = torch.float32
    init: Literal["random", "k-means++"] = "random"
    batch_size: int | None = None
    metric: Metric = "l2"

    def fit(self, points: FeatureStore | Float[Tensor, "n F"], checkpoint: Path | None = None) -> KMeansResult:
        """Return the clusters of the best run.

        Beside a block of points it holds the ids' counts, the centroids a few times over and one number a point, so the
        points may be larger than memory. In a process group each rank gives a shard of the points and makes the same call;
        all return the same clusters, those of the points together.

        Args:
            checkpoint: file that rank 0 saves the state to, each minute and on Ctrl-C, for the same call to resume
                bit-exactly; all ranks must see it. It stays when the work is done.

        Raises:
            MapetError: more clusters than points, a rank without points, or a checkpoint that is damaged or of another call.
        """
        if not int(distributed.all_gather(torch.tensor(len(points))).min()):
            raise MapetError("k-means needs at least one point in each process")
        data = DistributedPoints(points if isinstance(points, FeatureStore) else FeatureStore.of(points), self.metric)
        if self.vocab_size > len(data):
            raise MapetError(
                f"V = {self.vocab_size:,} visual tokens need at least as many patches, but there are {len(data):,}: lower {option('vocab_size')}"
            )
        nowhere = torch.zeros(self.vocab_size, data.store.num_features, device=data.device)
        none = torch.zeros(self.vocab_size, dtype=torch.int64, device=data.device)
        state = KMeansState(0, torch.inf, torch.inf, nowhere, nowhere, none, none)
        call = asdict(self) | {"world_size": distributed.world_size()}
        call["precision"] = str(call.pop("dtype"))
        if checkpoint:
            call["points"] = _digest(data)
            state = load_state(checkpoint, call, state)
        saved, total = time.monotonic(), self.n_init * self.max_iter
        try:
            with tqdm(desc="k-means", total=total, initial=state.rounds, unit="round", disable=None) as bar:
                while state.rounds < total:
                    state = self._next_round(data, state)
                    if checkpoint and time.monotonic() - saved >= SAVE_EVERY_S:
                        save_state(checkpoint, call, state)
                        saved = time.monotonic()
                    bar.set_postfix(error=f"{state.error:.4g}", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            if not checkpoint or not state.rounds:
                raise
            save_state(checkpoint, call, state)
            rounds = f"{state.rounds} of {total} rounds of k-means"
            raise Interrupted(f"interrupted; {rounds} are saved in {checkpoint}") from None
        return _evaluate(data, state.best)

    def _next_round(self, points: DistributedPoints, state: KMeansState) -> KMeansState:
        """Move each centroid to its points, and those that win none to the worst served.

        Of all points, centroids become their clusters' means; of a batch, the means of the points that they have won so far:
        the v-th moves a centroid by 1 / v of the way (Sculley's rate). The error is that of all points to the new centroids,
        or of a batch to the old ones. Random choices depend on the seed and the number of rounds alone.
        """
        mean, variance = points.moments
        run, round_of_run = divmod(state.rounds, self.max_iter)
        _, _, best_error, centroids, best, visits, idle = state
        if round_of_run == 0:
            choose = random_init if self.init == "random" else kmeans_plusplus_init
            centroids = points.take(choose(points, self.vocab_size, self.seed, run)) - mean
            visits, idle = torch.zeros_like(visits), torch.zeros_like(idle)
        is_last, batch = round_of_run == self.max_iter - 1, None
        if not is_last and self.batch_size is not None and self.batch_size < len(points):
            random = np.random.default_rng([self.seed, run, round_of_run])
            batch = stratified_sample(len(points), self.batch_size, random)
        distances_to = Distances(centroids, self.dtype)
        sums, counts = torch.zeros_like(centroids), torch.zeros_like(visits)
        num_visited = len(points.store) if batch is None else len(points.local(batch))
        half_sq_dist = torch.empty(num_visited, dtype=self.dtype, device=centroids.device)
        for start, block in points.blocks(batch):
            block -= mean
            ids, half_sq_dist[start : start + len(block)], _ = nearest(distances_to(block))
            sums.index_add_(0, ids, block)
            counts += torch.bincount(ids, minlength=len(centroids))
        sums, counts = distributed.all_reduce(sums), distributed.all_reduce(counts)
        if batch is None:
            moved = points.project(sums / counts.clamp_min(1)[:, None] + mean) - mean
            # The sum of |x - c|^2 is that of |x|^2, which is known, less 2 x.c - |c|^2.
            explained = (2 * (sums * moved).sum(1) - counts * moved.square().sum(1)).sum() / len(points)
            error = variance - float(distributed.broadcast(explained))
            dead = counts == 0
        else:
            visits = visits + counts
            moved = centroids + (sums - counts[:, None] * centroids) / visits.clamp_min(1)[:, None]
            moved = points.project(moved + mean) - mean
            error = 2 * float(distributed.all_reduce(half_sq_dist.float().sum())) / len(batch)
            idle = torch.where(counts > 0, 0, idle + len(batch))
            dead = idle >= DEAD_AFTER * len(centroids)
        if num_dead := int(dead.sum()):
            worst = _worst_points(points, half_sq_dist, num_dead, batch)
            dead = dead.nonzero().flatten()[: len(worst)]
            moved = moved.index_copy(0, dead, points.take(worst) - mean)
            visits, idle = visits.index_fill(0, dead, 0), idle.index_fill(0, dead, 0)
        centroids, error = distributed.broadcast(moved), max(0.0, error)
        if is_last and error < best_error:
            best_error, best = error, centroids
        return KMeansState(state.rounds + 1, error, best_error, centroids, best, visits, idle)


def _digest(points: DistributedPoints) -> str:
    """Tells other points from these: by their number, moments and 1,024 rows."""
    mean, variance = points.moments
    rows = points.take(stratified_sample(len(points), 1024, np.random.default_rng(0)))
    content = [np.array([len(points), variance]), mean.cpu().numpy(), rows.cpu().numpy()]
    return hashlib.sha256(b"".join(part.tobytes() for part in content)).hexdigest()


def save_state(path: Path, call: dict[str, Any], state: KMeansState) -> None:
    """Replace `path` by the state, as one safetensors file; rank 0 does."""
    if distributed.rank() > 0:
        return
    values = state._asdict()
    tensors = {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in values.items() if name not in tensors}
    with atomic_write(path) as temporary:
        write_tensors(temporary, tensors, {"config": json.dumps(call), "numbers": json.dumps(numbers)})


def load_state(path: Path, call: dict[str, Any], initial: KMeansState) -> KMeansState:
    """Return the state that `path` holds, or `initial` if there is none.

    Raises:
        MapetError: it is damaged, of another call, or not the same for all ranks.
    """
    state = initial
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name).to(initial.centroids.device) for name in file.keys()}  # noqa: SIM118
            begun = dict(json.loads(metadata["config"]))
            state = KMeansState(**json.loads(metadata["numbers"]), **tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise MapetError(f"{path}: damaged k-means checkpoint ({error}); delete it to begin again") from None
        check_same_options(path, begun, call)
    distributed.check_same(state.rounds, path)
    return state


def _worst_points(
    points: DistributedPoints, distances: Float[Tensor, " n"], count: int, batch: Int[Tensor, " b"] | None
) -> Int[Tensor, " m"]:
    """Numbers of the `count` visited points of all processes that are farthest from their centroids; all, if they are fewer.

    Of equals the first, so that all processes agree; each names its worst, filled up with nobody.
    """
    own = distances.float().sort(descending=True, stable=True)
    worst = own.indices[:count].cpu()
    numbers = points.first + (worst if batch is None else points.local(batch)[worst])
    padding = (0, count - len(worst))
    values = distributed.all_gather(pad(own.values[:count], padding, value=-torch.inf)).flatten()
    order = values.sort(descending=True, stable=True).indices[: min(count, int(values.isfinite().sum()))]
    return distributed.all_gather(pad(numbers, padding)).flatten()[order.cpu()]


def _evaluate(points: DistributedPoints, best: Float[Tensor, "K F"]) -> KMeansResult:
    """Count the points of each centroid, and measure their distances, by the exact assignment."""
    mean, variance = points.moments
    centroids = points.project(best + mean)
    assign_exactly = NearestCentroid(centroids)
    counts, total = torch.zeros(len(centroids), dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    for _, block in points.blocks():
        ids, distances = assign_exactly(block)
        counts += torch.bincount(ids, minlength=len(centroids)).cpu()
        total += float(distances.sum())
    mean_sq_dist = float(distributed.all_reduce(total)) / len(points)
    return KMeansResult(centroids, distributed.all_reduce(counts), mean_sq_dist, variance)


def random_init(points: DistributedPoints, num_clusters: int, seed: int = 0, restart: int = 0) -> Int[Tensor, " K"]:
    """Numbers of random points, to be the first centroids."""
    generator = torch.Generator().manual_seed(seed * 1009 + restart)
    return torch.randperm(len(points), generator=generator)[:num_clusters]


def kmeans_plusplus_init(
    points: DistributedPoints, num_clusters: int, seed: int = 0, restart: int = 0
) -> Int[Tensor, " K"]:
    """Numbers of points chosen by k-means++ (Arthur & Vassilvitskii, SODA 2007): each in proportion to D^2, its squared
    distance to the nearest chosen before.

    Chosen among all points, or `SAMPLE` times K random ones if there are more; exactly, but several in one pass by
    rejection (the idea is Cohen-Addad et al.'s, arXiv 2012.11891): up to `COLUMNS` are drawn by the D^2 of the pass before, and
    each is taken with the share of it that those just taken leave. A pass costs a product of the sample and the drawn, of
    which nearly all are taken where K is large: the whole costs about a float32 round over the sample, 1/32 of a round over
    fit-tokenizer's 512 points for each centroid. The sample is held in memory as float16: 16 K F numbers, 1 GB for 8192 x 4096.

    If fewer points differ than there are centroids, the rest is chosen at random.
    """
    random = np.random.default_rng([seed, restart])
    numbers = stratified_sample(len(points), SAMPLE * num_clusters, random)
    sample = DistributedPoints(points.store.select(points.local(numbers)), points.metric)
    taken = torch.from_numpy(random.integers(len(numbers), size=1))
    shift = points.take(numbers[taken])[0]  # smaller norms: less cancellation
    squared = _squared_distances(sample, shift, taken)
    while len(taken) < num_clusters:
        sums = squared.cumsum(0)
        if sums[-1] == 0:
            rest = torch.ones(len(numbers)).index_fill(0, taken, 0).nonzero().flatten()
            more = torch.from_numpy(random.permutation(len(rest)))[: num_clusters - len(taken)]
            taken = torch.cat([taken, rest[more]])
            break
        drawn = torch.searchsorted(sums, torch.from_numpy(random.random(COLUMNS)) * sums[-1], right=True)
        drawn = drawn.clamp_max(len(numbers) - 1)
        drawn = drawn[_accepted(sample.take(drawn), squared[drawn], random)][: num_clusters - len(taken)]
        squared = torch.minimum(squared, _squared_distances(sample, shift, drawn))
        taken = torch.cat([taken, drawn])
    return numbers[taken]


def _squared_distances(points: DistributedPoints, shift: Tensor, to: Int[Tensor, " m"]) -> Float[Tensor, " n"]:
    """Of each point, on the CPU, to the nearest of the points `to`; zero if float32 cannot tell it from that."""
    distances_to = Distances(points.take(to) - shift, torch.float32)
    half = torch.zeros(len(points), device=points.device)
    for start, block in points.blocks():
        block -= shift
        own = distances_to(block).amin(1)
        start += points.first
        half[start : start + len(block)] = own.masked_fill_(own <= TIE_TOLERANCE * _half_norms(block), 0)
    return 2 * distributed.all_reduce(half).cpu().double().index_fill_(0, to, 0)


def _accepted(drawn: Float[Tensor, "m F"], squared: Float[Tensor, " m"], random: np.random.Generator) -> Tensor:
    """(m,) booleans: which of the points drawn in proportion to `squared` to take, one after the other."""
    rows = drawn.cpu().double()
    between = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()  # equal points: 0
    left, accepted = squared.numpy().copy(), np.zeros(len(rows), dtype=bool)
    for index, limit in enumerate(random.random(len(rows)) * left):
        if limit < left[index]:
            accepted[index] = True
            np.minimum(left, between[index], out=left)
    return distributed.broadcast(torch.from_numpy(accepted))


def automatic_vocab_size(num_patches: int) -> int:
    """The largest power of two that leaves 64 patches for each word, from 2 to the paper's 8192."""
    return min(8192, max(2, 1 << max(1, (num_patches // 64).bit_length() - 1))) if num_patches > 1 else 1
