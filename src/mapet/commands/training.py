"""Pre-training with its report, fine-tuning once or with several seeds, and a step whose numbers went wrong, once more."""

import json
import logging
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mapet.config.base import build_config, read_config, write_config
from mapet.config.evaluation import FinetuneConfig
from mapet.config.pretraining import DebugStepConfig, PretrainConfig
from mapet.config.shared import TrainerConfig
from mapet.config.tokenizers import TrainTokenizerConfig
from mapet.data.dataset import EpochBatchSampler
from mapet.device import ComputeContext
from mapet.errors import Interrupted, MapetError, option
from mapet.evaluation.eval_context import mean_over_seeds, wilson_interval
from mapet.files import create_output_dir
from mapet.reports.model_card import finetuning_provenance
from mapet.reports.page import write_run_report
from mapet.reports.plots import plot_learning_curve, save_figure
from mapet.run_state import CONFIG_FILE, RunState, pretrain_folder, read_command, record, record_end, run_state
from mapet.training import checkpoint
from mapet.training.run_folder import MUTABLE_ON_RESUME, command_to_resume, resolve_resume_config
from mapet.training.task import Task
from mapet.training.tasks.finetuning import FinetuningTask
from mapet.training.tasks.pretraining import PretrainingTask
from mapet.training.tasks.vqkd import VQKDTask
from mapet.training.trainer import Trainer

log = logging.getLogger("mapet")
TASKS: dict[str, tuple[type[Task[Any, Any, Any]], type[TrainerConfig]]] = {
    "pretrain": (PretrainingTask, PretrainConfig),
    "finetune": (FinetuningTask, FinetuneConfig),
    "train-tokenizer": (VQKDTask, TrainTokenizerConfig),
}
"""Command -> what it trains, and its options."""


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train, and write the run's report however it ends; return the folder of the backbone."""
    try:
        backbone = Trainer(PretrainingTask(), config).fit()
    except (Interrupted, checkpoint.NonFiniteError) as error:
        record_end(config.out, error)
        write_run_report(config.out)
        raise
    write_run_report(config.out)
    return backbone


def train_tokenizer(config: TrainTokenizerConfig) -> Path:
    """Train a VQ-KD tokenizer; return its safetensors file."""
    return Trainer(VQKDTask(), config).fit()


def finetune(config: FinetuneConfig) -> float:
    """Fine-tune with one seed or several; return the (mean) accuracy."""
    return _tune(config)[0] if config.num_seeds == 1 else _tune_each(config)


def _tune(config: FinetuneConfig) -> tuple[float, str]:
    """Fine-tune with one seed; also return the signal that asked to stop as it ended, or ''."""
    if config.resume:
        config = resolve_resume_config(config, "finetune")
    if config.resume and config.out and "accuracy" in (done := RunState.read(config.out).results):
        accuracy = float(done["accuracy"])
        log.info("%s is finished: accuracy %.3f", config.out, accuracy)
        return accuracy, ""
    trainer = Trainer(FinetuningTask(), config)
    right, seen, train, guess = trainer.fit()
    score, (low, high) = right / seen, wilson_interval(right, seen)
    log.info(
        "accuracy %.3f (%.3f to %.3f on %s images; always guessing one class %.3f), trained on %s images of %d classes",
        score, low, high, f"{seen:,}", guess, f"{len(train.labels):,}", len(train.classes),
    )  # fmt: skip
    if low <= guess:
        log.warning(f"that is not clearly better than guessing: try a higher {option('lr')} or more {option('epochs')}")
    if config.out:
        rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        save_figure(plot_learning_curve(rows), config.out / "curve.png")
        results = {"accuracy": score, "ci95_low": low, "ci95_high": high, "classes": train.classes}
        counts, hashes = {"images": len(train.labels), "test_images": seen}, {"images": train.images.hash}
        record(config.out, counts=counts, hashes=hashes, results=results)
        images = {"number": len(train.labels), "hash": train.images.hash, "classes": len(train.classes)}
        record(config.out, results={"provenance": asdict(finetuning_provenance(config.out, images))})
        shutil.rmtree(config.out / "checkpoints")  # all is done: there is nothing to go on with
    return score, trainer.stop.signal_name


def _tune_each(config: FinetuneConfig) -> float:
    """Fine-tune with each seed, in a folder of its own; return the mean accuracy."""
    asked, out = config.resume, config.out
    if asked:
        config = resolve_resume_config(config, "finetune", MUTABLE_ON_RESUME | {"num_seeds"})
    again = command_to_resume(out, "finetune") if out else ""
    if out:
        if not config.resume:
            create_output_dir(out)
        write_config(config, out / CONFIG_FILE)
    scores: dict[str, float] = {}
    last = config.seed + config.num_seeds - 1
    for seed in range(config.seed, last + 1):
        log.info("--- seed %d (%d of %d)", seed, seed - config.seed + 1, config.num_seeds)
        place = out and out / f"seed-{seed}"
        one = config.model_copy(update={"seed": seed, "num_seeds": 1, "out": place, "resume": asked})
        try:
            with run_state(place, "finetune", one) if place else nullcontext():
                score, stopped = _tune(one)
        except Interrupted as error:
            raise Interrupted(error.what, again) from None
        if stopped and seed < last:
            raise Interrupted(f"stopped by {stopped} after seed {seed}, saved", again)
        scores[f"seed-{seed}"] = score
    mean = mean_over_seeds(list(scores.values()))
    few = "; two seeds tell little" if config.num_seeds == 2 else ""
    log.info("accuracy %.3f (%.3f to %.3f over %s%s)", mean.value, mean.ci_low, mean.ci_high, mean.over, few)
    interval = {"ci95_low": mean.ci_low, "ci95_high": mean.ci_high}
    record(out, results={"accuracy": mean.value, **interval, "seeds": scores})
    return mean.value


def debug_step(config: DebugStepConfig) -> list[checkpoint.StepReport]:
    """Compute the steps of a debug bundle again, and report each."""
    folder = config.bundle.absolute().parent.parent
    recipe = folder / CONFIG_FILE
    if not (recipe.is_file() and (config.bundle / checkpoint.BUNDLE).is_file()):
        kept = sorted((pretrain_folder(config.bundle) / "debug").glob("step-*"))
        hint = f"did you mean {kept[0]}?" if kept else "a run whose numbers were not finite has them, as debug/step-*"
        raise MapetError(f"{config.bundle} is not the debug bundle of a run: {hint}")
    task_type, config_type = TASKS.get(read_command(folder), TASKS["pretrain"])
    task, run = task_type(), build_config(config_type, read_config(recipe), recipe)
    given = {name: getattr(config, name) for name in ("images", "precision", "trust_teacher") if getattr(config, name)}
    run = run.model_copy(update={"device": config.device} | given)
    task.build(run, ComputeContext.from_options(run.device, run.precision))
    sampler = EpochBatchSampler(task.indices, task.config.batch_size, run.epochs, run.seed)
    reports = []
    for step in checkpoint.load_debug_bundle(config.bundle, task, sampler):
        report = checkpoint.debug_step(task, sampler, step)
        reports.append(report)
        log.info("step %d, %s: loss %.4g, gradient norm %.4g", step, task.compute, report.loss, report.norm)
        log.info("  largest losses: %s", ", ".join(f"{name!r} {loss:.4g}" for name, loss in report.losses[:5]))
        if report.module:
            log.info("  not finite first in: %s", report.module)
        if report.parameters:
            log.info("  gradients not finite: %s", ", ".join(report.parameters[:5]))
    return reports
