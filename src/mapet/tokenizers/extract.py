"""Features of images by a frozen teacher, batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mapet.data.dataset import Batch, Quarantine, ViewDataset, inference_batch_size, make_loader
from mapet.data.image_list import ImageList
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.tokenizers.teacher import Teacher


def teacher_features(
    teacher: Teacher, batch: Batch, images: ImageList, compute: Compute
) -> Float[Tensor, "B F rows columns"]:
    """Compute the features of a batch's teacher views.

    Raises:
        MapetError: a feature is NaN or infinite; the image is named.
    """
    assert batch.teacher_images is not None
    features = teacher(compute.to(batch.teacher_images))
    finite = features.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        first = int(batch.image_index[int((~finite).nonzero()[0])])
        raise MapetError(
            f"teacher '{teacher.name}' gave NaN or infinite features for {int((~finite).sum())} of {len(finite)} images, first "
            f"{images.id(first)!r}: check its weights and the range of its input ([0, 1])"
        )
    return features


@dataclass
class FeatureExtractor:
    """A frozen teacher with the images, the device and the loader that feed it.

    Attributes:
        dataset: renders views at `teacher.image_size`.
        unreadable: collects the images that cannot be read.
    """

    teacher: Teacher
    dataset: ViewDataset
    unreadable: Quarantine
    compute: Compute

    def patch_features(self, indices: Sequence[int], title: str = "teacher features") -> Iterator[Float[Tensor, "n F"]]:
        """Yield the features of the images' patches, row-major, image after image; unreadable images have none."""
        size = inference_batch_size(self.teacher.image_size)
        batches = [[(0, index) for index in indices[i : i + size]] for i in range(0, len(indices), size)]
        loader = make_loader(self.dataset, batches)
        for batch in tqdm(loader, desc=title, unit="batch", disable=None):
            self.unreadable.add(batch.bad)
            if len(batch):
                features = teacher_features(self.teacher, batch, self.dataset.images, self.compute)
                yield features.permute(0, 2, 3, 1).flatten(0, 2)
