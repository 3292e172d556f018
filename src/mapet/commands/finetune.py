"""Stage: train the whole ViT on labels."""

import logging
from contextlib import nullcontext
from dataclasses import asdict

from mapet.commands.command import command
from mapet.config.base import write_recipe
from mapet.config.evaluation import FinetuneConfig
from mapet.errors import option

log = logging.getLogger("mapet")
STAGE = "finetune"


@command(FinetuneConfig)
def finetune(config: FinetuneConfig) -> float:
    """Fine-tune a backbone on labelled images; returns (and prints) top-1 accuracy on the test images.

    Example:
      mapet finetune --backbone runs/photos --images labelled/train --test-images labelled/test --views random-crop --out tuned
      mapet finetune --backbone runs/photos --images labelled/train --labels-per-class 10 --num-seeds 5
      mapet finetune --backbone runs/photos --images labelled/train --labels-per-class 10 --num-seeds 5 --from-scratch
      mapet finetune tuned/config.yaml --resume
    """
    return tune(config)[0] if config.num_seeds == 1 else tune_each(config)


def tune(config: FinetuneConfig) -> tuple[float, str]:
    """With one seed; also returns the signal that asked to stop as it ended, or ''."""
    import json
    import shutil

    from mapet.evaluation.intervals import wilson
    from mapet.run_state import RunState, record
    from mapet.training.run_folder import resolve_resume_config
    from mapet.training.tasks.finetuning import FinetuningTask
    from mapet.training.trainer import Trainer

    if config.resume:
        config = resolve_resume_config(config, STAGE)
    if config.resume and config.out and "accuracy" in (done := RunState.read(config.out).results):
        accuracy = float(done["accuracy"])
        log.info("%s is finished: accuracy %.3f", config.out, accuracy)
        return accuracy, ""
    trainer = Trainer(FinetuningTask(), config)
    right, seen, train, guess = trainer.fit()
    score, (low, high) = right / seen, wilson(right, seen)
    log.info(
        "accuracy %.3f (%.3f to %.3f on %s images; always guessing one class %.3f), trained on %s images of %d classes",
        score, low, high, f"{seen:,}", guess, f"{len(train.labels):,}", len(train.classes),
    )  # fmt: skip
    if low <= guess:
        log.warning(f"that is not clearly better than guessing: try a higher {option('lr')} or more {option('epochs')}")
    if config.out:
        from mapet.reports.card import origin_of_tuned
        from mapet.reports.plots import plot_learning_curve, save_figure

        rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        save_figure(plot_learning_curve(rows), config.out / "curve.png")
        images = {"number": len(train.labels), "hash": train.images.hash, "classes": len(train.classes)}
        record(
            config.out,
            counts={"images": len(train.labels), "test_images": seen},
            hashes={"images": train.images.hash},
            results={"accuracy": score, "ci95_low": low, "ci95_high": high, "classes": train.classes},
        )
        record(config.out, results={"provenance": asdict(origin_of_tuned(config.out, images))})
        shutil.rmtree(config.out / "checkpoints")  # all is done: there is nothing to go on with
    return score, trainer.stop.signal_name


def tune_each(config: FinetuneConfig) -> float:
    """Once with each seed, in a folder of its own; the mean accuracy."""
    from mapet.errors import Interrupted, option
    from mapet.evaluation.intervals import over_seeds
    from mapet.files import new_folder
    from mapet.run_state import record, run_state
    from mapet.training.run_folder import MUTABLE_ON_RESUME, command_to_resume, resolve_resume_config

    asked = config.resume
    if asked:
        config = resolve_resume_config(config, STAGE, MUTABLE_ON_RESUME | {"num_seeds"})
    out = config.out
    again = command_to_resume(out, STAGE) if out else ""
    if out:
        if not config.resume:
            new_folder(out, resume_hint=f", or go on with {option('resume', True)}")
        write_recipe(config, out / "config.yaml")
        config = config.model_copy(update={"resume": asked})
    scores: dict[str, float] = {}
    last = config.seed + config.num_seeds - 1
    for seed in range(config.seed, last + 1):
        log.info("--- seed %d (%d of %d)", seed, seed - config.seed + 1, config.num_seeds)
        place = out and out / f"seed-{seed}"
        try:
            one = config.model_copy(update={"seed": seed, "num_seeds": 1, "out": place})
            with run_state(place, STAGE, one) if place else nullcontext():
                score, stopped = tune(one)
        except Interrupted as error:
            raise Interrupted(error.what, again) from None
        if stopped and seed < last:
            raise Interrupted(f"stopped by {stopped} after seed {seed}, saved", again)
        scores[f"seed-{seed}"] = score
    figure = over_seeds(list(scores.values()))
    few = "; two seeds tell little" if config.num_seeds == 2 else ""
    log.info("accuracy %.3f (%.3f to %.3f over %s%s)", figure.value, figure.ci_low, figure.ci_high, figure.over, few)
    interval = {"ci95_low": figure.ci_low, "ci95_high": figure.ci_high}
    record(out, results={"accuracy": figure.value, **interval, "seeds": scores})
    return figure.value
