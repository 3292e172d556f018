"""Stage: train the whole ViT on labels."""

import logging
from pathlib import Path

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mapet.recipe import Source, read_recipe, stage, to_yaml
from mapet.stages.options import BackboneSource, BadImages, Device, ModelArgs, Precision, automatic_workers
from mapet.stages.tokenize import Views

log = logging.getLogger("mapet")


class FinetuneConfig(ModelArgs, Views, BadImages, Device):
    """Options of `finetune`."""

    backbone: BackboneSource
    """A run, a model folder of timm or Hugging Face, a weights file, or timm:NAME."""
    images: Source
    """Labelled images, CLASS/image.jpg, to train on."""
    test_images: Source | None = None
    """Labelled images to test on; automatic: a fifth of `images`, chosen by image name."""
    out: Path | None = None
    """New folder for the fine-tuned model, its options (config.yaml), what is known of its backbone (origin.json), its accuracy
    (result.json) and its curve (metrics.jsonl, curve.png)."""
    scratch: bool = False
    """Start the same architecture from random weights, for comparison."""
    labels_per_class: PositiveInt | None = None
    """Use only so many labelled images of each class: the fixed split of `seed` that `evaluate` uses."""
    label_share: float = Field(1.0, gt=0, le=1)
    """Use only this share of each class's labelled images, likewise."""
    epochs: PositiveInt = 100
    """Passes over the training images."""
    batch_size: PositiveInt | None = None
    """Images a step; automatic: a tenth of the images, from 8 to 512 (128 on a CPU)."""
    lr: PositiveFloat | None = None
    """Peak learning rate; automatic: 5e-4 * sqrt(batch / 512)."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end."""
    warmup_epochs: NonNegativeFloat | None = None
    """Passes with a rising learning rate; automatic: a tenth."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Learning-rate factor from each block to the one before (the paper: 0.65 for ViT-S and ViT-B)."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the last block."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target spread over all classes."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    rand_augment: str | None = None
    """RandAugment in timm's words, e.g. rand-m9-mstd0.5-inc1 (the released recipe's); pictures of 1 or 3 channels."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of Mixup: pairs of images and labels are blended."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of CutMix: a box of one image is laid into another; with both, each batch has one or the other."""
    random_erasing: float = Field(0.0, ge=0, le=1)
    """Share of images in which a random box becomes noise."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights, e.g. 0.9999, which is judged and saved in their place."""
    seed: NonNegativeInt = 0
    """Seed of the head, order, views and of which labels are used."""
    precision: Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""
    workers: NonNegativeInt | None = None
    """Processes that read images; automatic: one a core, less one, at most 8."""

    @property
    def num_workers(self) -> int:
        return automatic_workers() if self.workers is None else self.workers

    @model_validator(mode="after")
    def _one_limit(self) -> "FinetuneConfig":
        if self.labels_per_class is not None and self.label_share < 1:
            raise ValueError("give labels_per_class or label_share, not both")
        return self


@stage
def finetune(config: FinetuneConfig) -> float:
    """Fine-tune a backbone on labelled images; returns (and prints) top-1 accuracy on the test images.

    Example:
      mapet finetune --backbone runs/photos --images labelled/train --test-images labelled/test --views crop
      mapet finetune --backbone runs/photos --images labelled/train --labels-per-class 10 --scratch
      mapet finetune tuned/config.yaml --out again
    """
    import json

    from mapet.evaluation.intervals import wilson
    from mapet.files import atomic, new_folder, write_json
    from mapet.model.backbone import save_backbone
    from mapet.training.finetune import finetune_vit

    if config.out:
        new_folder(config.out)
    rows: list[dict[str, float]] = []

    def note(row: dict[str, float]) -> None:
        rows.append(row)
        with (config.out / "metrics.jsonl").open("a", encoding="utf-8") as file:  # type: ignore[operator]
            file.write(json.dumps(row) + "\n")

    def begin(resolved: FinetuneConfig) -> None:
        with atomic(resolved.out / "config.yaml") as temporary:  # type: ignore[operator]
            temporary.write_text(
                f"# mapet finetune {resolved.out}/config.yaml --out NEW\n{to_yaml(resolved)}", encoding="utf-8"
            )

    vit, (right, seen), train = finetune_vit(config, *((note, begin) if config.out else ()))
    score, (low, high) = right / seen, wilson(right, seen)
    log.info(
        "accuracy %.3f (%.3f to %.3f on %d images), trained on %d images of %d classes",
        score, low, high, seen, len(train.labels), len(train.classes),
    )  # fmt: skip
    if config.out:
        from mapet.reporting.card import ORIGIN, origin_of_tuned
        from mapet.reporting.pictures import learning_curve, save_figure

        save_backbone(vit.cpu(), config.out / "model")
        log.info("model in %s", config.out / "model")
        note({"epoch": config.epochs, "accuracy": score})
        save_figure(learning_curve(rows), config.out / "curve.png")
        record = {"accuracy": score, "low": low, "high": high, "train_images": len(train.labels), "test_images": seen}
        write_json(config.out / "result.json", record | {"classes": train.classes, "images": config.images})
        images = {"number": len(train.labels), "hash": train.images.hash, "classes": len(train.classes)}
        write_json(config.out / ORIGIN, origin_of_tuned(read_recipe(config.out / "config.yaml"), images)._asdict())
    return score
