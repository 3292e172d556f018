"""Stage: a grid of pre-training runs, each evaluated alike, and the report that compares them.

`grid` says which cells there are, `tokenizers` makes what they share, `cells` runs and evaluates them, `summary` hands what came out to
the report.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mapet.commands.command import command
from mapet.config.base import write_recipe
from mapet.config.study import StudyConfig
from mapet.errors import Interrupted, MapetError, option

if TYPE_CHECKING:
    from mapet.studies.grid import GridCell

log = logging.getLogger("mapet")


@command(StudyConfig)
def study(config: StudyConfig) -> Path:
    """Compare objectives, tokenizers, ratios, models: run a grid, evaluate each cell, report; returns the report's folder.

    Example:
      mapet study --images PHOTOS --test-images TEST --out study --tokenizers 'pixels={}' --grid 'objective=[mim, pim, mapet]'
      mapet study study.yaml
      mapet study study.yaml --devices cuda:0 cuda:1
      mapet study study.yaml --report-only
    """
    from mapet.data.sources import scan
    from mapet.evaluation.features import train_and_test
    from mapet.studies.grid import cell_folder, grid_cells, with_budgets
    from mapet.studies.summary import write
    from mapet.studies.tokenizers import make_tokenizers
    from mapet.studies.trials import run_cells

    cells = grid_cells(config)
    for name, folder in {"test_images": config.test_images, **config.ood_images}.items():
        log.debug("%s: %d classes", name, len(train_and_test(config.images, folder)[0].classes))  # fail before work
    num_images = len(scan(config.images))
    _refuse_now(config, cells, num_images)
    write_recipe(config, config.out / "config.yaml")
    stopped = None
    if config.report_only:
        cells = with_budgets(config, cells)
    else:
        broken = make_tokenizers(config, {cell.tokenizer for cell in cells})
        cells = with_budgets(config, cells)
        stopped = run_cells(config, cells, broken, num_images)
    report = write(config, cells, measure=not config.report_only and not stopped)
    if stopped:
        done = sum((cell_folder(config, cell) / "result.json").exists() for cell in cells)
        raise Interrupted(
            f"stopped by {stopped}: {done} of {len(cells)} cells are done, the others saved", "the same command"
        )
    return report


def _refuse_now(config: StudyConfig, cells: "list[GridCell]", num_images: int) -> None:
    """What a cell would refuse, after hours perhaps, is refused before anything is written.

    Raises:
        MapetError: a tokenizer or a cell that was begun with other options; no such model or objective, sizes that don't fit, fewer
            labels than are asked for.
    """
    from mapet.evaluation.features import train_and_test
    from mapet.evaluation.few_shot import few_shot_split
    from mapet.studies.grid import cell_folder, pretrain_config, with_budgets
    from mapet.studies.tokenizers import fitting_config, refuse_other_tokenizer
    from mapet.studies.trials import cell_job, refuse_other_cell
    from mapet.training.build import check_model_config

    for name in config.tokenizers:
        refuse_other_tokenizer(config, name)
    train, _ = train_and_test(config.images, config.test_images)
    for amount in config.labels_per_class:
        try:
            few_shot_split(train, amount, seed=0)
        except MapetError as error:
            raise MapetError(f"{option('labels_per_class')}: {error}") from None
    for cell in with_budgets(config, cells):
        refuse_other_cell(cell_folder(config, cell), cell_job(config, cell, num_images))
    for cell in cells if not config.report_only else ():
        if cell.seed == config.seeds[0] and not (cell_folder(config, cell) / "pretrain").exists():
            fitting = fitting_config(config, cell.tokenizer)
            try:
                check_model_config(pretrain_config(config, cell), fitting)
            except MapetError as error:
                raise MapetError(f"grid, {cell.factors}: {error}") from None
