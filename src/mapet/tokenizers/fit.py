"""Making a quantizer from a sample of features, or taking the one that a teacher brings along."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from mapet import distributed
from mapet.data.dataset import Quarantine, ViewDataset, make_loader
from mapet.device import Compute
from mapet.tokenizers.extract import teacher_features
from mapet.tokenizers.feature_store import FeatureStore
from mapet.tokenizers.kmeans import kmeans
from mapet.tokenizers.points import Metric, rows_at_once
from mapet.tokenizers.quantizers import Quantizer, principal_components, project
from mapet.tokenizers.teachers import Teacher


class Fitted(NamedTuple):
    """A quantizer and how it does on the patches it was fitted to.

    Attributes:
        usage: patches that have each word.
        error: mean squared distance to the nearest centroid, None where there are none.
        relative_error: that, divided by the distance to one global mean.
    """

    quantizer: Quantizer
    usage: Int[Tensor, " K"]
    error: float | None = None
    relative_error: float | None = None


def fit_kmeans(points: FeatureStore, vocab_size: int, pca: int | None, metric: Metric, **options: Any) -> Fitted:
    """K-means centroids of the features or of their first `pca` principal components; `options` are those of `kmeans`."""
    projection = principal_components(points, pca, whiten=False) if pca else {}
    with FeatureStore(len(points), points.memory, points.scratch, points.device) as projected:
        if projection:
            for _, block in points.blocks(rows_at_once(points.device)):
                projected.append(project(block, **projection))
        clustered = projected if projection else points
        centroids, usage, error, variance = kmeans(clustered, vocab_size, metric=metric, **options)
    quantizer = Quantizer({"kind": "nearest", "metric": metric}, {"centroids": centroids, **projection})
    return Fitted(quantizer, usage, error, error / variance if variance > 0 else 0.0)


def fit_scalar(points: FeatureStore, levels: Sequence[int]) -> Fitted:
    """Levels of whitened principal components, one for each (FSQ; LFQ where all levels are 2)."""
    projection = principal_components(points, len(levels), whiten=True)
    quantizer = Quantizer({"kind": "scalar", "levels": list(levels)}, projection).to(points.device)
    usage = torch.zeros(quantizer.vocab_size, dtype=torch.int64)
    for _, block in points.blocks(rows_at_once(points.device)):
        usage += torch.bincount(quantizer(block), minlength=len(usage)).cpu()
    return Fitted(quantizer, distributed.all_reduce(usage))


def use_own(
    teacher: Teacher,
    quantizer: Quantizer,
    dataset: ViewDataset,
    indices: Sequence[int],
    quarantine: Quarantine,
    compute: Compute,
    batch_size: int,
    workers: int,
) -> Fitted:
    """The words that a teacher brings along, and how often images have each; `indices` are this process's."""
    usage = torch.zeros(quantizer.vocab_size, dtype=torch.int64)
    batches = [[(0, index) for index in indices[i : i + batch_size]] for i in range(0, len(indices), batch_size)]
    for batch in tqdm(make_loader(dataset, batches, workers), desc="words", unit="batch", disable=None):
        quarantine.add(batch.bad)
        if len(batch.image_index):
            features = teacher_features(teacher, batch, dataset.images, compute)
            ids = quantizer(features.permute(0, 2, 3, 1).flatten(0, 2))
            usage += torch.bincount(ids, minlength=len(usage)).cpu()
    return Fitted(quantizer, distributed.all_reduce(usage))
