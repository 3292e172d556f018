"""Load batches of images. Random draws are pure functions of (seed, epoch, image id), whatever the number of workers."""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from mapet.data import views
from mapet.data.hugging_face import HFStream
from mapet.data.image_list import ImageList
from mapet.data.loader import load
from mapet.data.readers.image import ImageDecodeError
from mapet.data.readers.read_each import read_each
from mapet.data.token_store import TokenStore
from mapet.data.views import PermutationKind, ViewSpec
from mapet.errors import MapetError, option

log = logging.getLogger("mapet")
Targets = Int[Tensor, "B N"] | Float[Tensor, "B N F"]
"""Per-patch prediction target, row-major: token id or regression vector."""
DropPathRand = Float[Tensor, "B num_branches"]
"""Uniform in [0, 1): one number for each residual branch, of which a block has two."""
INFERENCE_BATCH_SIZE, INFERENCE_SIDE = 64, 384
"""Images that a frozen network takes at a time, and the side of images, pixels, up to which it takes so many."""
Positions = list[tuple[int, int]]
"""(view index, image index) of the images of a batch; in training the view index is the epoch."""


@dataclass
class Batch:
    """Views of B images and what a training step needs to know about them, from the data set to the loss.

    Attributes:
        image_index: of each image in the list of images.
        images: pixels of the student's view; once a task has prepared the batch, the model's normalized input.
        teacher_images: pixels of the same view at the teacher's size.
        targets: the prediction target of each patch.
        permutation: patch indices in the order in which they are revealed and predicted.
        jitter: factors of brightness, contrast and saturation.
        drop_path_rand: random numbers by which stochastic depth drops branches; None: the model draws its own.
        num_context: number of context patches in this step; None: the model's own.
        target_indices: which of the N - num_context masked patches are predicted, ascending; None: all.
        unreadable: images that could not be read, as (index in the list, reason); they have no row in the tensors.
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
        """Return a micro-batch: the images `part` of every tensor that has a row per image; the other fields are the whole batch's."""
        # `target_indices` is a tensor, too, but of patches, the same for all images: it is not sliced.
        return replace(self._map_tensors(lambda tensor: tensor[part]), target_indices=self.target_indices)

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device; the copy to a GPU is asynchronous."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> "Batch":
        """Copy the tensors to pinned memory; torch's DataLoader calls it."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a copy whose tensors are replaced by `function(tensor)`; the other fields, and None, stay."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **mapped)


@dataclass
class ViewDataset:
    """Views of images; `load` reads their batches.

    Attributes:
        image_size: (H, W) of `Batch.images`; None: without.
        teacher_size: (h, w) of `Batch.teacher_images`, the same view at the teacher's size; None: without.
        store: token ids, the targets; one of its views is drawn instead of a new one.
        grid: rows and columns of patches to draw a permutation of, in an order of kind `order`; None: without.
        num_context: c of `views.sample_permutation`.
        jitter: strength of color jitter of `Batch.images` (never of the teacher's). A batch holds its three factors;
            they are applied with normalization, on the device: see `views.normalize`.
        num_branches: residual branches of the student, to draw `Batch.drop_path_rand`; 0: without.
        augment: changes the pixels of one image of `Batch.images` further; it draws from the global generators of Python
            and NumPy, which are seeded for it.
        seed: of all draws but those of `spec`.
    """

    images: ImageList
    spec: ViewSpec
    channels: int = 3
    image_size: tuple[int, int] | None = None
    teacher_size: tuple[int, int] | None = None
    store: TokenStore | None = None
    grid: tuple[int, int] | None = None
    order: PermutationKind = "random"
    num_context: int = 0
    jitter: float = 0.0
    num_branches: int = 0
    augment: Callable[[Tensor], Tensor] | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Positions) -> Batch:
        """Return the batch of the views at these positions, in their order; unreadable images are in `Batch.unreadable` instead.

        If no image is readable, the batch has no rows, and no fields but `image_index` and `unreadable`.

        All draws come before all pixels: alternating with decoders, the same draws take three times as long, as each finds
        its code gone from the processor's caches.
        """
        unreadable: list[tuple[int, str]] = []
        samples: list[dict[str, Any]] = []
        drawn = [self._draw(view_index, image_index) for view_index, image_index in positions]
        stored = [(image_index, view_index) for (_, image_index), (view_index, _) in zip(positions, drawn, strict=True)]
        rendered = read_each(self._render, stored, lambda position: self.images.id(position[0]))
        for (epoch, image_index), (_, sample), pixels in zip(positions, drawn, rendered, strict=True):
            if isinstance(pixels, ImageDecodeError):
                unreadable.append((image_index, str(pixels)))
            else:
                samples.append(sample | self._augment(pixels, image_index, epoch))
        return _collate(samples, unreadable)

    def placeholder(self, index: int) -> Batch:
        """Return a batch of one black image with every field that a batch has, for a rank that can read none of its images.

        All ranks must compute a forward and a backward pass together; the caller gives this one a weight of 0 in the loss.

        Args:
            index: of an image in the list, whose targets and random draws the batch has.
        """
        black = {name: torch.zeros(self.channels, *size, dtype=torch.uint8) for name, size in self._sizes.items()}
        return _collate([self._draw(0, index)[1] | black], [])

    @property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Return (height, width) of the fields of `Batch` that hold pixels."""
        sizes = {"images": self.image_size, "teacher_images": self.teacher_size}
        return {name: size for name, size in sizes.items() if size}

    def _draw(self, view_index: int, image_index: int) -> tuple[int, dict[str, Any]]:
        """Draw everything that is random about a view but its box and its augmentation.

        The generator is seeded by (seed, image id, view index). The order of the draws is fixed: runs must resume to the same weights.

        Args:
            view_index: of the view to draw; in training the epoch.
            image_index: of the image in the list.

        Returns:
            (index of the view for `sample_view`: if there is a store, a random one of its views; else `view_index`;
            a sample without pixels: fields of `Batch` without the dimension B)
        """
        rng = np.random.default_rng([self.seed, self.images.key(image_index), view_index])
        sample: dict[str, Any] = {"image_index": np.int64(image_index)}
        if self.store is not None:
            view_index = int(rng.integers(self.store.num_views))
            sample["targets"] = self.store.read(image_index, view_index)
        if self.grid is not None:
            sample["permutation"] = views.sample_permutation(self.order, self.grid, self.num_context, rng)
        if self.jitter:
            sample["jitter"] = views.sample_jitter(self.jitter, rng)
        if self.num_branches:
            sample["drop_path_rand"] = rng.random(self.num_branches, dtype=np.float32)
        return view_index, sample

    def _render(self, position: tuple[int, int]) -> dict[str, UInt8[Tensor, "C h w"]]:
        """Return the pixels of a view: the fields of `Batch` in `_sizes`.

        Args:
            position: index of the image in the list; view index for `sample_view`, as `_draw` returned it.

        Raises:
            ImageDecodeError: the image cannot be read.
        """
        image_index, view_index = position
        image = self.images.open(image_index, self.channels)
        view = views.sample_view(self.spec, image.size, self.images.key(image_index), view_index)
        return {name: views.render_view(image, view, size) for name, size in self._sizes.items()}

    def _augment(self, pixels: dict[str, Tensor], image_index: int, epoch: int) -> dict[str, Tensor]:
        """Return what `_render` did, with `images` augmented; image and epoch seed the draws."""
        if self.augment is not None and "images" in pixels:
            with views.fork_rng(self.seed, self.images.key(image_index), epoch):
                pixels["images"] = self.augment(pixels["images"])
        return pixels


def _collate(samples: list[dict[str, Any]], unreadable: list[tuple[int, str]]) -> Batch:
    """Stack samples to a batch.

    Args:
        samples: of each readable image, the fields of `Batch` by name, without the dimension B: arrays, or pixels as tensors (C, h, w). All
            samples have the same fields; there may be no sample.
        unreadable: (index in the list, reason) of each image that could not be read.
    """
    stacked: dict[str, Any] = {"image_index": torch.zeros(0, dtype=torch.int64)}  # replaced if there are samples
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples]
        if isinstance(values[0], Tensor):  # pixels lie in memory as rows of RGB, and stay so: one copy of bytes
            stacked[name] = torch.stack([pixels.movedim(0, -1) for pixels in values]).movedim(-1, 1)
        else:
            stacked[name] = torch.from_numpy(np.stack(values))
    return Batch(**stacked, unreadable=unreadable)


@dataclass(eq=False)
class EpochBatchSampler(Sampler[Positions]):
    """Batches of (epoch, image index); each epoch is a new permutation that depends on (seed, epoch) alone.

    Every image comes once per epoch; if `batch_size` does not divide the number of images, an epoch's batches are a little
    smaller, all about equal, rather than one of them tiny.

    Attributes:
        indices: the images to train on.
        batch_size: largest number of images of a step, of all ranks together.
        epochs: above 0, rounded to whole steps (at least one); with a fraction the last epoch ends early.
        first_step: step at which iteration starts, from 0; to resume a run.
        rank: index of this process among `world_size`, which split each batch between them, image by image.
    """

    indices: Int[np.ndarray, " n"]
    batch_size: int
    epochs: float
    seed: int
    first_step: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    @property
    def total_steps(self) -> int:
        return max(1, round(self.epochs * self.steps_per_epoch))

    def __len__(self) -> int:
        return self.total_steps - self.first_step

    def __iter__(self) -> Iterator[Positions]:
        step = self.first_step
        while step < self.total_steps:  # `epochs` may change meanwhile
            yield self.batch(step)[self.rank :: self.world_size]
            step += 1

    def batch(self, step: int) -> Positions:
        """Return the (epoch, image index) of the images of a step, counted from 0 over all epochs, of all ranks together."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = self._permutation(epoch)
        start, end = (len(order) * n // self.steps_per_epoch for n in (step_in_epoch, step_in_epoch + 1))
        return [(epoch, int(index)) for index in order[start:end]]

    @functools.lru_cache(maxsize=1)  # noqa: B019, a sampler lives as long as its run
    def _permutation(self, epoch: int) -> Int[np.ndarray, " n"]:
        """Return `indices` in the random order of an epoch; the last one is kept, as all steps of an epoch need it."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.indices)


def inference_batch_size(image_size: tuple[int, int]) -> int:
    """Return how many images a frozen network takes at a time, fewer if they have more than `INFERENCE_SIDE` squared pixels."""
    return max(1, min(INFERENCE_BATCH_SIZE, INFERENCE_BATCH_SIZE * INFERENCE_SIDE**2 // math.prod(image_size)))


def position_batches(indices: Iterable[int], batch_size: int, view_index: int = 0) -> list[Positions]:
    """Return batches of positions (view_index, image index), in the order of the image indices."""
    positions = [(view_index, int(index)) for index in indices]
    return [positions[first : first + batch_size] for first in range(0, len(positions), batch_size)]


@dataclass
class UnreadableImages:
    """Images that could not be read, with reasons; stops the command when there are too many.

    Attributes:
        images: the list, or the stream of them.
        max_unreadable: largest fraction of the list that may be unreadable; one image is always allowed, unless the list has no other.
        reasons: image index -> reason.
        is_option: whether `max_unreadable` is an option of the command, which the error then advises to raise.
    """

    images: ImageList | HFStream
    max_unreadable: float
    reasons: dict[int, str] = field(default_factory=dict)
    is_option: bool = True

    def add(self, unreadable: list[tuple[int, str]], quiet: bool = False) -> None:
        """Count images that could not be read, and warn about those that were not known yet.

        Args:
            unreadable: (image index, reason) of each; an image that is counted already does not count again.
            quiet: without warnings, for images that were reported before.

        Raises:
            MapetError: more images than `max_unreadable` allows, or all of them, are unreadable now.
        """
        for index, reason in unreadable:
            if index in self.reasons:
                continue
            self.reasons[index] = reason
            if not quiet:
                log.warning("unreadable image %r: %s", self.images.id(index), reason)
            num_unreadable, total = len(self.reasons), len(self.images)
            if num_unreadable > max(1, self.max_unreadable * total) or num_unreadable == total:
                examples = "; ".join(f"{self.images.id(i)!r}: {r}" for i, r in list(self.reasons.items())[:3])
                alternative = f", or raise {option('max_unreadable')}" if self.is_option else ""
                raise MapetError(
                    f"{num_unreadable} of {total} images are unreadable so far, expected at most the fraction {self.max_unreadable:g} and not "
                    f"all of them ({examples}). `mapet check` lists them all: remove them{alternative}"
                )


def readable_batches(
    dataset: ViewDataset, batches: Iterable[Positions], unreadable: UnreadableImages, title: str | None
) -> Iterator[Batch]:
    """Yield the batches without their unreadable images, which are counted; a batch without any readable image is skipped.

    Args:
        dataset: renders the views.
        batches: positions of each batch.
        unreadable: counts the images that could not be read, over all batches.
        title: of the progress bar; None shows none.

    Raises:
        MapetError: too many images are unreadable (`UnreadableImages.add`).
    """
    for batch in tqdm(
        load(dataset.batch, batches), desc=title, unit="batch", disable=None if title else True, leave=False
    ):
        unreadable.add(batch.unreadable)
        if len(batch):
            yield batch
