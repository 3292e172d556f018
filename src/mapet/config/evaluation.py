"""Options of `evaluate`, `finetune`, `embed` and `export`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mapet.config import shared
from mapet.config.limits import LimitOptions
from mapet.errors import option

Control = Literal["auto", "none", "pixels", "untrained", "hog", "kmeans", "teacher", "tokens"]


class EvaluateConfig(
    shared.ReadOptions,
    LimitOptions,
    shared.FeatureOptions,
    shared.GroupOptions,
    shared.TrustTeacherOptions,
    shared.DeviceOptions,
    shared.SeedOptions,
):
    """Options of `evaluate`."""

    file_only: ClassVar[frozenset[str]] = frozenset(
        {"linear_epochs", "dense_epochs", "max_images", "max_control_minutes"}
    )

    backbone: list[shared.BackboneSource] = Field(min_length=1)
    """One or more, side by side: a run, a backbone folder, an export, a folder of `finetune`, a weights file, timm:NAME, or random:NAME for
    a timm model or a folder's architecture with random weights. Corruption errors are relative to the first."""
    images: shared.Source
    """Images to train on; CLASS/image.jpg for protocols that need labels."""
    test_images: shared.Source | None = None
    """Images to test on; auto: a 20 % hold-out split of `images`, chosen by image name."""
    out: Path | None = None
    """New folder for evaluation.md, per_class.csv, figures and the results in run.json; none: the table is only printed."""
    protocols: list[str] | None = None
    """Protocols to run, e.g. logistic knn few-shot (an unknown name lists all); auto: those that have the data they need and are not
    expensive."""
    controls: tuple[Control, ...] = Field(default=("auto",), min_length=1)
    """Controls beside the backbones, by the protocols logistic and knn: pixels (raw), untrained (the same network), hog (features), kmeans
    (k-means patch features), teacher and tokens (of a run: its teacher's features, the bag of its tokens); none; or auto, all that there are."""
    max_control_minutes: PositiveFloat | None = None
    """Minutes from the start until all controls shall be measured, with a warning of those that are skipped: each is taken to last as long as
    the one before; none: no limit."""
    max_images: PositiveInt | None = None
    """Labeled images of each set at most, those with the smallest hashes of their ids; none: all."""
    linear_epochs: PositiveInt = 100
    """Epochs of the linear-sgd probe over the features."""
    few_shot: tuple[shared.Labels, ...] = (0.01, 0.1, 5)
    """Sizes of few-shot training splits: a number below 1 is a fraction of the images of each class, one from 1 on a number of images per class."""
    num_seeds: PositiveInt = 5
    """Number of seeds (0, 1, ...) over which few-shot splits and clustering are repeated; their metrics are means."""
    ood_images: dict[str, shared.Source] = Field(default_factory=dict)
    """Further labeled folders to test on, NAME=FOLDER (protocol ood); classes are matched by name."""
    eval_image_sizes: list[PositiveInt] | None = None
    """Input sizes, pixels: resolution tests each (auto: from half to twice the trained one), segmentation and detection take the largest
    (auto: the trained one)."""
    seg_masks: Path | None = None
    """Masks of `images` (protocol segmentation): a folder of PNGs of class ids, paired by name, or a COCO panoptic JSON; auto: found where
    `images` holds images/ and masks/, or is ADE20K's folder."""
    test_seg_masks: Path | None = None
    """Masks of `test_images` or, without that option, of `images`; auto: a 20 % hold-out split of the masked images
    is tested on."""
    ignore_labels: tuple[NonNegativeInt, ...] = ()
    """Class ids in masks that are not counted, beside 255 (and 0 in ADE20K's folder)."""
    annotations: Path | None = None
    """COCO annotations of `images`, instances JSON (protocols multi-label and detection)."""
    test_annotations: Path | None = None
    """COCO annotations of `test_images` (of `images`, without those); auto: a 20 % hold-out split of the training images is tested on."""
    dense_epochs: PositiveInt = 10
    """Epochs of the segmentation and detection heads."""
    precision: shared.Precision = "float32"
    """Matmul precision; auto: the faster one in a timing; bfloat16 rounds, which costs features of small variance some accuracy."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each contradiction between options."""
        if repeated := [name for name in dict.fromkeys(self.backbone) if self.backbone.count(name) > 1]:
            yield f"{option('backbone')}: {repeated[0]} is given twice: give each backbone once"
        if len(self.controls) > 1 and {"auto", "none"} & {*self.controls}:
            yield f"{option('controls')}: auto and none are given alone, got {' '.join(self.controls)}: omit the others"
        if self.annotations is not None and (self.seg_masks or self.test_seg_masks or self.ignore_labels):
            yield f"{option('annotations')} and {option('seg_masks')} each list their own images: evaluate one after the other"
        if self.ood_images and (self.annotations or self.seg_masks):
            yield f"{option('ood_images')} needs labels from class folders, not {option('annotations')} or {option('seg_masks')}: omit one of them"
        if self.annotations is not None and self.test_images is not None and self.test_annotations is None:
            yield f"{option('test_images')} with {option('annotations')} needs {option('test_annotations')}: give both or neither"
        if self.test_annotations is not None and self.annotations is None:
            yield f"{option('test_annotations')} are for {option('annotations')}: give both"


class FinetuneOptions(shared.TrainerOptions, shared.ViewOptions):
    """Training options of `finetune`; a section of `study`."""

    file_only: ClassVar[frozenset[str]] = shared.LOOP_OPTIONS
    batch_size: PositiveInt | None = None
    """Images per step, over all ranks; auto: a tenth of the images, from 8 to 512 (128 on a CPU)."""
    lr: PositiveFloat | None = None
    """Peak learning rate; auto: 5e-4 * sqrt(batch / 512), at least 3e-4."""
    min_lr: NonNegativeFloat = 1e-6
    """Final learning rate of the cosine schedule, at most `lr`."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Factor of the learning rate from each block to the one before it (the paper: 0.65 for ViT-S and ViT-B); none: 1."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Maximum drop-path rate (increases linearly with depth)."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the target that is spread over all classes."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength s of color jitter: brightness, contrast and saturation are each multiplied by a factor drawn from max(0, 1 - s) to 1 + s."""
    rand_augment: str | None = None
    """RandAugment in timm's notation, e.g. rand-m9-mstd0.5 (the released config's), for gray and RGB images; none: no RandAugment."""
    mixup: NonNegativeFloat = 0.0
    """Mixup alpha: pairs of images and labels are blended; 0: off."""
    cutmix: NonNegativeFloat = 0.0
    """CutMix alpha: a box of one image replaces another's; 0: off. With both, each batch gets one of them."""
    random_erasing: float = Field(default=0.0, ge=0, le=1)
    """Fraction of images in which a random box becomes noise."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of a moving average of the weights, e.g. 0.9999, which is evaluated and saved in their place; none: off."""
    num_seeds: PositiveInt = 1
    """Fine-tuning runs, with `seed` and those after it, in OUT/seed-*; gives the mean accuracy and its interval (run.json)."""


class FinetuneConfig(FinetuneOptions, shared.ReadOptions, LimitOptions, shared.GroupOptions, shared.TrainerConfig):
    """Options of `finetune`."""

    backbone: shared.BackboneSource
    """A run, a model folder of timm or Hugging Face, a weights file, or timm:NAME."""
    images: shared.Source
    """Labeled images to train on, CLASS/image.jpg."""
    test_images: shared.Source | None = None
    """Labeled images to test on; auto: a 20 % hold-out split of `images`, chosen by image name."""
    out: Path | None = None
    """New folder for the fine-tuned model, its config (config.yaml), accuracy and provenance (run.json), curve (metrics.jsonl,
    tensorboard/, learning_curve.png) and, until it is finished, checkpoints; none: only the accuracy is returned."""
    from_scratch: bool = False
    """Start the same architecture from random weights, for comparison."""
    labels_per_class: shared.Labels | None = None
    """Labeled images of each class to use, or below 1 a fraction of them: the split of `seed` that `evaluate` uses too; none: all."""
    seed: shared.Seed = 0
    """Random seed of the head, order of images, views and choice of labels."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each contradiction between options."""
        yield from super().problems()
        if self.resume and self.out is None:
            yield f"{option('resume', True)} needs the folder to resume: give {option('out')}"


class InferenceOptions(
    shared.ReadOptions, LimitOptions, shared.UnreadableImageOptions, shared.DeviceOptions, shared.ResumeOptions
):
    """A frozen backbone, run on all images of a source: options of `embed`, `predict` and `search`."""

    backbone: shared.BackboneSource
    """A run, a model folder of timm or Hugging Face, a weights file (MaPeT's released ones, MAE, DINO, timm, ...), or timm:NAME."""
    images: shared.Source
    """Folder of images, text file of paths, .tar shards (also by URL), or hf:NAME[:SPLIT] of Hugging Face's `datasets`."""
    precision: shared.Precision = "auto"
    """Matmul precision; auto: the faster one in a timing."""


class EmbedConfig(InferenceOptions, shared.FeatureOptions):
    """Options of `embed`."""

    out: Path
    """New folder for the features."""
    pool: Literal[shared.Pool, "none"] = shared.DEFAULT_POOL  # type: ignore[assignment]
    """Pooling of a layer's feature map: mean (of all patches), cls (the class token), 2x2 or 3x3 (means of that many cells, concatenated)
    or none (all patch tokens, row by row)."""
    format: Literal["npy", "parquet"] = "npy"
    """File format: npy (features.npy and ids.json) or parquet (features.parquet, a folder of files with the columns id and features)."""
    dtype: Literal["float32", "float16"] = "float32"
    """Data type of the features on disk."""
    image_size: shared.Size | None = None
    """Height and width of the input, pixels; positions are interpolated; auto: the backbone's own."""


class PredictConfig(InferenceOptions):
    """Options of `predict`."""

    out_is_file: ClassVar[bool] = True
    backbone: shared.BackboneSource
    """A folder of `finetune`, or a model folder of timm with a classifier and the names of its classes."""
    out: Path
    """New file for labels and probabilities, .csv or .parquet."""

    def problems(self) -> Iterator[str]:
        """Yield a message if the file has another format."""
        if self.out.suffix not in (".csv", ".parquet"):
            yield f"{option('out')} {self.out} ends neither in .csv nor in .parquet: give a file of one of them"


class SearchConfig(InferenceOptions, shared.FeatureOptions):
    """Options of `search`."""

    out: Path
    """New folder for the page, the CSV files and the features."""
    query: shared.Source | None = None
    """An image file, or other images, whose nearest ones among `images` are searched for; none: those of each image of `images`, with
    duplicates and outliers."""
    features: Path | None = None
    """Folder of features of `images` by `backbone`, of `embed` or an earlier search, or a new one; auto: OUT/features."""
    num_neighbors: PositiveInt = 10
    """Nearest images of each."""
    min_similarity: float | None = Field(default=None, gt=-1, le=1)
    """Cosine similarity from which on two images are near duplicates; auto: that which 95 % of a sample have with their own JPEG copies."""


class ExportConfig(shared.FeatureOptions, LimitOptions):
    """Options of `export`."""

    backbone: shared.BackboneSource
    """A run (of an unfinished one, the last checkpoint), a fine-tuned model, a model folder of timm or Hugging Face, a weights file
    (MaPeT's released ones, MAE, DINO, timm, ...), or timm:NAME."""
    out: Path
    """New folder: a timm model folder with its model card; other formats are folders in it."""
    format: tuple[Literal["timm", "transformers", "onnx", "torch-export"], ...] = ()
    """Further formats beside timm's: transformers, onnx, torch-export."""
    image_size: shared.Size | None = None
    """Height and width of the input, pixels; positions are interpolated; auto: the backbone's own."""
    patch_size: PositiveInt | None = None
    """Side of a patch, pixels; the patch embedding is resampled; auto: the backbone's own."""
    channels: PositiveInt | None = None
    """Channels of the input; the patch embedding is adapted; auto: the backbone's own."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Keywords of the ViT that cannot be inferred from a weights file, e.g. num_heads=6; other commands then take the exported folder."""
    images: shared.Source | None = None
    """Images to check the formats on; auto: the run's own."""
    license: str = "other"
    """License of the weights, for the model card, e.g. apache-2.0."""
