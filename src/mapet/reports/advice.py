"""What a run's figures say that a person should know: a table of pure functions, history -> a sentence or None."""

from collections.abc import Callable, Mapping
from math import sqrt
from shlex import quote
from statistics import fmean, median
from typing import Any, Literal, NamedTuple

from mapet.errors import option
from mapet.reports.history import History, Series

RECORDS = 8
"""So many records before anything is said of a run's course."""
EARLY = 0.1
"""Share of the planned epochs that a run may take to leave the baselines."""
FEW_STEPS = 1000
"""Fewer, and what is not learned yet may only need more of them."""
NEAR = 0.01
"""So near to a baseline, an accuracy or a loss (as a share of it) has not left it."""


class Subject(NamedTuple):
    """What is judged.

    Attributes:
        recipe: options of `pretrain` as resolved.
        health: of visual_tokenizer.json, measured on the patches that the words were fitted to.
        probe: the probe of the run that it is part of.
    """

    history: History
    recipe: Mapping[str, Any]
    health: Mapping[str, Any] = {}
    probe: Mapping[str, Any] = {}


def accuracy_at_baseline(run: Subject) -> str | None:
    """Guessing the commonest word would do as well."""
    accuracy, baseline = run.history["token_accuracy"], run.history["commonest_token"]
    if not _begun(run, accuracy) or not baseline.values:
        return None
    now, guess = run.history.over_last_epoch("token_accuracy"), baseline.last
    if max(now, fmean(accuracy.values[-5:])) >= min(guess + NEAR, 1.5 * guess):
        return None
    return (
        f"Token accuracy has not left the baseline: {now:.1%}, and always guessing the commonest word scores {guess:.1%}. "
        f"{_few_steps(accuracy)} more {option('epochs')} or a higher {option('lr')}. {_command(run, 'inspect-tokenizer')} says whether "
        f"these words can be predicted"
    )


def loss_at_baseline(run: Subject) -> str | None:
    """Guessing by frequency would do as well."""
    loss, entropy = run.history["loss"], run.history["token_entropy"]
    if not _begun(run, loss) or not entropy.values:
        return None
    now, guess = run.history.over_last_epoch("loss"), entropy.last
    if min(now, fmean(loss.values[-5:])) < (1 - NEAR) * guess:
        return None
    return (
        f"The loss is not below that of guessing by frequency alone: {now:.3f} against {guess:.3f} nats; nothing is learned "
        f"of the images yet. {_few_steps(loss)} more {option('epochs')}, or another {option('lr')}. "
        f"{_command(run, 'inspect-tokenizer')} checks the words"
    )


def loss_rises(run: Subject) -> str | None:
    """The loss is well above its lowest."""
    loss = run.history["loss"].values
    if len(loss) < 2 * RECORDS:
        return None
    width = max(1, len(loss) // 10)
    means = [fmean(loss[i : i + width]) for i in range(0, len(loss) - width + 1, width)]
    lowest, now = min(means), fmean(loss[-width:])
    if now < lowest + max(0.1 * abs(lowest), 0.001):
        return None
    return (
        f"The loss rose again: {now:.3f}, after {lowest:.3f} before; try a lower {option('lr')}, a longer {option('warmup_epochs')} or a "
        f"smaller {option('clip_grad')}"
    )


def skipped_steps(run: Subject) -> str | None:
    """Updates were left out."""
    skipped = run.history["skipped_steps"]
    if not skipped.values or not skipped.last:
        return None
    return (
        f"{skipped.last:.0f} of {skipped.steps[-1]:.0f} steps were left out, for their loss or gradient was not finite; train.log "
        f"names their images. Try {option('precision')} float32 or a lower {option('lr')}"
    )


def waits_for_images(run: Subject) -> str | None:
    """The loader is slower than the model."""
    waiting = run.history["data_wait"].values
    if len(waiting) < RECORDS or (share := median(waiting[len(waiting) // 4 :])) < 0.25:
        return None
    return (
        f"Training waits for images {share:.0%} of the time; try more processes that read them (MAPET_WORKERS), and `mapet prepare` for images much "
        "larger than the input"
    )


def slower_than_it_was(run: Subject) -> str | None:
    """The speed of the last quarter is less than half of what it was."""
    speed = run.history["images_per_second"].values
    if len(speed) < 4 * RECORDS:
        return None
    quarter = len(speed) // 4
    before, now = median(speed[quarter:-quarter]), median(speed[-quarter:])
    if now > before / 2:
        return None
    return f"Training slowed down from {before:.0f} to {now:.0f} images/s; is something else running on this machine?"


def mostly_clipped(run: Subject) -> str | None:
    """The gradient's norm is above the limit in most records of the later half."""
    limit, norms = run.recipe.get("clip_grad"), run.history["gradient_norm"].values
    if not limit or len(norms) < 2 * RECORDS:
        return None
    late = norms[len(norms) // 2 :]
    share = sum(norm > limit for norm in late) / len(late)
    if share < 0.5:
        return None
    return (
        f"The gradient is larger than {option('clip_grad')} {limit:g} in {share:.0%} of the later records (median norm {median(late):.2g}): "
        f"training is unsteady. Try a lower {option('lr')} or a longer {option('warmup_epochs')}"
    )


def probe_falls(run: Subject) -> str | None:
    """The features were better before."""
    probe = run.history["probe/logistic"]
    if len(probe.values) < 3 or (best := max(probe.values)) - probe.last < 0.03:
        return None
    when = probe.steps[probe.values.index(best)]
    return (
        f"The linear probe fell from {best:.3f} at step {when:.0f} to {probe.last:.3f}: the features get worse for these "
        f"labels while the loss is learned. Fewer {option('epochs')}, or a lower {option('lr')}, may do better"
    )


def probe_stands_still(run: Subject) -> str | None:
    """The features are no better than at the first probe."""
    probe = run.history["probe/logistic"]
    if len(probe.values) < 3 or max(probe.values[1:]) - probe.values[0] >= 0.01 or probe_falls(run):
        return None
    return (
        f"The linear probe is where it was at first: {probe.values[0]:.3f} and {probe.last:.3f}; what is learned does not help "
        "to tell these classes apart. Other words may: --fit-tokenizer.teacher, or another --fit-tokenizer.vocab-size"
    )


def probe_like_untrained(run: Subject) -> str | None:
    """The features may be no better than those of random weights: less than two standard errors of the difference."""
    try:
        before, after = (float(run.probe[state]["logistic"]) for state in ("untrained", "pretrained"))
        images = int(run.probe["data"]["test_images"])
    except (KeyError, TypeError, ValueError):
        return None
    share = (before + after) / 2
    if images < 1 or not 0 <= share <= 1 or after - before >= 2 * sqrt(2 * share * (1 - share) / images):
        return None
    return (
        f"The linear probe is not clearly better than untrained: {after:.3f} against {before:.3f} on {images:,} images. More "
        f"{option('epochs')} or more images to learn from may help, and more test images would tell smaller differences"
    )


def too_easy(run: Subject) -> str | None:
    """Nearly every word is predicted."""
    accuracy = run.history["token_accuracy"].values
    if len(accuracy) < RECORDS or (now := fmean(accuracy[-5:])) < 0.95:
        return None
    return (
        f"{now:.1%} of the words are predicted: the task has become too easy to teach more. Try a higher {option('mask_ratio')}, a "
        f"larger --fit-tokenizer.vocab-size, or {option('patch_order')} blockwise"
    )


def dead_words(run: Subject) -> str | None:
    """Much of the codebook is never used."""
    used, dead = run.health.get("num_used_codes"), run.health.get("num_dead_codes")
    if not used or not dead or dead <= used / 4:
        return None
    return f"{dead:,} of {used + dead:,} visual words are never used; fit the tokenizer on more images or with a smaller --fit-tokenizer.vocab-size"


def one_word_for_most(run: Subject) -> str | None:
    """A single word takes most patches."""
    share = run.health.get("top_code_fraction")
    if not share or share < 0.5:
        return None
    return (
        f"{share:.0%} of the patches have the same visual word (background, perhaps); there is little to predict in them. Try "
        "larger patches, tighter crops (--tokenize.views random-crop) or another teacher"
    )


WARNINGS: tuple[Callable[[Subject], str | None], ...] = (
    accuracy_at_baseline,
    loss_at_baseline,
    loss_rises,
    skipped_steps,
    waits_for_images,
    slower_than_it_was,
    mostly_clipped,
    probe_falls,
    probe_stands_still,
    probe_like_untrained,
    too_easy,
    dead_words,
    one_word_for_most,
)


def warnings(run: Subject) -> list[str]:
    """Sentences of all rules that hold."""
    return [sentence for rule in WARNINGS if (sentence := rule(run))]


def not_judged(run: Subject) -> str:
    """What to do where it is over and there was no label to judge it by; else an empty text."""
    epochs = run.history["epoch"].values
    over = bool(epochs) and epochs[-1] >= float(run.recipe.get("epochs") or 0)
    if run.probe or run.history["probe/logistic"].values or not over or too_early(run):
        return ""
    return (
        f"There were no labels, so nothing here says whether the features are of use. {_command(run, 'evaluate')} holds them "
        "against random weights without labels; a few labelled images say more"
    )


def _few_steps(series: Series) -> str:
    """Fewer steps than learning usually takes come first in what to change."""
    steps = series.steps[-1]
    return f"That was after {steps:,.0f} steps, which is few: give it" if steps < FEW_STEPS else "Try"


def _command(run: Subject, stage: Literal["inspect-tokenizer", "evaluate"]) -> str:
    """As a person can type it, of this run."""
    given = {name: quote(str(run.recipe.get(name) or name.upper())) for name in ("tokenizer", "images", "out")}
    if stage == "inspect-tokenizer":
        return "`mapet inspect-tokenizer {tokenizer} --images {images} --out NEW`".format(**given)
    return "`mapet evaluate --backbone random:{out} {out} --images {images} --protocols feature-rank nearest-neighbors --out NEW`".format(
        **given
    )


def too_early(run: Subject) -> bool:
    """Whether so little of the run is over that its course says nothing yet."""
    return not _begun(run, run.history["loss"])


def _begun(run: Subject, series: Series) -> bool:
    if len(series.values) < RECORDS:
        return False
    epochs = run.history["epoch"]
    return not epochs.values or epochs.last >= EARLY * float(run.recipe.get("epochs") or 0)
