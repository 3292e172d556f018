"""The points that k-means clusters: of one process or several, as they are or of unit length."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mapet import distributed
from mapet.tokenizers.feature_store import FeatureStore

Metric = Literal["l2", "cosine"]


def rows_at_once(device: torch.device) -> int:
    """DistributedPoints in a block: on a CPU their table of bfloat16 distances to 8192 centroids takes 32 MB; a GPU has more to do than to start."""
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

    def blocks(self, numbers: Int[Tensor, " m"] | None = None) -> Iterator[tuple[int, Float[Tensor, "r F"]]]:
        """This process's points: (how many came before, the next `rows_at_once`), in order; each block may overwrite the last.

        Args:
            numbers: of the points to visit, ascending; None: all.
        """
        rows = rows_at_once(self.device)
        if numbers is None:
            for start, block in self.store.blocks(rows):
                yield start, self.project(block)
        else:
            own = self.local(numbers)
            for start in range(0, len(own), rows):
                yield start, self.project(self.store.take(own[start : start + rows]))

    def take(self, numbers: Int[Tensor, " m"]) -> Float[Tensor, "m F"]:
        """The points with these numbers, whoever holds them, in every process."""
        here = self._here(numbers)
        rows = torch.zeros(len(numbers), self.store.num_features, device=self.device)
        rows[here.to(self.device)] = self.store.take(numbers[here] - self.first)
        return self.project(distributed.all_reduce(rows))

    def select(self, numbers: Int[Tensor, " m"]) -> "DistributedPoints":
        """The points with these numbers alone, ascending; each process keeps its own, in memory."""
        return DistributedPoints(self.store.select(self.local(numbers)), self.metric)

    def local(self, numbers: Int[Tensor, " m"]) -> Int[Tensor, " o"]:
        """Rows in this process's store of those of `numbers` that it holds."""
        return numbers[self._here(numbers)] - self.first

    def project(self, vectors: Float[Tensor, "m F"]) -> Float[Tensor, "m F"]:
        """DistributedPoints as they are clustered, or centroids where the metric lets them be; may overwrite `vectors`."""
        return vectors if self.metric == "l2" else normalize(vectors, dim=1, out=vectors)

    def all_gather(self, own: Float[Tensor, " n"]) -> Float[Tensor, " total"]:
        """A number for each point of this process -> for each point of all, in every process."""
        everyone = own.new_zeros(len(self))
        everyone[self.first : self.first + len(own)] = own
        return distributed.all_reduce(everyone)

    def _here(self, numbers: Tensor) -> Tensor:
        return (numbers >= self.first) & (numbers < self.first + len(self.store))


def stratified_sample(num_points: int, size: int, random: np.random.Generator) -> Int[Tensor, " size"]:
    """Numbers of `size` different points, ascending: one at random from each of as many equal stretches.

    Patches of an image are neighbours, and much alike: so few come from one image. All points if `size` is larger.
    """
    size = min(size, num_points)
    ends = np.arange(size + 1) * num_points // size
    return torch.from_numpy(ends[:-1] + (random.random(size) * np.diff(ends)).astype(np.int64))
