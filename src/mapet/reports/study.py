"""The report of a study: the same in Markdown and in HTML that needs no network, and its runs as CSV."""

import csv
import io
import re
from itertools import product
from math import isfinite, nan
from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from mapet.evaluation.eval_context import mean_and_margin
from mapet.files import write_text
from mapet.reports.plots import plot_seeds
from mapet.reports.render import Bold, render, render_part
from mapet.studies import statistics
from mapet.studies.statistics import Difference, Study, Trial

SENTENCES = "study_sentences.md"
COSTS = {"epochs": ("epochs", 1.0), "PFLOP": ("flops", 1e15), "minutes": ("seconds", 60.0)}
"""Column -> attribute of a trial and unit."""
CURVES = {"loss": "training loss", "logistic": "linear probe while training", "knn": "k-NN while training"}
AXES = {"epoch": ("epochs", 1.0), "flops": ("PFLOP", 1e15)}
"""Key of a curve's point -> label and unit."""


def write_report(study: Study, folder: Path) -> None:
    """Write report.md, report.html and report.csv into `folder`, in place of earlier ones."""
    differences = statistics.paired_differences(study)
    content = {
        "study": study,
        "findings": findings(study, differences),
        "scores_head": [*study.other_factors, study.compared_factor, *study.metrics, *COSTS],
        "scores": {budget: _scores(study, budget) for budget in study.budgets},
        "curves": _curves(study),
        "differences": [_difference(row) for row in differences],
        "missing": [[trial.name, trial.status, trial.reason] for trial in study.trials if not trial.finished],
        "tested": not statistics.has_single_seed(differences),
    }
    texts = {"csv": _csv(study)} | {kind: render(f"study.{kind}", **content) for kind in ("md", "html")}
    for kind, text in texts.items():
        write_text(folder / f"report.{kind}", text)


def findings(study: Study, differences: list[Difference]) -> list[str]:
    """What the study says, in sentences: pooled differences, those told apart in a condition, the best values."""
    if not any(trial.finished for trial in study.trials):
        return ["No run has finished: there is nothing to compare yet."]
    single = [row for row in differences if not row.is_primary]
    told = [row for row in single if row.verdict in ("higher", "lower")]
    if not differences:
        said = [render_part(SENTENCES, "no_pairs", study.compared_factor)]
    elif statistics.has_single_seed(differences):
        said = [render_part(SENTENCES, "one_seed", study.compared_factor)]
    else:
        said = [sentence(row) for row in [*(row for row in differences if row.is_primary), *told]]
        said += [render_part(SENTENCES, "told_apart", len(single), len(told))] if single else []
    places = product(study.budgets, study.metrics, study.other_factors)
    return said + [
        render_part(SENTENCES, "best", *place, best)
        for place in places
        if (best := statistics.find_best_levels(study, *place))
    ]


def sentence(row: Difference) -> str:
    """Write a difference in plain English."""
    condition, p = statistics.format_condition(row.conditions[0]), statistics.format_p_value(row.p_holm, "= ")
    return render_part(SENTENCES, "difference", row, condition, p).strip()


def _scores(study: Study, budget: str) -> list[list[str]]:
    """Tabulate mean accuracies and costs, a row for each condition and compared value, then the baselines."""
    rows = []
    for condition in study.conditions:
        scores = {
            (value, metric): list(study.scores(budget, condition, value, metric).values())
            for value, metric in product(study.values, study.metrics)
        }
        for value in study.values:
            if trials := study.select(budget, condition, value):
                row = [*(level for _, level in condition), value]
                for metric in study.metrics:
                    rivals = [fmean(own) for other in study.values if (own := scores[other, metric])]
                    row.append(_accuracy(scores[value, metric], rivals))
                rows.append(row + [_cost(trials, *cost) for cost in COSTS.values()])
    for name, known in study.baselines.items():
        accuracies = [f"{known[metric]:.3f}" if _known(known, metric) else "-" for metric in study.metrics]
        rows.append([*[""] * len(study.other_factors), name, *accuracies, *["-"] * len(COSTS)])
    return rows


def _accuracy(scores: list[float], rivals: list[float]) -> str:
    """'0.512 ± 0.010 (3)', bold if the highest of several rivals, its own mean among them."""
    if not scores:
        return "-"
    mean, width = mean_and_margin(scores)
    text = f"{mean:.3f}{'' if width is None else f' ± {width:.3f}'} ({len(scores)})"
    return Bold(text) if len(rivals) > 1 and mean == max(rivals) else text


def _cost(trials: list[Trial], attribute: str, unit: float) -> str:
    """Mean over the runs that are done."""
    values = [value for trial in trials if trial.finished and (value := getattr(trial, attribute)) is not None]
    mean = fmean(values) / unit if values else nan
    return "-" if not isfinite(mean) else f"{mean:.3g}" if mean < 1000 else f"{mean:,.0f}"


def _difference(row: Difference) -> list[str]:
    """A row of the table of differences."""
    where = (
        statistics.format_condition(row.conditions[0])
        if len(row.conditions) == 1
        else f"mean of {len(row.conditions)} conditions"
    )
    low, high = (100 * (row.mean + side * (row.half_width or 0)) for side in (-1, 1))
    interval = "-" if row.half_width is None else f"{low:z.1f} to {high:z.1f}"
    pair = [row.budget, row.metric, f"{row.first} - {row.second}", where, f"{100 * row.mean:z.1f}"]
    return [
        *pair,
        interval,
        str(row.seeds),
        statistics.format_p_value(row.p),
        statistics.format_p_value(row.p_holm),
        row.verdict,
    ]


def _curves(study: Study) -> dict[str, dict[str, Markup]]:
    """Draw learning curves: title -> condition -> SVG, of the same heights; ids get a prefix, for they are a page's."""
    found: dict[str, dict[str, Markup]] = {}
    for budget, (metric, name), (axis, (label, unit)) in product(study.budgets, CURVES.items(), AXES.items()):
        panels: dict[str, list[tuple[int, list[tuple[float, float]]]]] = {}
        for condition, (i, value) in product(study.conditions, enumerate(study.values)):
            for trial in study.select(budget, condition, value):
                known = [point for point in trial.curve if _known(point, axis, metric)]
                if known and trial.finished:
                    line = sorted((point[axis] / unit, point[metric]) for point in known)
                    panels.setdefault(statistics.format_condition(condition), []).append((i, line))
        ys = [y for lines in panels.values() for _, line in lines for _, y in line]
        for where, lines in panels.items():
            svg = plot_seeds(lines, label, name, (min(ys), max(ys)))
            drawn = found.setdefault(f"{name[0].upper()}{name[1:]} against {label}, {budget}", {})
            prefix = f"d{len(found)}-{len(drawn)}-"
            drawn[where] = Markup(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg))
    return found


def _known(numbers: dict[str, float], *keys: str) -> bool:
    return all(isfinite(numbers.get(key, nan)) for key in keys)


def _csv(study: Study) -> str:
    """One row a run; numbers unrounded, what is not known left empty."""
    file = io.StringIO()
    writer = csv.writer(file)
    factors, costs = [study.compared_factor, *study.other_factors], [attribute for attribute, _ in COSTS.values()]
    writer.writerow(["name", *factors, "seed", "budgets", "status", "reason", *costs, *study.metrics])
    for trial in study.trials:
        numbers = [*(getattr(trial, cost) for cost in costs), *(trial.scores.get(m) for m in study.metrics)]
        known = ["" if number is None or not isfinite(number) else number for number in numbers]
        words = [trial.name, *(trial.factors[factor] for factor in factors), trial.seed, "; ".join(trial.budgets)]
        writer.writerow([*words, trial.status, trial.reason, *known])
    return "\ufeff" + file.getvalue()  # without this mark spreadsheets do not take it for UTF-8
