"""From a patch's feature to its token id: the nearest centroid, a rounded projection, or the largest logit."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mapet import distributed
from mapet.errors import MapetError, option
from mapet.tokenizers.feature_store import DistributedPoints, FeatureStore
from mapet.tokenizers.kmeans import assign

MIN_VARIANCE_RATIO, EIGENVALUE_FLOOR = 1e-10, 1e-12
"""Largest variance over the squared mean, below which float16 features are all the same; smallest variance over the largest that is divided by."""
LEVELS = {
    64: (8, 8), 240: (8, 6, 5), 512: (8, 8, 8), 1000: (8, 5, 5, 5), 4375: (7, 5, 5, 5, 5),
    8192: (8, 8, 8, 4, 4), 15360: (8, 8, 8, 6, 5), 64000: (8, 8, 8, 5, 5, 5),
}  # fmt: skip
"""Vocabulary size -> levels of each dimension: FSQ's (arXiv 2309.15505, section 4.1), and those of 64, 512 and 8192."""


class FitResult(NamedTuple):
    """A quantizer, and how it fits the patches that it was fitted to.

    Attributes:
        usage: number of patches, of all ranks, that have each code.
        error: mean squared distance to the nearest centroid; None without centroids.
        relative_error: `error` divided by the mean squared distance to the mean of all features.
    """

    quantizer: "Quantizer"
    usage: Int[Tensor, " K"]
    error: float | None = None
    relative_error: float | None = None


class Quantizer(nn.Module):
    """Maps features to token ids. There are three kinds, the first two optionally behind a projection to fewer dimensions:

    nearest: the nearest of K centroids, by L2 (k-CLIP) or by cosine (spherical k-means, VQ-KD).
    scalar: each projected dimension is rounded to one of a few levels, and the levels together are the token: finite scalar
        quantization (FSQ, arXiv 2309.15505); with two levels each only the signs count, as in look-up-free quantization (LFQ,
        arXiv 2310.05737). Those methods train an encoder to fill the levels; here the dimensions are whitened principal components,
        and each level takes an equal fraction of a normal distribution, so there is no codebook to fit.
    argmax: the largest of the teacher's own logits (DALL-E's dVAE).

    The id of a feature does not depend on the batch that it comes in: projections are computed in float64.

    Attributes:
        vocab_size: V, number of codes.
        num_features: F, width of the features it takes.
    """

    centroids: Tensor | None
    mean: Tensor | None
    components: Tensor | None

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Make a quantizer of one of the kinds 'nearest', 'scalar' and 'argmax'.

        Args:
            settings: 'kind' and, for nearest, 'metric' ('l2' or 'cosine'); for scalar, 'levels' (a list); for argmax, 'vocab_size'. They
                are written to visual_tokenizer.json and enter the tokenizer's hash.
            tensors: 'centroids' (K, d) for nearest; 'mean' (F,) and 'components' (F, d) if there is a projection. They become buffers.
        """
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
        """Return the token id of each feature, 0 to V - 1.

        Args:
            features: of each patch.

        Raises:
            MapetError: the features have another width than the quantizer was made for.
        """
        if features.shape[1] != self.num_features:
            raise MapetError(
                f"the teacher gives {features.shape[1]} features per patch, expected {self.num_features} as in the codebook: run "
                "`mapet fit-tokenizer` into a new folder"
            )
        if self.settings["kind"] == "argmax":
            return features.argmax(1)
        if self.components is not None and self.mean is not None:
            features = project(features, self.mean, self.components)
        if self.centroids is not None:
            if self.settings["metric"] == "cosine":
                features = F.normalize(features.double(), dim=1).to(features.dtype)
            return assign(features, self.centroids)[0]
        # The level of each dimension is a digit of the id, the first dimension's the most significant.
        ids = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        for values, num_levels in zip(features.T, self.settings["levels"], strict=True):
            quantiles = torch.special.ndtr(values.double())  # uniform in 0 to 1 if the values are normal
            ids = ids * num_levels + (quantiles * num_levels).long().clamp_max(num_levels - 1)
        return ids


def project(
    features: Float[Tensor, "n F"], mean: Float[Tensor, " F"], components: Float[Tensor, "F d"]
) -> Float[Tensor, "n d"]:
    """Return (features - mean) @ components in the features' dtype.

    The product is computed in float64, so that the result of a row does not depend on the number of rows.

    Args:
        features: a row for each patch.
        mean, components: what `principal_components` returns, on the features' device.
    """
    return ((features.double() - mean.double()) @ components.double()).to(features.dtype)


def principal_components(store: FeatureStore, dimensions: int, whiten: bool) -> dict[str, Tensor]:
    """Return the mean and the principal components of the features of all ranks, for `project`; a collective call.

    Args:
        store: this rank's features.
        dimensions: d, number of components, those of largest variance first.
        whiten: scale the components so that each projected dimension has unit variance.

    Returns:
        'mean' (F,) and 'components' (F, d), float32 on the store's device, the same on all ranks. Each component's largest
        coefficient is positive, as an eigenvector's sign is arbitrary.

    Raises:
        MapetError: more dimensions than the features have, features that are all the same to be whitened, or a rank has no features.
    """
    width = store.num_features
    if dimensions > width:
        raise MapetError(
            f"{dimensions} components of features of width {width}: lower {option('pca_dim')} or shorten {option('fsq_levels')}"
        )
    points = DistributedPoints(store)
    mean = points.moments[0]
    products = torch.zeros(width, width, dtype=torch.float64)
    for _, block in points.blocks():
        centered = block.cpu().double() - mean.cpu().double()
        products += centered.T @ centered
    variances, vectors = torch.linalg.eigh(distributed.all_reduce(products) / len(points))  # ascending
    variances, vectors = variances.flip(0)[:dimensions], vectors.flip(1)[:, :dimensions]
    # The coefficient of largest magnitude of each column becomes positive.
    components = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    if whiten:
        if (
            variances[0] <= MIN_VARIANCE_RATIO * mean.double().square().sum().cpu()
        ):  # float16 features cannot differ by so little
            raise MapetError(
                f"the features of all {len(points):,} patches are the same: give other {option('images')} or teacher"
            )
        smallest = variances[0] * EIGENVALUE_FLOOR  # a component without variance is not divided by zero
        components = components / variances.clamp_min(smallest).sqrt()
    return {"mean": mean, "components": distributed.broadcast(components.float()).to(store.device)}


def levels_for(vocab_size: int, signs: bool) -> tuple[int, ...]:
    """Return the number of levels of each dimension, whose product is the largest possible vocabulary of at most `vocab_size` codes.

    Args:
        vocab_size: largest number of codes, at least 1.
        signs: True (LFQ): two levels in each dimension, which make exactly `vocab_size` codes. False (FSQ): the entry of the table `LEVELS`
            with the most codes, e.g. (8, 6, 5), 240 codes, for 300.

    Raises:
        MapetError: LFQ with a number of codes that is no power of two, or FSQ with fewer codes than the table's first entry.
    """
    if signs:
        if vocab_size < 2 or vocab_size & (vocab_size - 1):
            raise MapetError(f"quantizer 'lfq': {option('vocab_size')} must be a power of two, got {vocab_size}")
        return (2,) * (vocab_size.bit_length() - 1)
    possible = [size for size in LEVELS if size <= vocab_size]
    if not possible:
        raise MapetError(f"'fsq' makes at least {min(LEVELS)} codes: raise {option('vocab_size')}, got {vocab_size}")
    return LEVELS[max(possible)]
