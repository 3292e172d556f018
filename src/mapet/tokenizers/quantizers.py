"""From a patch's feature to its visual word: the nearest centroid, a rounded projection, or the largest logit."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mapet import distributed
from mapet.errors import MapetError
from mapet.tokenizers.feature_store import FeatureStore
from mapet.tokenizers.kmeans import assign

LEVELS = {
    64: (8, 8), 240: (8, 6, 5), 512: (8, 8, 8), 1000: (8, 5, 5, 5), 4375: (7, 5, 5, 5, 5),
    8192: (8, 8, 8, 4, 4), 15360: (8, 8, 8, 6, 5), 64000: (8, 8, 8, 5, 5, 5),
}  # fmt: skip
"""Levels of each dimension by the number of words they make: FSQ's (arXiv 2309.15505, section 4.1), and 64, 512 and 8192."""


class Quantizer(nn.Module):
    """Names features. One of three kinds, each optionally behind a projection to fewer dimensions:

    nearest: the nearest of K centroids, by L2 (k-CLIP), or by cosine (spherical k-means, VQ-KD).
    scalar: each projected dimension is rounded to one of a few levels, and the levels together are the word: finite scalar
        quantization (FSQ, arXiv 2309.15505); with two levels each it takes signs alone, as look-up-free quantization does
        (LFQ, arXiv 2310.05737). Where those train an encoder to fill the levels, here they hold equal shares of a normal
        distribution of the whitened principal components, so there is no codebook to fit.
    argmax: the largest of the teacher's own logits (DALL-E's dVAE).

    A word depends on the feature alone, not on the batch: projections are made in float64.

    Attributes:
        vocab_size: V, words.
        num_features: F, of the features it takes.

    Args:
        settings: kind, and metric ('l2', 'cosine'), levels or vocab_size; goes into visual_tokenizer.json.
        tensors: centroids (K, d); mean (F,) and components (F, d) of the projection, if there is one.
    """

    centroids: Tensor | None
    mean: Tensor | None
    components: Tensor | None

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.settings = dict(settings)
        for name in ("centroids", "mean", "components"):
            self.register_buffer(name, tensors.get(name))
        if self.settings["kind"] == "nearest":
            self.vocab_size, self.num_features = tensors["centroids"].shape
        else:
            levels = self.settings.get("levels")
            self.vocab_size = self.num_features = math.prod(levels) if levels else int(self.settings["vocab_size"])
        if self.components is not None:
            self.num_features = len(self.components)

    @torch.inference_mode()
    def forward(self, features: Float[Tensor, "n F"]) -> Int[Tensor, " n"]:
        """Ids.

        Raises:
            MapetError: features of another width than it was made for.
        """
        if features.shape[1] != self.num_features:
            raise MapetError(f"the teacher gives {features.shape[1]} features, the codebook has {self.num_features}")
        if self.settings["kind"] == "argmax":
            return features.argmax(1)
        if self.components is not None and self.mean is not None:
            features = project(features, self.mean, self.components)
        if self.centroids is not None:
            if self.settings["metric"] == "cosine":
                features = F.normalize(features.double(), dim=1).to(features.dtype)
            return assign(features, self.centroids)[0]
        ids = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        for values, levels in zip(features.T, self.settings["levels"], strict=True):
            share = torch.special.ndtr(values.double())  # 0 to 1, evenly for normal values
            ids = ids * levels + (share * levels).long().clamp_max(levels - 1)
        return ids


def project(
    features: Float[Tensor, "n F"], mean: Float[Tensor, " F"], components: Float[Tensor, "F d"]
) -> Float[Tensor, "n d"]:
    """In float64, so that a row's numbers don't depend on how many rows there are."""
    return ((features.double() - mean.double()) @ components.double()).to(features.dtype)


def principal_components(points: FeatureStore, dimensions: int, whiten: bool) -> dict[str, Tensor]:
    """Mean and components of the points' covariance, largest first: `mean` (F,), `components` (F, d).

    Of several processes each gives its points; all get what those of all have.

    Args:
        whiten: give each unit variance.

    Raises:
        MapetError: more dimensions than the features have.
    """
    width = points.num_features
    if dimensions > width:
        raise MapetError(f"{dimensions} principal components of features that are {width} wide: ask for fewer")
    total, square = (torch.zeros(*shape, dtype=torch.float64) for shape in [(width,), (width, width)])
    first = points.take(torch.tensor([0]))[0].cpu().double()
    shift = distributed.broadcast(first)  # near the mean, against cancellation
    for _, block in points.blocks(2048):
        rows = block.cpu().double() - shift
        total += rows.sum(0)
        square += rows.T @ rows
    count = int(distributed.all_reduce(torch.tensor(len(points))))
    mean = distributed.all_reduce(total) / count
    values, vectors = torch.linalg.eigh(distributed.all_reduce(square) / count - torch.outer(mean, mean))
    values, vectors = values.flip(0)[:dimensions], vectors.flip(1)[:, :dimensions]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # an eigenvector's sign is arbitrary
    components = vectors * signs
    if whiten:
        components = components / values.clamp_min(values[0] * 1e-12 + 1e-300).sqrt()
    found = {"mean": (mean + shift).float(), "components": components.float()}
    return {name: distributed.broadcast(tensor).to(points.device) for name, tensor in found.items()}


def levels_for(vocab_size: int, signs: bool) -> tuple[int, ...]:
    """Levels that make about so many words: twos (LFQ), or FSQ's.

    Raises:
        MapetError: no such levels.
    """
    if signs:
        if vocab_size < 2 or vocab_size & (vocab_size - 1):
            raise MapetError(f"{vocab_size} words of signs alone: their number must be a power of two")
        return (2,) * (vocab_size.bit_length() - 1)
    fitting = [number for number in LEVELS if number <= vocab_size]
    if not fitting:
        raise MapetError(f"{vocab_size} words are too few for FSQ: at least {min(LEVELS)}")
    return LEVELS[max(fitting)]
