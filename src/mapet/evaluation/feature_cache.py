"""Frozen features of a set of images: computed once for all protocols, as float16, in memory or a scratch file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapet.evaluation.backbone_wrapper import BackboneWrapper
from mapet.evaluation.features import LabelledSet, Pool, centred_batches, must_be_finite_features
from mapet.tokenizers.feature_store import FeatureStore

BLOCK_BYTES = 256 << 20
"""Float32 bytes of the rows that are read together."""


@dataclass(frozen=True)
class CacheConfig:
    """Where features are kept, and how images are read.

    Attributes:
        memory: bytes that one set's features may take; more go to a file in `scratch_dir`.
        progress: shows a progress bar.
    """

    memory: int = 1 << 62
    scratch_dir: Path = Path()
    batch_size: int = 64
    progress: bool = True


@dataclass
class FeatureCache:
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
    def extract(
        cls,
        backbone: BackboneWrapper,
        data: LabelledSet,
        config: CacheConfig,
        layers: list[int] | None = None,
        pool: Pool = "avg",
    ) -> "FeatureCache":
        """Run the backbone over the centred views.

        Args:
            layers: counted from 1; None takes the last.

        Raises:
            MapetError: features that aren't finite, no room, too many unreadable images.
        """
        layers = layers or [backbone.num_layers]
        training = backbone.model.training
        backbone.model.eval()
        store = FeatureStore(len(data.images), config.memory, config.scratch_dir)
        indices, ends = [], [0]
        show = "features" if config.progress else None
        for index, images in centred_batches(
            data.images, backbone.image_size, backbone.channels, shuffled_batches(len(data.images), config.batch_size),
            show,
        ):  # fmt: skip
            parts = backbone.pooled_features(images, layers, pool)
            features = torch.cat(parts, 1).cpu()
            must_be_finite_features(features, backbone.name)
            store.append(features)
            indices.append(index)
            ends = [0, *np.cumsum([part.shape[1] for part in parts]).tolist()]
        backbone.model.train(training)
        index = torch.cat(indices)
        columns = {layer: slice(*ends[i : i + 2]) for i, layer in enumerate(layers)}
        return cls(store, index, torch.from_numpy(data.labels)[index], columns)

    def __len__(self) -> int:
        return len(self.store)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "m W"]]]:
        """Yield (first row, float32 rows of all layers) in order; each block overwrites the one before."""
        yield from self.store.blocks(max(1024, BLOCK_BYTES // (4 * self.store.num_features)))

    def batches(self, num_rows: int, size: int, seed: int) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b W"]]]:
        """Yield (rows, their features) of the first rows in another random order for each seed; never a lone row of several."""
        generator = torch.Generator().manual_seed(seed)
        for start, block in self.blocks():
            count = min(num_rows - start, len(block))
            if count > 0:
                for part in torch.randperm(count, generator=generator).split(size):
                    if len(part) > 1 or count == 1:
                        yield start + part, block[part]

    def layer_blocks(self, layer: int | None = None) -> Iterator[tuple[int, Float[Tensor, "m D"]]]:
        """Yield the `blocks` of one layer (the deepest)."""
        columns = self.columns[layer or max(self.columns)]
        for start, block in self.blocks():
            yield start, block[:, columns]

    def layer_features(self, rows: Int[Tensor, " m"] | None = None, layer: int | None = None) -> Float[Tensor, "m D"]:
        """Read one layer's (the deepest's) features into memory, of some rows or all."""
        if rows is not None:
            return self.store.take(rows)[:, self.columns[layer or max(self.columns)]]
        return torch.cat([block.clone() for _, block in self.layer_blocks(layer)])

    def close(self) -> None:
        """Give memory and scratch file back."""
        self.store.__exit__(None, None, None)


@dataclass
class PatchTokenCache:
    """Patch tokens of the last layer, kept as float16 where they fit the memory, else computed anew for each epoch.

    Rows lie in a random order, as in `FeatureCache`.

    Attributes:
        index: image of each row, in that order.
    """

    backbone: BackboneWrapper
    data: LabelledSet
    config: CacheConfig
    store: FeatureStore | None = None
    index: Int[Tensor, " n"] | None = None

    def epoch(self) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b N D"]]]:
        """Yield (indices of images, their tokens), a batch at a time, once through."""
        depth, *grid = self.backbone.map_shape
        shape = int(np.prod(grid)), depth
        if self.store is not None and self.index is not None:
            for start, rows in self.store.blocks(self.config.batch_size):
                yield self.index[start : start + len(rows)], rows.unflatten(1, shape)
            return
        count, seen = len(self.data.images), []
        fits = 2 * count * int(np.prod(shape)) <= self.config.memory
        self.store = FeatureStore(count, self.config.memory, self.config.scratch_dir) if fits else None
        for index, images in centred_batches(
            self.data.images, self.backbone.image_size, self.backbone.channels,
            shuffled_batches(count, self.config.batch_size), "tokens",
        ):  # fmt: skip
            tokens = self.backbone.last_layer(images).flatten(2).transpose(1, 2).cpu()
            if self.store is not None:
                self.store.append(tokens.flatten(1))
            seen.append(index)
            yield index, tokens
        self.index = torch.cat(seen)


def shuffled_batches(count: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Batch (0, index) in a random order, always the same."""
    order = np.random.default_rng(0).permutation(count).tolist()
    return [[(0, index) for index in order[start : start + batch_size]] for start in range(0, count, batch_size)]
