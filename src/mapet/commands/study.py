"""Command: a grid of pre-training runs, each evaluated alike, and the report that compares them."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mapet.commands.command import command
from mapet.config.base import write_recipe
from mapet.config.pipeline import StudyConfig
from mapet.errors import Interrupted, MapetError, option

if TYPE_CHECKING:
    from mapet.studies.statistics import Trial

log = logging.getLogger("mapet")


@command(StudyConfig)
def study(config: StudyConfig) -> Path:
    """Compare objectives, tokenizers, ratios, models: run a grid, evaluate each trial, report; returns the report's folder.

    Example:
      mapet study --images PHOTOS --test-images TEST --out study --tokenizers 'pixels={}' --grid 'objective=[mim, pim, mapet]'
      mapet study study.yaml
      mapet study study.yaml --devices cuda:0 cuda:1
      mapet study study.yaml --report-only
    """
    from mapet.data.sources import scan
    from mapet.reports.study import write_report
    from mapet.studies.grid import grid_trials, trial_folder, with_budgets
    from mapet.studies.trials import is_finished, make_tokenizers, run_trials, summarize

    trials = grid_trials(config)
    num_images = len(scan(config.images))
    _check(config, trials, num_images)
    write_recipe(config, config.out / "config.yaml")
    stopped, broken = "", {}
    if not config.report_only:
        broken = make_tokenizers(config, {trial.tokenizer for trial in trials})
    trials = with_budgets(config, trials)
    if not config.report_only:
        stopped = run_trials(config, trials, broken, num_images)
    report = config.out / "report"
    write_report(summarize(config, trials, measure=not config.report_only and not stopped), report)
    finished = (
        f"{sum(is_finished(trial_folder(config, trial)) for trial in trials)} of {len(trials)} trials are finished"
    )
    log.info("%s; report in %s", finished, report / "report.html")
    if stopped:
        raise Interrupted(f"stopped by {stopped}: {finished}, the others saved", "the same command")
    return report


def _check(config: StudyConfig, trials: "list[Trial]", num_images: int) -> None:
    """Refuse now, before anything is written, what a trial would refuse after hours.

    Raises:
        MapetError: a tokenizer or a trial that was begun with other options; no such model or objective, sizes that don't fit, other
            classes in a test set, fewer labels than are asked for.
    """
    from mapet.evaluation.datasets import few_shot_split, train_and_test
    from mapet.studies.grid import (
        check_same_trial,
        pretrain_config,
        tokenizer_configs,
        trial_config,
        trial_folder,
        with_budgets,
    )
    from mapet.training.tasks.pretraining import check_model_config

    fitting = {name: tokenizer_configs(config, name)[0] for name in config.tokenizers}
    train, _ = train_and_test(config.images, config.test_images)
    for folder in config.ood_images.values():
        train_and_test(config.images, folder)
    for amount in (amount for amount in config.labels_per_class if amount != "all"):
        try:
            few_shot_split(train, amount, seed=0)
        except MapetError as error:
            raise MapetError(f"{option('labels_per_class')}: {error}") from None
    for trial in with_budgets(config, trials):
        check_same_trial(trial_folder(config, trial), trial_config(config, trial, num_images))
    for trial in trials if not config.report_only else ():
        if trial.seed == config.seeds[0] and not (trial_folder(config, trial) / "pretrain").exists():
            try:
                check_model_config(pretrain_config(config, trial), fitting[trial.tokenizer])
            except MapetError as error:
                raise MapetError(f"grid, {trial.factors}: {error}") from None
