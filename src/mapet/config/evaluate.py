"""Options of `evaluate`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mapet.config.base import Size, Source
from mapet.config.shared import BackboneSource, Device, Loading, ModelArgs, Precision


class EvaluateConfig(ModelArgs, Loading, Device):
    """Options of `evaluate`."""

    backbone: list[BackboneSource] = Field(min_length=1)
    """One or more, side by side: a run, a backbone folder, an export, a folder of `finetune`, a weights file, timm:NAME, or random:NAME for a timm
    model or a folder's architecture with random weights. The first is what the others' corruption errors are relative to."""
    images: Source
    """Images to train on; CLASS/image.jpg for protocols that need labels."""
    test_images: Source | None = None
    """Images to test on; automatic: a fifth of `images`, chosen by image name."""
    out: Path
    """New folder for evaluation.md, evaluation.json, per_class.csv and pictures."""
    protocols: list[str] | None = None
    """Which to run, of knn linear attentive few-label cluster rank neighbours ood corruptions resolution multi-label segmentation
    detection; automatic: those that have the data they need, but for corruptions, resolution and detection, which take long."""
    pool: Literal["avg", "token", "both"] = "avg"
    """Feature of an image: mean of its patch tokens, the class token, or the two beside each other."""
    layers: list[PositiveInt] | None = None
    """Layers that the linear probe chooses from, counted from 1; automatic: four, spread over the depth. The others take the deepest."""
    epochs: PositiveInt = 100
    """Passes of the linear probe over the features."""
    attentive_epochs: PositiveInt = 30
    """Passes of the attentive probe."""
    k: PositiveInt = 20
    """Neighbours of k-NN."""
    few_labels: tuple[PositiveFloat, ...] = (0.01, 0.1, 5)
    """Few-label splits: below 1 a share of each class, else so many images a class."""
    other_images: dict[str, Source] = Field(default_factory=dict)
    """Further labelled folders to test on, NAME=FOLDER (protocol ood); classes are matched by name."""
    corruption_images: PositiveInt = 1000
    """Test images, at most, that are corrupted in each of 75 ways (protocol corruptions)."""
    corruption_kinds: list[str] | None = None
    """Some of the 15 kinds, e.g. "gaussian noise" fog jpeg; automatic: all."""
    corruption_severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Some of the severities 1 to 5."""
    sizes: list[PositiveInt] | None = None
    """Input sizes, pixels (protocol resolution); automatic: from half to twice the trained one."""
    masks: Path | None = None
    """Masks of `images` (protocol segmentation): a folder of PNGs of class ids, paired by name, or a COCO panoptic JSON; automatic:
    found where `images` holds images/ and masks/, or is ADE20K's folder."""
    test_masks: Path | None = None
    """Masks of `test_images` (of `images`, without those); automatic: a fifth of the training images is tested on."""
    annotations: Path | None = None
    """COCO annotations of `images`, instances JSON (protocols multi-label and detection)."""
    test_annotations: Path | None = None
    """Of `test_images` (of `images`, without those); automatic: a fifth of the training images is tested on."""
    detection_epochs: PositiveInt = 10
    """Passes over the training images for detection."""
    detection_train_backbone: bool = False
    """Train the backbone with the detector, rather than keep it frozen."""
    void_labels: tuple[NonNegativeInt, ...] = ()
    """Class ids in masks that don't count, beside 255 (and 0 in ADE20K's folder)."""
    dense_size: Size | None = None
    """Input height and width for segmentation and detection, pixels; automatic: the trained one."""
    dense_epochs: PositiveInt = 10
    """Passes over the training images for segmentation."""
    seeds: PositiveInt = 5
    """Seeds of few-label splits and of clustering."""
    seed: NonNegativeInt = 0
    """Seed of probes and of random weights."""
    precision: Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""
    memory: PositiveFloat | None = None
    """GB that cached features of a set may take; more go to a scratch file, or patch tokens are computed anew; automatic: a quarter
    of what is free."""
    scratch: Path | None = None
    """Folder of the scratch file; automatic: `out`."""

    @model_validator(mode="after")
    def _shares_and_numbers(self) -> "EvaluateConfig":
        odd = [amount for amount in self.few_labels if amount >= 1 and amount != int(amount)]
        if odd:
            raise ValueError(f"--few-labels {odd[0]}: neither a share below 1 nor a number of images")
        if not self.corruption_severities or not set(self.corruption_severities) <= {1, 2, 3, 4, 5}:
            raise ValueError("--corruption-severities: give some of 1 2 3 4 5")
        for what in ("annotations", "masks"):
            here, there = getattr(self, what), getattr(self, f"test_{what}")
            if here is not None and self.test_images is not None and there is None:
                raise ValueError(f"--test-images with --{what} need --test-{what}")
        if self.test_annotations is not None and self.annotations is None:
            raise ValueError("--test-annotations are for --annotations: give both")
        if len(set(self.backbone)) < len(self.backbone):
            raise ValueError("--backbone: the same one is given twice")
        return self
