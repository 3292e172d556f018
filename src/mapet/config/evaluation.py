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
    """One or more backbones: a run, a backbone folder, an export, a folder of `finetune`, a weights file, timm:NAME, or random:NAME for a timm
    model or a folder's architecture with random weights. Corruption errors (mCE) are relative to the first one's."""
    images: shared.Source
    """Training images; CLASS/image.jpg for protocols that need labels."""
    test_images: shared.Source | None = None
    """Test images; automatic: a 20 % hold-out split of `images`, chosen by image name."""
    out: Path | None = None
    """New folder for evaluation.md, per_class.csv, figures and the results in run.json; automatic: the table is only printed."""
    protocols: list[str] | None = None
    """Protocols to run, e.g. logistic knn few-shot (an unknown name lists all); automatic: all inexpensive ones whose data is there."""
    pool: Literal["avg", "token", "both"] = "avg"
    """Feature of an image: avg, the mean of its patch tokens; token, the class token; both, the two concatenated."""
    linear_epochs: PositiveInt = 100
    """Training epochs of the linear-sgd probe."""
    few_shot: tuple[shared.Labels, ...] = (0.01, 0.1, 5)
    """Few-shot splits: below 1 the fraction of each class's images, else the number of images per class."""
    num_seeds: PositiveInt = 5
    """Number of seeds of few-shot splits and of clustering."""
    ood_images: dict[str, shared.Source] = Field(default_factory=dict)
    """Further labeled test folders, NAME=FOLDER (protocol ood); classes are matched by name."""
    eval_image_sizes: list[PositiveInt] | None = None
    """Input sizes, pixels: resolution tests each (automatic: from half to twice the trained size), segmentation and detection use the
    largest (automatic: the trained size)."""
    seg_masks: Path | None = None
    """Masks of `images` (protocol segmentation): a folder of PNGs of class ids, paired by name, or a COCO panoptic JSON; automatic:
    found if `images` holds images/ and masks/, or is ADE20K's folder."""
    test_seg_masks: Path | None = None
    """Masks of `test_images`, or of further images in `images` without that option; automatic: a 20 % hold-out split of the training images."""
    ignore_labels: tuple[NonNegativeInt, ...] = ()
    """Class ids in masks that are ignored, beside 255 (and 0 in ADE20K's folder)."""
    annotations: Path | None = None
    """COCO annotations of `images`, instances JSON (protocols multi-label and detection)."""
    test_annotations: Path | None = None
    """COCO annotations of `test_images`, or of images in `images` without that option; automatic: a 20 % hold-out split of the training images."""
    dense_epochs: PositiveInt = 10
    """Training epochs of the segmentation heads and of the detector."""
    precision: shared.Precision = "auto"
    """Precision of matrix products; auto: bfloat16 where the hardware accelerates it."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each contradiction between options."""
        if len(set(self.backbone)) < len(self.backbone):
            yield f"{option('backbone')}: a backbone is given twice"
        if self.annotations is not None and (self.seg_masks or self.test_seg_masks or self.ignore_labels):
            yield f"{option('annotations')} and {option('seg_masks')} each list their own images: evaluate one after the other"
        if self.ood_images and (self.annotations or self.seg_masks):
            yield f"{option('ood_images')} are matched by class folders, which {option('annotations')} or {option('seg_masks')} take the place of"
        if self.annotations is not None and self.test_images is not None and self.test_annotations is None:
            yield f"{option('test_images')} with {option('annotations')} need {option('test_annotations')}"
        if self.test_annotations is not None and self.annotations is None:
            yield f"{option('test_annotations')} are for {option('annotations')}: give both"


class FinetuneOptions(shared.TrainerOptions, shared.ViewOptions):
    """Training options of `finetune`; a section of `study`."""

    file_only: ClassVar[frozenset[str]] = shared.LOOP_OPTIONS
    batch_size: PositiveInt | None = None
    """Images per step; automatic: a tenth of the images, from 8 to 512 (128 on a CPU)."""
    lr: PositiveFloat | None = None
    """Peak learning rate; automatic: 5e-4 * sqrt(batch / 512), at least 3e-4."""
    min_lr: NonNegativeFloat = 1e-6
    """Final learning rate of the cosine schedule, at most `lr`."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Learning-rate factor from each block to the one before it (the paper: 0.65 for ViT-S and ViT-B)."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Maximum drop-path rate (increases linearly with depth)."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the target that is spread over all classes."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    rand_augment: str | None = None
    """RandAugment as timm spells it, e.g. rand-m9-mstd0.5-inc1 (the released recipe's); for images of 1 or 3 channels."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of Mixup, which blends pairs of images and labels."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of CutMix, which pastes a box of one image into another; with `mixup` too, each batch gets one of the two."""
    random_erasing: float = Field(default=0.0, ge=0, le=1)
    """Probability that a random box of an image is replaced by noise."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the weights, e.g. 0.9999, which is evaluated and saved in their place."""
    num_seeds: PositiveInt = 1
    """Number of fine-tunings, with `seed` and the seeds after it, in OUT/seed-*; run.json then has the mean accuracy and its interval."""


class FinetuneConfig(FinetuneOptions, shared.TrainerConfig):
    """Options of `finetune`."""

    backbone: shared.BackboneSource
    """Backbone: a run, a model folder of timm or Hugging Face, a weights file, or timm:NAME."""
    images: shared.Source
    """Labeled training images, CLASS/image.jpg."""
    test_images: shared.Source | None = None
    """Labeled test images; automatic: a 20 % hold-out split of `images`, chosen by image name."""
    out: Path | None = None
    """New folder for the fine-tuned model, its options (config.yaml), its accuracy and the provenance of its backbone
    (run.json), its learning curve (metrics.jsonl, tensorboard/, curve.png) and, until it is finished, checkpoints; automatic: only
    the accuracy is returned and printed."""
    from_scratch: bool = False
    """Train the same architecture from random weights, for comparison."""
    labels_per_class: shared.Labels | None = None
    """Number of labeled images per class that are used, below 1 the fraction of them: the fixed split of `seed` that `evaluate` uses."""
    seed: NonNegativeInt = 0
    """Seed of the classifier's weights, image order, views and the split of `labels_per_class`."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each contradiction between options."""
        if self.resume and self.out is None:
            yield f"{option('resume', True)} needs the folder to resume: give {option('out')}"


class EmbedConfig(shared.UnreadableImageOptions, shared.DeviceOptions, shared.ResumeOptions):
    """Options of `embed`."""

    backbone: shared.BackboneSource
    """Backbone: a run, a model folder of timm or Hugging Face, a weights file (MaPeT's released ones, MAE, DINO, timm, ...), or timm:NAME."""
    images: shared.Source
    """Folder of images, or text file of paths."""
    out: Path
    """New folder for the features."""
    pool: Literal["avg", "token", "none"] = "avg"
    """Features of an image: avg, the mean of its patch tokens; token, the class token; none, all patch tokens, row by row."""
    format: Literal["npy", "parquet"] = "npy"
    """npy: features.npy and ids.json; parquet: features.parquet, a folder of files with the columns id and features."""
    dtype: Literal["float32", "float16"] = "float32"
    """Data type of the features on disk."""
    image_size: shared.Size | None = None
    """Height and width of the input, pixels, to which positions are interpolated; automatic: the backbone's own."""
    precision: shared.Precision = "auto"
    """Precision of matrix products; auto: bfloat16 where the hardware accelerates it."""


class ExportConfig(Config):
    """Options of `export`."""

    backbone: shared.BackboneSource
    """Backbone: a run (an unfinished run's newest checkpoint), a fine-tuned model, a model folder of timm or Hugging Face, a
    weights file (MaPeT's released ones, MAE, DINO, timm, ...), or timm:NAME."""
    out: Path
    """New folder: a timm model folder with its model card; each other format is in a folder inside."""
    format: tuple[Literal["timm", "transformers", "onnx", "torch-export"], ...] = ()
    """Formats beside timm's, one or more: transformers, onnx, torch-export."""
    image_size: shared.Size | None = None
    """Height and width of the input, pixels, to which positions are interpolated; automatic: the backbone's own."""
    patch_size: PositiveInt | None = None
    """Side of a patch, pixels; the patch embedding is resampled; automatic: the backbone's own."""
    channels: PositiveInt | None = None
    """Channels of the input; the patch embedding is adapted; automatic: the backbone's own."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """ViT arguments that a weights file does not hold, e.g. num_heads=6; other commands then take the exported folder."""
    images: shared.Source | None = None
    """Images on which the exported formats are checked; automatic: the run's own."""
    license: str = "other"
    """License of the weights, for the model card, e.g. apache-2.0."""
