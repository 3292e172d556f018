"""Probes while pre-training: is it learning at all?"""

import logging
from dataclasses import dataclass

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from mapet.config.pretrain import PretrainConfig
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.device import Compute
from mapet.evaluation.classifiers import knn_accuracy, linear_accuracy
from mapet.evaluation.features import LabelledSet, extract_features, labelled, split

log = logging.getLogger("mapet")
MOST_TRAIN, MOST_TEST = 2000, 1000


@dataclass
class OnlineProbe:
    """k-NN and linear probe on a small fixed sample of labelled images."""

    train: LabelledSet
    test: LabelledSet
    every: int
    compute: Compute
    workers: int

    @classmethod
    def for_run(cls, config: PretrainConfig, images: ImageList, compute: Compute) -> "OnlineProbe | None":
        """None when turned off or when there are no labels."""
        if config.probe_every == 0:
            return None
        if config.probe_images is None and images.classes() is None:
            return None
        train, test = split(labelled(images if config.probe_images is None else scan(config.probe_images)))
        every = config.probe_every or max(1, config.epochs // 5)
        return cls(fixed_sample(train, MOST_TRAIN), fixed_sample(test, MOST_TEST), every, compute, config.num_workers)

    def due(self, epoch: int, epochs: int) -> bool:
        return epoch % self.every == 0 or epoch == epochs

    @staticmethod
    def line(scores: dict[str, float]) -> str:
        """The figures a person watches."""
        return f"linear probe {scores['probe/linear']:.3f}, k-NN {scores['probe/knn']:.3f}"

    def __call__(self, vit: VisionTransformer) -> dict[str, float]:
        fit, check = (
            extract_features(vit, data, self.compute, workers=self.workers, show=False)
            for data in (self.train, self.test)
        )
        return {
            "probe/linear": linear_accuracy(*fit, *check, strength=0.1, max_iterations=100),
            "probe/knn": knn_accuracy(*fit, *check),
        }


def fixed_sample(data: LabelledSet, most: int) -> LabelledSet:
    """The same `most` images every time, chosen by a hash of their ids."""
    if len(data.labels) <= most:
        return data
    return data.subset(np.sort(np.argsort(data.images.keys())[:most]))
