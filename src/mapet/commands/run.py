"""Stage: all of it, in order, with defaults."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mapet.commands.command import Command, command
from mapet.commands.evaluate import evaluate
from mapet.commands.fit_tokenizer import fit_tokenizer
from mapet.commands.pretrain import pretrain
from mapet.commands.report import report
from mapet.commands.tokenize import tokenize
from mapet.config.base import Config, as_options_of_section, build
from mapet.config.run import RunConfig
from mapet.errors import Interrupted, MapetError, shell_command
from mapet.run_state import read_or_none, record
from mapet.signals import RESUME_HINT

log = logging.getLogger("mapet")


@command(RunConfig, distributed=True)
def run(config: RunConfig) -> Path:
    """Tokenizer, tokens, pre-training, evaluation (if there are labels) and figures of a folder of images; returns the backbone's folder.

    Example:
      mapet run --images PHOTOS --out runs/photos
      mapet run --images PHOTOS --out runs/photos --pretrain.epochs 30 --fit-tokenizer.teacher resnet50x64_clip.openai
      mapet run runs/photos/config.yaml --resume
    """
    from mapet import distributed
    from mapet.config.shared import is_own_code
    from mapet.data.sources import scan
    from mapet.files import is_free
    from mapet.reports.page import NAME, write_run_report
    from mapet.training.tracking import require

    require(config.pretrain.track)  # before hours of tokenizing
    recipe = config.out / "config.yaml"
    tokenizer, tokens, pretrained = (config.out / name for name in ("tokenizer", "tokens", "pretrain"))
    backbone, figures = pretrained / "backbone", config.out / "figures"
    fitting: Any = config.fit_tokenizer
    own_code = fitting.teacher if is_own_code(fitting.teacher) else None
    begun = (pretrained / "config.yaml").exists()
    sources = [f"random:{backbone}", str(backbone)]
    configs = {  # all before anything is written: each stage refuses options that contradict each other
        stage: _config_of(stage, config, given)
        for stage, given in (
            (fit_tokenizer, {"out": tokenizer, "resume": True}),
            (tokenize, {"out": tokens, "tokenizer": tokenizer, "trust_teacher": own_code, "resume": True}),
            (pretrain, {"out": pretrained, "tokenizer": tokenizer, "tokens": tokens, "resume": begun}),
            (evaluate, {"backbone": sources, "test_images": config.test_images, "protocols": ["logistic", "knn"]}),
            (report, {"run": [pretrained], "figures_dir": figures, "trust_teacher": own_code}),
        )
    }
    state = read_or_none(config.out)
    evaluated = state is not None and "evaluation" in state.results
    if distributed.rank() == 0:
        made = {
            "fit_tokenizer": not is_free(tokenizer), "tokenize": not is_free(tokens), "pretrain": begun,
            "test_images": evaluated, "report": not is_free(figures),
        }  # fmt: skip
        _refuse_now(config, configs, made)
        _begin(config, recipe, frozenset(part for part, done in made.items() if not done))
    distributed.barrier()

    RESUME_HINT[0] = shell_command("run", recipe, "--resume")

    def do(stage: Command[..., Any, Any]) -> Any:
        log.info("--- %s", stage.__name__.replace("_", "-"))
        try:
            with _naming_options(stage):
                return stage(configs[stage])
        except (Interrupted, KeyboardInterrupt) as error:  # the latter where a stage has nothing to save
            what = error.what if isinstance(error, Interrupted) else "interrupted"
            raise Interrupted(what, shell_command("run", recipe, "--resume")) from None

    missing = {path for path in (tokenizer, backbone, figures) if is_free(path)}
    distributed.barrier()  # all have looked before one writes
    if tokenizer in missing:
        do(fit_tokenizer)
    do(tokenize)
    if backbone in missing:
        do(pretrain)
    if not evaluated and (config.test_images or scan(config.images).classes()):
        record(config.out, results={"evaluation": _with_baseline(do(evaluate), config)})
    elif not evaluated:
        log.info(
            "--- not evaluated: %s has no labels (two class folders or more), and there are no --test-images",
            config.images,
        )
    if figures in missing:
        do(report)
    write_run_report(config.out)
    log.info("what came out of it, in one page: %s", config.out / NAME)
    log.info(
        "done: backbone in %s; load it with mapet.load_backbone(%r) or timm.create_model('local-dir:%s', pretrained=True)",
        backbone,
        str(config.out),
        backbone,
    )
    return backbone


def _with_baseline(found: dict[str, dict[str, float]] | None, config: RunConfig) -> dict[str, dict[str, float]]:
    """Name what `evaluate` found of random weights and of the backbone, beside the test images and the majority's accuracy."""
    from mapet.evaluation.features import train_and_test

    _, test = train_and_test(config.images, config.test_images)
    data = {"majority_accuracy": test.majority_accuracy, "test_images": len(test.labels)}
    return dict(zip(("untrained", "pretrained"), (found or {}).values(), strict=False)) | {"data": data}


def _config_of(stage: Command[..., Any, Any], config: RunConfig, given: dict[str, Any]) -> Config:
    """A stage's own config: its section of the recipe, what all stages share, and what `run` gives it."""
    names = ("images", "seed", "device", "max_unreadable")
    shared = {name: getattr(config, name) for name in names} | given
    section = getattr(config, stage.__name__, None)  # `evaluate` has none
    own = section.model_dump(exclude_unset=True) if section else {}
    try:
        return build(
            stage.config_type,
            own | {key: value for key, value in shared.items() if key in stage.config_type.model_fields},
        )
    except MapetError as error:
        raise MapetError(f"{stage.__name__.replace('_', '-')}: {_as_options_of_run(str(error), stage)}") from None


@contextmanager
def _naming_options(stage: Command[..., Any, Any]) -> Iterator[None]:
    """What a stage calls --vocab-size is --fit-tokenizer.vocab-size here, in errors and in what is logged."""

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = _as_options_of_run(record.getMessage(), stage), None
        return True

    log.addFilter(rename)
    try:
        yield
    except MapetError as error:
        error.args = (_as_options_of_run(str(error), stage), *error.args[1:])
        raise
    finally:
        log.removeFilter(rename)


def _as_options_of_run(message: str, stage: Command[..., Any, Any]) -> str:
    """See `as_options_of_section`."""
    return as_options_of_section(message, stage.__name__, stage.config_type.model_fields, RunConfig.model_fields)


def _refuse_now(config: RunConfig, configs: dict[Command[..., Any, Any], Any], made: dict[str, bool]) -> None:
    """What a later stage would refuse, after hours perhaps, is refused before the first.

    Raises:
        MapetError: no such model or objective, sizes that don't fit together, labelled images that have no labels.
    """
    from mapet.data.sources import scan
    from mapet.evaluation.features import labelled, train_and_test
    from mapet.training.build import check_model_config

    pretraining = configs[pretrain]
    if not made["pretrain"]:
        with _naming_options(pretrain):
            check_model_config(pretraining, configs[fit_tokenizer])
        if pretraining.probe_images is not None:
            labelled(scan(pretraining.probe_images))
    if config.test_images is not None and not made["test_images"]:
        try:
            train_and_test(config.images, config.test_images)
        except MapetError as error:
            raise MapetError(
                f"{error}. --test-images are to test a probe on, which is trained on the labels of --images: leave them out if "
                "there are none"
            ) from None


def _begin(config: RunConfig, recipe: Path, free: frozenset[str]) -> None:
    """A new folder with the recipe, or the old one if it is the same but for the options of `free` stages, which have
    made nothing yet."""
    from mapet.config.base import differences, read_recipe, write_recipe
    from mapet.data.sources import scan
    from mapet.files import new_folder
    from mapet.run_state import is_unused
    from mapet.training.run_folder import NOTHING_TO_RESUME, restart_hint

    if is_unused(config.out, "run"):
        images = scan(config.images)  # fail before anything is written
        if config.resume:
            log.warning(NOTHING_TO_RESUME, config.out)
        log.info("%s images in %s", f"{len(images):,}", config.images)
        write_recipe(config, recipe)
        return
    if not (config.resume and recipe.exists()):
        new_folder(config.out, resume_hint=", or go on with --resume")  # refuses it
    old = build(RunConfig, read_recipe(recipe), recipe)
    may_change = frozenset({"resume", "device", "max_unreadable"})
    moved = {"out"} | ({"images"} if old.images != config.images and _made_of(config) else set())
    if changed := differences(old, config, may_change | free | moved):
        raise MapetError(
            f"{config.out} was started with another recipe ({'; '.join(changed)}). To go on as it was: "
            f"{shell_command('run', recipe, '--resume')}; to start {restart_hint(config.out, '--pretrain.init-from')}"
        )
    if differences(old, config, may_change):
        write_recipe(config, recipe)


def _made_of(config: RunConfig) -> bool:
    """Whether the tokenizer that is there was fitted on the images that are given now, wherever they lie."""
    from mapet.data.sources import scan
    from mapet.files import read_json

    description = config.out / "tokenizer" / "visual_tokenizer.json"
    if not description.is_file():
        return False
    return read_json(description, "tokenizer")["fit_config"].get("images_hash") == scan(config.images).hash
