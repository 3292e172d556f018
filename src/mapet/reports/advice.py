"""What a run's metrics say that a user should know, in sentences."""

from collections.abc import Iterator, Mapping
from math import sqrt
from shlex import quote
from statistics import fmean, median
from typing import Any, NamedTuple

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
INSPECT = "`mapet inspect-tokenizer {tokenizer} --images {images} --out NEW`"
EVALUATE = "`mapet evaluate --backbone random:{out} {out} --images {images} --protocols feature-rank nearest-neighbors --out NEW`"


class Subject(NamedTuple):
    """What is judged.

    Attributes:
        recipe: options of `pretrain` as resolved.
        health: codebook_stats of visual_tokenizer.json, measured on the patches that the codebook was fitted to.
        probe: the probe of the run that it is part of.
    """

    history: History
    recipe: Mapping[str, Any]
    health: Mapping[str, Any] = {}
    probe: Mapping[str, Any] = {}

    def has_begun(self, series: Series) -> bool:
        """Whether enough of the run is over for its course to say something."""
        epochs = self.history["epoch"]
        over = not epochs.values or epochs.last >= EARLY * float(self.recipe.get("epochs") or 0)
        return over and len(series.values) >= RECORDS

    def command(self, template: str) -> str:
        """A command for this run, as it can be typed."""
        given = {name: quote(str(self.recipe.get(name) or name.upper())) for name in ("tokenizer", "images", "out")}
        return template.format(**given)


def warnings(run: Subject) -> list[str]:
    """Say what is wrong or may be; empty for a run that goes well."""
    return [*_at_baselines(run), *_course(run), *_speed(run), *_probes(run), *_tokens(run)]


def not_judged(run: Subject) -> str:
    """Say what to do where the run is over and there was no label to judge it by; else an empty text."""
    epochs = run.history["epoch"].values
    over = bool(epochs) and epochs[-1] >= float(run.recipe.get("epochs") or 0)
    if run.probe or run.history["probe/logistic"].values or not over or not run.has_begun(run.history["loss"]):
        return ""
    return (
        f"There were no labels, so nothing here says whether the features are of use. {run.command(EVALUATE)} holds them "
        "against random weights without labels; a few labelled images say more"
    )


def _at_baselines(run: Subject) -> Iterator[str]:
    """Guessing the most frequent token, or by frequency, would do as well."""
    history = run.history
    accuracy, majority, loss, unigram = (
        history[name] for name in ("token_accuracy", "commonest_token", "loss", "token_entropy")
    )
    steps = loss.steps[-1] if loss.steps else 0
    attempt = f"That was after {steps:,.0f} steps, which is few: give it" if steps < FEW_STEPS else "Try"
    if run.has_begun(accuracy) and majority.values:
        now, guess = history.over_last_epoch("token_accuracy"), majority.last
        if max(now, fmean(accuracy.values[-5:])) < min(guess + NEAR, 1.5 * guess):
            yield (
                f"Token accuracy has not left the baseline: {now:.1%}, and always guessing the commonest word scores {guess:.1%}. {attempt} "
                f"more {option('epochs')} or a higher {option('lr')}. {run.command(INSPECT)} says whether these words can be predicted"
            )
    if run.has_begun(loss) and unigram.values:
        now, guess = history.over_last_epoch("loss"), unigram.last
        if min(now, fmean(loss.values[-5:])) >= (1 - NEAR) * guess:
            yield (
                f"The loss is not below that of guessing by frequency alone: {now:.3f} against {guess:.3f} nats; nothing is learned of the "
                f"images yet. {attempt} more {option('epochs')}, or another {option('lr')}. {run.command(INSPECT)} checks the words"
            )


def _course(run: Subject) -> Iterator[str]:
    """The loss rises, steps were skipped, or most gradients are clipped."""
    loss, norms = run.history["loss"].values, run.history["gradient_norm"].values
    if len(loss) >= 2 * RECORDS:
        width = max(1, len(loss) // 10)
        lowest = min(fmean(loss[i : i + width]) for i in range(0, len(loss) - width + 1, width))
        if (now := fmean(loss[-width:])) >= lowest + max(0.1 * abs(lowest), 0.001):
            yield (
                f"The loss rose again: {now:.3f}, after {lowest:.3f} before; try a lower {option('lr')}, a longer "
                f"{option('warmup_epochs')} or a smaller {option('clip_grad')}"
            )
    skipped = run.history["skipped_steps"]
    if skipped.values and skipped.last:
        yield (
            f"{skipped.last:.0f} of {skipped.steps[-1]:.0f} steps were left out, for their loss or gradient was not finite; train.log "
            f"names their images. Try {option('precision')} float32 or a lower {option('lr')}"
        )
    if (limit := run.recipe.get("clip_grad")) and len(norms) >= 2 * RECORDS:
        late = norms[len(norms) // 2 :]
        if (share := fmean(norm > limit for norm in late)) >= 0.5:
            yield (
                f"The gradient is larger than {option('clip_grad')} {limit:g} in {share:.0%} of the later records (median norm "
                f"{median(late):.2g}): training is unsteady. Try a lower {option('lr')} or a longer {option('warmup_epochs')}"
            )


def _speed(run: Subject) -> Iterator[str]:
    """The loader is slower than the model, or the last quarter less than half as fast as what was before."""
    waiting, speed = run.history["data_wait"].values, run.history["images_per_second"].values
    if len(waiting) >= RECORDS and (share := median(waiting[len(waiting) // 4 :])) >= 0.25:
        yield (
            f"Training waits for images {share:.0%} of the time; try more processes that read them (MAPET_WORKERS), and `mapet prepare` for "
            "images much larger than the input"
        )
    if len(speed) >= 4 * RECORDS:
        quarter = len(speed) // 4
        before, now = median(speed[quarter:-quarter]), median(speed[-quarter:])
        if now <= before / 2:
            yield f"Training slowed down from {before:.0f} to {now:.0f} images/s; is something else running on this machine?"


def _probes(run: Subject) -> Iterator[str]:
    """The features get worse, or no better, or may be no better than those of random weights."""
    probe = run.history["probe/logistic"]
    if len(probe.values) >= 3:
        best = max(probe.values)
        if best - probe.last >= 0.03:
            when = probe.steps[probe.values.index(best)]
            yield (
                f"The linear probe fell from {best:.3f} at step {when:.0f} to {probe.last:.3f}: the features get worse for these "
                f"labels while the loss is learned. Fewer {option('epochs')}, or a lower {option('lr')}, may do better"
            )
        elif max(probe.values[1:]) - probe.values[0] < 0.01:
            yield (
                f"The linear probe is where it was at first: {probe.values[0]:.3f} and {probe.last:.3f}; what is learned does not help "
                "to tell these classes apart. Other words may: --fit-tokenizer.teacher, or another --fit-tokenizer.vocab-size"
            )
    if run.probe.keys() >= {"untrained", "pretrained", "data"}:
        before, after = (run.probe[state]["logistic"] for state in ("untrained", "pretrained"))
        share, images = (before + after) / 2, run.probe["data"]["test_images"]
        if after - before < 2 * sqrt(2 * share * (1 - share) / images):  # two standard errors of the difference
            yield (
                f"The linear probe is not clearly better than untrained: {after:.3f} against {before:.3f} on {images:,} images. More "
                f"{option('epochs')} or more images to learn from may help, and more test images would tell smaller differences"
            )


def _tokens(run: Subject) -> Iterator[str]:
    """Nearly every token is predicted, much of the codebook is never used, or a single token takes most patches."""
    accuracy = run.history["token_accuracy"].values
    if len(accuracy) >= RECORDS and (now := fmean(accuracy[-5:])) >= 0.95:
        yield (
            f"{now:.1%} of the words are predicted: the task has become too easy to teach more. Try a higher {option('mask_ratio')}, a "
            f"larger --fit-tokenizer.vocab-size, or {option('patch_order')} blockwise"
        )
    used, dead = (run.health.get(name) or 0 for name in ("num_used_codes", "num_dead_codes"))
    if dead > used / 4:
        yield (
            f"{dead:,} of {used + dead:,} visual words are never used; fit the tokenizer on more images or with a smaller "
            "--fit-tokenizer.vocab-size"
        )
    if (share := run.health.get("top_code_fraction") or 0) >= 0.5:
        yield (
            f"{share:.0%} of the patches have the same visual word (background, perhaps); there is little to predict in them. Try "
            "larger patches, tighter crops (--tokenize.views random-crop) or another teacher"
        )
