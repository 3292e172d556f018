"""Statistics of a study: intervals over seeds, paired differences of runs, and what may be said of them."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from math import isfinite, nan
from statistics import fmean
from typing import Any

from mapet.errors import MapetError, option
from mapet.evaluation.intervals import LEVEL, mean_and_interval

NO_SPREAD = 1e-9
"""Accuracies nearer than this are the same: no test set is large enough to tell them from rounding."""

EPOCHS, COMPUTE = "equal epochs", "equal compute"
"""Budgets: what runs that are compared have alike."""
Setting = tuple[tuple[str, str], ...]
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
        scores: accuracy (0..1) of each measure.
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

    def setting(self, compare: str) -> Setting:
        """(factor, value) of every factor but the compared one."""
        return tuple((factor, value) for factor, value in self.factors.items() if factor != compare)


@dataclass(frozen=True)
class Study:
    """A grid of runs, and what to print with it.

    Attributes:
        compare: the factor whose values are compared in pairs.
        baselines: accuracies of what was not pre-trained here, by name and measure.
        notes: sentences to print at the top.
        command: what repeats the study.
    """

    title: str
    compare: str
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
    def measures(self) -> list[str]:
        sources = [*(trial.scores for trial in self.trials), *self.baselines.values()]
        return list(dict.fromkeys(measure for scores in sources for measure in scores))

    @cached_property
    def values(self) -> list[str]:
        """Of the compared factor, in the order of the trials."""
        return list(dict.fromkeys(trial.factors[self.compare] for trial in self.trials))

    @cached_property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(trial.setting(self.compare) for trial in self.trials))

    @cached_property
    def other_factors(self) -> list[str]:
        return [factor for factor, _ in self.settings[0]] if self.trials else []

    def select(self, budget: str, setting: Setting, value: str) -> list[Trial]:
        """The runs, one a seed, of one value in one setting."""
        factors = {**dict(setting), self.compare: value}
        return [trial for trial in self.trials if budget in trial.budgets and trial.factors == factors]

    def scores(self, budget: str, setting: Setting, value: str, measure: str) -> dict[int, float]:
        """Accuracy of each seed that is done, in the order of seeds."""
        trials = sorted(self.select(budget, setting, value), key=lambda trial: trial.seed)
        found = {trial.seed: trial.scores.get(measure, nan) for trial in trials if trial.finished}
        return {seed: score for seed, score in found.items() if isfinite(score)}


@dataclass
class Difference:
    """Accuracy (0..1) of `first` minus that of `second`, over the seeds that both have.

    Attributes:
        settings: the one it holds for, or all those it is the mean of ("pooled").
        half_width, p, p_holm: None where there is no test: one seed, or no spread between the seeds.
        headline: pooled, or of the only setting of its pair.
    """

    budget: str
    measure: str
    first: str
    second: str
    settings: tuple[Setting, ...]
    seeds: int
    mean: float
    half_width: float | None
    p: float | None
    headline: bool
    p_holm: float | None = None

    @property
    def verdict(self) -> str:
        if self.p_holm is None:
            return "no test"
        return "not told apart" if self.p_holm >= LEVEL else "higher" if self.mean > 0 else "lower"


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's paired t-test that the mean difference is nought.

    None below two pairs, and None where all differences are the same: t is then 0/0 or infinite, and p = 0 would claim
    more than two or three runs that agree to the digit can show.
    """
    if len(differences) < 2 or max(differences) - min(differences) < NO_SPREAD:
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
    """Every pair of compared values, pooled and in each setting.

    Corrected over the tests of a budget and measure: the pooled rows (the questions a study is made for) among
    themselves, those of single settings among themselves.

    Pooled: the mean difference over the settings first, seed by seed, so that the settings of a seed do not count as
    independent. A pair with one setting has no pooled row: it would be the same test twice.
    """
    found = []
    for budget, measure in product(study.budgets, study.measures):
        family = []
        for first, second in combinations(study.values, 2):
            gaps = {}
            for setting in study.settings:
                a, b = (study.scores(budget, setting, value, measure) for value in (first, second))
                if shared := [seed for seed in a if seed in b]:
                    gaps[setting] = {seed: a[seed] - b[seed] for seed in shared}
            pooled = [tuple(gaps)] if len(gaps) > 1 else []
            for settings in [*pooled, *((setting,) for setting in gaps)]:
                values = _mean_by_seed([gaps[setting] for setting in settings])
                (mean, width), p = mean_and_interval(values), paired_t_test(values)
                pair, headline = (budget, measure, first, second), len(settings) == len(gaps)
                width = None if p is None else width
                family.append(Difference(*pair, settings, len(values), mean, width, p, headline))
        for headline in (True, False):
            tested = [row for row in family if row.headline == headline and row.p is not None]
            for row, p_holm in zip(tested, holm([row.p or 0.0 for row in tested]), strict=True):
                row.p_holm = p_holm
        found += family
    return found


def _mean_by_seed(scores: Collection[dict[int, float]]) -> list[float]:
    """Mean over settings for each seed that any of them has."""
    seeds = sorted({seed for of_setting in scores for seed in of_setting})
    return [fmean(of_setting[seed] for of_setting in scores if seed in of_setting) for seed in seeds]


def findings(study: Study, differences: list[Difference]) -> list[str]:
    """What the study says, in sentences: pooled differences, those told apart in a setting, the best settings."""
    if not any(trial.finished for trial in study.trials):
        return ["No run has finished: there is nothing to compare yet."]
    if not differences:
        pairs = [f"No two values of {study.compare} share a finished seed and setting: there are no pairs to test."]
        return pairs + best_values(study)
    if of_one_seed(differences):
        said = (
            f"One seed: no interval and no test, so no difference between values of {study.compare} is told apart from chance. The table "
            f"of differences has them; more {option('seeds')} would tell."
        )
        return [said, *best_values(study)]
    single = [row for row in differences if not row.headline]
    told = [sentence(row) for row in single if row.verdict in ("higher", "lower")]
    count = f"Of {len(single)} differences in single settings {len(told)} can be told from nought; the table has all."
    return [sentence(r) for r in differences if r.headline] + told + [count] * bool(single) + best_values(study)


def of_one_seed(differences: list[Difference]) -> bool:
    """Whether there are differences, but without intervals and tests."""
    return bool(differences) and all(row.seeds == 1 for row in differences)


def sentence(row: Difference) -> str:
    """A difference in plain English; "points" are percentage points."""
    sign = -1 if row.mean < 0 else 1
    points = f"{100 * abs(row.mean):.1f}"
    gap = "level with" if points == "0.0" else f"{points} points {'above' if sign > 0 else 'below'}"
    where = f"over {len(row.settings)} settings" if len(row.settings) > 1 else f"with {in_words(row.settings[0])}"
    where = f" {where}" if row.settings[0] else ""
    start = f"At {row.budget}, {row.measure}: {row.first}"
    if row.p_holm is None or row.half_width is None:
        why = "One seed: no interval and" if row.seeds == 1 else f"The same in all {row.seeds} seeds: no spread and"
        return f"{start} is {gap} {row.second}{where}. {why} no test."
    low, high = (100 * (sign * row.mean + side * row.half_width) for side in (-1, 1))
    facts = f"95 % interval {low:z.1f} to {high:z.1f}, {row.seeds} seeds, corrected p {p_value(row.p_holm, '= ')}"
    if row.verdict == "not told apart":
        return f"{start} and {row.second} cannot be told apart{where} ({row.first} is {gap} {row.second}; {facts})."
    return f"{start} is {gap} {row.second}{where} ({facts})."


def in_words(setting: Setting) -> str:
    """'tokenizer pixels, ratio 0.75'."""
    return ", ".join(f"{factor} {value}" for factor, value in setting)


def p_value(p: float | None, equals: str = "") -> str:
    """Three digits, '< 0.001', or '-' where there was no test."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def best_values(study: Study) -> list[str]:
    """Sentences on where each compared value does best, for each other factor that varies: a description, no test.

    Levels of a factor are compared on the seeds and remaining settings that they share, averaged as in pooling.
    """
    sentences = []
    for budget, measure, factor in product(study.budgets, study.measures, study.other_factors):
        claims = []
        for value in study.values:
            levels: dict[str, dict[tuple[Setting, int], float]] = {}
            for setting in study.settings:
                rest = tuple(pair for pair in setting if pair[0] != factor)
                for seed, score in study.scores(budget, setting, value, measure).items():
                    levels.setdefault(dict(setting)[factor], {})[rest, seed] = score
            shared = set.intersection(*map(set, levels.values())) if len(levels) > 1 else set()
            if shared:
                claims.append(f"{_highest(levels, shared)} for {value}")
        if claims:
            sentences.append(f"At {budget}, {measure}: the {factor} of highest mean is {'; '.join(claims)}.")
    return sentences


def _highest(levels: dict[str, dict[tuple[Setting, int], float]], shared: set[tuple[Setting, int]]) -> str:
    """'0.75 (0.512; intervals overlap)'."""
    found = []
    for level, scores in levels.items():
        means = _mean_by_seed([{seed: scores[rest, seed]} for rest, seed in sorted(shared)])
        found.append((*mean_and_interval(means), level))
    highest, width, _ = max(found, key=lambda entry: entry[0])
    top = [level for mean, _, level in found if mean > highest - NO_SPREAD]
    reach = max(mean + (half or 0) for mean, half, level in found if level != top[0])
    remark = "intervals overlap" if reach >= highest - (width or 0) else "intervals do not overlap"
    return f"{' and '.join(top)} ({highest:.3f}; {'one seed, no interval' if width is None else remark})"
