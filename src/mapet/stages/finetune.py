"""Stage: train the whole ViT on labels."""

import logging
from pathlib import Path

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mapet.recipe import Source, read_recipe, stage, write_recipe
from mapet.stages.options import BackboneSource, BadImages, Device, ModelArgs, Precision, Tracked, automatic_workers
from mapet.stages.tokenize import Views

log = logging.getLogger("mapet")


class FinetuneConfig(ModelArgs, Views, BadImages, Tracked, Device):
    """Options of `finetune`."""

    backbone: BackboneSource
    """A run, a model folder of timm or Hugging Face, a weights file, or timm:NAME."""
    images: Source
    """Labelled images, CLASS/image.jpg, to train on."""
    test_images: Source | None = None
    """Labelled images to test on; automatic: a fifth of `images`, chosen by image name."""
    out: Path | None = None
    """New folder for the fine-tuned model, its options (config.yaml), what is known of its backbone (origin.json), its accuracy
    (result.json), its curve (metrics.jsonl, tensorboard/, curve.png) and, until it is finished, checkpoints; automatic: nothing
    is kept but the accuracy."""
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
    """Peak learning rate; automatic: 5e-4 * sqrt(batch / 512), at least 3e-4."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end, at most the peak."""
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
    seeds: PositiveInt = 1
    """Do it so often, with `seed` and those after it, in OUT/seed-*, for the mean accuracy and its interval (seeds.json)."""
    precision: Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""
    workers: NonNegativeInt | None = None
    """Processes that read images; automatic: one a core, less one, at most 8."""
    save_minutes: PositiveFloat = 10
    """Time between checkpoints."""
    resume: bool = False
    """Go on with an interrupted fine-tuning in `out`, exactly where it stopped."""

    @property
    def num_workers(self) -> int:
        return automatic_workers() if self.workers is None else self.workers

    @model_validator(mode="after")
    def _one_limit(self) -> "FinetuneConfig":
        if self.labels_per_class is not None and self.label_share < 1:
            raise ValueError("give --labels-per-class or --label-share, not both")
        return self

    @model_validator(mode="after")
    def _resumes_a_folder(self) -> "FinetuneConfig":
        if self.resume and self.out is None:
            raise ValueError("--resume goes on in the folder of --out: give it")
        return self


@stage
def finetune(config: FinetuneConfig) -> float:
    """Fine-tune a backbone on labelled images; returns (and prints) top-1 accuracy on the test images.

    Example:
      mapet finetune --backbone runs/photos --images labelled/train --test-images labelled/test --views crop --out tuned
      mapet finetune --backbone runs/photos --images labelled/train --labels-per-class 10 --seeds 5
      mapet finetune --backbone runs/photos --images labelled/train --labels-per-class 10 --seeds 5 --scratch
      mapet finetune tuned/config.yaml --resume
    """
    return tune(config)[0] if config.seeds == 1 else tune_each(config)


def tune(config: FinetuneConfig) -> tuple[float, str]:
    """With one seed; also returns the signal that asked to stop as it ended, or ''."""
    import json
    import shutil

    from mapet.evaluation.intervals import wilson
    from mapet.files import read_json, write_json
    from mapet.training.finetune import STAGE, finetune_vit
    from mapet.training.run_folder import recipe_to_resume

    if config.resume:
        config = recipe_to_resume(config, STAGE)
    if config.resume and config.out and (config.out / "result.json").is_file():
        accuracy = read_json(config.out / "result.json", "fine-tuned model")["accuracy"]
        log.info("%s is finished: accuracy %.3f", config.out, accuracy)
        return accuracy, ""
    _, right, seen, train, guess, stopped = finetune_vit(config)
    score, (low, high) = right / seen, wilson(right, seen)
    log.info(
        "accuracy %.3f (%.3f to %.3f on %s images; always guessing one class %.3f), trained on %s images of %d classes",
        score, low, high, f"{seen:,}", guess, f"{len(train.labels):,}", len(train.classes),
    )  # fmt: skip
    if low <= guess:
        log.warning("that is not clearly better than guessing: try a higher --lr or more --epochs")
    if config.out:
        from mapet.reporting.card import ORIGIN, origin_of_tuned
        from mapet.reporting.pictures import learning_curve, save_figure

        rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        save_figure(learning_curve(rows), config.out / "curve.png")
        images = {"number": len(train.labels), "hash": train.images.hash, "classes": len(train.classes)}
        write_json(config.out / ORIGIN, origin_of_tuned(read_recipe(config.out / "config.yaml"), images)._asdict())
        record = {"accuracy": score, "low": low, "high": high, "train_images": len(train.labels), "test_images": seen}
        write_json(config.out / "result.json", record | {"classes": train.classes, "images": config.images})
        shutil.rmtree(config.out / "checkpoints")  # all is done: there is nothing to go on with
    return score, stopped


def tune_each(config: FinetuneConfig) -> float:
    """Once with each seed, in a folder of its own; the mean accuracy."""
    from mapet.errors import Interrupted
    from mapet.evaluation.intervals import over_seeds
    from mapet.files import new_folder, write_json
    from mapet.training.finetune import STAGE
    from mapet.training.run_folder import MAY_CHANGE, command_to_resume, recipe_to_resume

    asked = config.resume
    if asked:
        config = recipe_to_resume(config, STAGE, MAY_CHANGE | {"seeds"})
    out = config.out
    again = command_to_resume(out, STAGE) if out else ""
    if out:
        if not config.resume:
            new_folder(out, resume_hint=", or go on with --resume")
        write_recipe(config, out / "config.yaml", STAGE)
        config = config.model_copy(update={"resume": asked})
    scores: dict[str, float] = {}
    last = config.seed + config.seeds - 1
    for seed in range(config.seed, last + 1):
        log.info("--- seed %d (%d of %d)", seed, seed - config.seed + 1, config.seeds)
        place = out and out / f"seed-{seed}"
        try:
            score, stopped = tune(config.model_copy(update={"seed": seed, "seeds": 1, "out": place}))
        except Interrupted as error:
            raise Interrupted(error.what, again) from None
        if stopped and seed < last:
            raise Interrupted(f"stopped by {stopped} after seed {seed}, saved", again)
        scores[f"seed-{seed}"] = score
    figure = over_seeds(list(scores.values()))
    few = "; two seeds tell little" if config.seeds == 2 else ""
    log.info("accuracy %.3f (%.3f to %.3f over %s%s)", figure.value, figure.low, figure.high, figure.of, few)
    if out:
        write_json(out / "seeds.json", {"accuracy": figure.value, "low": figure.low, "high": figure.high} | scores)
    return figure.value
