"""Statistics of a study: intervals over seeds, paired differences of runs, the best values."""

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

MIN_SPREAD = 1e-9
"""Accuracies nearer than this are the same: no test set is large enough to tell them from rounding."""

EPOCHS, COMPUTE = "equal epochs", "equal compute"
"""Budgets: what runs that are compared have alike."""
Condition = tuple[tuple[str, str], ...]
"""(factor, value) of every factor but the compared one."""


@dataclass(frozen=True)
class Trial:
    """One pre-training run of a study, and what came of it. Only runs that are done count in the statistics.

    Attributes:
        factors: value of each factor but the seed; the same keys in all trials of a study.
        tokenizer: its name in the study.
        options: of `pretrain`.
        budgets: the comparisons it belongs to.
        status: of its run.json ("finished", "failed", ...; `reason` says why), or "not run".
        scores: accuracy (0..1) of each metric.
        flops, seconds: of the whole pre-training; wall-clock.
        curve: points of "epoch", "flops", "seconds", and any of "loss", "logistic", "knn".
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
    epochs: int | None = None
    flops: float | None = None
    seconds: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        parts = [*(value for _, value in sorted(self.factors.items())), f"seed {self.seed}"]
        return ", ".join(parts if EPOCHS in self.budgets else [*parts, f"{self.options['epochs']} epochs"])

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    def condition(self, compare: str) -> Condition:
        """(factor, value) of every factor but the compared one."""
        return tuple((factor, value) for factor, value in self.factors.items() if factor != compare)


@dataclass(frozen=True)
class Study:
    """A grid of runs, and what to print with it.

    Attributes:
        compared_factor: the factor whose values are compared in pairs.
        baselines: accuracies of what was not pre-trained here, by name and metric.
        notes: sentences to print at the top.
        command: what repeats the study.
    """

    title: str
    compared_factor: str
    trials: list[Trial]
    baselines: dict[str, dict[str, float]]
    notes: list[str]
    command: str

    def __post_init__(self) -> None:
        keys = Counter((budget, *sorted(c.factors.items()), c.seed) for c in self.trials for budget in c.budgets)
        if twice := [key for key, count in keys.items() if count > 1]:  # pairs would be ambiguous
            raise MapetError(f"study '{self.title}' has more than one run of {twice[0]}")

    @cached_property
    def budgets(self) -> list[str]:
        return list(dict.fromkeys(budget for trial in self.trials for budget in trial.budgets))

    @cached_property
    def metrics(self) -> list[str]:
        sources = [*(trial.scores for trial in self.trials), *self.baselines.values()]
        return list(dict.fromkeys(metric for scores in sources for metric in scores))

    @cached_property
    def values(self) -> list[str]:
        """Of the compared factor, in the order of the trials."""
        return list(dict.fromkeys(trial.factors[self.compared_factor] for trial in self.trials))

    @cached_property
    def conditions(self) -> list[Condition]:
        return list(dict.fromkeys(trial.condition(self.compared_factor) for trial in self.trials))

    @cached_property
    def other_factors(self) -> list[str]:
        return [factor for factor, _ in self.conditions[0]] if self.trials else []

    def select(self, budget: str, condition: Condition, value: str) -> list[Trial]:
        """The runs, one a seed, of one value in one condition."""
        factors = {**dict(condition), self.compared_factor: value}
        return [trial for trial in self.trials if budget in trial.budgets and trial.factors == factors]

    def scores(self, budget: str, condition: Condition, value: str, metric: str) -> dict[int, float]:
        """Accuracy of each seed that is done, in the order of seeds."""
        trials = sorted(self.select(budget, condition, value), key=lambda trial: trial.seed)
        found = {trial.seed: trial.scores.get(metric, nan) for trial in trials if trial.finished}
        return {seed: score for seed, score in found.items() if isfinite(score)}


@dataclass
class Difference:
    """Accuracy (0..1) of `first` minus that of `second`, over the seeds that both have.

    Attributes:
        conditions: the one it holds for, or all those it is the mean of ("pooled").
        half_width, p, p_holm: None where there is no test: one seed, or no spread between the seeds.
        is_primary: pooled, or of the only condition of its pair.
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
        if self.p_holm is None:
            return "no test"
        return "not significant" if self.p_holm >= ALPHA else "higher" if self.mean > 0 else "lower"


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's paired t-test that the mean difference is nought.

    None below two pairs, and None where all differences are the same: t is then 0/0 or infinite, and p = 0 would claim
    more than two or three runs that agree to the digit can show.
    """
    if len(differences) < 2 or max(differences) - min(differences) < MIN_SPREAD:
        return None
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for testing all of them (Holm, 1979: a simple sequentially rejective multiple test procedure)."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        corrected[i] = highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
    return corrected


def paired_differences(study: Study) -> list[Difference]:
    """Every pair of compared values, pooled and in each condition.

    Corrected over the tests of a budget and metric: the pooled rows (the questions a study is made for) among
    themselves, those of single conditions among themselves.

    Pooled: the mean difference over the conditions first, seed by seed, so that the conditions of a seed do not count as
    independent. A pair with one condition has no pooled row: it would be the same test twice.
    """
    found = []
    for budget, metric in product(study.budgets, study.metrics):
        family = []
        for first, second in combinations(study.values, 2):
            gaps = {}
            for condition in study.conditions:
                a, b = (study.scores(budget, condition, value, metric) for value in (first, second))
                if shared := [seed for seed in a if seed in b]:
                    gaps[condition] = {seed: a[seed] - b[seed] for seed in shared}
            pooled = [tuple(gaps)] if len(gaps) > 1 else []
            for conditions in [*pooled, *((condition,) for condition in gaps)]:
                values = _mean_by_seed([gaps[condition] for condition in conditions])
                (mean, width), p = mean_and_margin(values), paired_t_test(values)
                pair, is_primary = (budget, metric, first, second), len(conditions) == len(gaps)
                width = None if p is None else width
                family.append(Difference(*pair, conditions, len(values), mean, width, p, is_primary))
        for is_primary in (True, False):
            tested = [row for row in family if row.is_primary == is_primary and row.p is not None]
            for row, p_holm in zip(tested, holm([row.p or 0.0 for row in tested]), strict=True):
                row.p_holm = p_holm
        found += family
    return found


def _mean_by_seed(scores: Collection[dict[int, float]]) -> list[float]:
    """Mean over conditions for each seed that any of them has."""
    seeds = sorted({seed for scores_of_condition in scores for seed in scores_of_condition})
    return [
        fmean(scores_of_condition[seed] for scores_of_condition in scores if seed in scores_of_condition)
        for seed in seeds
    ]


def has_single_seed(differences: list[Difference]) -> bool:
    """Whether there are differences, but without intervals and tests."""
    return bool(differences) and all(row.seeds == 1 for row in differences)


def format_condition(condition: Condition) -> str:
    """'tokenizer pixels, ratio 0.75'."""
    return ", ".join(f"{factor} {value}" for factor, value in condition)


def format_p_value(p: float | None, equals: str = "") -> str:
    """Three digits, '< 0.001', or '-' where there was no test."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


class BestLevels(NamedTuple):
    """The levels of a factor at which a compared value has its highest mean: a description, no test.

    Attributes:
        overlap: whether its interval overlaps with another level's; None where there is one seed.
    """

    value: str
    levels: list[str]
    mean: float
    overlap: bool | None


def find_best_levels(study: Study, budget: str, metric: str, factor: str) -> list[BestLevels]:
    """Where each compared value does best.

    Levels of a factor are compared on the seeds and remaining conditions that they share, averaged as in pooling.
    """
    found = []
    for value in study.values:
        levels: dict[str, dict[tuple[Condition, int], float]] = {}
        for condition in study.conditions:
            rest = tuple(pair for pair in condition if pair[0] != factor)
            for seed, score in study.scores(budget, condition, value, metric).items():
                levels.setdefault(dict(condition)[factor], {})[rest, seed] = score
        shared = set.intersection(*map(set, levels.values())) if len(levels) > 1 else set()
        if not shared:
            continue
        seeds = {key: _mean_by_seed([{seed: of[rest, seed]} for rest, seed in shared]) for key, of in levels.items()}
        intervals = {level: mean_and_margin(means) for level, means in seeds.items()}
        highest, width = max(intervals.values(), key=lambda interval: interval[0])
        top = [level for level, (mean, _) in intervals.items() if mean > highest - MIN_SPREAD]
        reach = max(mean + (half or 0) for level, (mean, half) in intervals.items() if level != top[0])
        found.append(BestLevels(value, top, highest, None if width is None else reach >= highest - width))
    return found
