"""Options of `evaluate`, `finetune`, `embed` and `export`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mapet.config import shared
from mapet.config.base import Config
from mapet.errors import option


class EvaluateConfig(shared.DeviceOptions, shared.SeedOptions):
    """Options of `evaluate`."""

    backbone: list[shared.BackboneSource] = Field(min_length=1)
    """One or more, side by side: a run, a backbone folder, an export, a folder of `finetune`, a weights file, timm:NAME, or random:NAME for a timm
    model or a folder's architecture with random weights. The first is what the others' corruption errors are relative to."""
    images: shared.Source
    """Images to train on; CLASS/image.jpg for protocols that need labels."""
    test_images: shared.Source | None = None
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
    few_shot: tuple[shared.Labels, ...] = (0.01, 0.1, 5)
    """Few-shot splits: below 1 a fraction of each class, else so many images a class."""
    num_seeds: PositiveInt = 5
    """Seeds of few-shot splits and of clustering."""
    ood_images: dict[str, shared.Source] = Field(default_factory=dict)
    """Further labeled folders to test on, NAME=FOLDER (protocol ood); classes are matched by name."""
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
    precision: shared.Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""

    def problems(self) -> Iterator[str]:
        """Say what contradicts itself or each other."""
        if len(set(self.backbone)) < len(self.backbone):
            yield f"{option('backbone')}: the same one is given twice"
        if self.annotations is not None and (self.seg_masks or self.test_seg_masks or self.ignore_labels):
            yield f"{option('annotations')} and {option('seg_masks')} list images each in its own way: evaluate one after the other"
        if self.ood_images and (self.annotations or self.seg_masks):
            yield f"{option('ood_images')} are matched by class folders, which {option('annotations')} or {option('seg_masks')} take the place of"
        for what in ("annotations", "seg_masks"):
            train, test = getattr(self, what), getattr(self, f"test_{what}")
            if train is not None and self.test_images is not None and test is None:
                yield f"{option('test_images')} with {option(what)} need {option(f'test_{what}')}"
        if self.test_annotations is not None and self.annotations is None:
            yield f"{option('test_annotations')} are for {option('annotations')}: give both"


class FinetuneOptions(shared.TrainerOptions, shared.ViewOptions):
    """Options of `finetune` that say how to train; a section of `study`."""

    file_only: ClassVar[frozenset[str]] = shared.LOOP_OPTIONS
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


class FinetuneConfig(FinetuneOptions, shared.TrainerConfig):
    """Options of `finetune`."""

    backbone: shared.BackboneSource
    """A run, a model folder of timm or Hugging Face, a weights file, or timm:NAME."""
    images: shared.Source
    """Labeled images, CLASS/image.jpg, to train on."""
    test_images: shared.Source | None = None
    """Labeled images to test on; automatic: a fifth of `images`, chosen by image name."""
    out: Path | None = None
    """New folder for the fine-tuned model, its options (config.yaml), its accuracy and what is known of its backbone
    (run.json), its curve (metrics.jsonl, tensorboard/, curve.png) and, until it is finished, checkpoints; automatic: nothing
    is kept but the accuracy."""
    from_scratch: bool = False
    """Start the same architecture from random weights, for comparison."""
    labels_per_class: shared.Labels | None = None
    """Use only so many labeled images of each class, below 1 a fraction of them: the fixed split of `seed` that `evaluate` uses."""
    seed: NonNegativeInt = 0
    """Seed of the head, order, views and of which labels are used."""

    def problems(self) -> Iterator[str]:
        """Say what contradicts itself or each other."""
        if self.resume and self.out is None:
            yield f"{option('resume', True)} goes on in the folder of {option('out')}: give it"


class EmbedConfig(shared.UnreadableImageOptions, shared.DeviceOptions, shared.ResumeOptions):
    """Options of `embed`."""

    backbone: shared.BackboneSource
    """A run, a model folder of timm or Hugging Face, a weights file (MaPeT's released ones, MAE, DINO, timm, ...), or timm:NAME."""
    images: shared.Source
    """Folder of images, or text file of paths."""
    out: Path
    """New folder for the features."""
    pool: Literal["avg", "token", "none"] = "avg"
    """Features of an image: mean of its patch tokens; the class token; none: all patch tokens, row by row."""
    format: Literal["npy", "parquet"] = "npy"
    """npy: features.npy and ids.json; parquet: features.parquet, a folder of files with the columns id and features."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the numbers on disk."""
    image_size: shared.Size | None = None
    """Height and width of the input, pixels; positions are interpolated; automatic: the backbone's own."""
    precision: shared.Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""


class ExportConfig(Config):
    """Options of `export`."""

    backbone: shared.BackboneSource
    """A run, finished or not (then its newest checkpoint is taken), a fine-tuned model, a model folder of timm or Hugging Face, a
    weights file (MaPeT's released ones, MAE, DINO, timm, ...), or timm:NAME."""
    out: Path
    """New folder: a timm model folder with its model card; other formats lie in folders of it."""
    format: tuple[Literal["timm", "transformers", "onnx", "torch-export"], ...] = ()
    """Formats beside timm's, several if wanted: transformers, onnx, torch-export."""
    image_size: shared.Size | None = None
    """Height and width of the input, pixels; positions are interpolated; automatic: the backbone's own."""
    patch_size: PositiveInt | None = None
    """Side of a patch, pixels; the patch embedding is resampled; automatic: the backbone's own."""
    channels: PositiveInt | None = None
    """Channels of the input; the patch embedding is adapted; automatic: the backbone's own."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """What a weights file doesn't tell of its ViT, e.g. num_heads=6; other commands then take the exported folder."""
    images: shared.Source | None = None
    """Images to check the formats on; automatic: the run's own."""
    license: str = "other"
    """License of the weights, for the model card, e.g. apache-2.0."""
