"""Running the teacher over images: a sample of features to fit a codebook to, or the tokens of all."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mapet.data.dataset import Batch, Quarantine, ViewDataset, make_loader
from mapet.data.image_list import ImageList
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.tokenizers.feature_store import FeatureStore
from mapet.tokenizers.teachers import Teacher


def teacher_features(
    teacher: Teacher, batch: Batch, images: ImageList, compute: Compute
) -> Float[Tensor, "B F rows columns"]:
    """Features of a batch's teacher views.

    Raises:
        MapetError: a feature is NaN or infinite; the image is named.
    """
    assert batch.teacher_image is not None
    features = teacher(compute.to(batch.teacher_image))
    finite = features.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        first = int(batch.image_index[int((~finite).nonzero()[0])])
        raise MapetError(
            f"teacher '{teacher.name}' gave NaN or infinite features for {int((~finite).sum())} of {len(finite)} images, first "
            f"{images.id(first)!r}: check its weights and the range of its input ([0, 1])"
        )
    return features


def sample_features(
    teacher: Teacher,
    dataset: ViewDataset,
    indices: Sequence[int],
    store: FeatureStore,
    quarantine: Quarantine,
    compute: Compute,
    batch_size: int,
    workers: int,
) -> None:
    """Fill the store with patch features of these images, one after the other."""
    batches = [[(0, index) for index in indices[i : i + batch_size]] for i in range(0, len(indices), batch_size)]
    for batch in tqdm(make_loader(dataset, batches, workers), desc="teacher features", unit="batch", disable=None):
        quarantine.add(batch.bad)
        if len(batch.image_index):
            features = teacher_features(teacher, batch, dataset.images, compute)
            store.append(features.permute(0, 2, 3, 1).flatten(0, 2))
