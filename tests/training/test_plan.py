"""The plan of `run`: a pure function of facts, timings, time and given options."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from mapet.models.backbone import create_vit
from mapet.training import plan as planning
from mapet.training.plan import TIERS, FolderFacts, Plan, Timings, choose_input, list_candidates, make_plan
from tests.refused import refused

PHOTOS = FolderFacts(500, 256, False, 0, 0, 0)
LAPTOP = Timings(
    4e-3, reading=2e-3, teaching=1e-4, feature_size=192, features=0.05, probe=1e-5, flops=5e10, precision="float32"
)
EMPTY: dict[str, dict[str, Any]] = {"fit_tokenizer": {}, "tokenize": {}, "pretrain": {}}


def plan(
    facts: FolderFacts = PHOTOS,
    timings: Timings = LAPTOP,
    minutes: float = 30,
    spent: float = 0.0,
    slower: Sequence[float] = (1.0, 2.0),
    **given: Any,
) -> Plan:
    """Plan with the timings of the smallest candidate, and larger ones that take so many times as long."""
    timed = [replace(timings, training=factor * timings.training) for factor in slower]
    return make_plan(facts, list_candidates(facts, EMPTY | given), timed, 60 * minutes, EMPTY | given, spent)


@pytest.mark.parametrize("minutes", [15, 30, 120, 3000])
@pytest.mark.parametrize(
    "facts", [PHOTOS, FolderFacts(20_000, 64, True, 10, 16_000, 4_000), FolderFacts(300, 8, True, 10, 240, 60)]
)
def test_costs_are_the_time_and_controls_a_quarter_at_most(facts, minutes):
    made = plan(facts, minutes=minutes, spent=20)
    assert sum(made.costs.values()) + planning.FINISH_SECONDS == pytest.approx(60 * minutes)
    assert made.costs["start"] == 20 and made.costs["tokenize"] <= 0.11 * 60 * minutes + facts.num_images * 0.003
    assert made.costs["evaluate"] <= 0.25 * 60 * minutes or made.evaluation_images <= planning.MIN_EVALUATED
    per_image = (2 if TIERS.index(find_tier(made)) else 1) * LAPTOP.training + LAPTOP.reading
    assert made.epochs * facts.num_images * per_image == pytest.approx(made.costs["pretrain"])


def test_the_plan_is_a_function_of_its_arguments_and_changes_none():
    frozen = {name: MappingProxyType({}) for name in EMPTY}
    candidates = list_candidates(PHOTOS, frozen)
    assert make_plan(PHOTOS, candidates, [LAPTOP], 1800, frozen) == make_plan(
        PHOTOS, candidates, [LAPTOP], 1800, frozen
    )


SLOW = replace(LAPTOP, training=0.3, reading=0.02)


@pytest.mark.parametrize("facts", [PHOTOS, FolderFacts(2_000, 64, True, 10, 1_600, 400)])
def test_a_time_that_is_too_short_is_refused_with_the_least_that_is_not(facts):
    with refused(field="time") as error:
        plan(facts, SLOW, minutes=4)
    least = int(str(error.value).rsplit("time=", 1)[1].split()[0].rstrip("."))
    assert plan(facts, SLOW, minutes=least).epochs * facts.num_images >= planning.MIN_IMAGES_SEEN
    with refused(field="time"):
        plan(facts, SLOW, minutes=0.7 * least)


def test_a_time_in_which_few_images_are_seen_is_taken_and_the_plan_says_that_they_are_few_and_what_would_do():
    made = plan(PHOTOS, SLOW, minutes=40)
    assert planning.MIN_IMAGES_SEEN < made.epochs * 500 < planning.FEW_IMAGES_SEEN
    assert find_tier(made) == TIERS[0]
    enough = int(made.reasons["pretrain.epochs"].rsplit("time=", 1)[1])
    better = plan(PHOTOS, SLOW, minutes=enough)
    assert better.epochs * 500 >= planning.FEW_IMAGES_SEEN and "few" not in better.reasons["pretrain.epochs"]


def test_given_options_stay_and_are_not_chosen():
    given = {
        "fit_tokenizer": {"image_size": (48, 32), "teacher": "k-clip"},
        "tokenize": {"num_views": 3},
        "pretrain": {"lr": 1.0, "batch_size": 7},
    }
    made = plan(**given)
    for section, options in given.items():
        assert not options.keys() & made.options[section].keys()
    assert made.options["fit_tokenizer"]["patch_size"] in (4, 8)


def test_given_epochs_decide_instead_of_the_time():
    made = plan(minutes=30, pretrain={"epochs": 3})
    assert made.epochs == 3 and made.costs["pretrain"] == pytest.approx(3 * 500 * LAPTOP.per_image)
    assert "epochs" not in made.options["pretrain"] and "pretrain.epochs" not in made.reasons


@pytest.mark.parametrize(
    ("short_side", "expected"),
    [(8, (8, 2)), (28, (28, 4)), (32, (32, 4)), (50, (48, 6)), (256, (64, 8)), (4000, (64, 8))],
)
def test_the_input_suits_the_images(short_side, expected):
    (height, width), patch = choose_input(short_side, TIERS[1], None, None)
    assert (height, patch) == expected and height == width <= short_side
    for tier in TIERS:
        (side, _), patch = choose_input(short_side, tier, None, None)
        assert side % patch == 0 and side <= max(short_side, tier.max_side) and side // patch >= 2


def test_a_faster_machine_gets_a_larger_model_that_still_sees_enough_images():
    slower = [4**index for index in range(len(TIERS))]
    fast = replace(LAPTOP, training=2e-6, reading=1e-5, on_gpu=True)
    chosen = [
        TIERS.index(find_tier(plan(timings=fast, minutes=minutes, slower=slower))) for minutes in (3, 30, 300, 30000)
    ]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]
    for minutes, index in zip((3, 30, 300, 30000), chosen, strict=True):
        assert plan(timings=fast, minutes=minutes, slower=slower).epochs * 500 >= TIERS[index].images_seen


def find_tier(made: Plan) -> planning.Tier:
    options = made.options["pretrain"]
    return next(tier for tier in TIERS if (tier.model, tier.model_args) == (options["model"], options["model_args"]))


def test_every_tier_is_a_model_of_timm():
    for tier in TIERS[:4]:
        vit = create_vit(
            tier.model, (tier.max_side, tier.max_side), tier.max_side // tier.grid, 3, dict(tier.model_args)
        )
        assert vit.patch_embed.num_patches == tier.grid**2


def test_small_images_get_center_crops_large_ones_random_crops_as_many_as_there_is_time_for():
    assert plan(FolderFacts(1000, 32, False, 0, 0, 0)).options["tokenize"] == {"views": "center", "num_views": 1}
    assert plan().options["tokenize"] == {"views": "random-crop", "num_views": 8}
    many = plan(FolderFacts(20_000, 256, False, 0, 0, 0), minutes=20).options["tokenize"]["num_views"]
    assert 2 <= many < 8


def test_on_several_gpus_training_takes_a_part_of_the_time():
    gpu = replace(LAPTOP, on_gpu=True, reading=0.0)
    assert plan(timings=replace(gpu, num_processes=4)).epochs == pytest.approx(4 * plan(timings=gpu).epochs)
    assert math.isclose(gpu.per_image, LAPTOP.training)
