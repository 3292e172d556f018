"""Patch features for k-means: float16 rows in memory or in a scratch file, and the shards of all ranks as one set of points."""

import functools
import io
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mapet import distributed
from mapet.errors import MapetError, option
from mapet.files import preallocate

log = logging.getLogger("mapet")
FLOAT16_MAX = torch.finfo(torch.float16).max
CPU_BLOCK_POINTS, GPU_BLOCK_POINTS = 2048, 16384
"""Points that k-means processes at a time. On a CPU the bfloat16 distances of a block to 8192 centroids then take 32 MB; a GPU needs larger
blocks to be busy."""
BYTES_PER_VALUE = 2
"""Size of a float16 number."""
HEADROOM = 64
"""How many times larger than the largest value of the first rows a later value may be."""
Metric = Literal["l2", "cosine"]


class FeatureStore(AbstractContextManager["FeatureStore"]):
    """An (n, F) matrix of features that grows by `append`, held as float16 in memory or in a scratch file.

    The rows that are read back are the same wherever they are held. They are multiplied by a power of two, chosen from the first
    rows, so that they fit float16, whose largest value is 65504; the scaling itself is exact. The scratch file has no name: the
    operating system removes it when the process ends, however that happens.

    Attributes:
        num_rows: n, rows appended so far.
        num_features: F; 0 before the first rows.
        scale: the power of two that stored rows are multiplied by.
        scratch_file: None if the rows are in memory.
    """

    def __init__(
        self, max_rows: int, memory_limit: int, scratch_dir: Path, device: torch.device | str = "cpu", hint: str = ""
    ) -> None:
        """Create an empty store; the first `append` allocates its space.

        Args:
            max_rows: rows for which space is allocated; `append` ignores rows beyond it.
            memory_limit: bytes of memory that the rows may take; a store of more bytes uses the scratch file.
            scratch_dir: folder for the scratch file.
            device: whose memory holds the rows, and where rows are returned.
            hint: what the user can do for more space, beside choosing another folder; the end of an error, ', or ...'.
        """
        self.max_rows, self.memory_limit, self.scratch_dir = max_rows, memory_limit, scratch_dir
        self.device, self.hint = torch.device(device), hint
        self.num_rows = self.num_features = 0
        self.scale = 1.0
        self._rows: Tensor | None = None
        self.scratch_file: io.FileIO | None = None

    @classmethod
    def from_tensor(cls, features: Float[Tensor, "n F"]) -> "FeatureStore":
        """Return a full store that holds a copy of `features`, as float16, in the memory of their device."""
        store = cls(len(features), features.numel() * BYTES_PER_VALUE, Path(), features.device)
        store.append(features)
        return store

    def __exit__(self, *_: object) -> None:
        """Free the memory, and close the scratch file, which removes it."""
        self._rows = None
        if self.scratch_file is not None:
            self.scratch_file.close()

    def __len__(self) -> int:
        """Return n, the rows appended so far."""
        return self.num_rows

    def append(self, features: Float[Tensor, "m F"]) -> None:
        """Add a copy of these rows at the end; those beyond `max_rows` are ignored.

        The first call with rows chooses the scale and whether rows are held in memory or in the scratch file, and allocates the space.

        Args:
            features: rows of any float type and device; F is the same in every call.

        Raises:
            MapetError: there is too little disk for the scratch file, or a value does not fit float16.
        """
        features = features[: self.max_rows - self.num_rows]
        if not len(features):
            return
        if self.num_rows == 0:
            self._allocate(features)
        scaled = features.float() * self.scale
        if float(scaled.abs().max()) > FLOAT16_MAX:
            raise MapetError(
                f"features reach {float(features.abs().max()):.3g}, over {HEADROOM} times more than in the first batch, and cannot be "
                "stored as float16: use features of another layer, or normalize the model's output"
            )
        if self.scratch_file is None:
            assert self._rows is not None
            self._rows[self.num_rows : self.num_rows + len(scaled)] = scaled
        else:
            self.scratch_file.seek(self.num_rows * self.num_features * BYTES_PER_VALUE)
            scaled.half().cpu().numpy().tofile(self.scratch_file)
        self.num_rows += len(scaled)

    def _allocate(self, first_rows: Float[Tensor, "m F"]) -> None:
        """Choose the scale by the first rows and allocate `max_rows`, in memory or, above `memory_limit`, in the scratch file.

        Rows are multiplied by the scale, a power of two, before they are stored as float16. It brings the largest absolute value of the first
        rows to between 1/2 and 1 times M / `HEADROOM`, where M is float16's largest number, so that later rows may be larger.

        Args:
            first_rows: features, not all zero for a scale other than 1.

        Raises:
            MapetError: the scratch file cannot be created in `scratch_dir`, or is larger than the free disk space.
        """
        self.num_features = first_rows.shape[1]
        largest = float(first_rows.abs().max())
        self.scale = 2.0 ** math.floor(math.log2(FLOAT16_MAX / HEADROOM / largest)) if largest > 0 else 1.0
        size = self.max_rows * self.num_features * BYTES_PER_VALUE
        if size <= self.memory_limit:
            self._rows = torch.empty(self.max_rows, self.num_features, dtype=torch.float16, device=self.device)
            return
        try:
            self.scratch_dir.mkdir(parents=True, exist_ok=True)
            self.scratch_file = tempfile.TemporaryFile(dir=self.scratch_dir, buffering=0)  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            problem = f"cannot create a scratch file for features in {self.scratch_dir}: {error.strerror or error}"
            raise MapetError(f"{problem}; give {option('out')} in another folder{self.hint}") from None
        free = shutil.disk_usage(self.scratch_dir).free
        if size > free:
            raise MapetError(
                f"{self.max_rows:,} feature vectors take {size / 1e9:.3g} GB, more than the {self.memory_limit / 1e9:.3g} GB of memory for "
                f"them and the {free / 1e9:.3g} GB free in {self.scratch_dir}: give {option('out')} on another disk{self.hint}"
            )
        preallocate(self.scratch_file, size, self.scratch_dir)
        log.info("features: %.3g GB in a scratch file in %s, which is removed at the end", size / 1e9, self.scratch_dir)

    def blocks(self, block_size: int) -> Iterator[tuple[int, Float[Tensor, "m F"]]]:
        """Yield all rows in order, in blocks, each as (index of its first row, its rows).

        The rows are float32 on `device`, with the values that were appended, rounded to float16. Each block overwrites the one before; the
        caller may change it.

        Args:
            block_size: rows of a block; the last one may have fewer.
        """
        buffer = torch.empty(min(block_size, self.num_rows), self.num_features, device=self.device)
        for start in range(0, self.num_rows, block_size):
            rows = self._read(start, min(block_size, self.num_rows - start))
            yield start, buffer[: len(rows)].copy_(rows).mul_(1 / self.scale)

    def take(self, indices: Int[Tensor, " m"]) -> Float[Tensor, "m F"]:
        """Return the rows at `indices`, in their order, as a new float32 tensor on `device`."""
        if self._rows is not None:
            rows = self._rows[indices.to(self.device)]
        else:
            rows = torch.empty(len(indices), self.num_features, dtype=torch.float16)
            for position, index in enumerate(indices.tolist()):
                rows[position : position + 1] = self._read(index, 1)
        return rows.to(self.device).float() / self.scale

    def _read(self, start: int, count: int) -> Float[Tensor, "m F"]:
        """Return `count` rows from index `start` on as they are held: float16, scaled, in memory or on the CPU from the file.

        The file is read and not memory-mapped: a map of the whole file would count as this process's memory.
        """
        if self.scratch_file is None:
            assert self._rows is not None
            return self._rows[start : start + count]
        self.scratch_file.seek(start * self.num_features * BYTES_PER_VALUE)
        values = np.fromfile(self.scratch_file, np.float16, count * self.num_features)
        return torch.from_numpy(values).view(count, self.num_features)


def points_per_block(device: torch.device) -> int:
    """Return how many points k-means processes at a time, `CPU_BLOCK_POINTS` or `GPU_BLOCK_POINTS`."""
    return CPU_BLOCK_POINTS if device.type == "cpu" else GPU_BLOCK_POINTS


class DistributedPoints:
    """Points to cluster: each rank holds a shard in a `FeatureStore`, and a point's index counts from rank 0's first to the last rank's last.

    With the metric 'cosine' points are scaled to unit length. There |x - c|^2 = 2 - 2 cos(x, c), so that the nearest centroid is the
    same by distance and by angle; the metrics differ only in where centroids may lie (`apply_metric`). A point that is zero stays
    zero, equally near to all centroids.

    Attributes:
        store: this rank's features, unscaled.
        first: index of this rank's first point.
        total: number of points on all ranks.
    """

    def __init__(self, store: FeatureStore, metric: Metric = "l2") -> None:
        """Count the points of all ranks; every rank calls it with its shard.

        Raises:
            MapetError: a rank has no points.
        """
        self.store, self.metric, self.device = store, metric, store.device
        counts = distributed.all_gather(torch.tensor(len(store))).tolist()
        if 0 in counts:
            raise MapetError(
                f"each of {len(counts)} ranks needs a patch to fit to, rank {counts.index(0)} has none: start fewer processes or give more images"
            )
        self.first, self.total = sum(counts[: distributed.rank()]), sum(counts)

    def __len__(self) -> int:
        """Return the number of points on all ranks."""
        return self.total

    @functools.cached_property
    def moments(self) -> tuple[Float[Tensor, " F"], float]:
        """Compute (mean, variance) of the points of all ranks: their mean, and their mean squared distance to it, the same on every rank.

        Every rank must read it for the first time together: it is computed by reading each shard once, then kept.
        """
        shift = self.take(torch.tensor([0]))[0]  # a point is near the mean: less cancellation in the sums
        total, total_squared = torch.zeros(len(shift), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for _, block in self.blocks():
            block -= shift
            total += block.sum(0).cpu()
            total_squared += float(torch.linalg.vector_norm(block, dim=1).square().sum())
        mean = distributed.all_reduce(total) / len(self)
        variance = distributed.broadcast(distributed.all_reduce(total_squared) / len(self) - mean.square().sum())
        return distributed.broadcast(shift + mean.to(shift)), max(0.0, float(variance))

    def blocks(self, indices: Int[Tensor, " m"] | None = None) -> Iterator[tuple[int, Float[Tensor, "b F"]]]:
        """Yield points of this rank in order, in blocks of `points_per_block`, each as (number of points yielded before it, its points).

        The points are float32, scaled to unit length for 'cosine'. A block may overwrite the one before; the caller may change it.

        Args:
            indices: ascending indices of the points to visit; indices of other ranks' points are ignored. None: all points of this rank.
        """
        size = points_per_block(self.device)
        if indices is None:
            blocks = self.store.blocks(size)
        else:
            rows = self.local_rows(indices)
            blocks = ((start, self.store.take(rows[start : start + size])) for start in range(0, len(rows), size))
        for start, block in blocks:
            yield start, self.apply_metric(block)

    def take(self, indices: Int[Tensor, " m"]) -> Float[Tensor, "m F"]:
        """Return the points at `indices`, in their order, float32; all ranks call it with the same indices, and each gets all points.

        Args:
            indices: on the CPU, of points of any rank, in any order.
        """
        points = torch.zeros(len(indices), self.store.num_features, device=self.device)
        points[self._is_local(indices).to(self.device)] = self.store.take(self.local_rows(indices))
        return self.apply_metric(distributed.all_reduce(points))

    def local_rows(self, indices: Int[Tensor, " m"]) -> Int[Tensor, " l"]:
        """Return the rows of this rank's store at which it holds points of `indices`, in their order; other ranks' points are ignored."""
        return indices[self._is_local(indices)] - self.first

    def _is_local(self, indices: Int[Tensor, " m"]) -> Bool[Tensor, " m"]:
        """Return which of the points this rank holds."""
        return (indices >= self.first) & (indices < self.first + len(self.store))

    def apply_metric(self, vectors: Float[Tensor, "m F"]) -> Float[Tensor, "m F"]:
        """Scale vectors to unit length, in place, for 'cosine', and return them; for 'l2' return them unchanged.

        Args:
            vectors: points, or centroids that were computed as means of points.
        """
        return vectors if self.metric == "l2" else normalize(vectors, dim=1, out=vectors)


def stratified_sample(num_points: int, size: int, rng: np.random.Generator) -> Int[Tensor, " s"]:
    """Return s = min(size, num_points) different indices below `num_points`, ascending: one drawn from each of s equal intervals.

    Patches of one image are consecutive and much alike: intervals keep the sample from taking many of one image.
    """
    size = min(size, num_points)
    bounds = np.arange(size + 1) * num_points // size
    return torch.from_numpy(bounds[:-1] + (rng.random(size) * np.diff(bounds)).astype(np.int64))
