"""Similar images: nearest ones, exact and near duplicates, and outliers, by the cosine similarity of features on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvf
from jaxtyping import Float, Int, UInt8
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from tqdm import tqdm

from mapet import files
from mapet.data.image_list import ImageList
from mapet.evaluation.embeddings import FORMAT, KIND, ROWS
from mapet.evaluation.probes import nearest_neighbors

BLOCK_ROWS = 8192
"""Rows of features that are compared at a time, with as many."""
COPY_QUALITY = 75
"""JPEG quality of the copies that near duplicates are measured by: libjpeg's default."""
COPY_QUANTILE = 0.05
"""Fraction of images that may be less similar to their own copy than near duplicates are to each other."""
ROUNDING = 1e-4
"""Images of equal bytes have equal features, but for the rounding of their similarity."""


class Neighbors(NamedTuple):
    """The images nearest to each of m queries, nearest first: their cosine similarities, and their indices in the list."""

    similarity: Float[np.ndarray, "m k"]
    image_index: Int[np.ndarray, "m k"]


@dataclass(frozen=True)
class FeatureIndex:
    """Features of the readable images of a list, mapped from a folder of `mapet embed`.

    Attributes:
        features: (images, D); rows of unreadable images are NaN.
        readable: (n,) index in the list of each readable image, ascending.
        device: where they are compared.
    """

    features: Float[np.ndarray, "images D"]
    readable: Int[np.ndarray, " n"]
    device: torch.device

    @classmethod
    def open(cls, folder: Path, device: torch.device) -> "FeatureIndex":
        """Map the features of a finished folder of `mapet embed`, of format npy."""
        manifest = files.read_manifest(folder, KIND, FORMAT)
        readable = np.setdiff1d(np.arange(manifest["num_images"]), [int(index) for index in manifest["unreadable"]])
        return cls(files.read_array(folder / ROWS, "r"), readable, device)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "b D"]]]:
        """Yield (position in `readable` of the first row, rows) of consecutive readable images, on the device."""
        for first in range(0, len(self.readable), BLOCK_ROWS):
            rows = torch.from_numpy(self.features[self.readable[first : first + BLOCK_ROWS]])
            yield first, rows.to(self.device, torch.float32)

    def search(self, queries: Float[Tensor, "m D"], k: int) -> Neighbors:
        """Find the `k` images nearest to each query by cosine similarity; with fewer images, all of them."""
        similarity, positions = nearest_neighbors(self.blocks(), queries.to(self.device, torch.float32), k, None)
        return Neighbors(similarity.cpu().numpy(), self.readable[positions.cpu().numpy()])

    def neighbors(self, k: int) -> Neighbors:
        """Find the `k` images nearest to each readable image, other than itself."""
        parts = []
        for first, rows in tqdm(
            self.blocks(), "neighbors", -(-len(self.readable) // BLOCK_ROWS), unit="block", disable=None
        ):
            nearest = self.search(rows, k + 1)
            is_self = nearest.image_index == self.readable[first : first + len(rows), None]
            # An image is among its k + 1 nearest unless more than k others equal it: then the last of these is dropped.
            order = np.argsort(is_self, axis=1, kind="stable")[:, :-1]
            parts.append([np.take_along_axis(part, order, 1) for part in nearest])
        return Neighbors(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def jpeg_copy(pixels: UInt8[Tensor, "C H W"]) -> UInt8[Tensor, "C H W"]:
    """Return pixels as they are after JPEG compression; of other than 3 channels each by itself."""
    return torch.cat([tvf.jpeg(part, COPY_QUALITY) for part in pixels.split(3 if len(pixels) == 3 else 1)])


def copy_similarity(originals: Float[Tensor, "n D"], copies: Float[Tensor, "n D"]) -> float:
    """Return the cosine similarity that all but the fraction `COPY_QUANTILE` of images have at least with their own copies."""
    return float(F.cosine_similarity(originals.double(), copies.double()).quantile(COPY_QUANTILE))


class Duplicate(NamedTuple):
    """Two images of a list that are duplicates.

    Attributes:
        group: index, from 1, of the images that are connected by duplicates.
        first, second: indices in the list, ascending.
        is_exact: whether their files have the same bytes; else they are near duplicates.
        similarity: cosine similarity of their features.
    """

    group: int
    first: int
    second: int
    is_exact: bool
    similarity: float


Pairs = dict[tuple[int, int], float]
"""Indices of two images in the list, ascending -> cosine similarity of their features."""


def similar_pairs(queries: Int[np.ndarray, " n"], neighbors: Neighbors, min_similarity: float) -> Pairs:
    """Return the images and neighbors of at least this similarity, and all that may have equal files; each pair once.

    Args:
        queries: index in the list of each image that the neighbors are of.
    """
    pairs: Pairs = {}
    for row, column in np.argwhere(neighbors.similarity >= min(min_similarity, 1 - ROUNDING)).tolist():
        first, second = sorted((int(queries[row]), int(neighbors.image_index[row, column])))
        pairs[first, second] = float(neighbors.similarity[row, column])
    return pairs


def find_duplicates(images: ImageList, pairs: Pairs, min_similarity: float) -> list[Duplicate]:
    """Return the pairs whose files are equal, and those of at least this similarity, by group.

    Args:
        images: the list, whose bytes are compared where features are equal.
        pairs: see `similar_pairs`.
        min_similarity: of near duplicates.
    """
    digest = cache(images.digest)
    exact = {(a, b): value >= 1 - ROUNDING and b"" != digest(a) == digest(b) for (a, b), value in pairs.items()}
    duplicate_pairs = sorted(pair for pair, value in pairs.items() if exact[pair] or value >= min_similarity)
    if not duplicate_pairs:
        return []
    first, second = np.array(duplicate_pairs).T
    graph = coo_array((np.ones(len(duplicate_pairs)), (first, second)), (len(images), len(images)))
    component = connected_components(graph, directed=False)[1]
    group_ids = {value: index for index, value in enumerate(dict.fromkeys(component[first].tolist()), 1)}
    return sorted(Duplicate(group_ids[int(component[a])], a, b, exact[a, b], pairs[a, b]) for a, b in duplicate_pairs)


def outlier_scores(neighbors: Neighbors) -> Float[np.ndarray, " n"]:
    """Return the mean cosine distance of each image to its nearest ones (Angiulli and Pizzuti 2002: the weight of a point)."""
    return 1 - neighbors.similarity.mean(1)
