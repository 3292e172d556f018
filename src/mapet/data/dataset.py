"""Images -> batches. Every random draw is a pure function of (seed, epoch, image id), whatever the number of workers."""

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mapet.data.augment import seeded
from mapet.data.decode import BadImage
from mapet.data.image_list import ImageList
from mapet.data.order import OrderKind, draw_order
from mapet.data.token_store import TokenStore
from mapet.data.views import ViewSpec, draw_jitter, draw_view, render
from mapet.errors import MapetError
from mapet.signals import ignore_signals_in_worker

log = logging.getLogger("mapet")


class Sample(NamedTuple):
    """One view of one image, or the reason why there is none."""

    image_index: int
    image: UInt8[Tensor, "C H W"] | None = None
    teacher_image: UInt8[Tensor, "C h w"] | None = None
    tokens: Int[np.ndarray, " N"] | None = None
    permutation: Int[np.ndarray, " N"] | None = None
    jitter: Float[np.ndarray, "3"] | None = None
    survival: Float[np.ndarray, " branches"] | None = None
    bad: str | None = None


class Batch(NamedTuple):
    """Samples that could be read, stacked; `bad` are the others: (image index, reason)."""

    image_index: Int[Tensor, " B"]
    image: UInt8[Tensor, "B C H W"] | None
    teacher_image: UInt8[Tensor, "B C h w"] | None
    tokens: Int[Tensor, "B N"] | None
    permutation: Int[Tensor, "B N"] | None
    jitter: Float[Tensor, "B 3"] | None
    survival: Float[Tensor, "B branches"] | None
    bad: list[tuple[int, str]]


def collate(samples: list[Sample]) -> Batch:
    good = [sample for sample in samples if sample.bad is None]

    def stack(name: str) -> Tensor | None:
        values = [getattr(sample, name) for sample in good]
        if not values or values[0] is None:
            return None
        if isinstance(values[0], np.ndarray):
            return torch.from_numpy(np.stack(values))
        # Pixels lie as rows of RGB, and stay so: one copy of bytes.
        return torch.stack([image.movedim(0, -1) for image in values]).movedim(-1, 1)

    index = torch.tensor([sample.image_index for sample in good], dtype=torch.int64)
    bad = [(sample.image_index, sample.bad) for sample in samples if sample.bad is not None]
    names = ("image", "teacher_image", "tokens", "permutation", "jitter", "survival")
    return Batch(index, **{name: stack(name) for name in names}, bad=bad)


@dataclass
class ViewDataset(Dataset[Sample]):
    """View `number` of image `index` for dataset[(number, index)].

    Attributes:
        image_size: (H, W) of `Sample.image`; None leaves it out.
        teacher_size: (h, w) of `Sample.teacher_image`, the same view at the teacher's size; None leaves it out.
        store: token ids; then the view drawn is one of the stored ones.
        grid: rows and columns of patches to draw a permutation of, in an order of kind `order`; None leaves it out.
        jitter: strength of colour jitter of `Sample.image` (never of the teacher's). A sample holds its three factors;
            they are applied with normalization, on the device: see `evaluation.features.normalize`.
        branches: residual branches of the student whose stochastic depth is to be drawn with the sample.
        augment: changes `Sample.image` further; draws from the global generators, which are seeded for it.
    """

    images: ImageList
    spec: ViewSpec
    channels: int = 3
    image_size: tuple[int, int] | None = None
    teacher_size: tuple[int, int] | None = None
    store: TokenStore | None = None
    grid: tuple[int, int] | None = None
    order: OrderKind = "random"
    jitter: float = 0.0
    branches: int = 0
    augment: Callable[[Tensor], Tensor] | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: tuple[int, int]) -> Sample:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[tuple[int, int]]) -> list[Sample]:
        """Samples of a whole batch, as `DataLoader` asks for them: first all draws, then all pixels.

        In turn with decoders, the same draws take three times as long: each finds its code gone from the caches.
        """
        draws = [self._draw(number, index) for number, index in positions]
        samples = [sample._replace(**self._pixels(sample.image_index, number)) for sample, number in draws]
        return samples if self.augment is None else list(map(self._augmented, samples, positions))

    def _augmented(self, sample: Sample, position: tuple[int, int]) -> Sample:
        if self.augment is None or sample.image is None:
            return sample
        with seeded(self.seed, self.images.key(position[1]), position[0]):
            return sample._replace(image=self.augment(sample.image))

    def _draw(self, number: int, index: int) -> tuple[Sample, int]:
        """A sample without pixels, and the number of its view."""
        rng = np.random.default_rng([self.seed, self.images.key(index), number])
        if self.store is not None:
            number = int(rng.integers(self.store.num_views))
        permutation = None if self.grid is None else draw_order(self.order, self.grid, rng)
        jitter = draw_jitter(self.jitter, rng) if self.jitter else None
        survival = rng.random(self.branches, dtype=np.float32) if self.branches else None
        tokens = None if self.store is None else self.store.read(index, number)
        return Sample(index, None, None, tokens, permutation, jitter, survival), number

    def _pixels(self, index: int, number: int) -> dict[str, Any]:
        try:
            picture = self.images.open(index, self.channels)
            view = draw_view(self.spec, picture.size, self.images.key(index), number)
            sizes = {"image": self.image_size, "teacher_image": self.teacher_size}
            return {name: render(picture, view, size) for name, size in sizes.items() if size}
        except BadImage as error:
            return {"bad": str(error)}


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), each epoch a fresh order that depends on (seed, epoch) alone; starts at any step.

    Every image comes once an epoch; where `batch_size` doesn't divide their number, an epoch's batches are a little
    smaller, all about equal, rather than one of them tiny.

    Args:
        rank: of several `processes`, which: they deal out each batch among them, image by image.
    """

    def __init__(
        self,
        indices: Int[np.ndarray, " n"],
        batch_size: int,
        epochs: int,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.indices, self.batch_size, self.epochs, self.seed = indices, batch_size, epochs, seed
        self.first_step, self.rank, self.processes = first_step, rank, processes
        self.steps_per_epoch = -(-len(indices) // batch_size)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.epochs * self.steps_per_epoch):
            yield self.batch(step)[self.rank :: self.processes]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The batch of a step, counted from 0, of all processes."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        first, last = (len(order) * n // self.steps_per_epoch for n in (number, number + 1))
        return [(epoch, int(index)) for index in order[first:last]]

    @functools.lru_cache(maxsize=1)  # noqa: B019, a sampler lives as long as its run
    def _order(self, epoch: int) -> Int[np.ndarray, " n"]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.indices)


def in_order(count: int, batch_size: int, start: int = 0, number: int = 0) -> list[list[tuple[int, int]]]:
    """Batches of (number, index) for indices start .. count-1 in order."""
    return [
        [(number, index) for index in range(first, min(first + batch_size, count))]
        for first in range(start, count, batch_size)
    ]


def make_loader(dataset: ViewDataset, batches: Any, workers: int, pin_memory: bool = False) -> Iterable[Batch]:
    """A torch DataLoader over explicit batches; batches come in order whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
    )


def _start_worker(_number: int) -> None:
    torch.set_num_threads(1)
    ignore_signals_in_worker()
    sys.excepthook = _unless_left


def _unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A thread that hands over memory has nothing to tell when the main process is gone; errors of reading go another way."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


class Named(Protocol):
    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...


@dataclass
class Quarantine:
    """Images that could not be read, with reasons; stops the stage when there are too many.

    Attributes:
        images: the list, or what names and counts its images.
        max_bad: the largest share of the list that may be bad; one bad image is always allowed.
        on_new: called with (index, reason) of each newly found one.
    """

    images: Named
    max_bad: float
    reasons: dict[int, str] = field(default_factory=dict)
    on_new: Callable[[int, str], None] | None = None

    def add(self, bad: list[tuple[int, str]], quiet: bool = False) -> None:
        """Raises MapetError when there are too many. `quiet`: they have been named before."""
        for index, reason in bad:
            if index in self.reasons:
                continue
            self.reasons[index] = reason
            if not quiet:
                log.warning("bad image %r: %s", self.images.id(index), reason)
            if self.on_new:
                self.on_new(index, reason)
            if len(self.reasons) > max(1, self.max_bad * len(self.images)) or len(self.reasons) == len(self.images):
                examples = "; ".join(f"{self.images.id(i)!r}: {r}" for i, r in list(self.reasons.items())[:3])
                raise MapetError(
                    f"{len(self.reasons)} of {len(self.images)} images cannot be read so far, more than --max-bad {self.max_bad:g} allows "
                    f"({examples}). `mapet check` lists them all; remove them or raise --max-bad"
                )
