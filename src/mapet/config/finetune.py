"""Options of `finetune`."""

from pathlib import Path

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mapet.config.shared import (
    BackboneSource,
    ModelArgs,
    TrainerConfig,
    TrainerOptions,
    Views,
)
from mapet.config.types import Source
from mapet.errors import option


class FinetuneOptions(TrainerOptions, ModelArgs, Views):
    """Options of `finetune` that say how to train; a section of `study`."""

    epochs: PositiveInt = 100
    """Passes over the training images."""
    batch_size: PositiveInt | None = None
    """Images a step; automatic: a tenth of the images, from 8 to 512 (128 on a CPU)."""
    lr: PositiveFloat | None = None
    """Peak learning rate; automatic: 5e-4 * sqrt(batch / 512), at least 3e-4."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end, at most the peak."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Learning-rate factor from each block to the one before (the paper: 0.65 for ViT-S and ViT-B)."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the last block."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target spread over all classes."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    rand_augment: str | None = None
    """RandAugment in timm's words, e.g. rand-m9-mstd0.5-inc1 (the released recipe's); pictures of 1 or 3 channels."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of Mixup: pairs of images and labels are blended."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of CutMix: a box of one image is laid into another; with both, each batch has one or the other."""
    random_erasing: float = Field(default=0.0, ge=0, le=1)
    """Share of images in which a random box becomes noise."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the weights, e.g. 0.9999, which is judged and saved in their place."""
    num_seeds: PositiveInt = 1
    """Do it so often, with `seed` and those after it, in OUT/seed-*, for the mean accuracy and its interval (run.json)."""


class FinetuneConfig(FinetuneOptions, TrainerConfig):  # type: ignore[misc]  # of the plugin: two `model_construct`
    """Options of `finetune`."""

    backbone: BackboneSource
    """A run, a model folder of timm or Hugging Face, a weights file, or timm:NAME."""
    images: Source
    """Labelled images, CLASS/image.jpg, to train on."""
    test_images: Source | None = None
    """Labelled images to test on; automatic: a fifth of `images`, chosen by image name."""
    out: Path | None = None
    """New folder for the fine-tuned model, its options (config.yaml), its accuracy and what is known of its backbone
    (run.json), its curve (metrics.jsonl, tensorboard/, curve.png) and, until it is finished, checkpoints; automatic: nothing
    is kept but the accuracy."""
    from_scratch: bool = False
    """Start the same architecture from random weights, for comparison."""
    labels_per_class: PositiveInt | None = None
    """Use only so many labelled images of each class: the fixed split of `seed` that `evaluate` uses."""
    label_fraction: float = Field(default=1.0, gt=0, le=1)
    """Use only this share of each class's labelled images, likewise."""
    seed: NonNegativeInt = 0
    """Seed of the head, order, views and of which labels are used."""

    @model_validator(mode="after")
    def _one_limit(self) -> "FinetuneConfig":
        if self.labels_per_class is not None and self.label_fraction < 1:
            raise ValueError(f"give {option('labels_per_class')} or {option('label_fraction')}, not both")
        return self

    @model_validator(mode="after")
    def _resumes_a_folder(self) -> "FinetuneConfig":
        if self.resume and self.out is None:
            raise ValueError(f"{option('resume', True)} goes on in the folder of {option('out')}: give it")
        return self
