"""Frozen features of a set of images: computed once for all protocols, as float16, in memory or a scratch file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapet.evaluation.encoder import Encoder, Pool
from mapet.evaluation.features import LabelledSet, centred_batches, must_be_finite_features
from mapet.tokenizers.feature_store import FeatureStore

BLOCK_BYTES = 256 << 20
"""Float32 bytes of the rows that are looked at together."""


@dataclass(frozen=True)
class Place:
    """Where features are kept, and how images are read.

    Attributes:
        memory: bytes that one set's features may take; more go to a file in `scratch`.
    """

    memory: int
    scratch: Path
    batch_size: int = 64
    workers: int = 0


@dataclass
class Bank:
    """Features of some layers of each image.

    Rows lie in a random order (the same for every backbone), so that those that are read in turn are a random sample.

    Attributes:
        store: (n, sum of widths).
        index: image of each row.
        labels: class of each row.
        columns: of each layer, by its number from 1.
    """

    store: FeatureStore
    index: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    columns: dict[int, slice]

    @classmethod
    def of(cls, encoder: Encoder, data: LabelledSet, layers: list[int], pool: Pool, place: Place) -> "Bank":
        """Run the backbone over the centred views.

        Raises:
            MapetError: features that aren't finite, no room, too many unreadable images.
        """
        store = FeatureStore(len(data.images), place.memory, place.scratch)
        indices = []
        columns: dict[int, slice] = {}
        batches = shuffled(len(data.images), place.batch_size)
        for index, images in centred_batches(
            data.images, encoder.image_size, encoder.channels, batches, place.workers, "features"
        ):
            parts = [part.cpu() for part in encoder.pooled(images, layers, pool)]
            together = torch.cat(parts, 1)
            must_be_finite_features(together, encoder.name)
            if not columns:
                ends = np.cumsum([0, *(part.shape[1] for part in parts)]).tolist()
                columns = {layer: slice(*ends[i : i + 2]) for i, layer in enumerate(layers)}
            store.append(together)
            indices.append(index)
        index = torch.cat(indices)
        return cls(store, index, torch.from_numpy(data.labels)[index], columns)

    def __len__(self) -> int:
        return len(self.store)

    @property
    def last(self) -> slice:
        """Columns of the deepest layer."""
        return self.columns[max(self.columns)]

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "m W"]]]:
        """(first row, float32 rows) in order; each block overwrites the one before."""
        yield from self.store.blocks(max(1024, BLOCK_BYTES // (4 * self.store.num_features)))

    def batches(
        self, first: int, last: int, size: int, seed: int
    ) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b W"]]]:
        """(rows, their features) of rows first .. last - 1 in another random order for each seed; none of one row alone."""
        generator = torch.Generator().manual_seed(seed)
        for start, block in self.blocks():
            low, high = max(first - start, 0), min(last - start, len(block))
            if high > low:
                for part in (torch.randperm(high - low, generator=generator) + low).split(size):
                    if len(part) > 1 or high - low == 1:
                        yield start + part, block[part]

    def of_layer(self, rows: Int[Tensor, " m"] | None = None, layer: int | None = None) -> Float[Tensor, "m D"]:
        """Features of one layer (the deepest) in memory, of some rows or all."""
        columns = self.last if layer is None else self.columns[layer]
        if rows is not None:
            return self.store.take(rows)[:, columns]
        return torch.cat([block[:, columns].clone() for _, block in self.blocks()])

    def layer_blocks(self, layer: int | None = None) -> Iterator[tuple[int, Float[Tensor, "m D"]]]:
        """`blocks` of one layer (the deepest)."""
        columns = self.last if layer is None else self.columns[layer]
        for start, block in self.blocks():
            yield start, block[:, columns]

    def close(self) -> None:
        self.store.__exit__(None, None, None)


def shuffled(count: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of (0, index) in a random order, always the same."""
    order = np.random.default_rng(0).permutation(count).tolist()
    return [[(0, index) for index in order[start : start + batch_size]] for start in range(0, count, batch_size)]
