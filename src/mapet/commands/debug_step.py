"""Stage: a step whose numbers went wrong, once more."""

import logging
from typing import TYPE_CHECKING, Any

from mapet.commands.command import command
from mapet.config.evaluation import FinetuneConfig
from mapet.config.pretraining import DebugStepConfig, PretrainConfig
from mapet.config.shared import TrainerConfig
from mapet.config.tokenizers import TrainTokenizerConfig

if TYPE_CHECKING:
    from mapet.training.checkpoint import StepReport

log = logging.getLogger("mapet")
CONFIGS: dict[str, type[TrainerConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "train-tokenizer": TrainTokenizerConfig,
}


@command(DebugStepConfig)
def debug_step(config: DebugStepConfig) -> "list[StepReport]":
    """Compute again the steps that stopped a run: which images, which module, which gradients are not finite.

    Example:
      mapet debug-step runs/vit/debug/step-00001200
      mapet debug-step runs/vit/debug/step-00001200 --precision float32
    """
    from mapet.config.base import build, read_recipe
    from mapet.data.dataset import EpochSampler
    from mapet.device import Compute
    from mapet.errors import MapetError
    from mapet.run_state import command_of, pretrain_folder
    from mapet.training.checkpoint import BUNDLE, debug_step, load_debug_bundle
    from mapet.training.task import Task
    from mapet.training.tasks.finetuning import FinetuningTask
    from mapet.training.tasks.pretraining import PretrainingTask
    from mapet.training.tasks.vqkd import VQKDTask

    folder = config.bundle.absolute().parent.parent
    recipe = folder / "config.yaml"
    if not (recipe.is_file() and (config.bundle / BUNDLE).is_file()):
        kept = sorted((pretrain_folder(config.bundle) / "debug").glob("step-*"))
        way = (
            f"did you mean {kept[0]}?"
            if kept
            else "a run that stopped for numbers that are not finite has them, as debug/step-*"
        )
        raise MapetError(f"{config.bundle} is not the replay bundle of a run: {way}")
    tasks: dict[str | None, type[Task[Any, Any]]] = {
        task.command: task for task in (PretrainingTask, FinetuningTask, VQKDTask)
    }
    task = tasks.get(command_of(folder), PretrainingTask)()
    run = build(CONFIGS[task.command], read_recipe(recipe), recipe)
    given = {name: getattr(config, name) for name in ("images", "precision", "trust_teacher") if getattr(config, name)}
    run = run.model_copy(update={"device": config.device} | given)
    task.build(run, Compute.choose(run.device, run.precision))
    sampler = EpochSampler(task.indices, task.config.batch_size, run.epochs, run.seed)
    looks = []
    for step in load_debug_bundle(config.bundle, task, sampler):
        look = debug_step(task, sampler, step)
        looks.append(look)
        log.info("step %d, %s: loss %.4g, gradient norm %.4g", step, task.compute, look.loss, look.norm)
        log.info("  largest losses: %s", ", ".join(f"{name!r} {loss:.4g}" for name, loss in look.losses[:5]))
        if look.module:
            log.info("  not finite first in: %s", look.module)
        if look.parameters:
            log.info("  gradients not finite: %s", ", ".join(look.parameters[:5]))
    return looks
