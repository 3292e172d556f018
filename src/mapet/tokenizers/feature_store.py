"""Patch features to cluster: float16 rows in memory or, beyond a limit, in a scratch file; and those of all processes."""

import functools
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mapet import distributed
from mapet.errors import MapetError, option
from mapet.files import preallocate

log = logging.getLogger("mapet")
HEADROOM = 64
"""How much larger than the first rows' largest value a later value may be."""
Metric = Literal["l2", "cosine"]


class FeatureStore:
    """(n, F) features, kept as float16 wherever they are, so that nothing depends on where that is.

    Rows are scaled by a power of two, which loses nothing, so that float16's range fits them: its largest value is 65504,
    and some encoders give more. The scratch file has no name: the system removes it with the process, however that ends.

    Attributes:
        capacity: most rows.
        memory: bytes of the device's memory that rows may take; more go to the scratch file.
        scratch: folder for the scratch file.
    """

    def __init__(self, capacity: int, memory: int, scratch: Path, device: torch.device | str = "cpu") -> None:
        self.capacity, self.memory, self.scratch, self.device = capacity, memory, scratch, torch.device(device)
        self.count = self.num_features = 0
        self.scale = 1.0
        self._rows: Tensor | None = None
        self._file: Any = None

    @classmethod
    def of(cls, features: Float[Tensor, "n F"]) -> "FeatureStore":
        """Features in memory, for k-means on a tensor."""
        store = cls(len(features), features.numel() * 2, Path(), features.device)
        store.append(features)
        return store

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._rows = None
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return self.count

    @property
    def in_memory(self) -> bool:
        return self._file is None

    def append(self, features: Float[Tensor, "m F"]) -> None:
        """Add rows, up to the capacity; the rest is left out.

        Raises:
            MapetError: too little disk for the scratch file, or values that float16 cannot hold.
        """
        if not self.count:
            self._open(features)
        features = features[: self.capacity - self.count]
        scaled = features.float() * self.scale
        if scaled.numel() and float(scaled.abs().max()) > torch.finfo(torch.float16).max:
            raise MapetError(
                f"the teacher's features reach {float(features.abs().max()):.3g}, over {HEADROOM} times more than in its first "
                f"batch: too uneven for k-means. Choose another {option('teacher_layer')} or normalize the encoder's output"
            )
        if self._rows is not None:
            self._rows[self.count : self.count + len(scaled)] = scaled
        else:
            self._file.seek(self.count * self.num_features * 2)
            scaled.half().cpu().numpy().tofile(self._file)
        self.count += len(scaled)

    def _open(self, first: Tensor) -> None:
        """Decide scale and place by the first rows."""
        self.num_features = first.shape[1]
        largest = float(first.abs().max())
        limit = torch.finfo(torch.float16).max / HEADROOM
        self.scale = 2.0 ** math.floor(math.log2(limit / largest)) if largest > 0 else 1.0
        size = self.capacity * self.num_features * 2
        if size <= self.memory:
            self._rows = torch.empty(self.capacity, self.num_features, dtype=torch.float16, device=self.device)
            return
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.scratch, buffering=0)  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise MapetError(
                f"no scratch file in {self.scratch}: {error.strerror}; give another {option('out')} or more {option('memory_gb')}"
            ) from None
        free = shutil.disk_usage(self.scratch).free
        if size > free:
            raise MapetError(
                f"the features of {self.capacity:,} patches take {size / 1e9:.3g} GB, more than {option('memory_gb')} {self.memory / 1e9:.3g} "
                f"and than the {free / 1e9:.3g} GB free in {self.scratch}: give {option('out')} on another disk, more {option('memory_gb')} "
                f"or fewer {option('patches_per_code')}"
            )
        preallocate(self._file, size, self.scratch)
        log.info("features: %.3g GB in a scratch file in %s, removed at the end", size / 1e9, self.scratch)

    def blocks(self, rows: int) -> Iterator[tuple[int, Float[Tensor, "m F"]]]:
        """(index of the first row, float32 rows), in order; each block overwrites the one before."""
        shape = min(rows, self.count), self.num_features
        buffer = torch.empty(shape, device=self.device)
        read = torch.empty(shape, dtype=torch.float16)
        for start in range(0, self.count, rows):
            count = min(rows, self.count - start)
            half = self._read(start, read[:count]) if self._rows is None else self._rows[start : start + count]
            yield start, buffer[:count].copy_(half).mul_(1 / self.scale)

    def take(self, indices: Int[Tensor, " m"]) -> Float[Tensor, "m F"]:
        """The float32 rows at `indices`."""
        return self._take(indices).float() / self.scale

    def select(self, indices: Int[Tensor, " m"]) -> "FeatureStore":
        """A store of the rows at `indices` alone, in memory whatever their size."""
        part = FeatureStore(len(indices), self.memory, self.scratch, self.device)
        part.count, part.num_features, part.scale = len(indices), self.num_features, self.scale
        part._rows = self._take(indices)
        return part

    def _take(self, indices: Tensor) -> Tensor:
        if self._rows is not None:
            return self._rows[indices.to(self.device)]
        rows = torch.empty(len(indices), self.num_features, dtype=torch.float16)
        for place, index in enumerate(indices.tolist()):
            self._read(index, rows[place : place + 1])
        return rows.to(self.device)

    def _read(self, start: int, into: Tensor) -> Tensor:
        """Rows from `start` on. Read, not mapped: a map of the whole file would count as this process's memory."""
        self._file.seek(start * self.num_features * 2)
        if self._file.readinto(into.numpy().data) != into.nbytes:
            raise MapetError(f"the scratch file in {self.scratch} ends too early: is that disk in order?")
        return into


def rows_at_once(device: torch.device) -> int:
    """Points in a block: on a CPU their table of bfloat16 distances to 8192 centroids takes 32 MB; a GPU has more to do than to start."""
    return 2048 if device.type == "cpu" else 16384


class DistributedPoints:
    """A shard of features in each process, numbered through from the first process to the last.

    Under the metric 'cosine' points are of unit length: there |x - c|^2 = 2 - 2 cos(x, c), so that the nearest centroid is
    the same by L2 and by cosine, and only where centroids may lie tells the two apart (`project`). A point that is zero
    stays zero, as near to one centroid as to another.

    Attributes:
        store: this process's features.
        first: number of this process's first point.
    """

    def __init__(self, store: FeatureStore, metric: Metric = "l2") -> None:
        self.store, self.metric, self.device = store, metric, store.device
        sizes = distributed.all_gather(torch.tensor(len(store))).tolist()
        self.first, self._total = sum(sizes[: distributed.rank()]), sum(sizes)

    def __len__(self) -> int:
        """Of all processes."""
        return self._total

    @functools.cached_property
    def moments(self) -> tuple[Float[Tensor, " F"], float]:
        """The mean of the points and their mean squared distance to it."""
        shift = self.take(torch.tensor([0]))[0]  # near the mean, against cancellation
        first, second = torch.zeros(len(shift), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for _, block in self.blocks():
            block -= shift
            first += block.sum(0).cpu()
            second += float(torch.linalg.vector_norm(block, dim=1).square().sum())
        mean = distributed.all_reduce(first) / len(self)
        variance = distributed.broadcast(distributed.all_reduce(second) / len(self) - mean.square().sum())
        return distributed.broadcast(shift + mean.to(shift)), max(0.0, float(variance))

    def blocks(self, numbers: Int[Tensor, " m"] | None = None) -> Iterator[tuple[int, Float[Tensor, "r F"]]]:
        """This process's points: (how many came before, the next `rows_at_once`), in order; each block may overwrite the last.

        Args:
            numbers: of the points to visit, ascending; None: all.
        """
        rows = rows_at_once(self.device)
        if numbers is None:
            blocks = self.store.blocks(rows)
        else:
            own = self.local(numbers)
            blocks = ((start, self.store.take(own[start : start + rows])) for start in range(0, len(own), rows))
        for start, block in blocks:
            yield start, self.project(block)

    def take(self, numbers: Int[Tensor, " m"]) -> Float[Tensor, "m F"]:
        """The points with these numbers, whoever holds them, in every process."""
        rows = torch.zeros(len(numbers), self.store.num_features, device=self.device)
        rows[self._here(numbers).to(self.device)] = self.store.take(self.local(numbers))
        return self.project(distributed.all_reduce(rows))

    def local(self, numbers: Int[Tensor, " m"]) -> Int[Tensor, " o"]:
        """Rows in this process's store of those of `numbers` that it holds."""
        return numbers[self._here(numbers)] - self.first

    def _here(self, numbers: Tensor) -> Tensor:
        return (numbers >= self.first) & (numbers < self.first + len(self.store))

    def project(self, vectors: Float[Tensor, "m F"]) -> Float[Tensor, "m F"]:
        """Points as they are clustered, or centroids where the metric lets them be; may overwrite `vectors`."""
        return vectors if self.metric == "l2" else normalize(vectors, dim=1, out=vectors)


def stratified_sample(num_points: int, size: int, random: np.random.Generator) -> Int[Tensor, " size"]:
    """Numbers of `size` different points, ascending: one at random from each of as many equal stretches.

    Patches of an image are neighbors, and much alike: so few come from one image. All points if `size` is larger.
    """
    size = min(size, num_points)
    ends = np.arange(size + 1) * num_points // size
    return torch.from_numpy(ends[:-1] + (random.random(size) * np.diff(ends)).astype(np.int64))
