"""Pre-training with its report, tokenizer training, fine-tuning with one seed or several, and debugging of NaN or Inf."""

import json
import logging
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
from mapet.evaluation.eval_context import MetricValue, mean_over_seeds
from mapet.evaluation.imbalance import METRIC_NAMES
from mapet.files import create_output_dir, remove_dir
from mapet.reports.evaluation import format_metric
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
"""Command -> the task that it trains, and its config class."""
NUM_SHOWN = 5
"""Images and parameters that the log of `debug_step` names."""


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train, and write the run's report; return the folder of the exported backbone.

    The report is also written when a signal or too many NaN or Inf steps stop the run, before the error is raised again.
    """
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
    """Fine-tune with one seed or several; return the (mean) accuracy (0..1) on the test images."""
    return _finetune_once(config)[0]["accuracy"] if config.num_seeds == 1 else _finetune_seeds(config)


def _finetune_once(config: FinetuneConfig) -> tuple[dict[str, float], str]:
    """Fine-tune with one seed, log the accuracy and, if there is an `out` folder, record it in run.json and draw OUT/learning_curve.png.

    With `resume`, a run whose run.json has an accuracy is finished: its metrics are returned, and nothing is trained. Another run
    resumes from its newest checkpoint. The checkpoints are deleted when the run has finished.

    Args:
        config: options of `mapet finetune`; `num_seeds` is not used.

    Returns:
        'accuracy' on the test images (0..1), after 'balanced_accuracy' and 'auroc' if they are imbalanced; and the name of the signal that
        asked to stop during the last step or later, when the run was finished anyway; '' without such a signal.

    Raises:
        Interrupted: a signal asked to stop before the last step; a checkpoint is saved if there is an `out` folder.
        MapetError: options, labels, backbone or folder are not as needed; see `Trainer`.
    """
    if config.resume:
        config = resolve_resume_config(config, "finetune")
    if config.resume and config.out:
        results = RunState.read(config.out).results
        if "accuracy" in results:
            log.info("%s is finished: accuracy %.3f", config.out, results["accuracy"])
            return {kind: results[kind] for kind in METRIC_NAMES if kind in results}, ""
    trainer = Trainer(FinetuningTask(), config)
    metrics, num_test, train, majority_accuracy, calibration = trainer.fit()
    log.info(
        "%s: 95 %% intervals over %s test images; majority baseline of the accuracy %.3f; trained on %s images of %d classes",
        _format_metrics(metrics), f"{num_test:,}", majority_accuracy, f"{len(train.labels):,}", len(train.classes),
    )  # fmt: skip
    leading, low = next((kind, metric.ci_low or 0.0) for kind, metric in metrics.items())
    if low <= (majority_accuracy if leading == "accuracy" else 1 / len(train.classes)):
        hint = f"try a higher {option('lr')} or more {option('epochs')}"
        name = METRIC_NAMES[leading]
        log.warning("the %s is not significantly above that of always predicting one class: %s", name, hint)
    if config.out:
        rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        save_figure(plot_learning_curve(rows), config.out / "learning_curve.png")
        results = {**_metrics_to_json(metrics), "classes": train.classes}
        if calibration:
            results["calibration"] = calibration._asdict()
            log.info(
                "probabilities calibrated on %s test images: temperature %.3f, negative log-likelihood %.3f (before %.3f)",
                f"{calibration.num_images:,}", calibration.temperature, calibration.nll, calibration.nll_before,
            )  # fmt: skip
        images = {"number": len(train.labels), "hash": train.images.hash, "classes": len(train.classes)}
        results["provenance"] = asdict(finetuning_provenance(config.out, images))
        # One call: a run whose run.json has the accuracy is finished, and is not completed by resuming.
        counts, hashes = {"images": len(train.labels), "test_images": num_test}, {"images": train.images.hash}
        record(config.out, counts=counts, hashes=hashes, results=results)
        remove_dir(config.out / "checkpoints")  # no longer needed: a finished run is not resumed
    return {kind: metric.value for kind, metric in metrics.items()}, trainer.stop.signal_name


def _format_metrics(metrics: dict[str, MetricValue]) -> str:
    """Format metrics by kind with their intervals, those that lead first: 'accuracy 0.543 (0.512 to 0.573)'."""
    return ", ".join(f"{METRIC_NAMES[kind]} {format_metric(metric)}" for kind, metric in metrics.items())


def _metrics_to_json(metrics: dict[str, MetricValue]) -> dict[str, Any]:
    """Return what run.json has of metrics: 'accuracy', 'ci95_low', 'ci95_high'; of other kinds KIND, 'KIND_ci95_low', ..., before it."""
    results: dict[str, Any] = {}
    for kind, metric in metrics.items():
        prefix = "" if kind == "accuracy" else f"{kind}_"
        results |= {kind: metric.value, f"{prefix}ci95_low": metric.ci_low, f"{prefix}ci95_high": metric.ci_high}
    return results


def _finetune_seeds(config: FinetuneConfig) -> float:
    """Fine-tune with `num_seeds` seeds from `seed` on, each in OUT/seed-*; record and return the mean accuracy (0..1).

    Without `out` nothing is written. With `resume`, finished seeds are not trained again, the seed that was stopped resumes from its
    checkpoint, and `num_seeds` may differ from that of the first call.

    Args:
        config: options of `mapet finetune`.

    Returns:
        The mean accuracy on the test images (0..1).

    Raises:
        Interrupted: a signal asked to stop; finished seeds are kept, and the running one's checkpoint.
        MapetError: OUT is not empty (without `resume`), or was made with other options (with `resume`); or a seed cannot be trained.
    """
    resume, out = config.resume, config.out
    if resume:  # a new run in an empty folder has no config to resume from: `resume` is then False in the result
        config = resolve_resume_config(config, "finetune", MUTABLE_ON_RESUME | {"num_seeds"})
    if out:
        if not config.resume:
            create_output_dir(out)
        write_config(config, out / CONFIG_FILE)
    resume_command = command_to_resume(out, "finetune") if out else ""
    scores: dict[str, dict[str, float]] = {}
    last = config.seed + config.num_seeds - 1
    for seed in range(config.seed, last + 1):
        log.info("--- seed %d (%d of %d)", seed, seed - config.seed + 1, config.num_seeds)
        folder = out and out / f"seed-{seed}"
        seed_config = config.model_copy(update={"seed": seed, "num_seeds": 1, "out": folder, "resume": resume})
        try:
            with run_state(folder, "finetune", seed_config) if folder else nullcontext():
                scores[f"seed-{seed}"], stop_signal = _finetune_once(seed_config)
        except Interrupted as error:
            raise Interrupted(error.what, resume_command) from None
        if stop_signal and seed < last:
            raise Interrupted(f"stopped by {stop_signal} after seed {seed}, saved", resume_command)
    kinds = next(iter(scores.values()))
    means = {kind: mean_over_seeds([each[kind] for each in scores.values()]) for kind in kinds}
    caution = "; an interval from two seeds is unreliable" if config.num_seeds == 2 else ""
    log.info("%s: 95 %% intervals over %d seeds%s", _format_metrics(means), config.num_seeds, caution)
    accuracies = {seed: each["accuracy"] for seed, each in scores.items()}
    record(out, results={**_metrics_to_json(means), "seeds": accuracies})
    return means["accuracy"].value


def debug_step(config: DebugStepConfig) -> list[checkpoint.StepReport]:
    """Recompute the steps of a debug bundle without updating weights; log and return the loss and gradient of each.

    A debug bundle is the folder RUN/debug/step-* with weights and image ids that a run saves when NaN or Inf stops it.

    Args:
        config: its `device` replaces the run's option, and so do `images` and `precision` where they are given.

    Returns:
        A report for each step of the bundle, which are the last ones before the stop, in their order.

    Raises:
        MapetError: not a debug bundle, or not in the folder of its run; images that are not those of the run.
    """
    folder = config.bundle.absolute().parent.parent
    path = folder / CONFIG_FILE
    if not (path.is_file() and (config.bundle / checkpoint.BUNDLE).is_file()):
        bundles = sorted((pretrain_folder(config.bundle) / "debug").glob("step-*"))
        hint = (
            f"did you mean {bundles[0]}?" if bundles else "give RUN/debug/step-* of a run that stopped for NaN or Inf"
        )
        raise MapetError(
            f"{config.bundle} is not the debug bundle of a run: {hint}", field="bundle", value=config.bundle
        )
    task_type, config_type = TASKS.get(read_command(folder), TASKS["pretrain"])
    task, run = task_type(), build_config(config_type, read_config(path), path)
    overrides = {name: getattr(config, name) for name in ("images", "precision") if getattr(config, name)}
    run = run.model_copy(update={"device": config.device} | overrides)
    task.build(run, ComputeContext.from_options(run.device, run.precision))
    sampler = EpochBatchSampler(task.indices, task.config.batch_size, run.epochs, run.seed)
    reports = []
    for step in checkpoint.load_debug_bundle(config.bundle, task, sampler):
        report = checkpoint.debug_step(task, sampler, step)
        reports.append(report)
        log.info("step %d, %s: loss %.4g, gradient norm %.4g", step, task.compute, report.loss, report.norm)
        largest = report.losses[:NUM_SHOWN]
        log.info("  largest losses: %s", ", ".join(f"{image_id!r} {loss:.4g}" for image_id, loss in largest))
        if report.module:
            log.info("  first module with NaN or Inf outputs: %s", report.module)
        if report.parameters:
            log.info("  parameters with NaN or Inf gradients: %s", ", ".join(report.parameters[:NUM_SHOWN]))
    return reports
