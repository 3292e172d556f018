"""Options of `evaluate`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from mapet.config.shared import BackboneSource, Device, Loading, ModelArgs, Precision
from mapet.config.types import Source
from mapet.errors import option


class EvaluateConfig(ModelArgs, Loading, Device):
    """Options of `evaluate`."""

    backbone: list[BackboneSource] = Field(min_length=1)
    """One or more, side by side: a run, a backbone folder, an export, a folder of `finetune`, a weights file, timm:NAME, or random:NAME for a timm
    model or a folder's architecture with random weights. The first is what the others' corruption errors are relative to."""
    images: Source
    """Images to train on; CLASS/image.jpg for protocols that need labels."""
    test_images: Source | None = None
    """Images to test on; automatic: a fifth of `images`, chosen by image name."""
    out: Path | None = None
    """New folder for evaluation.md, per_class.csv, figures and the results in run.json; automatic: only the table is printed."""
    protocols: list[str] | None = None
    """Which to run, e.g. logistic knn few-shot (an unknown name lists all); automatic: those that have the data they need and don't take
    long."""
    pool: Literal["avg", "token", "both"] = "avg"
    """Feature of an image: mean of its patch tokens, the class token, or both concatenated."""
    linear_epochs: PositiveInt = 100
    """Epochs of the linear-sgd probe over the features."""
    knn_k: PositiveInt = 20
    """Neighbors of k-NN."""
    few_shot: tuple[PositiveFloat, ...] = (0.01, 0.1, 5)
    """Few-shot splits: below 1 a fraction of each class, else so many images a class."""
    num_seeds: PositiveInt = 5
    """Seeds of few-shot splits and of clustering."""
    ood_images: dict[str, Source] = Field(default_factory=dict)
    """Further labelled folders to test on, NAME=FOLDER (protocol ood); classes are matched by name."""
    eval_image_sizes: list[PositiveInt] | None = None
    """Input sizes, pixels: resolution tests each (automatic: from half to twice the trained one), segmentation and detection take the
    largest (automatic: the trained one)."""
    seg_masks: Path | None = None
    """Masks of `images` (protocol segmentation): a folder of PNGs of class ids, paired by name, or a COCO panoptic JSON; automatic:
    found where `images` holds images/ and masks/, or is ADE20K's folder."""
    test_seg_masks: Path | None = None
    """Masks of `test_images` (of `images`, without those); automatic: a fifth of the training images is tested on."""
    ignore_labels: tuple[NonNegativeInt, ...] = ()
    """Class ids in masks that don't count, beside 255 (and 0 in ADE20K's folder)."""
    annotations: Path | None = None
    """COCO annotations of `images`, instances JSON (protocols multi-label and detection)."""
    test_annotations: Path | None = None
    """Of `test_images` (of `images`, without those); automatic: a fifth of the training images is tested on."""
    dense_epochs: PositiveInt = 10
    """Epochs of the heads of segmentation and detection."""
    seed: NonNegativeInt = 0
    """Seed of probes and of random weights."""
    precision: Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""

    @field_validator("backbone")
    @classmethod
    def _differ(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("the same one is given twice")
        return value

    @field_validator("few_shot")
    @classmethod
    def _fractions_or_counts(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        odd = [amount for amount in value if amount >= 1 and amount != int(amount)]
        if odd:
            raise ValueError(f"{odd[0]} is neither a fraction below 1 nor a number of images")
        return value

    @model_validator(mode="after")
    def _belong_together(self) -> "EvaluateConfig":
        if self.annotations is not None and (self.seg_masks or self.test_seg_masks or self.ignore_labels):
            raise ValueError(
                f"{option('annotations')} and {option('seg_masks')} list images each in its own way: evaluate one after the other"
            )
        if self.ood_images and (self.annotations or self.seg_masks):
            raise ValueError(
                f"{option('ood_images')} are matched by class folders, which {option('annotations')} or {option('seg_masks')} take the place of"
            )
        for what in ("annotations", "seg_masks"):
            train, test = getattr(self, what), getattr(self, f"test_{what}")
            if train is not None and self.test_images is not None and test is None:
                raise ValueError(f"{option('test_images')} with {option(what)} need {option(f'test_{what}')}")
        if self.test_annotations is not None and self.annotations is None:
            raise ValueError(f"{option('test_annotations')} are for {option('annotations')}: give both")
        return self
