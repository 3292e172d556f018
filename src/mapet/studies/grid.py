"""What a study runs: every combination of the grid's values with every seed, and the options of each command."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from mapet.config.base import Config, build, differences
from mapet.config.evaluation import FinetuneOptions
from mapet.config.pipeline import StudyConfig
from mapet.config.pretraining import PretrainConfig, PretrainOptions
from mapet.config.shared import is_own_code
from mapet.config.tokenizers import FitTokenizerConfig, TokenizeConfig
from mapet.errors import MapetError, did_you_mean, option
from mapet.files import is_free
from mapet.run_state import read_or_none
from mapet.studies.statistics import COMPUTE, EPOCHS, Trial
from mapet.training.estimate import flops_per_image

SAME_TOKENS = frozenset({"memory_gb", "images", "out", "tokenizer", "device", "resume", "trust_teacher"})
"""Options that change no token: how fast, and where things are, whose hashes are compared elsewhere."""
SAME_TRIAL = frozenset({"images", "out", "tokenizer", "tokens", "device", "trust_teacher", "track"})
"""Options that may differ when a trial is resumed: the study may have moved, and trackers are only told."""
EVALUATION = frozenset({"finetune", "test_images", "ood_images", "labels_per_class"})
Axes = dict[str, dict[str, dict[str, Any]]]
"""Name of a factor -> name of a value -> the options that it stands for."""


class TrialConfig(Config):
    """Everything that a trial's process needs to know.

    Attributes:
        labels_per_class: None means all.
    """

    resume: ClassVar[bool] = True
    pretrain: PretrainConfig
    finetune: FinetuneOptions
    test_images: str
    ood_images: dict[str, str]
    labels_per_class: list[int | None]
    num_images: int
    flops_per_epoch: float


# ---- the grid


def grid_trials(config: StudyConfig) -> list[Trial]:
    """Return every combination with every seed, at equal epochs; all of one seed first.

    Raises:
        MapetError: a doubled value, an unknown name, options that `pretrain` refuses.
    """
    axes = _axes(config)
    if (name := compared_factor(config)) not in axes:
        known = f"{option('compare_by')} takes one of {', '.join(axes)}"
        raise MapetError(f"compare_by: '{name}' is not varied{did_you_mean(name, axes)}; {known}")
    if len(set(config.seeds)) < len(config.seeds):
        raise MapetError(f"seeds: {config.seeds} has one twice")
    trials: dict[str, Trial] = {}
    for names in itertools.product(*axes.values()):
        factors = dict(zip(axes, names, strict=True))
        options: dict[str, Any] = {"epochs": PretrainConfig.model_fields["epochs"].default}
        for chosen in [config.pretrain.model_dump(exclude_unset=True), *(axes[axis][factors[axis]] for axis in axes)]:
            options |= chosen
        tokenizer = str(options.pop("tokenizer", next(iter(config.tokenizers))))
        if tokenizer not in config.tokenizers:
            raise MapetError(f"grid: no tokenizer '{tokenizer}'{did_you_mean(tokenizer, config.tokenizers)}")
        try:
            resolved = build(PretrainOptions, options).model_dump_json() + tokenizer
        except MapetError as error:
            raise MapetError(f"grid, {factors}: {error}") from None
        if resolved in trials:
            raise MapetError(f"grid: {factors} and {trials[resolved].factors} are the same trial")
        trials[resolved] = Trial(factors, 0, tokenizer, options)
    return [replace(trial, seed=seed) for seed in config.seeds for trial in trials.values()]


def _axes(config: StudyConfig) -> Axes:
    known = [*PretrainOptions.model_fields, "tokenizer"]
    axes: Axes = {}
    for name, values in config.grid.items():
        if isinstance(values, list) and name not in known:
            raise MapetError(
                f"grid: '{name}' is no option of `pretrain`{did_you_mean(name, known)}; options that vary together are "
                f"written {name}: {{NAME: {{option: value}}}}"
            )
        if isinstance(values, dict):
            axes[name] = values
        else:
            words = [" to ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
            axes[name] = {word: {name: value} for word, value in zip(words, values, strict=True)}
        if not values or len(axes[name]) < len(values):
            raise MapetError(f"grid: '{name}' has {f'a value twice: {values}' if values else 'no values'}")
    return axes


def compared_factor(config: StudyConfig) -> str:
    """Return the varied name whose values are compared."""
    return config.compare_by or (next(iter(config.grid)) if len(config.grid) == 1 else "objective")


def with_budgets(config: StudyConfig, trials: list[Trial]) -> list[Trial]:
    """Return the trials with their cost, and longer ones that cost as much as the most expensive of their comparison."""
    costs: dict[str, float] = {}
    for trial in trials:
        if str(trial.factors) not in costs:
            made = not is_free(tokenizer_folder(config, trial.tokenizer) / "tokenizer")
            costs[str(trial.factors)] = flops_per_image(pretrain_config(config, trial)) if made else 0.0
    trials = [replace(trial, flops_per_image=costs[str(trial.factors)]) for trial in trials]
    if not config.equal_compute:
        return trials
    most: dict[str, float] = {}
    for trial in trials:
        setting, cost = str(trial.setting(compared_factor(config))), trial.flops_per_image * trial.options["epochs"]
        most[setting] = max(cost, most.get(setting, 0.0))
    result = []
    for trial in trials:
        epochs = trial.options["epochs"]
        if trial.flops_per_image:
            epochs = round(most[str(trial.setting(compared_factor(config)))] / trial.flops_per_image)
        if epochs == trial.options["epochs"]:
            result.append(replace(trial, budgets=(EPOCHS, COMPUTE)))
        else:
            result += [trial, replace(trial, options=trial.options | {"epochs": epochs}, budgets=(COMPUTE,))]
    return result


# ---- options of the commands


def tokenizer_folder(config: StudyConfig, name: str) -> Path:
    """Return the folder that holds `tokenizer` and `tokens`."""
    return config.out / "tokenizers" / name


def tokenizer_configs(config: StudyConfig, name: str) -> tuple[FitTokenizerConfig, TokenizeConfig]:
    """Return what `fit-tokenizer` and `tokenize` are called with.

    Raises:
        MapetError: options that contradict each other, or other options than those it was made with.
    """
    folder, options = tokenizer_folder(config, name), config.tokenizers[name].model_dump(exclude_unset=True)
    shared = {"images": config.images, "device": config.devices[0], "resume": True}
    try:
        fitting = build(FitTokenizerConfig, options | shared | {"out": folder / "tokenizer"})
    except MapetError as error:
        raise MapetError(f"tokenizer '{name}': {error}") from None
    teacher = fitting.teacher if is_own_code(fitting.teacher) else None
    given = {"out": folder / "tokens", "tokenizer": fitting.out, "trust_teacher": teacher}
    tokenizing = build(TokenizeConfig, config.tokenize.model_dump(exclude_unset=True) | shared | given)
    for now in (fitting, tokenizing):
        state = read_or_none(now.out)
        if state and (changed := differences(build(type(now), state.config), now, SAME_TOKENS)):
            raise MapetError(
                f"{folder} was made with other options ({'; '.join(changed)}): use the same, another name for it, or a new {option('out')}"
            )
    return fitting, tokenizing


def trial_folder(config: StudyConfig, trial: Trial) -> Path:
    """Return where a trial's run.json, trial.log and pre-training run lie."""
    return config.out / "trials" / re.sub(r"[^\w.=+-]+", "_", trial.name)


def pretrain_config(config: StudyConfig, trial: Trial) -> PretrainConfig:
    """Return what `pretrain` is called with."""
    folder, teacher = tokenizer_folder(config, trial.tokenizer), config.tokenizers[trial.tokenizer].teacher
    given = {"images": config.images, "out": trial_folder(config, trial) / "pretrain", "seed": trial.seed}
    given |= {"tokenizer": folder / "tokenizer", "tokens": folder / "tokens"}
    return build(PretrainConfig, trial.options | given | {"trust_teacher": teacher if is_own_code(teacher) else None})


def trial_config(config: StudyConfig, trial: Trial, num_images: int) -> TrialConfig:
    """Return what a trial's process is called with."""
    return TrialConfig(
        pretrain=pretrain_config(config, trial), finetune=config.finetune, test_images=config.test_images,
        ood_images=config.ood_images, num_images=num_images, flops_per_epoch=trial.flops_per_image * num_images,
        labels_per_class=[None if amount == "all" else amount for amount in config.labels_per_class],
    )  # fmt: skip


def check_same_trial(folder: Path, now: TrialConfig) -> None:
    """Check that a trial that was begun has the same options; how it is evaluated may change until it is.

    Raises:
        MapetError: its options are others.
    """
    state = read_or_none(folder)
    if state is None or not (folder / "pretrain").exists():
        return
    old = build(TrialConfig, state.config)
    free = frozenset({"pretrain", "flops_per_epoch"}) | (frozenset() if state.status == "finished" else EVALUATION)
    if changed := differences(old.pretrain, now.pretrain, SAME_TRIAL) + differences(old, now, free):
        raise MapetError(
            f"{folder} was run with other options ({'; '.join(changed)}): use the same, or a new {option('out')}"
        )
