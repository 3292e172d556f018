"""The plan of `run`: options that fit a folder and a machine to a time budget, and why. Pure: facts and timings in, options and reasons out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mapet.errors import MapetError, format_size, option, pluralize
from mapet.training.metrics import format_duration

UserOptions = Mapping[str, Mapping[str, Any]]
"""Section of `run` ('fit_tokenizer', 'tokenize', 'pretrain') -> option -> value, of the options that the user has given."""


class Tier(NamedTuple):
    """A size of model with its input.

    Attributes:
        model, model_args: options of `pretrain`.
        max_side: of the input, pixels; smaller images are taken as they are.
        grid: patches along a side.
        images_seen: fewest images (with repetitions) that training must see for this tier to be preferred to the one before.
        lr: peak learning rate at a batch of 128; None: that of `pretrain`.
        drop_path: of `pretrain`.
    """

    model: str
    model_args: Mapping[str, Any]
    max_side: int
    grid: int
    images_seen: int
    lr: float | None
    drop_path: float


DEFAULT_TEACHER, DEFAULT_OBJECTIVE = "hog", "mim"
"""Tokens and objective where none are given."""
TIERS = (
    Tier("vit_tiny_patch16_224", {"embed_dim": 64, "depth": 3, "num_heads": 2}, 48, 6, 0, 2e-3, 0.0),
    Tier("vit_tiny_patch16_224", {"embed_dim": 96, "depth": 4, "num_heads": 3}, 64, 8, 20_000, 1.5e-3, 0.0),
    Tier("vit_tiny_patch16_224", {"embed_dim": 192, "depth": 6, "num_heads": 3}, 96, 12, 1_000_000, 1e-3, 0.0),
    Tier("vit_tiny_patch16_224", {}, 112, 14, 3_000_000, 7.5e-4, 0.1),
    Tier("vit_small_patch16_224", {}, 224, 14, 10_000_000, None, 0.1),
    Tier("vit_base_patch16_224", {}, 224, 14, 50_000_000, None, 0.1),
)
MIN_IMAGES_SEEN, FEW_IMAGES_SEEN = 2_000, 20_000
"""Images seen in training, with repetitions: of fewer than the first nothing is learned, and such a budget is refused; of fewer than the
second little is, and the plan says so."""
MIN_STEPS, MAX_BATCH_SIZE, MIN_BATCH_SIZE, LR_BATCH_SIZE = 800, 128, 16, 128
"""Steps that the batch size leaves, its limits, and the batch that `Tier.lr` is for."""
EVALUATION_FRACTION, MAX_EVALUATION_FRACTION = 0.2, 0.25
"""Fraction of the budget that the evaluation is planned to take, and that controls may take before the others are skipped."""
TOKENIZE_FRACTION, KMEANS_FRACTION = 0.1, 0.05
"""Fractions of the budget that tokenizing several views, and k-means, may take."""
MAX_VOCAB_SIZE, KMEANS_ITERS, PATCHES_PER_CODE = 8192, 20, 512
NUM_VIEWS, CROP_MARGIN = 8, 1.5
"""Random crops of each image, where images are at least `CROP_MARGIN` times as large as the input; else center crops."""
MIN_EVALUATED, MAX_RAW_FEATURES, PROBE_OFFSET = 200, 3072, 250
"""Fewest labeled images to evaluate on; features of raw pixels; and the dimensions that a linear probe's cost starts from."""
WARMUP_FRACTION, MAX_WARMUP_EPOCHS = 1 / 30, 100
MIN_PROBED_MINUTES = 60
"""Shorter runs have no probes while they train: they would take a large part of the time."""
FINISH_SECONDS = 5.0
"""Of pre-training's own end: the last checkpoint and the backbone's folder."""


class FolderFacts(NamedTuple):
    """What is known of the images.

    Attributes:
        num_images: to pre-train on.
        short_side: median, pixels.
        gray: whether all images looked at have three equal channels.
        num_classes: 0 without labels.
        num_train, num_test: labeled images of the evaluation; 0 without labels.
    """

    num_images: int
    short_side: int
    gray: bool
    num_classes: int
    num_train: int
    num_test: int


class Candidate(NamedTuple):
    """A model, of a tier or given by the user in place of it, with its input (height and width, and patches, in pixels); to be timed."""

    tier: Tier
    image_size: tuple[int, int]
    patch_size: int

    @property
    def num_patches(self) -> int:
        return math.prod(side // self.patch_size for side in self.image_size)


@dataclass(frozen=True)
class Timings:
    """What was timed on this machine with a candidate. Seconds are of all cores or the one device together, per image unless stated otherwise.

    Attributes:
        training: of a training step.
        reading: to read an image, with all cores; on a GPU this happens at the same time.
        teaching: of the teacher.
        feature_size: channels of the teacher's features.
        features: of all that the evaluation computes features with: two ViTs, HOG, k-means patch features, the teacher twice.
        probe: seconds of a linear probe for each training image and dimension (plus `PROBE_OFFSET`).
        flops: matrix products' speed in the faster precision, per second.
        precision: the faster one.
        on_gpu: whether training runs on a GPU.
        num_processes: that train together.
        report: seconds of figures and report.
    """

    training: float
    reading: float
    teaching: float
    feature_size: int
    features: float
    probe: float
    flops: float
    precision: str
    on_gpu: bool = False
    num_processes: int = 1
    report: float = 20.0

    @property
    def per_image(self) -> float:
        """Seconds that training takes for an image: reading adds to them on a CPU, and hides behind on a GPU."""
        training = self.training / self.num_processes
        return max(training, self.reading) if self.on_gpu else training + self.reading


@dataclass(frozen=True)
class Plan:
    """Options of `run` for a folder, a machine and a time.

    Attributes:
        options: section -> option -> value, of those that the plan has chosen; not `epochs` of a run with a time budget.
        reasons: 'section.option' -> why it has this value, for all that matter, also given ones.
        costs: stage -> seconds: 'start' (up to the plan), 'fit-tokenizer', 'tokenize', 'pretrain', 'evaluate', 'report'.
        epochs: of pre-training.
        evaluation_images: labeled images of each set that the evaluation takes at most; None without labels.
    """

    options: dict[str, dict[str, Any]]
    reasons: dict[str, str]
    costs: dict[str, float]
    epochs: float
    evaluation_images: int | None

    @property
    def reserve(self) -> float:
        """Return the seconds that come after pre-training."""
        return self.costs["evaluate"] + self.costs["report"] + FINISH_SECONDS


# ---- candidates


def list_candidates(facts: FolderFacts, user_options: UserOptions) -> list[Candidate]:
    """Return the models to choose among, each with its input, from small to large; of a given model or input there is no choice.

    Raises:
        MapetError: a given patch size is larger than the image.
    """
    pretrain, fitting, tiers = user_options.get("pretrain", {}), user_options.get("fit_tokenizer", {}), [*TIERS]
    if "model_args" in pretrain:
        tiers = [TIERS[0]._replace(model=pretrain.get("model", TIERS[0].model), model_args=pretrain["model_args"])]
    elif "model" in pretrain:
        like = [tier for tier in TIERS if tier.model == pretrain["model"]] or TIERS
        tiers = [like[-1]._replace(model=pretrain["model"], model_args={})]
    sizes = [
        choose_input(facts.short_side, tier, fitting.get("image_size"), fitting.get("patch_size")) for tier in tiers
    ]
    return [Candidate(tier, *size) for tier, size in zip(tiers, sizes, strict=True)]


def choose_input(
    short_side: int, tier: Tier, image_size: tuple[int, int] | None, patch_size: int | None
) -> tuple[tuple[int, int], int]:  # fmt: skip
    """Return (height, width) of the input and the patch size, of which each may be given; else a square of about `tier.grid` patches a side.

    Raises:
        MapetError: not even one given patch fits.
    """
    if image_size is not None:
        if patch_size is not None:
            return image_size, patch_size
        both = math.gcd(*image_size)
        divisors = [size for size in range(1, both + 1) if both % size == 0 and both // size > 1] or [both]
        target_size = min(image_size) / tier.grid
        return image_size, min(divisors, key=lambda size: (abs(size - target_size), -size))
    side = min(short_side, tier.max_side)
    patch = patch_size or min(max(2, round(side / tier.grid)), max(1, side // 2))
    if patch > short_side:
        problem = (
            f"{option('patch_size')} {patch}: the images have a short side of {short_side} px, expected at most that"
        )
        raise MapetError(problem, field="patch_size", value=patch)
    side = patch * max(side // patch, min(2, short_side // patch))
    return (side, side), patch


# ---- the plan


def make_plan(
    facts: FolderFacts, candidates: Sequence[Candidate], timings: Sequence[Timings], budget: float, user_options: UserOptions, elapsed: float = 0.0
) -> Plan:  # fmt: skip
    """Choose all options that are not given, for a time budget.

    Args:
        facts: on the images.
        candidates: from `list_candidates`.
        timings: of this machine, with the first candidates; later ones were not timed, as even the last timed one is too slow.
        budget: seconds from the start of the command to its end.
        user_options: options that the user has given, which stay; with `pretrain.epochs` these decide how long training takes, not the budget.
        elapsed: seconds of the budget that are over.

    Raises:
        MapetError: the budget is too short for anything that makes sense; the message has the least.
    """
    timed = zip(candidates, timings, strict=False)
    plans = [_plan_candidate(facts, candidate, timing, budget, user_options, elapsed) for candidate, timing in timed]
    best = 0
    for index, plan in enumerate(plans):
        images_seen = plan.epochs * facts.num_images
        if images_seen >= candidates[index].tier.images_seen and sum(plan.costs.values()) <= budget:
            best = index
    plan, images_seen = plans[best], plans[best].epochs * facts.num_images
    if "epochs" not in user_options.get("pretrain", {}):
        speed = f"{1 / timings[best].per_image:,.0f} images/s were timed"
        plan.reasons["pretrain.epochs"] = f"as many as fit: {speed}"
        if images_seen < FEW_IMAGES_SEEN:

            def replan(minutes: float) -> Plan:
                return _plan_candidate(facts, candidates[0], timings[0], 60 * minutes, user_options, elapsed)

            if images_seen < MIN_IMAGES_SEEN:
                raise _too_short(facts, budget, *_least_plan(facts, budget, MIN_IMAGES_SEEN, replan))
            enough = _least_plan(facts, budget, FEW_IMAGES_SEEN, replan)[0]
            few = f"{images_seen:,.0f} images seen are few, expect little of them; {FEW_IMAGES_SEEN:,} take {option('time', enough)}"
            plan.reasons["pretrain.epochs"] += f". {few}"
    plan.reasons["pretrain.model"] = "as given"
    if len(candidates) > 1:
        needed = f"which needs {candidates[best].tier.images_seen:,} images seen and gets {images_seen:,.0f}"
        plan.reasons["pretrain.model"] = (
            f"the largest for this time, {needed}" if best else "the smallest: larger ones need more images seen"
        )
    return plan


def _least_plan(
    facts: FolderFacts, budget: float, images_seen: int, replan: Callable[[float], Plan]
) -> tuple[int, Plan]:
    """Return the fewest minutes, to about 5 %, in which training sees so many images, and their plan.

    Args:
        facts: on the images.
        budget: seconds that are too few.
        images_seen: to reach, with repetitions.
        replan: from minutes to a plan.
    """
    minutes = budget / 60
    while True:
        minutes = math.ceil(1.05 * minutes + 0.5)
        plan = replan(minutes)
        if plan.epochs * facts.num_images >= images_seen:
            return minutes, plan


def _too_short(facts: FolderFacts, budget: float, minutes: int, least: Plan) -> MapetError:
    """Return the error of a budget, in seconds, that is too short, from the fewest minutes that are not and their plan."""
    rest = format_duration(sum(least.costs.values()) - least.costs["pretrain"])
    return MapetError(
        f"{option('time', f'{budget / 60:g}')} is too short for these {facts.num_images:,} images on this machine: {MIN_IMAGES_SEEN:,} images "
        f"seen, the fewest that anything is learned of, and {rest} for the rest take {option('time', minutes)}. Give that or more, or fewer images",
        field="time", value=budget / 60,
    )  # fmt: skip


def _plan_candidate(
    facts: FolderFacts, candidate: Candidate, timings: Timings, budget: float, user_options: UserOptions, elapsed: float
) -> Plan:  # fmt: skip
    """Return the plan with one candidate; see `make_plan`. Its `epochs` may be 0 or less if nothing is left for pre-training."""
    fitting, views = user_options.get("fit_tokenizer", {}), user_options.get("tokenize", {})
    reasons: dict[str, str] = {}
    tokenizer = _plan_tokenizer(facts, candidate, timings, budget, reasons)
    tokenizer = {name: value for name, value in tokenizer.items() if name not in fitting}
    vocab_size = fitting.get("vocab_size") or tokenizer.get("vocab_size") or MAX_VOCAB_SIZE
    read_and_teach = timings.reading + timings.teaching
    tokens = _plan_views(facts, candidate, read_and_teach, budget, reasons) if not views else {}
    num_views = {**tokens, **views}.get("num_views", 1) or 1
    patches = min(PATCHES_PER_CODE * vocab_size, facts.num_images * candidate.num_patches)
    evaluation_images, evaluation = _plan_evaluation(facts, candidate, timings, vocab_size, budget)
    costs = {
        "start": elapsed,
        "fit-tokenizer": patches / candidate.num_patches * read_and_teach
        + _kmeans_seconds(patches, vocab_size, timings),
        "tokenize": num_views * facts.num_images * read_and_teach,
        "evaluate": evaluation,
        "report": timings.report,
    }
    pretrain, per_image = user_options.get("pretrain", {}), timings.per_image
    if "epochs" in pretrain:
        epochs = float(pretrain["epochs"])
        costs["pretrain"] = epochs * facts.num_images * per_image
    else:
        costs["pretrain"] = budget - sum(costs.values()) - FINISH_SECONDS
        epochs = costs["pretrain"] / per_image / facts.num_images
    training = _plan_training(facts, candidate, timings, epochs, budget, pretrain, reasons)
    costs = {name: costs[name] for name in ("start", "fit-tokenizer", "tokenize", "pretrain", "evaluate", "report")}
    options = {"fit_tokenizer": tokenizer, "tokenize": tokens, "pretrain": training}
    return Plan(options, reasons, costs, epochs, evaluation_images)


def _plan_tokenizer(
    facts: FolderFacts, candidate: Candidate, timings: Timings, budget: float, reasons: dict[str, str]
) -> dict[str, Any]:
    """Return options of `fit-tokenizer`, given ones among them, and add their reasons."""
    num_patches = facts.num_images * candidate.num_patches
    vocab_size = min(MAX_VOCAB_SIZE, 2 ** max(1, (num_patches // 64).bit_length() - 1))
    while (
        vocab_size > 64
        and _kmeans_seconds(min(PATCHES_PER_CODE * vocab_size, num_patches), vocab_size, timings)
        > KMEANS_FRACTION * budget
    ):
        vocab_size //= 2
    size, patch = candidate.image_size, candidate.patch_size
    reasons["fit_tokenizer.image_size"] = (
        f"the images have a median short side of {facts.short_side} px; {format_size(size)} px suits this model"
    )
    reasons["fit_tokenizer.patch_size"] = f"{candidate.num_patches} patches an image"
    reasons["fit_tokenizer.channels"] = "all images looked at are gray" if facts.gray else "the images are in color"
    reasons["fit_tokenizer.teacher"] = "it needs no pre-trained network"
    reasons["fit_tokenizer.vocab_size"] = (
        f"at least 64 of {num_patches:,} patches for each token, k-means at most {KMEANS_FRACTION:.0%} of the time"
    )
    reasons["pretrain.precision"] = "the faster one in a timing of matrix products"
    return {
        "image_size": size, "patch_size": patch, "channels": 1 if facts.gray else 3, "teacher": DEFAULT_TEACHER, "vocab_size": vocab_size,
        "precision": timings.precision,
    }  # fmt: skip


def _kmeans_seconds(patches: float, vocab_size: int, timings: Timings) -> float:
    """Return the seconds of k-means: the distances of all patches to all centroids, in each iteration."""
    return 2 * patches * vocab_size * timings.feature_size * KMEANS_ITERS / timings.flops


def _plan_views(
    facts: FolderFacts, candidate: Candidate, read_and_teach: float, budget: float, reasons: dict[str, str]
) -> dict[str, Any]:
    """Return options of `tokenize`: random crops of images that are larger than the input, as many as there is time for; else centers."""
    affordable = int(TOKENIZE_FRACTION * budget / (facts.num_images * read_and_teach))
    if facts.short_side < CROP_MARGIN * min(candidate.image_size) or affordable < 2:
        small = facts.short_side < CROP_MARGIN * min(candidate.image_size)
        reasons["tokenize.views"] = (
            "the images are hardly larger than the input" if small else "more views would take too long to tokenize"
        )
        return {"views": "center", "num_views": 1}
    num_views = min(NUM_VIEWS, affordable)
    reasons["tokenize.views"] = f"{num_views} of each image: the images are larger than the input"
    return {"views": "random-crop", "num_views": num_views}


def _plan_training(
    facts: FolderFacts, candidate: Candidate, timings: Timings, epochs: float, budget: float, user_options: Mapping[str, Any],
    reasons: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return options of `pretrain` that are not given, and add their reasons."""
    images_seen, tier = max(1.0, epochs * facts.num_images), candidate.tier
    largest = min(MAX_BATCH_SIZE, max(MIN_BATCH_SIZE, images_seen / MIN_STEPS), facts.num_images)
    batch_size = user_options.get("batch_size") or 1 << (max(1, int(largest)).bit_length() - 1)
    if timings.on_gpu and tier.lr is None:
        batch_size = user_options.get("batch_size")  # that of `pretrain`, which fits the memory
    reasons["pretrain.batch_size"] = (
        f"at most {MAX_BATCH_SIZE}, and at least {MIN_STEPS} steps" if batch_size else "what the memory holds"
    )
    reasons["pretrain.objective"] = "most images seen in this time" if DEFAULT_OBJECTIVE == "mim" else ""
    reasons["pretrain.lr"] = f"for this model and a batch of {batch_size}"
    options: dict[str, Any] = {
        "model": tier.model, "model_args": dict(tier.model_args), "objective": DEFAULT_OBJECTIVE, "batch_size": batch_size,
        "lr": tier.lr and batch_size and tier.lr * math.sqrt(batch_size / LR_BATCH_SIZE), "drop_path": tier.drop_path,
        "schedule": "constant", "warmup_epochs": round(min(MAX_WARMUP_EPOCHS, WARMUP_FRACTION * max(epochs, 0)), 3), "precision": timings.precision,
    }  # fmt: skip
    if budget < 60 * MIN_PROBED_MINUTES:
        options["probe_every"] = 0
    return {name: value for name, value in options.items() if name not in user_options and value is not None}


def _plan_evaluation(
    facts: FolderFacts, candidate: Candidate, timings: Timings, vocab_size: int, budget: float
) -> tuple[int | None, float]:
    """Return how many labeled images of each set the evaluation takes, of those there are, and its seconds; (None, 0) without labels."""
    if not facts.num_train:
        return None, 0.0
    width = int(candidate.tier.model_args.get("embed_dim", 192))
    sizes = (MAX_RAW_FEATURES, width, width, 27, 200, timings.feature_size, vocab_size)

    def seconds(count: int) -> float:
        """Return the seconds of the evaluation with at most so many images of each set."""
        train, test = min(count, facts.num_train), min(count, facts.num_test)
        features = (train + test) * (timings.features + len(sizes) * timings.reading)
        return features + timings.probe * sum(train * (PROBE_OFFSET + min(train, size)) for size in sizes)

    largest = max(facts.num_train, facts.num_test)
    count = min(MIN_EVALUATED, largest)
    while count < largest and seconds(min(largest, round(1.2 * count))) <= EVALUATION_FRACTION * budget:
        count = min(largest, round(1.2 * count))
    return count, seconds(count)


def describe_plan(plan: Plan, candidates_text: str, options: UserOptions, budget: float, has_labels: bool) -> list[str]:
    """Return the lines that show a plan: each option with its value and reason, then what each stage costs.

    Args:
        plan: it.
        candidates_text: the folder in brief.
        options: all options of the sections, chosen or given.
        budget: seconds.
        has_labels: whether the backbone is evaluated.
    """
    lines = [f"plan for {candidates_text}, {budget / 60:g} minutes:"]
    for name, reason in plan.reasons.items():
        section, _, field = name.partition(".")
        is_chosen = field in plan.options.get(section, {}) or field == "epochs"
        value = f"about {plan.epochs:.1f}" if field == "epochs" else options[section].get(field)
        text = f"{value:.3g}" if isinstance(value, float) else value
        if isinstance(value, tuple):  # an image size, or names of teachers
            text = (" x " if field == "image_size" else " ").join(map(str, value))
        if field == "model":
            text = f"{text} {' '.join(f'{key}={item}' for key, item in options[section].get('model_args', {}).items())}".strip()
        lines.append(f"  {field:<13} {text}: {reason if is_chosen else 'as given'}")
    parts = ", ".join(f"{stage} {format_duration(seconds)}" for stage, seconds in plan.costs.items() if seconds > 0)
    lines.append(f"  takes about {format_duration(sum(plan.costs.values()))}: {parts}")
    if has_labels:
        images = pluralize(plan.evaluation_images or 0, "labeled image")
        lines.append(
            f"  evaluate with controls takes at most {MAX_EVALUATION_FRACTION:.0%} of the time: at most {images} of each set"
        )
    return lines
