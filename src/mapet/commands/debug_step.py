"""Stage: a step whose numbers went wrong, once more."""

import logging
from typing import TYPE_CHECKING

from mapet.commands.command import command
from mapet.config.debug_step import ReplayConfig

if TYPE_CHECKING:
    from mapet.training.nonfinite import Look

log = logging.getLogger("mapet")


@command(ReplayConfig)
def replay(config: ReplayConfig) -> "list[Look]":
    """Compute again the steps that stopped a run: which images, which module, which gradients are not finite.

    Example:
      mapet replay --bundle runs/vit/replay/step-00001200
      mapet replay --bundle runs/vit/replay/step-00001200 --precision float32
    """
    from mapet.config.base import build, read_recipe
    from mapet.config.pretrain import PretrainConfig
    from mapet.errors import MapetError
    from mapet.run_state import pretrain_folder
    from mapet.training.nonfinite import BUNDLE, load_bundle, replay
    from mapet.training.training_setup import TrainingSetup

    recipe = config.bundle.absolute().parent.parent / "config.yaml"
    if not (recipe.is_file() and (config.bundle / BUNDLE).is_file()):
        kept = sorted((pretrain_folder(config.bundle) / "replay").glob("step-*"))
        way = (
            f"did you mean {kept[0]}?"
            if kept
            else "a run that stopped for numbers that are not finite has them, as replay/step-*"
        )
        raise MapetError(f"{config.bundle} is not the replay bundle of a run: {way}")
    run = build(PretrainConfig, read_recipe(recipe), recipe)
    given = {name: getattr(config, name) for name in ("images", "precision", "trust_teacher") if getattr(config, name)}
    setting = TrainingSetup.from_config(run.model_copy(update={"device": config.device} | given))
    looks = []
    for step in load_bundle(config.bundle, setting):
        look = replay(setting, step)
        looks.append(look)
        log.info("step %d, %s: loss %.4g, gradient norm %.4g", step, setting.compute, look.loss, look.norm)
        log.info("  largest losses: %s", ", ".join(f"{name!r} {loss:.4g}" for name, loss in look.losses[:5]))
        if look.module:
            log.info("  not finite first in: %s", look.module)
        if look.parameters:
            log.info("  gradients not finite: %s", ", ".join(look.parameters[:5]))
    return looks
