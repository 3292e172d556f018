"""The report of a study: the same in Markdown and in HTML that needs no network, and its runs as CSV."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain, product
from math import isfinite, nan
from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from mapet.evaluation.eval_context import mean_and_margin
from mapet.files import write_text
from mapet.reports.plots import Curve, plot_seeds
from mapet.reports.render import Bold, format_csv, render, render_macro
from mapet.studies import statistics
from mapet.studies.statistics import Difference, Study, Trial

SENTENCES = "study_sentences.md"
COSTS = {"epochs": ("epochs", 1.0), "PFLOP": ("flops", 1e15), "minutes": ("seconds", 60.0)}
"""Column of the table of scores -> attribute of a trial, and the number by which it is divided for this unit."""
CURVE_METRICS = {"loss": "Training loss", "logistic": "Linear probe while training", "knn": "k-NN while training"}
"""Metric of a curve's points -> label."""
CURVE_AXES = {"epoch": ("epochs", 1.0), "flops": ("PFLOP", 1e15)}
"""Key of a curve's points that is x -> label, and the number by which it is divided for this unit."""


def write_report(study: Study, folder: Path) -> None:
    """Write the report of a study, report.md, report.html and report.csv, into `folder`, replacing earlier ones.

    The first two have findings, tables of scores, costs and paired differences, and unfinished trials; learning curves are drawn in HTML
    alone. The CSV has a row for each trial.
    """
    differences = statistics.paired_differences(study)
    content = {
        "study": study,
        "findings": describe_findings(study, differences),
        "scores_head": [*study.other_factors, study.compared_factor, *study.metrics, *COSTS],
        "scores": {budget: _score_rows(study, budget) for budget in study.budgets},
        "curves": _plot_curves(study),
        "differences": [render_macro(SENTENCES, "difference_cells", row).split("\t") for row in differences],
        "missing": [[trial.name, trial.status, trial.reason] for trial in study.trials if not trial.finished],
        "tested": not statistics.has_single_seed(differences),
    }
    for kind in ("md", "html"):
        write_text(folder / f"report.{kind}", render(f"study.{kind}", **content))
    write_text(folder / "report.csv", _format_csv(study))


def describe_findings(study: Study, differences: list[Difference]) -> list[str]:
    """Return a study's findings as sentences.

    They are the primary differences (those over all conditions), the significant differences in single conditions and how many there
    are, then the levels of each other factor at which each compared value is best. If no trial is finished, no two can be compared, or
    all differences have one seed, a sentence says so instead of the differences.

    Args:
        differences: all of the study's, as `statistics.paired_differences` returns them.
        study: its finished trials are compared.
    """
    if not any(trial.finished for trial in study.trials):
        return ["No run has finished: there is nothing to compare yet."]
    if not differences:
        sentences = [render_macro(SENTENCES, "no_pairs", study.compared_factor)]
    elif statistics.has_single_seed(differences):
        sentences = [render_macro(SENTENCES, "one_seed", study.compared_factor)]
    else:
        primary = [difference for difference in differences if difference.is_primary]
        single = [difference for difference in differences if not difference.is_primary]
        significant = [difference for difference in single if difference.verdict in ("higher", "lower")]
        sentences = [describe_difference(difference) for difference in primary + significant]
        if single:
            sentences.append(render_macro(SENTENCES, "num_significant", len(single), len(significant)))
    for budget, metric, factor in product(study.budgets, study.metrics, study.other_factors):
        if best_levels := statistics.find_best_levels(study, budget, metric, factor):
            sentences.append(render_macro(SENTENCES, "best_levels", budget, metric, factor, best_levels))
    return sentences


def describe_difference(difference: Difference) -> str:
    """Return a sentence about the difference of two compared values, with its 95 % interval and corrected p if it was tested."""
    return render_macro(SENTENCES, "difference", difference).strip()


def _score_rows(study: Study, budget: str) -> list[list[str]]:
    """Return the rows of a budget's table: one for each compared value in each condition that has trials, then the baselines.

    Returns:
        Texts of the cells: a level of each factor but the compared one, the compared value, the mean of each metric (the highest of the
        condition as `Bold`), the mean epochs, PFLOP and minutes. Baselines have empty levels and no costs ('-').
    """
    rows = []
    for condition, value in product(study.conditions, study.values):
        if trials := study.select(budget, condition, value):
            row = [*(level for _, level in condition), value]
            for metric in study.metrics:
                scores = {other: [*study.scores(budget, condition, other, metric).values()] for other in study.values}
                row.append(_format_scores(scores, value))
            rows.append(row + [_format_cost(trials, *cost) for cost in COSTS.values()])
    for name, scores_by_metric in study.baselines.items():
        scores_of_metrics = [scores_by_metric.get(metric, nan) for metric in study.metrics]
        texts = [f"{score:.3f}" if isfinite(score) else "-" for score in scores_of_metrics]
        rows.append([*[""] * len(study.other_factors), name, *texts, *["-"] * len(COSTS)])
    return rows


def _format_scores(scores: Mapping[str, Sequence[float]], value: str) -> str:
    """Format the scores of a compared value over seeds: '0.512 ± 0.010 (3)' is mean, half of its 95 % interval and number of seeds.

    Without seeds it is '-', with one seed there is no interval; the highest mean of several values is `Bold`.

    Args:
        scores: compared value -> accuracy (0..1) of each seed; all values of a condition, to find the highest mean.
        value: the one that is formatted.
    """
    if not scores[value]:
        return "-"
    mean, margin = mean_and_margin(scores[value])
    means = [fmean(others) for others in scores.values() if others]
    text = f"{mean:.3f}{'' if margin is None else f' ± {margin:.3f}'} ({len(scores[value])})"
    return Bold(text) if len(means) > 1 and mean == max(means) else text


def _format_cost(trials: Sequence[Trial], attribute: str, unit: float) -> str:
    """Format the mean of an attribute over the finished trials in which it is known, with three digits; '-' if there are none.

    Args:
        attribute: 'epochs', 'flops' or 'seconds' of a `Trial`.
        unit: the mean is divided by it, e.g. 60 for seconds in minutes.
    """
    values = [getattr(trial, attribute) for trial in trials if trial.finished]
    finite_values = [value for value in values if value is not None and isfinite(value)]
    if not finite_values:
        return "-"
    mean = fmean(finite_values) / unit
    return f"{mean:.3g}" if mean < 1000 else f"{mean:,.0f}"


def _plot_curves(study: Study) -> dict[str, dict[str, Markup]]:
    """Draw a study's learning curves, for each budget, metric (loss, probes) and x (epochs, PFLOP) of which any trial has points.

    Returns:
        Title -> condition as text -> SVG with a curve for each finished trial; figures of one title have the same range of y. The ids in
        an SVG get a prefix of their own, because all of them are in one page.
    """
    figures: dict[str, dict[str, Markup]] = {}
    for budget, metric, axis in product(study.budgets, CURVE_METRICS, CURVE_AXES):
        (label, unit), panels = CURVE_AXES[axis], {}
        for condition in study.conditions:
            if curves := _find_curves(study, budget, condition, metric, axis, unit):
                panels[statistics.format_condition(condition)] = curves
        ys = [y for curve in chain.from_iterable(panels.values()) for _, y in curve.points]
        title = f"{CURVE_METRICS[metric]} against {label}, {budget}"
        for index, (condition_name, curves) in enumerate(panels.items()):
            svg = plot_seeds(curves, label, CURVE_METRICS[metric], (min(ys), max(ys)))
            svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>figure{len(figures)}-{index}-", svg)
            figures.setdefault(title, {})[condition_name] = Markup(svg)
    return figures


def _find_curves(
    study: Study, budget: str, condition: statistics.Condition, metric: str, axis: str, unit: float
) -> list[Curve]:
    """Return the learning curve of each finished trial of a budget and condition that has points with this metric and x.

    Args:
        condition: (factor, level) of every factor but the compared one.
        metric: key of the points that is y: 'loss', 'logistic' or 'knn'.
        axis: key of the points that is x: 'epoch' or 'flops'; it is divided by `unit`.
    """
    curves = []
    for index, value in enumerate(study.values):
        for trial in study.select(budget, condition, value):
            points = [(point.get(axis, nan) / unit, point.get(metric, nan)) for point in trial.curve]
            if trial.finished and (finite_points := sorted((x, y) for x, y in points if isfinite(x) and isfinite(y))):
                curves.append(Curve(index, finite_points))
    return curves


def _format_csv(study: Study) -> str:
    """Return the CSV of a study, with a row for each trial, finished or not; numbers are not rounded, unknown ones are empty.

    Columns: name, the factors (the compared one first), seed, budgets, status, reason, epochs, flops, seconds, then the metrics (0..1).
    """
    costs = [attribute for attribute, _ in COSTS.values()]
    factors = [study.compared_factor, *study.other_factors]
    columns = ["name", *factors, "seed", "budgets", "status", "reason", *costs, *study.metrics]
    rows: list[list[object]] = [[*columns]]
    for trial in study.trials:
        values_by_name = {name: getattr(trial, name) for name in costs} | trial.scores
        finite_values = {
            name: number for name, number in values_by_name.items() if number is not None and isfinite(number)
        }
        texts = {name: getattr(trial, name) for name in ("name", "seed", "status", "reason")}
        row = trial.factors | texts | {"budgets": "; ".join(trial.budgets)} | finite_values
        rows.append([row.get(column, "") for column in columns])
    return "\ufeff" + format_csv(rows)  # without a byte order mark spreadsheets do not take it for UTF-8
