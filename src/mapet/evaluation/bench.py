"""What protocols work with and what they give: a backbone beside the data it is judged on, and figures."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.annotated.coco import CocoSet
from mapet.evaluation.annotated.masks import MaskedSet
from mapet.evaluation.bank import Bank, Place
from mapet.evaluation.classifiers import nearest_neighbours
from mapet.evaluation.encoder import Encoder
from mapet.evaluation.features import LabelledSet
from mapet.evaluation.intervals import Figure, share
from mapet.evaluation.linear import LinearProbe, linear_probes

SHOWN = 8
"""Neighbours in the panel, at most."""


@dataclass
class Outcome:
    """What a protocol found.

    Attributes:
        figures: rows of the table of all backbones.
        per_class: of some figures, (correct, images) of each class; of segmentation, pixels of (intersection, union).
        details: further results, as JSON.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    per_class: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def classify(
        self, name: str, predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], classes: list[str], choice: str
    ) -> None:
        """Add top-1 accuracy with its interval, and the table of classes."""
        right = predicted == labels
        self.figures[name] = share(int(right.sum()), len(labels), choice)
        counts, hits = (torch.bincount(part, minlength=len(classes)).tolist() for part in (labels, labels[right]))
        self.per_class[name] = dict(zip(classes, zip(hits, counts, strict=True), strict=True))


@dataclass
class Sets:
    """The images. Without class folders `classes` is empty and all labels are 0.

    Attributes:
        others: further labelled test sets, by name.
        masks: training and test images with a class for every pixel.
        boxes: training and test images with COCO annotations.
    """

    train: LabelledSet
    test: LabelledSet
    others: dict[str, LabelledSet] = field(default_factory=dict)
    masks: tuple[MaskedSet, MaskedSet] | None = None
    boxes: tuple[CocoSet, CocoSet] | None = None


@dataclass
class Bench:
    """One backbone and the data it is judged on; features are computed when first wanted, and shared by the protocols.

    Attributes:
        options: an `EvaluateConfig`.
    """

    encoder: Encoder
    sets: Sets
    place: Place
    options: Any

    @property
    def compute(self) -> Compute:
        return self.encoder.compute

    @property
    def classes(self) -> list[str]:
        return self.sets.train.classes

    @property
    def num_classes(self) -> int:
        return len(self.sets.train.classes)

    @cached_property
    def layers(self) -> list[int]:
        asked = self.options.layers
        if asked is None:
            return self.encoder.spread_layers()
        deepest = self.encoder.num_layers
        if max(asked) > deepest:
            raise MapetError(f"{self.encoder.name} has layers 1 to {deepest}, not {max(asked)}: see --layers")
        return sorted(set(asked))

    @cached_property
    def train(self) -> Bank:
        return Bank.of(self.encoder, self.sets.train, self.layers, self.options.pool, self.place)

    @cached_property
    def test(self) -> Bank:
        return Bank.of(self.encoder, self.sets.test, self.layers, self.options.pool, self.place)

    @cached_property
    def probes(self) -> dict[str, LinearProbe]:
        return linear_probes(
            self.train, self.train.labels, self.num_classes, self.compute, self.options.epochs, seed=self.options.seed
        )

    @cached_property
    def test_neighbours(self) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """Similarities and rows of the training images nearest to each test image."""
        k = max(self.options.k, SHOWN)
        return nearest_neighbours(self.train.layer_blocks(), self.test.of_layer(), k)

    @cached_property
    def probe(self) -> LinearProbe:
        """The better of the linear probes on held-out training images."""
        return max(self.probes.values(), key=lambda probe: max(probe.held_out.values()))

    @property
    def classifier(self) -> str:
        """What `classify` reads: the model's own classifier where it has one with names, else a linear probe."""
        return "own classifier" if self.encoder.classes else f"linear, {self.probe.choice}"

    def classify(self, images: UInt8[Tensor, "B C H W"], encoder: Encoder | None = None) -> Float[Tensor, "B K"]:
        """Logits of the training images' classes.

        Args:
            encoder: the same model for another input size.

        Raises:
            MapetError: the model's own classifier lacks some of them.
        """
        encoder = encoder or self.encoder
        if encoder.classes:
            place = {name: number for number, name in enumerate(encoder.classes)}
            unknown = [name for name in self.sets.train.classes if name not in place]
            if unknown:
                raise MapetError(f"{encoder.name} was fine-tuned without the class '{unknown[0]}'")
            return encoder.logits(images)[:, [place[name] for name in self.sets.train.classes]].cpu()
        features = encoder.pooled(images, [self.probe.choice.layer], self.options.pool)[0]
        return self.probe(features).cpu()

    def close(self) -> None:
        for name in ("train", "test"):
            if name in self.__dict__:
                self.__dict__[name].close()
