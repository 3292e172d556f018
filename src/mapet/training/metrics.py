"""Running figures of a training run, kept on the device so that steps don't wait for them."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mapet import distributed
from mapet.errors import MapetError
from mapet.models.pretraining import PreTrainingOutput

T = TypeVar("T")


class Window(NamedTuple):
    """The steps since the last `Meter.read`.

    Attributes:
        metrics: their figures.
        losses: of each step; NaN or infinite where its update was left out.
        images: of each step, index and loss of the images of this process.
    """

    metrics: dict[str, float]
    losses: list[float]
    images: list[tuple[Int[Tensor, " B"], Float[Tensor, " B"]]]


class Meter:
    """Figures since the last `read`, of all processes together."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.token_counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)  # since the start: the baseline
        self.skipped = 0  # since the start
        self._steps: list[Float[Tensor, 4]] = []
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._steps.clear()
        self._images: list[tuple[Tensor, Tensor]] = []
        self._waited = 0.0
        self._started = time.monotonic()

    def time_waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass the batches on, counting the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(iterator, None)
            self._waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Time spent within is no time of training."""
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before

    def add(self, prediction: PreTrainingOutput | None, gradient_norm: Tensor, index: Tensor, share: float) -> None:
        """A step: this process's part of it (None: it had no image), which is `share` of the whole, and the whole's norm."""
        loss = accuracy = torch.zeros((), device=self._device)
        images = 0
        if prediction is not None:
            loss, images = prediction.loss, len(prediction.loss_per_image)
            if prediction.num_correct is not None:
                accuracy = share * prediction.num_correct / prediction.targets.numel()
                self.token_counts += torch.bincount(prediction.targets.flatten(), minlength=len(self.token_counts))
            self._images.append((index, prediction.loss_per_image))
        else:
            self._images.append((index, torch.zeros(0)))
        norm = gradient_norm.detach() if distributed.rank() == 0 else torch.zeros_like(loss)  # all have the same one
        self._steps.append(torch.stack([loss, accuracy, norm, torch.full_like(loss, images)]).float())

    def read(self) -> Window:
        """Figures since the last call; means are over steps whose numbers were finite.

        loss: mean of the objective's; nats where words are predicted. Only there: token_accuracy, the share of patches
        whose word is the likeliest one; compare with commonest_token, the share that always guessing the commonest word
        would get, and the loss with token_entropy, that of guessing by frequency alone (both over all targets so far).
        skipped_steps: since the start, whose loss or gradient was not finite. data_wait: share of time waiting for images.
        """
        steps = self._all_steps()
        elapsed = max(1e-9, time.monotonic() - self._started)
        finite = steps.isfinite().all(dim=1)
        loss, accuracy, norm, _ = steps[finite].mean(dim=0).tolist()
        self.skipped += int((~finite).sum())
        counts = distributed.all_reduce(self.token_counts).cpu().double()
        metrics = {"loss": loss}
        if counts.any():
            share = counts / counts.sum()
            metrics |= {
                "token_accuracy": accuracy,
                "commonest_token": float(share.max()),
                "token_entropy": float(-(share * share.clamp_min(1e-12).log()).sum()),
            }
        metrics |= {
            "gradient_norm": norm,
            "skipped_steps": self.skipped,
            "images_per_second": float(steps[:, 3].sum()) / elapsed,
            "data_wait": self._waited / elapsed,
        }
        losses = torch.where(finite, steps[:, 0], torch.nan).tolist()
        window = Window(metrics, losses, self._images)
        self._reset()
        return window

    def _all_steps(self) -> Float[Tensor, "steps 4"]:
        mine = torch.stack(self._steps) if self._steps else torch.zeros(0, 4, device=self._device)
        return distributed.all_reduce(mine).cpu().double()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to write the same figures; a collective call."""
        steps, counts = self._all_steps(), distributed.all_reduce(self.token_counts).cpu()
        return {"steps": steps, "token_counts": counts, "skipped": torch.tensor(self.skipped)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.skipped = int(state["skipped"])
        steps, counts = state["steps"].float(), state["token_counts"]
        if distributed.rank() > 0:  # the sum over all processes is what was saved
            steps, counts = torch.zeros_like(steps), torch.zeros_like(counts)
        self.token_counts.copy_(counts)
        self._steps = list(steps.to(self._device))
        self._images = [(torch.zeros(0, dtype=torch.int64), torch.zeros(0))] * len(steps)

    @staticmethod
    def learning(metrics: dict[str, float]) -> str:
        """Loss and accuracy, each beside what guessing would get."""
        words = ""
        if "token_entropy" in metrics:
            words = (
                f" (by frequency {metrics['token_entropy']:.3f}), accuracy {metrics['token_accuracy']:.1%} "
                f"(commonest {metrics['commonest_token']:.1%})"
            )
        return f"loss {metrics['loss']:.3f}{words}"

    @staticmethod
    def speed(metrics: dict[str, float]) -> str:
        """Images a second, and whether the loader keeps up."""
        return f"{metrics['images_per_second']:.0f} img/s, data wait {metrics['data_wait']:.0%}"

    @staticmethod
    def line(metrics: dict[str, float]) -> str:
        """The figures a person watches."""
        return f"{Meter.learning(metrics)}, {Meter.speed(metrics)}"


def must_be_finite(loss: float, step: int, lr: float) -> None:
    """Stop rather than train on, or save, numbers that went wrong."""
    if not math.isfinite(loss):
        raise MapetError(
            f"the loss is {loss} at step {step}: start again with a lower --lr (now {lr:.2g}) or --precision float32"
        )
