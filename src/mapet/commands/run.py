"""Run the whole pipeline, stage by stage."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from mapet.commands.command import Command, command
from mapet.commands.evaluate import evaluate
from mapet.commands.fit_tokenizer import fit_tokenizer
from mapet.commands.pretrain import pretrain
from mapet.commands.report import report
from mapet.commands.tokenize import tokenize
from mapet.config.base import Config, build, differences, read_recipe, write_recipe
from mapet.config.pipeline import RunConfig
from mapet.config.pretraining import PretrainConfig
from mapet.config.shared import is_own_code
from mapet.config.tokenizers import FitTokenizerConfig
from mapet.errors import Interrupted, MapetError, option, shell_command, spell_in_section
from mapet.run_state import read_or_none, record
from mapet.signals import RESUME_HINT

log = logging.getLogger("mapet")
SHARED = ("images", "seed", "device", "max_unreadable")
"""Options of `run` that it hands to every stage which has them."""


class Stage(NamedTuple):
    """A command with its config.

    Attributes:
        begun: whether it has written something; until then its options may change.
        done: whether it is finished.
    """

    command: Command[..., Any, Any]
    config: Config
    begun: bool
    done: bool

    @property
    def name(self) -> str:
        """Its section of the options."""
        return self.command.__name__


@command(RunConfig, distributed=True)
def run(config: RunConfig) -> Path:
    """Tokenizer, tokens, pre-training, evaluation (if there are labels) and figures of a folder of images; returns the backbone's folder.

    Example:
      mapet run --images PHOTOS --out runs/photos
      mapet run --images PHOTOS --out runs/photos --pretrain.epochs 30 --fit-tokenizer.teacher resnet50x64_clip.openai
      mapet run runs/photos/config.yaml --resume
    """
    from mapet import distributed
    from mapet.reports.page import NAME, write_run_report
    from mapet.training.run_folder import require

    with spell_in_section("pretrain", RunConfig.model_fields):
        require(config.pretrain.track)  # before hours of tokenizing
    stages = _plan(config)
    if distributed.rank() == 0:
        _check_later_stages(config, stages)
        _begin(config, stages)
    distributed.barrier()  # all have looked before one writes
    again = shell_command("run", config.out / "config.yaml", "--resume")
    RESUME_HINT[0] = again
    for stage in stages:
        if stage.done:
            continue
        log.info("--- %s", stage.name.replace("_", "-"))
        try:
            with spell_in_section(stage.name, RunConfig.model_fields):
                result = stage.command(stage.config)
        except (Interrupted, KeyboardInterrupt) as error:  # the latter where a stage has nothing to save
            raise Interrupted(error.what if isinstance(error, Interrupted) else "interrupted", again) from None
        if stage.command is evaluate:
            record(config.out, results={"evaluation": _with_baseline(result, config)})
    write_run_report(config.out)
    backbone = config.out / "pretrain" / "backbone"
    log.info("what came out of it, in one page: %s", config.out / NAME)
    log.info(
        "done: backbone in %s; load it with mapet.load_backbone(%r) or timm.create_model('local-dir:%s', pretrained=True)",
        backbone, str(config.out), backbone,
    )  # fmt: skip
    return backbone


def _plan(config: RunConfig) -> list[Stage]:
    """Build the config of every stage before anything is written: contradicting options are refused now."""
    from mapet.files import is_free

    tokenizer, tokens, pretrained = (config.out / name for name in ("tokenizer", "tokens", "pretrain"))
    backbone, figures = pretrained / "backbone", config.out / "figures"
    trusted = config.fit_tokenizer.teacher if is_own_code(config.fit_tokenizer.teacher) else None
    begun = (pretrained / "config.yaml").exists()

    def stage(of: Command[..., Any, Any], begun: bool, done: bool, **given: Any) -> Stage:
        shared = {name: getattr(config, name) for name in SHARED if name in of.config_type.model_fields}
        options = getattr(config, of.__name__, None)  # `evaluate` and `report` have none
        section = options.model_dump(exclude_unset=True) if options else {}
        with spell_in_section(of.__name__, RunConfig.model_fields):
            return Stage(of, build(of.config_type, section | shared | given), begun, done)

    made = {path: not is_free(path) for path in (tokenizer, tokens, backbone, figures)}
    state = read_or_none(config.out)
    evaluated = state is not None and "evaluation" in state.results
    return [
        stage(fit_tokenizer, made[tokenizer], made[tokenizer], out=tokenizer, resume=True),
        stage(tokenize, made[tokens], False, out=tokens, tokenizer=tokenizer, trust_teacher=trusted, resume=True),
        stage(pretrain, begun, made[backbone], out=pretrained, tokenizer=tokenizer, tokens=tokens, resume=begun),
        stage(
            evaluate, evaluated, evaluated or not _has_labels(config), backbone=[f"random:{backbone}", str(backbone)],
            test_images=config.test_images, protocols=["logistic", "knn"],
        ),
        stage(report, made[figures], made[figures], run=[pretrained], figures_dir=figures, trust_teacher=trusted),
    ]  # fmt: skip


def _with_baseline(found: dict[str, dict[str, float]] | None, config: RunConfig) -> dict[str, dict[str, float]]:
    """Name what `evaluate` found of random weights and of the backbone, beside the test images and the majority's accuracy."""
    from mapet.evaluation.datasets import train_and_test

    _, test = train_and_test(config.images, config.test_images)
    data = {"majority_accuracy": test.majority_accuracy, "test_images": len(test.labels)}
    return dict(zip(("untrained", "pretrained"), (found or {}).values(), strict=False)) | {"data": data}


def _has_labels(config: RunConfig) -> bool:
    from mapet.data.sources import scan

    if config.test_images or scan(config.images).classes():
        return True
    log.info(
        "--- not evaluated: %s has no labels (two class folders or more), and there are no %s",
        config.images, option("test_images"),
    )  # fmt: skip
    return False


def _check_later_stages(config: RunConfig, stages: list[Stage]) -> None:
    """Refuse now what a later stage would refuse, perhaps after hours.

    Raises:
        MapetError: no such model or objective, sizes that don't fit together, labelled images that have no labels, no tracker.
    """
    from mapet.data.sources import scan
    from mapet.evaluation.datasets import labelled, train_and_test
    from mapet.training.tasks.pretraining import check_model_config

    fitting, _, pretraining, evaluation, _ = stages
    assert isinstance(fitting.config, FitTokenizerConfig) and isinstance(pretraining.config, PretrainConfig)
    if not pretraining.begun:
        with spell_in_section("pretrain", RunConfig.model_fields):
            check_model_config(pretraining.config, fitting.config)
        if config.pretrain.probe_images is not None:
            labelled(scan(config.pretrain.probe_images))
    if config.test_images is not None and not evaluation.begun:
        try:
            train_and_test(config.images, config.test_images)
        except MapetError as error:
            raise MapetError(
                f"{error}. {option('test_images')} are to test a probe on, which is trained on the labels of {option('images')}: "
                "leave them out if there are none"
            ) from None


def _begin(config: RunConfig, stages: list[Stage]) -> None:
    """Write the config into a new folder, or check that it is the old one's, but for stages that have made nothing yet."""
    from mapet.data.sources import scan
    from mapet.files import new_folder
    from mapet.run_state import is_unused
    from mapet.training.run_folder import NOTHING_TO_RESUME, restart_hint

    recipe = config.out / "config.yaml"
    if is_unused(config.out, "run"):
        images = scan(config.images)  # fail before anything is written
        if config.resume:
            log.warning(NOTHING_TO_RESUME, config.out)
        log.info("%s images in %s", f"{len(images):,}", config.images)
        write_recipe(config, recipe)
        return
    if not (config.resume and recipe.exists()):
        new_folder(config.out, resume_hint=f", or go on with {option('resume', True)}")  # refuses it
    old = build(RunConfig, read_recipe(recipe), recipe)
    may_change = {"resume", "device", "max_unreadable"} | {stage.name for stage in stages if not stage.begun}
    may_change |= set() if stages[3].begun else {"test_images"}
    moved = {"out"} | ({"images"} if old.images != config.images and _same_images(config) else set())
    if changed := differences(old, config, frozenset(may_change | moved)):
        with spell_in_section("pretrain", RunConfig.model_fields):
            restart = restart_hint(config.out)
        raise MapetError(
            f"{config.out} was started with another recipe ({'; '.join(changed)}). To go on as it was: "
            f"{shell_command('run', recipe, '--resume')}; to start {restart}"
        )
    write_recipe(config, recipe)


def _same_images(config: RunConfig) -> bool:
    """Return whether the tokenizer was fitted on the images that are given now, wherever they lie."""
    from mapet.data.sources import scan
    from mapet.files import read_json

    description = config.out / "tokenizer" / "visual_tokenizer.json"
    if not description.is_file():
        return False
    return read_json(description, "tokenizer")["fit_config"].get("images_hash") == scan(config.images).hash
