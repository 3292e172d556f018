"""Words of a sample of images, as they are and under changes that leave what the patches show the same."""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from jaxtyping import Int, UInt8
from torch import Tensor

from mapet.data.dataset import Batch, Quarantine, ViewDataset, inference_batch_size, readable_batches
from mapet.data.image_list import ImageList
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec, color_jitter
from mapet.device import Compute
from mapet.evaluation.features import MAX_UNREADABLE
from mapet.evaluation.tokens import overlap
from mapet.tokenizers.tokenizer import Tokenizer

JITTER = 0.1
"""Brightness, contrast and saturation are changed by up to a tenth."""
NOISE = 2.0
"""Standard deviation of the noise, of 255 grey levels: that of a good camera in good light."""
JPEG_QUALITY = 75
"""libjpeg's own default."""


class Words(NamedTuple):
    """Words of the centred views of a sample.

    Attributes:
        image_index: of each image that could be read, in the list.
        images: the first of them, at the student's size.
    """

    image_index: Int[Tensor, " n"]
    ids: Int[Tensor, "n rows columns"]
    images: UInt8[Tensor, "m C H W"]


class Sampler:
    """Runs a tokenizer over images.

    Args:
        tokenizer: with its teacher, on `compute.device`.
    """

    def __init__(self, tokenizer: Tokenizer, compute: Compute) -> None:
        assert tokenizer.teacher is not None, "loaded without its teacher"
        self.tokenizer, self.compute = tokenizer, compute
        self.channels: int = tokenizer.description["teacher"]["channels"]
        self.teacher_size = tokenizer.teacher.image_size
        self.spec = ViewSpec(image_size=tokenizer.student_size)

    def words(self, images: ImageList, shown: int) -> Words:
        """Words of all images, and the pixels of the first `shown`.

        Raises:
            MapetError: more than half of the images cannot be read.
        """
        size = self.tokenizer.student_size
        dataset = ViewDataset(images, self.spec, self.channels, size, self.teacher_size)
        index, ids, pixels = [], [], []
        for batch in self._batches(dataset, range(len(images)), "words"):
            assert batch.images is not None
            index.append(batch.image_index)
            ids.append(self._ids(batch.teacher_images))
            pixels.append(batch.images[: max(0, shown)])
            shown -= len(batch.images)
        return Words(torch.cat(index), torch.cat(ids), torch.cat(pixels))

    def views(self, images: ImageList, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """Change of view -> words of the same content, without it and with it; see `tokens.CHANGES`.

        The shift is by whole patches that are whole pixels of the teacher's view, diagonally, between two windows of one
        larger rendering: nothing is padded. Where only the whole grid is whole pixels, and for JPEG with neither 1 nor 3
        channels, that view is left out.
        """
        (height, width), (rows, columns) = self.teacher_size, self.tokenizer.grid
        down, right = rows // gcd(rows, height), columns // gcd(columns, width)  # patches
        below, beside = height // gcd(rows, height), width // gcd(columns, width)  # pixels
        shifts = down < rows and right < columns
        dataset = ViewDataset(
            images, self.spec, self.channels, (height + below, width + beside) if shifts else None, self.teacher_size,
            jitter=JITTER, seed=seed,
        )  # fmt: skip
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for batch in self._batches(dataset, range(len(images)), "changed views"):
            assert batch.teacher_images is not None and batch.jitter is not None
            view = batch.teacher_images.contiguous()
            words = self._ids(view)
            pairs = {
                "flip": (words.flip(-1), self._ids(view.flip(-1))),
                "jitter": (words, self._ids(_bytes(color_jitter(view.float(), batch.jitter)))),
                "noise": (words, self._ids(_bytes(view + self._noise(images, batch, seed)))),
            }
            if self.channels in (1, 3):
                pairs["jpeg"] = words, self._ids(tvf.jpeg(view, JPEG_QUALITY))
            if batch.images is not None:
                windows = batch.images[..., :height, :width], batch.images[..., below:, beside:]
                pairs["shift"] = overlap(self._ids(windows[0]), self._ids(windows[1]), down, right)
            for name, pair in pairs.items():
                found.setdefault(name, []).append(pair)
        return {name: _joined(pairs) for name, pairs in found.items()}

    def stored(self, images: ImageList, store: TokenStore, chosen: Int[np.ndarray, " n"]) -> tuple[Tensor, Tensor]:
        """Words of the chosen images' first views: those in the store, and those they have now."""
        dataset = ViewDataset(images, store.view_spec, self.channels, teacher_size=self.teacher_size)
        pairs = []
        for batch in self._batches(dataset, chosen.tolist(), "stored words"):
            ids = np.stack([store.read(int(index), 0) for index in batch.image_index])
            pairs.append((torch.from_numpy(ids).long(), self._ids(batch.teacher_images).flatten(1)))
        return _joined(pairs)

    def _batches(self, dataset: ViewDataset, indices: Sequence[int], title: str) -> Iterator[Batch]:
        size = inference_batch_size(self.teacher_size)
        batches = [[(0, i) for i in indices[at : at + size]] for at in range(0, len(indices), size)]
        quarantine = Quarantine(dataset.images, MAX_UNREADABLE)
        return readable_batches(dataset, batches, quarantine, title)

    @torch.inference_mode()
    def _ids(self, images: Tensor | None) -> Int[Tensor, "B rows columns"]:
        assert images is not None
        return self.tokenizer(self.compute.to(images)).cpu()

    def _noise(self, images: ImageList, batch: Batch, seed: int) -> Tensor:
        """A function of the image alone, whatever the batch."""
        shape = (self.channels, *self.teacher_size)
        draws = [
            np.random.default_rng([seed, images.key(int(index))]).normal(0, NOISE, shape).astype(np.float32)
            for index in batch.image_index
        ]
        return torch.from_numpy(np.stack(draws))


def _bytes(pixels: Tensor) -> UInt8[Tensor, "B C h w"]:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)
