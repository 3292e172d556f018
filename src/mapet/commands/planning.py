"""The plan of `run`, made from the folder and this machine; `check` reports it without the run."""

import logging

from mapet.config.base import build_config, merge_options
from mapet.config.pipeline import RunConfig
from mapet.data.dataset_stats import (
    DatasetStats,
    compute_dataset_stats,
    find_value_range,
    sample_image_infos,
)
from mapet.data.sources import list_images
from mapet.device import num_workers
from mapet.errors import MapetError, spell_in_section
from mapet.evaluation.datasets import LabeledSet, load_train_test
from mapet.training.measure import folder_facts, measure_machine
from mapet.training.plan import Plan, describe_plan, list_candidates, make_plan

log = logging.getLogger("mapet")
NUM_LOOKED_AT = 64
"""Images that `run` looks at."""


def plan_run(config: RunConfig, elapsed: float, stats: DatasetStats | None = None) -> tuple[Plan, RunConfig]:
    """Make and log the plan for a config; return it, and the config with all its options.

    Args:
        config: options as given; those that are not given are chosen.
        elapsed: seconds of the time that are over.
        stats: of all images; None: some are looked at here.

    Returns:
        The plan; and the config with all its options, those that the plan has chosen included.

    Raises:
        MapetError: the time is too short, no image can be read, or an option does not fit the images.
    """
    user_options, budget = config.user_options, 60 * config.time
    channels = user_options["fit_tokenizer"].get("channels", 3)
    if stats is None:
        images = find_value_range(list_images(config.images, config), channels)
        log.info("%s images in %s", f"{len(images):,}", config.images)
        infos = sample_image_infos(images, channels, NUM_LOOKED_AT)
    else:
        images, infos = stats.images, stats.infos
    labeled = find_labels(config)
    if labeled:
        log.info("evaluated on %s", config.test_images or "a fifth of them, which pre-training sees without labels")
    facts = folder_facts(images, infos, labeled)
    candidates = list_candidates(facts, user_options)
    with spell_in_section("pretrain", RunConfig.model_fields):
        timings = measure_machine(images, facts, candidates, user_options, config.device, budget)
    plan = make_plan(facts, candidates, timings, budget, user_options, elapsed)
    plan_options = {**plan.options, "out": config.out}
    if plan.evaluation_images is not None and config.evaluation_images is None:
        plan_options["evaluation_images"] = plan.evaluation_images
    complete = build_config(RunConfig, merge_options(config.model_dump(exclude_unset=True), plan_options))
    summary = f"{len(images):,} images of about {facts.short_side} px"
    options = {name: getattr(complete, name).model_dump() for name in user_options}
    for line in describe_plan(plan, summary, options, budget, labeled is not None):
        log.info("%s", line)
    return plan, complete


def find_labels(config: RunConfig) -> tuple[LabeledSet, LabeledSet] | None:
    """Return the training and test set of the evaluation; None if there are no labels."""
    if config.test_images is None and list_images(config.images, config).classes() is None:
        return None
    return load_train_test(config.images, config.test_images, config, config.group_by)


def check(config: RunConfig) -> DatasetStats:
    """Read every image; log what is there, warnings, all unreadable images and the plan of `run`; return the statistics.

    Args:
        config: options of `mapet check`, which are those of `run`.

    Returns:
        Statistics of all images; without a plan if none is readable.
    """
    channels = config.user_options["fit_tokenizer"].get("channels", 3)
    images = find_value_range(list_images(config.images, config), channels)
    stats = compute_dataset_stats(images, channels, num_workers() + 1)
    for line in stats.lines():
        log.info("%s", line)
    if not stats.infos:
        return stats
    image_size = (0, 0)
    try:
        image_size = plan_run(config, 0.0, stats)[1].fit_tokenizer.image_size
    except MapetError as error:
        log.warning("`mapet run` would refuse this: %s", error)
    for line in stats.warnings(image_size, config.max_unreadable):
        log.warning("%s", line)
    return stats
