"""Images to batches. Every random draw is a pure function of (seed, epoch, image id), whatever the number of workers."""

import functools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from mapet.data.hugging_face import HFStream
from mapet.data.image_list import ImageList
from mapet.data.readers import ImageDecodeError
from mapet.data.token_store import TokenStore
from mapet.data.views import (
    PermutationKind,
    ViewSpec,
    fork_rng,
    render_view,
    sample_jitter,
    sample_permutation,
    sample_view,
)
from mapet.device import num_workers
from mapet.errors import MapetError, option
from mapet.signals import ignore_signals_in_worker

log = logging.getLogger("mapet")
OF_ALL_IMAGES = ("num_context", "target_indices", "unreadable")
"""Fields of `Batch` that are the same for every micro-batch."""

Targets = Int[Tensor, "B N"] | Float[Tensor, "B N F"]
"""Per-patch prediction target, row-major: token id or regression vector."""
DropPathRand = Float[Tensor, "B num_branches"]
"""A number from 0 to 1 for each residual branch, two a block."""


@dataclass
class Batch:
    """Views of B images and what a training step needs to know of them, from the data set to the loss.

    Attributes:
        image_index: of each image in the list of images.
        images: pixels of the student's view; once a task has prepared the batch, the model's normalized input.
        teacher_images: pixels of the same view at the teacher's size.
        targets: what is to be predicted of each patch.
        permutation: patch indices in the order in which they are revealed and predicted.
        jitter: factors of brightness, contrast and saturation.
        drop_path_rand: what stochastic depth decides by; None: it draws for itself.
        num_context: c of the step; None: the model's own.
        target_indices: which of the p = N - c hidden patches are predicted, ascending; None: all.
        unreadable: images that could not be read, as (index in the list, reason); the tensors leave them out.
    """

    image_index: Int[Tensor, " B"]
    images: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"] | None = None
    teacher_images: UInt8[Tensor, "B C h w"] | None = None
    targets: Targets | None = None
    permutation: Int[Tensor, "B N"] | None = None
    jitter: Float[Tensor, "B 3"] | None = None
    drop_path_rand: DropPathRand | None = None
    num_context: int | None = None
    target_indices: Int[Tensor, " m"] | None = None
    unreadable: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        """Return B."""
        return len(self.image_index)

    def __getitem__(self, part: slice) -> "Batch":
        """Return a micro-batch: some of the images, and what holds for all of them."""
        per_image = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OF_ALL_IMAGES}
        return replace(self, **{name: value[part] for name, value in per_image.items() if value is not None})

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors; the copy to a GPU does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> "Batch":
        """Pin the tensors in memory, as torch's DataLoader asks for it."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass
class ViewDataset(Dataset[Batch]):
    """Views of images; dataset[number, index] is a batch of one, view `number` of image `index`.

    Attributes:
        image_size: (H, W) of `Batch.images`; None leaves it out.
        teacher_size: (h, w) of `Batch.teacher_images`, the same view at the teacher's size; None leaves it out.
        store: token ids, the targets; then the view drawn is one of the stored ones.
        grid: rows and columns of patches to draw a permutation of, in an order of kind `order`; None leaves it out.
        jitter: strength of color jitter of `Batch.images` (never of the teacher's). A batch holds its three factors;
            they are applied with normalization, on the device: see `evaluation.features.normalize`.
        num_branches: residual branches of the student whose stochastic depth is to be drawn with the sample.
        augment: changes `Batch.images` further; draws from the global generators, which are seeded for it.
    """

    images: ImageList
    spec: ViewSpec
    channels: int = 3
    image_size: tuple[int, int] | None = None
    teacher_size: tuple[int, int] | None = None
    store: TokenStore | None = None
    grid: tuple[int, int] | None = None
    order: PermutationKind = "random"
    jitter: float = 0.0
    num_branches: int = 0
    augment: Callable[[Tensor], Tensor] | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        return self.batch([position])

    def batch(self, positions: list[tuple[int, int]]) -> Batch:
        """Return the views at (view index, image index): first all draws, then all pixels.

        In turn with decoders, the same draws take three times as long: each finds its code gone from the caches.
        """
        bad, samples = list[tuple[int, str]](), []
        for position, (number, drawn) in zip(positions, [self._draw(*position) for position in positions], strict=True):
            try:
                samples.append(drawn | self._pixels(position, number))
            except ImageDecodeError as error:
                bad.append((position[1], str(error)))
        return _collate(samples, bad)

    __getitems__ = batch  # as `DataLoader` asks for it

    def placeholder(self, index: int) -> Batch:
        """Return a batch of one black image with all that a batch has, for a rank that can read none of its own."""
        sizes = {"images": self.image_size, "teacher_images": self.teacher_size}
        black = {name: torch.zeros(self.channels, *size, dtype=torch.uint8) for name, size in sizes.items() if size}
        return _collate([self._draw(0, index)[1] | black], [])

    def _draw(self, number: int, index: int) -> tuple[int, dict[str, Any]]:
        """Return the index of a stored view, or `number`, and a sample without pixels: fields of `Batch`."""
        rng = np.random.default_rng([self.seed, self.images.key(index), number])
        sample: dict[str, Any] = {"image_index": np.int64(index)}
        if self.store is not None:
            number = int(rng.integers(self.store.num_views))
        if self.grid is not None:
            sample["permutation"] = sample_permutation(self.order, self.grid, rng)
        if self.jitter:
            sample["jitter"] = sample_jitter(self.jitter, rng)
        if self.num_branches:
            sample["drop_path_rand"] = rng.random(self.num_branches, dtype=np.float32)
        if self.store is not None:
            sample["targets"] = self.store.read(index, number)
        return number, sample

    def _pixels(self, position: tuple[int, int], number: int) -> dict[str, Tensor]:
        """Raises ImageDecodeError: the image can't be read."""
        key = self.images.key(position[1])
        picture = self.images.open(position[1], self.channels)
        view = sample_view(self.spec, picture.size, key, number)
        sizes = {"images": self.image_size, "teacher_images": self.teacher_size}
        pixels = {name: render_view(picture, view, size) for name, size in sizes.items() if size}
        if self.augment is not None and "images" in pixels:
            with fork_rng(self.seed, key, position[0]):
                pixels["images"] = self.augment(pixels["images"])
        return pixels


def _collate(samples: list[dict[str, Any]], bad: list[tuple[int, str]]) -> Batch:
    """Stack samples: fields of `Batch`, arrays or pixels."""
    stacked: dict[str, Any] = {"image_index": torch.zeros(0, dtype=torch.int64)}
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples]
        if isinstance(values[0], Tensor):  # pixels lie as rows of RGB, and stay so: one copy of bytes
            stacked[name] = torch.stack([pixels.movedim(0, -1) for pixels in values]).movedim(-1, 1)
        else:
            stacked[name] = torch.from_numpy(np.stack(values))
    return Batch(**stacked, unreadable=bad)


@dataclass(eq=False)
class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), each epoch a fresh order that depends on (seed, epoch) alone; starts at any step.

    Every image comes once an epoch; where `batch_size` doesn't divide their number, an epoch's batches are a little
    smaller, all about equal, rather than one of them tiny.

    Args:
        rank: index of this process among `world_size`, which split each batch between them, image by image.
    """

    indices: Int[np.ndarray, " n"]
    batch_size: int
    epochs: int
    seed: int
    first_step: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.epochs * self.steps_per_epoch):
            yield self.batch(step)[self.rank :: self.world_size]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The batch of a step, counted from 0, for all ranks."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        first, last = (len(order) * n // self.steps_per_epoch for n in (number, number + 1))
        return [(epoch, int(index)) for index in order[first:last]]

    @functools.lru_cache(maxsize=1)  # noqa: B019, a sampler lives as long as its run
    def _order(self, epoch: int) -> Int[np.ndarray, " n"]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.indices)


def inference_batch_size(image_size: tuple[int, int]) -> int:
    """How many images a frozen network reads at a time: 64, fewer of images above 384 x 384 pixels."""
    return max(1, min(64, 64 * 384**2 // math.prod(image_size)))


def position_batches(indices: Iterable[int], batch_size: int, view_index: int = 0) -> list[list[tuple[int, int]]]:
    """Return batches of positions (view_index, image index), in the order of the image indices."""
    positions = [(view_index, int(index)) for index in indices]
    return [positions[first : first + batch_size] for first in range(0, len(positions), batch_size)]


def create_loader(dataset: ViewDataset, batches: Any, pin_memory: bool = False) -> Iterable[Batch]:
    """A torch DataLoader over explicit batches; batches come in order whatever the number of workers."""
    workers = num_workers()
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, prefetch_factor=4 if workers else None,
        collate_fn=_as_is, pin_memory=pin_memory, worker_init_fn=_start_worker,
    )  # fmt: skip


def _as_is(batch: Any) -> Any:
    """`ViewDataset` makes whole batches."""
    return batch


def _start_worker(_number: int) -> None:
    torch.set_num_threads(1)
    ignore_signals_in_worker()
    sys.excepthook = _unless_left


def _unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A thread that hands over memory has nothing to tell when the main process is gone; errors of reading go another way."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


@dataclass
class UnreadableImages:
    """Images that could not be read, with reasons; stops the stage when there are too many.

    Attributes:
        images: the list, or the stream of them.
        max_unreadable: the largest fraction of the list that may be bad; one bad image is always allowed.
    """

    images: ImageList | HFStream
    max_unreadable: float
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, bad: list[tuple[int, str]], quiet: bool = False) -> None:
        """Raises MapetError when there are too many. `quiet`: they have been named before."""
        for index, reason in bad:
            if index in self.reasons:
                continue
            self.reasons[index] = reason
            if not quiet:
                log.warning("bad image %r: %s", self.images.id(index), reason)
            num_bad, total = len(self.reasons), len(self.images)
            if num_bad > max(1, self.max_unreadable * total) or num_bad == total:
                examples = "; ".join(f"{self.images.id(i)!r}: {r}" for i, r in list(self.reasons.items())[:3])
                raise MapetError(
                    f"{num_bad} of {total} images unreadable so far, more than {option('max_unreadable')} {self.max_unreadable:g} "
                    f"allows ({examples}). `mapet check` lists them all; remove them or raise {option('max_unreadable')}"
                )


def readable_batches(
    dataset: ViewDataset, batches: Any, unreadable: UnreadableImages, title: str | None
) -> Iterator[Batch]:
    """Yield batches of readable images; the others are counted. `title` names the progress bar; None shows none."""
    loader = create_loader(dataset, batches)
    for batch in tqdm(loader, desc=title, unit="batch", disable=None if title else True, leave=False):
        unreadable.add(batch.unreadable)
        if len(batch):
            yield batch
