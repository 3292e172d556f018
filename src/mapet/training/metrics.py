"""Running figures of a training run, kept on the device so that steps don't wait for them."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from mapet.model.pretrainer import Prediction

T = TypeVar("T")


class Meter:
    """Sums since the last `read`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.token_counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)  # since the start: the baseline
        self._sums = torch.zeros(4, device=device)  # float32: Apple GPUs know no float64
        self._reset()

    def _reset(self) -> None:
        self._sums.zero_()
        self._images = self._steps = 0
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

    def add(self, prediction: Prediction, gradient_norm: torch.Tensor) -> None:
        correct = torch.zeros_like(prediction.loss)
        if prediction.correct is not None:
            correct = prediction.correct / prediction.targets.numel()
            self.token_counts += torch.bincount(prediction.targets.flatten(), minlength=len(self.token_counts))
        self._sums += torch.stack([prediction.loss, correct, gradient_norm.detach(), torch.ones_like(correct)]).float()
        self._images += len(prediction.targets)
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Figures since the last call.

        loss: mean of the objective's; nats where words are predicted. Only there: token_accuracy, the share of patches
        whose word is the likeliest one; compare with commonest_token, the share that always guessing the commonest word
        would get, and the loss with token_entropy, that of guessing by frequency alone (both over all targets so far).
        data_wait: share of time waiting for images.
        """
        loss, correct, norm, steps = self._sums.tolist()
        steps = steps or float("nan")
        counts = self.token_counts.cpu().double()
        elapsed = max(1e-9, time.monotonic() - self._started)
        metrics = {"loss": loss / steps}
        if counts.any():
            share = counts / counts.sum()
            metrics |= {
                "token_accuracy": correct / steps,
                "commonest_token": float(share.max()),
                "token_entropy": float(-(share * share.clamp_min(1e-12).log()).sum()),
            }
        metrics |= {
            "gradient_norm": norm / steps,
            "images_per_second": self._images / elapsed,
            "data_wait": self._waited / elapsed,
        }
        self._reset()
        return metrics

    @staticmethod
    def line(metrics: dict[str, float]) -> str:
        """The figures a person watches."""
        words = ""
        if "token_entropy" in metrics:
            words = (
                f" (by frequency {metrics['token_entropy']:.3f}), accuracy {metrics['token_accuracy']:.1%} "
                f"(commonest {metrics['commonest_token']:.1%})"
            )
        speed = f"{metrics['images_per_second']:.0f} img/s, data wait {metrics['data_wait']:.0%}"
        return f"loss {metrics['loss']:.3f}{words}, {speed}"
