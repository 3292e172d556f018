"""The trials of a study: every combination of the grid's values with every seed, at equal epochs and equal compute."""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapet.config.base import build
from mapet.config.pipeline import StudyConfig
from mapet.config.pretraining import PretrainConfig, PretrainOptions
from mapet.config.shared import is_own_code
from mapet.errors import MapetError, did_you_mean, option
from mapet.files import is_free
from mapet.studies.tokenizers import tokenizer_folder
from mapet.training.estimate import flops_per_image

EPOCHS, COMPUTE = "equal epochs", "equal compute"
Axes = dict[str, dict[str, dict[str, Any]]]
"""Name of a factor -> name of a value -> the options that it stands for."""


@dataclass(frozen=True)
class Trial:
    """One pre-training run of a study.

    Attributes:
        factors: the grid's name -> the value's.
        options: of `pretrain`.
        budgets: the comparisons it takes part in.
    """

    factors: dict[str, str]
    seed: int
    tokenizer: str
    options: dict[str, Any]
    budgets: tuple[str, ...] = (EPOCHS,)
    flops_per_image: float = 0.0

    @property
    def name(self) -> str:
        parts = [*(value for _, value in sorted(self.factors.items())), f"seed {self.seed}"]
        return ", ".join(parts if EPOCHS in self.budgets else [*parts, f"{self.options['epochs']} epochs"])


def grid_trials(config: StudyConfig) -> list[Trial]:
    """Return every combination with every seed, at equal epochs; all of one seed first.

    Raises:
        MapetError: an empty or doubled value, an unknown name, options that `pretrain` refuses.
    """
    if not config.tokenizers:
        raise MapetError("no tokenizers: give at least one, e.g. tokenizers: {pixels: {image_size: 32, patch_size: 4}}")
    axes = _axes(config)
    if (name := compared_factor(config)) not in axes:
        known = f"{option('compare_by')} takes one of {', '.join(axes)}"
        raise MapetError(f"compare_by: '{name}' is not varied{did_you_mean(name, axes)}; {known}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise MapetError(f"seeds: {config.seeds} has {'none' if not config.seeds else 'one twice'}")
    combinations = [dict(zip(axes, names, strict=True)) for names in itertools.product(*axes.values())]
    trials: dict[str, Trial] = {}
    for factors in combinations:
        trial = _trial(config, axes, factors)
        try:
            resolved = build(PretrainOptions, trial.options).model_dump_json() + trial.tokenizer
        except MapetError as error:
            raise MapetError(f"grid, {factors}: {error}") from None
        if resolved in trials:
            raise MapetError(f"grid: {factors} and {trials[resolved].factors} are the same trial")
        trials[resolved] = trial
    return [replace(trial, seed=seed) for seed in config.seeds for trial in trials.values()]


def _axes(config: StudyConfig) -> Axes:
    known = [*PretrainOptions.model_fields, "tokenizer"]
    if not config.grid:
        raise MapetError("the grid is empty: give at least one name with values, e.g. objective: [mim, pim, mapet]")
    axes: Axes = {}
    for name, values in config.grid.items():
        if isinstance(values, list) and name not in known:
            raise MapetError(
                f"grid: '{name}' is no option of `pretrain`{did_you_mean(name, known)}; options that vary together are "
                f"written {name}: {{NAME: {{option: value}}}}"
            )
        axis = values if isinstance(values, dict) else {_value_name(value): {name: value} for value in values}
        if not axis or len(axis) < len(values):
            raise MapetError(f"grid: '{name}' has {'no values' if not axis else f'a value twice: {values}'}")
        axes[name] = axis
    return axes


def _trial(config: StudyConfig, axes: Axes, factors: dict[str, str]) -> Trial:
    options = {"epochs": PretrainConfig.model_fields["epochs"].default}
    options |= config.pretrain.model_dump(exclude_unset=True)
    for name, value in factors.items():
        options |= axes[name][value]
    tokenizer = str(options.pop("tokenizer", next(iter(config.tokenizers))))
    if tokenizer not in config.tokenizers:
        raise MapetError(f"grid: no tokenizer '{tokenizer}'{did_you_mean(tokenizer, config.tokenizers)}")
    return Trial(factors, 0, tokenizer, options)


def compared_factor(config: StudyConfig) -> str:
    """Return the varied name whose values are compared."""
    return config.compare_by or (next(iter(config.grid)) if len(config.grid) == 1 else "objective")


def _value_name(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)


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
    result = []
    for trial in trials:
        rivals = [other for other in trials if _setting(config, other) == _setting(config, trial)]
        most = max(rival.flops_per_image * rival.options["epochs"] for rival in rivals)
        epochs = round(most / trial.flops_per_image) if trial.flops_per_image else trial.options["epochs"]
        if epochs == trial.options["epochs"]:
            result.append(replace(trial, budgets=(EPOCHS, COMPUTE)))
        else:
            result += [trial, replace(trial, options=trial.options | {"epochs": epochs}, budgets=(COMPUTE,))]
    return result


def _setting(config: StudyConfig, trial: Trial) -> dict[str, str]:
    return {name: value for name, value in trial.factors.items() if name != compared_factor(config)}


def pretrain_config(config: StudyConfig, trial: Trial) -> PretrainConfig:
    """Return what `pretrain` is called with."""
    folder, teacher = tokenizer_folder(config, trial.tokenizer), config.tokenizers[trial.tokenizer].teacher
    given = {
        "images": config.images,
        "out": trial_folder(config, trial) / "pretrain",
        "tokenizer": folder / "tokenizer",
        "tokens": folder / "tokens",
        "trust_teacher": teacher if is_own_code(teacher) else None,
        "seed": trial.seed,
    }
    return build(PretrainConfig, trial.options | given)


def trial_folder(config: StudyConfig, trial: Trial) -> Path:
    """Return where a trial's run.json, trial.log and pre-training run lie."""
    return config.out / "trials" / re.sub(r"[^\w.=+-]+", "_", trial.name)
