"""The cells of a study: every combination of the grid's values with every seed, at equal epochs and equal compute."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapet.config.base import build
from mapet.config.pretrain import PretrainConfig, PretrainOptions
from mapet.config.shared import is_own_code
from mapet.config.study import StudyConfig
from mapet.errors import MapetError, did_you_mean, option
from mapet.studies.tokenizers import tokenizer_folder
from mapet.training.estimate import flops_per_image

EPOCHS, COMPUTE = "equal epochs", "equal compute"


@dataclass(frozen=True)
class GridCell:
    """One cell: what to run.

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
        words = [*(value for _, value in sorted(self.factors.items())), f"seed {self.seed}"]
        return ", ".join([*words, *([] if EPOCHS in self.budgets else [f"{self.options['epochs']} epochs"])])

    @property
    def folder(self) -> str:
        return file_name(self.name)


def file_name(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)


def grid_cells(config: StudyConfig) -> list[GridCell]:
    """Every combination, with every seed, at equal epochs.

    Raises:
        MapetError: an empty or doubled value, an unknown name, options that `pretrain` refuses.
    """
    known = [*PretrainOptions.model_fields, "tokenizer"]
    if not config.grid:
        raise MapetError("the grid is empty: give at least one name with values, e.g. objective: [mim, pim, mapet]")
    if not config.tokenizers:
        raise MapetError("no tokenizers: give at least one, e.g. tokenizers: {pixels: {image_size: 32, patch_size: 4}}")
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    for name, values in config.grid.items():
        if isinstance(values, list) and name not in known:
            raise MapetError(
                f"grid: '{name}' is no option of `pretrain`{did_you_mean(name, known)}; options that vary together are "
                f"written {name}: {{NAME: {{option: value}}}}"
            )
        axis = values if isinstance(values, dict) else {_word(value): {name: value} for value in values}
        if not axis or len(axis) < len(values):
            raise MapetError(f"grid: '{name}' has {'no values' if not axis else f'a value twice: {values}'}")
        axes[name] = axis
    if (name := compared(config)) not in axes:
        raise MapetError(
            f"compare: '{name}' is not varied{did_you_mean(name, axes)}; {option('compare_by')} takes one of {', '.join(axes)}"
        )
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise MapetError(f"seeds: {config.seeds} has {'none' if not config.seeds else 'one twice'}")
    shared = config.pretrain.model_dump(exclude_unset=True)
    seen: dict[str, GridCell] = {}
    for names in itertools.product(*axes.values()):
        factors = dict(zip(axes, names, strict=True))
        options = dict(shared)
        for axis_name, value in factors.items():
            options |= axes[axis_name][value]
        tokenizer = str(options.pop("tokenizer", next(iter(config.tokenizers))))
        if tokenizer not in config.tokenizers:
            raise MapetError(f"grid: no tokenizer '{tokenizer}'{did_you_mean(tokenizer, config.tokenizers)}")
        options.setdefault("epochs", PretrainConfig.model_fields["epochs"].default)
        try:
            resolved = build(PretrainOptions, options).model_dump_json() + tokenizer
        except MapetError as error:
            raise MapetError(f"grid, {factors}: {error}") from None
        if resolved in seen:
            raise MapetError(f"grid: {factors} and {seen[resolved].factors} are the same cell")
        seen[resolved] = GridCell(factors, 0, tokenizer, options)
    return [replace(cell, seed=seed) for seed in config.seeds for cell in seen.values()]  # all of one seed first


def compared(config: StudyConfig) -> str:
    """The varied name whose values are compared."""
    return config.compare_by or (next(iter(config.grid)) if len(config.grid) == 1 else "objective")


def _word(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)


def with_budgets(config: StudyConfig, cells: list[GridCell]) -> list[GridCell]:
    """The cells with their cost, and those that are run longer to cost as much as the dearest of their comparison."""
    costs: dict[tuple[str, ...], float] = {}

    def cost(cell: GridCell) -> float:
        key = tuple(cell.factors.values())
        if key not in costs:
            made = (tokenizer_folder(config, cell.tokenizer) / "tokenizer").exists()
            costs[key] = flops_per_image(pretrain_config(config, cell)) if made else 0.0
        return costs[key]

    cells = [replace(cell, flops_per_image=cost(cell)) for cell in cells]
    if not config.equal_compute:
        return cells
    found = []
    for cell in cells:
        rivals = [c for c in cells if _without(c.factors, compared(config)) == _without(cell.factors, compared(config))]
        most = max(c.flops_per_image * c.options["epochs"] for c in rivals)
        epochs = round(most / cell.flops_per_image) if cell.flops_per_image else cell.options["epochs"]
        if epochs == cell.options["epochs"]:
            found.append(replace(cell, budgets=(EPOCHS, COMPUTE)))
        else:
            longer = replace(cell, options=cell.options | {"epochs": epochs}, budgets=(COMPUTE,))
            found += [cell, longer]
    return found


def _without(factors: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in factors.items() if key != name}


def pretrain_config(config: StudyConfig, cell: GridCell) -> PretrainConfig:
    tokenizer = tokenizer_folder(config, cell.tokenizer)
    teacher = getattr(config.tokenizers[cell.tokenizer], "teacher")  # noqa: B009 (a made-up class)
    given = {
        "images": config.images,
        "out": cell_folder(config, cell) / "pretrain",
        "tokenizer": tokenizer / "tokenizer",
        "tokens": tokenizer / "tokens",
        "trust_teacher": teacher if is_own_code(teacher) else None,
        "seed": cell.seed,
    }
    return build(PretrainConfig, cell.options | given)


def cell_folder(config: StudyConfig, cell: GridCell) -> Path:
    return config.out / "cells" / cell.folder
