"""Probes while pre-training: is it learning at all?"""

from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer

from mapet.config.pretraining import PretrainConfig
from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.device import Compute
from mapet.evaluation.backbone_wrapper import BackboneWrapper
from mapet.evaluation.feature_cache import CacheConfig, FeatureCache
from mapet.evaluation.features import LabelledSet, labelled, split
from mapet.evaluation.probes import probe_accuracy

MAX_TRAIN, MAX_TEST, ONLINE_C = 2000, 1000, 0.1
"""Images that are probed; C of the linear probe, fixed, for it is fitted again and again."""


@dataclass
class OnlineProbe:
    """Linear probe and k-NN on a small fixed sample of labelled images."""

    train: LabelledSet
    test: LabelledSet
    every: int
    compute: Compute

    @classmethod
    def for_run(cls, config: PretrainConfig, images: ImageList, compute: Compute) -> "OnlineProbe | None":
        """Make the probe that the config asks for: None when turned off or when there are no labels."""
        if config.probe_every == 0 or (config.probe_images is None and images.classes() is None):
            return None
        train, test = split(labelled(images if config.probe_images is None else scan(config.probe_images)))
        every = config.probe_every or max(1, config.epochs // 5)
        return cls(train.sample(MAX_TRAIN), test.sample(MAX_TEST), every, compute)

    def due(self, epoch: int, epochs: int) -> bool:
        """Tell whether to probe after this epoch."""
        return epoch % self.every == 0 or epoch == epochs

    @staticmethod
    def line(scores: dict[str, float]) -> str:
        """Format the scores for the log."""
        return f"linear probe {scores['probe/logistic']:.3f}, k-NN {scores['probe/knn']:.3f}"

    def __call__(self, vit: VisionTransformer) -> dict[str, float]:
        """Measure the accuracy of a ViT's frozen features."""
        backbone, config = BackboneWrapper.of_vit(vit, self.compute), CacheConfig(progress=False)
        train, test = (FeatureCache.extract(backbone, data, config) for data in (self.train, self.test))
        return {f"probe/{name}": value for name, value in probe_accuracy(train, test, C=ONLINE_C).items()}
