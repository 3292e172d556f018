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


def plan_run(config: RunConfig, spent: float, stats: DatasetStats | None = None) -> tuple[Plan, RunConfig]:
    """Make and log the plan for a config; return it, and the config with all its options.

    Args:
        config: options as given; those that are not given are chosen.
        spent: seconds of the time that are over.
        stats: of all images; None: some are looked at here.

    Raises:
        MapetError: the time is too short, no image can be read, or an option does not fit the images.
    """
    given, budget = config.given, 60 * config.time
    channels = given["fit_tokenizer"].get("channels", 3)
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
    candidates = list_candidates(facts, given)
    with spell_in_section("pretrain", RunConfig.model_fields):
        timings = measure_machine(images, facts, candidates, given, config.device, budget)
    plan = make_plan(facts, candidates, timings, budget, given, spent)
    chosen = {**plan.options, "out": config.out}
    if plan.evaluation_images is not None and config.evaluation_images is None:
        chosen["evaluation_images"] = plan.evaluation_images
    complete = build_config(RunConfig, merge_options(config.model_dump(exclude_unset=True), chosen))
    found = f"{len(images):,} images of about {facts.short_side} px"
    options = {name: getattr(complete, name).model_dump() for name in given}
    for line in describe_plan(plan, found, options, budget, labeled is not None):
        log.info("%s", line)
    return plan, complete


def find_labels(config: RunConfig) -> tuple[LabeledSet, LabeledSet] | None:
    """Return the training and test set of the evaluation; None if there are no labels."""
    if config.test_images is None and list_images(config.images, config).classes() is None:
        return None
    return load_train_test(config.images, config.test_images, config, config.group_by)


def check(config: RunConfig) -> DatasetStats:
    """Read every image; log what is there, warnings, all unreadable images and the plan of `run`; return the statistics."""
    channels = config.given["fit_tokenizer"].get("channels", 3)
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
