"""Statistics of a study: intervals over seeds, paired differences of compared values, the levels at which each does best."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from math import isfinite, nan
from statistics import fmean
from typing import Any, NamedTuple

from mapet.errors import MapetError
from mapet.evaluation.eval_context import ALPHA, mean_and_margin

MIN_SHOWN_P = 0.001
"""Smaller p values are given as below it."""
MIN_SPREAD = 1e-9
"""Accuracies that differ by less count as equal: one image of any real test set is more, so this is rounding."""

EPOCHS, COMPUTE = "equal epochs", "equal compute"
"""Budgets: what the compared runs have in common."""
Condition = tuple[tuple[str, str], ...]
"""(factor, level) of every factor but the compared one."""


@dataclass(frozen=True)
class Trial:
    """One pre-training run of a study and its results. Only finished runs count in the statistics.

    Attributes:
        factors: name of each factor (the seed is none) -> its level here; all trials of a study have the same keys.
        tokenizer: name of its tokenizer in the study.
        options: options of `pretrain`, `epochs` among them.
        budgets: the comparisons that it belongs to, of `EPOCHS` and `COMPUTE`.
        flops_per_image: FLOPs of training on one image; 0 while its tokenizer is not there.
        status: that of its run.json ("finished", "failed", ...), or "not run".
        reason: why it failed or stopped; else ''.
        scores: metric -> accuracy (0..1).
        flops: of the whole pre-training; None until it is finished, as `epochs` and `seconds` are.
        seconds: training time, without start-up and evaluation.
        curve: learning curve; each point has "epoch", "flops", "seconds", and any of "loss", "logistic", "knn".
    """

    factors: dict[str, str]
    seed: int
    tokenizer: str
    options: dict[str, Any]
    budgets: tuple[str, ...] = (EPOCHS,)
    flops_per_image: float = 0.0
    status: str = "not run"
    reason: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    epochs: float | None = None
    flops: float | None = None
    seconds: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the levels in the order of their factors' names, the seed, and, of a run that was added for equal compute, the epochs."""
        parts = [*(level for _, level in sorted(self.factors.items())), f"seed {self.seed}"]
        return ", ".join(parts if EPOCHS in self.budgets else [*parts, f"{self.options['epochs']:g} epochs"])

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    def condition(self, compared_factor: str) -> Condition:
        """Return (factor, level) of every factor but the compared one."""
        return tuple((factor, level) for factor, level in self.factors.items() if factor != compared_factor)


@dataclass(frozen=True)
class Study:
    """The trials of a study and what its report prints with them.

    Attributes:
        compared_factor: the factor whose levels ("values") are compared in pairs.
        baselines: name of a model that was not pre-trained here -> metric -> accuracy (0..1).
        notes: sentences for the top of the report.
        command: the shell command that repeats the study.
    """

    title: str
    compared_factor: str
    trials: list[Trial]
    baselines: dict[str, dict[str, float]]
    notes: list[str]
    command: str

    def __post_init__(self) -> None:
        """Raise MapetError if two runs of a budget have the same factors and seed: pairs would be ambiguous."""
        keys = Counter((budget, *sorted(t.factors.items()), t.seed) for t in self.trials for budget in t.budgets)
        for key, count in keys.items():
            if count > 1:
                raise MapetError(
                    f"study '{self.title}' has more than one run of {key}: give each its own value or seed"
                )

    @cached_property
    def budgets(self) -> list[str]:
        return list(dict.fromkeys(budget for trial in self.trials for budget in trial.budgets))

    @cached_property
    def metrics(self) -> list[str]:
        sources = [*(trial.scores for trial in self.trials), *self.baselines.values()]
        return list(dict.fromkeys(metric for scores in sources for metric in scores))

    @cached_property
    def values(self) -> list[str]:
        """Return the levels of the compared factor, in the order of the trials."""
        return list(dict.fromkeys(trial.factors[self.compared_factor] for trial in self.trials))

    @cached_property
    def conditions(self) -> list[Condition]:
        return list(dict.fromkeys(trial.condition(self.compared_factor) for trial in self.trials))

    @cached_property
    def other_factors(self) -> list[str]:
        return [factor for factor, _ in self.conditions[0]] if self.trials else []

    def select(self, budget: str, condition: Condition, value: str) -> list[Trial]:
        """Return the runs, one per seed, of one compared value in one condition."""
        factors = {**dict(condition), self.compared_factor: value}
        return [trial for trial in self.trials if budget in trial.budgets and trial.factors == factors]

    def scores(self, budget: str, condition: Condition, value: str, metric: str) -> dict[int, float]:
        """Return seed -> accuracy (0..1) of the finished runs that have the metric, in ascending order of seeds."""
        trials = sorted(self.select(budget, condition, value), key=lambda trial: trial.seed)
        scores = {trial.seed: trial.scores.get(metric, nan) for trial in trials if trial.finished}
        return {seed: score for seed, score in scores.items() if isfinite(score)}


@dataclass
class Difference:
    """Mean accuracy (0..1) of `first` minus that of `second`, over the seeds that both have.

    Attributes:
        budget: `EPOCHS` or `COMPUTE`, what the compared runs have in common.
        metric: key of `Trial.scores`.
        first, second: the two compared values (levels of `Study.compared_factor`).
        conditions: the condition that it was measured in, or all those that it is averaged over.
        seeds: how many seeds both have.
        half_width: half the width of the 95 % interval of `mean`.
        p: of the paired t-test. It and `half_width` are None without a test: one seed, or no spread between the seeds.
        is_primary: whether it is averaged over all conditions of its pair, or the pair has only this one.
        p_holm: `p`, corrected for the other tests of its budget, metric and kind (primary or not).
    """

    budget: str
    metric: str
    first: str
    second: str
    conditions: tuple[Condition, ...]
    seeds: int
    mean: float
    half_width: float | None
    p: float | None
    is_primary: bool
    p_holm: float | None = None

    @property
    def verdict(self) -> str:
        """Return 'higher' or 'lower' where the corrected p is below `ALPHA`, else 'not significant', or 'no test'."""
        if self.p_holm is None:
            return "no test"
        if self.p_holm >= ALPHA:
            return "not significant"
        return "higher" if self.mean > 0 else "lower"


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of Student's paired t-test that the mean difference is zero.

    Args:
        differences: of accuracies (0..1), one for each seed.

    Returns:
        p; None for fewer than two pairs, and where all differences are equal (within `MIN_SPREAD`): t is then 0/0 or infinite, and p = 0
        would claim more than a few runs that agree to the last digit can show.
    """
    if len(differences) < 2 or max(differences) - min(differences) < MIN_SPREAD:
        return None
    from scipy import stats  # a second to import

    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Return p values corrected for testing all of them (Holm, 1979: a simple sequentially rejective multiple test procedure).

    The i-th smallest of n (from 0) is multiplied by n - i, and at least as large as those before it; the order of `p` is kept.
    """
    corrected, highest = [0.0] * len(p), 0.0
    for i, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        corrected[index] = highest = max(highest, min(1.0, (len(p) - i) * p[index]))
    return corrected


def paired_differences(study: Study) -> list[Difference]:
    """Compare every pair of values of the compared factor, for each budget and metric: over all conditions, then in each.

    p values are corrected over the tests of a budget and metric: primary ones (the questions a study is made for) among
    themselves, those of single conditions among themselves. A difference without a test (one seed) is not counted among them.

    Args:
        study: unfinished trials are ignored; a condition in which the two values share no seed is, too.

    Returns:
        For each budget, metric and pair of values, in this order, what `_compare_pair` returns, with `p_holm`.
    """
    differences = []
    for budget, metric in product(study.budgets, study.metrics):
        rows = []
        for first, second in combinations(study.values, 2):
            rows += _compare_pair(study, budget, metric, first, second)
        for is_primary in (True, False):
            tested = [(row, row.p) for row in rows if row.is_primary == is_primary and row.p is not None]
            for (row, _), p_holm in zip(tested, holm([p for _, p in tested]), strict=True):
                row.p_holm = p_holm
        differences += rows
    return differences


def _compare_pair(study: Study, budget: str, metric: str, first: str, second: str) -> list[Difference]:
    """Compare two values seed by seed: one row over all conditions, if there are several, then one for each condition.

    Over several conditions the difference is averaged over them first, for each seed, so that the conditions of a seed do not
    count as independent. A seed that some conditions lack is averaged over those that have it.

    Args:
        study: its finished trials are compared.
        budget, metric: of the scores to compare, see `Difference`.
        first, second: values of the compared factor.

    Returns:
        The rows, with `p_holm` None; [] if no condition has a seed with both values.
    """
    by_condition: dict[Condition, dict[int, float]] = {}  # -> seed -> difference
    for condition in study.conditions:
        scores, others = (study.scores(budget, condition, value, metric) for value in (first, second))
        if paired := {seed: scores[seed] - others[seed] for seed in scores if seed in others}:
            by_condition[condition] = paired
    groups: list[tuple[Condition, ...]] = [(condition,) for condition in by_condition]
    if len(by_condition) > 1:
        groups.insert(0, tuple(by_condition))
    rows = []
    for conditions in groups:
        values = _mean_by_seed([by_condition[condition] for condition in conditions])
        (mean, half_width), p = mean_and_margin(values), paired_t_test(values)
        half_width = None if p is None else half_width
        is_primary = len(conditions) == len(by_condition)
        rows.append(Difference(budget, metric, first, second, conditions, len(values), mean, half_width, p, is_primary))
    return rows


def _mean_by_seed(by_condition: Collection[dict[int, float]]) -> list[float]:
    """Average scores over conditions, for each seed that any condition has; in ascending order of seeds.

    Args:
        by_condition: for each condition, seed -> score (or difference of scores).
    """
    seeds = sorted({seed for scores in by_condition for seed in scores})
    return [fmean(scores[seed] for scores in by_condition if seed in scores) for seed in seeds]


def has_single_seed(differences: list[Difference]) -> bool:
    """Return whether there are differences, all of one seed, so that none has an interval or a test."""
    return bool(differences) and all(row.seeds == 1 for row in differences)


def format_condition(condition: Condition) -> str:
    """Format a condition: 'tokenizer pixels, ratio 0.75'."""
    return ", ".join(f"{factor} {level}" for factor, level in condition)


def format_p_value(p: float | None, equals: str = "") -> str:
    """Format three digits after `equals`, '< 0.001' below that, or '-' where there was no test."""
    if p is None:
        return "-"
    return f"< {MIN_SHOWN_P}" if p < MIN_SHOWN_P else f"{equals}{p:.3f}"


class BestLevels(NamedTuple):
    """The levels of a factor at which a compared value has its highest mean: a description, no test.

    Attributes:
        value: the compared value.
        levels: usually one; several whose means are equal.
        mean: the highest mean accuracy (0..1).
        overlap: whether its 95 % interval overlaps with another level's; None with one seed.
    """

    value: str
    levels: list[str]
    mean: float
    overlap: bool | None


def find_best_levels(study: Study, budget: str, metric: str, factor: str) -> list[BestLevels]:
    """Find the levels of `factor` at which each compared value is best.

    Levels are compared on the seeds and remaining factors that all of them have, averaged for each seed over these factors, then over
    seeds; a value with fewer than two levels, or with nothing in common between them, is omitted.

    Args:
        study: unfinished trials are ignored.
        budget, metric: of the scores, see `Difference`.
        factor: one of `study.other_factors`, i.e. not the compared one.

    Returns:
        An entry for each compared value, in their order.
    """
    best = []
    for value in study.values:
        by_level: dict[str, dict[tuple[Condition, int], float]] = {}  # -> (other factors, seed) -> score
        for condition in study.conditions:
            other_factors = tuple(pair for pair in condition if pair[0] != factor)
            for seed, score in study.scores(budget, condition, value, metric).items():
                by_level.setdefault(dict(condition)[factor], {})[other_factors, seed] = score
        shared = set.intersection(*map(set, by_level.values())) if len(by_level) > 1 else set()
        if not shared:
            continue
        intervals = {}
        for level, scores in by_level.items():
            intervals[level] = mean_and_margin(_mean_by_seed([{key[1]: scores[key]} for key in shared]))
        highest, half_width = max(intervals.values(), key=lambda interval: interval[0])
        levels = [level for level, (mean, _) in intervals.items() if mean > highest - MIN_SPREAD]
        upper_ends = [mean + (width or 0) for level, (mean, width) in intervals.items() if level != levels[0]]
        overlap = None if half_width is None else max(upper_ends) >= highest - half_width
        best.append(BestLevels(value, levels, highest, overlap))
    return best
