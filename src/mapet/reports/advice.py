"""What a run's metrics say that a user should know. The sentences are in web/advice.md, each under the name of its rule."""

from collections.abc import Iterator, Mapping
from math import sqrt
from statistics import fmean, median
from typing import Any, NamedTuple

from mapet.reports.history import History, Series
from mapet.reports.render import render_part

RECORDS = 8
"""So many records before anything is said of a run's course."""
EARLY = 0.1
"""Share of the planned epochs that a run may take to leave the baselines."""
FEW_STEPS = 1000
"""Fewer, and what is not learned yet may only need more of them."""
NEAR = 0.01
"""So near to a baseline, an accuracy or a loss (as a share of it) has not left it."""
Finding = tuple[str, tuple[Any, ...]]
"""Name of a rule that holds -> what its sentence tells."""


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


def warnings(run: Subject) -> list[str]:
    """Say what is wrong or may be; empty for a run that goes well."""
    found = [*_at_baselines(run), *_course(run), *_speed(run), *_probes(run), *_tokens(run)]
    return [render_part("advice.md", rule, *told) for rule, told in found]


def not_judged(run: Subject) -> str:
    """Say what to do where the run is over and there was no label to judge it by; else an empty text."""
    epochs = run.history["epoch"].values
    over = bool(epochs) and epochs[-1] >= float(run.recipe.get("epochs") or 0)
    if run.probe or run.history["probe/logistic"].values or not over or not run.has_begun(run.history["loss"]):
        return ""
    return render_part("advice.md", "not_judged", run.recipe)


def _at_baselines(run: Subject) -> Iterator[Finding]:
    """Guessing the most frequent token, or by frequency, would do as well."""
    accuracy, loss = run.history["token_accuracy"], run.history["loss"]
    majority, unigram = run.history["commonest_token"], run.history["token_entropy"]
    few_steps = loss.steps[-1] if loss.steps and loss.steps[-1] < FEW_STEPS else None
    if run.has_begun(accuracy) and majority.values:
        now, guess = run.history.over_last_epoch("token_accuracy"), majority.last
        if max(now, fmean(accuracy.values[-5:])) < min(guess + NEAR, 1.5 * guess):
            yield "accuracy_at_baseline", (run.recipe, few_steps, now, guess)
    if run.has_begun(loss) and unigram.values:
        now, guess = run.history.over_last_epoch("loss"), unigram.last
        if min(now, fmean(loss.values[-5:])) >= (1 - NEAR) * guess:
            yield "loss_at_baseline", (run.recipe, few_steps, now, guess)


def _course(run: Subject) -> Iterator[Finding]:
    """The loss rises, steps were skipped, or most gradients are clipped."""
    loss, norms, skipped = run.history["loss"].values, run.history["gradient_norm"].values, run.history["skipped_steps"]
    if len(loss) >= 2 * RECORDS:
        width = max(1, len(loss) // 10)
        lowest = min(fmean(loss[i : i + width]) for i in range(0, len(loss) - width + 1, width))
        if (now := fmean(loss[-width:])) >= lowest + max(0.1 * abs(lowest), 0.001):
            yield "loss_rises", (now, lowest)
    if skipped.values and skipped.last:
        yield "skipped_steps", (skipped.last, skipped.steps[-1])
    if (limit := run.recipe.get("clip_grad")) and len(norms) >= 2 * RECORDS:
        late = norms[len(norms) // 2 :]
        if (share := fmean(norm > limit for norm in late)) >= 0.5:
            yield "mostly_clipped", (limit, share, median(late))


def _speed(run: Subject) -> Iterator[Finding]:
    """The loader is slower than the model, or the last quarter less than half as fast as what was before."""
    waiting, speed = run.history["data_wait"].values, run.history["images_per_second"].values
    if len(waiting) >= RECORDS and (share := median(waiting[len(waiting) // 4 :])) >= 0.25:
        yield "waits_for_images", (share,)
    if len(speed) >= 4 * RECORDS:
        quarter = len(speed) // 4
        before, now = median(speed[quarter:-quarter]), median(speed[-quarter:])
        if now <= before / 2:
            yield "slower_than_it_was", (before, now)


def _probes(run: Subject) -> Iterator[Finding]:
    """The features get worse, or no better, or may be no better than those of random weights."""
    steps, scores = run.history["probe/logistic"]
    if len(scores) >= 3:
        if (best := max(scores)) - scores[-1] >= 0.03:
            yield "probe_falls", (best, steps[scores.index(best)], scores[-1])
        elif max(scores[1:]) - scores[0] < 0.01:
            yield "probe_stands_still", (scores[0], scores[-1])
    if run.probe.keys() >= {"untrained", "pretrained", "data"}:
        before, after = (run.probe[state]["logistic"] for state in ("untrained", "pretrained"))
        share, images = (before + after) / 2, run.probe["data"]["test_images"]
        if after - before < 2 * sqrt(2 * share * (1 - share) / images):  # two standard errors of the difference
            yield "probe_like_untrained", (before, after, images)


def _tokens(run: Subject) -> Iterator[Finding]:
    """Nearly every token is predicted, much of the codebook is never used, or a single token takes most patches."""
    accuracy = run.history["token_accuracy"].values
    if len(accuracy) >= RECORDS and (now := fmean(accuracy[-5:])) >= 0.95:
        yield "too_easy", (now,)
    used, dead = (run.health.get(name) or 0 for name in ("num_used_codes", "num_dead_codes"))
    if dead > used / 4:
        yield "dead_words", (dead, used + dead)
    if (share := run.health.get("top_code_fraction") or 0) >= 0.5:
        yield "one_word_for_most", (share,)
