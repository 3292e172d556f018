"""The report of a study: the same in Markdown and in HTML that needs no network, and its runs as CSV."""

import csv
import io
import re
from itertools import product
from math import isfinite, nan
from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from mapet.evaluation.intervals import mean_and_interval
from mapet.files import atomic
from mapet.reports.blocks import Block, Bold, Bullets, Code, Curves, Heading, Paragraph, Table, to_markdown
from mapet.reports.html import line_style, render_study
from mapet.reports.plots import plot_seeds
from mapet.studies.statistics import (
    Difference,
    Study,
    TrialResult,
    findings,
    in_words,
    of_one_seed,
    p_value,
    paired_differences,
)

METHOD = [
    "Accuracies are means over finished seeds (their number in brackets) ± half of a 95 % interval of that mean by Student's t.",
    "A difference is taken seed by seed between runs alike in all else (paired), in percentage points; its interval and "
    "its two-sided p are those of the paired t-test.",
    "A difference over several settings is averaged over them for each seed first, then tested over seeds, for the "
    "settings of a seed are not independent. Where a run is missing, that seed's mean is over the settings left to it.",
    "p values are corrected by Holm's method over the tests of one budget and one measure: differences over several "
    "settings among themselves, those of single settings among themselves. A difference is called higher "
    "or lower where the corrected p is below 0.05. Intervals are not corrected, so that one may leave out nought and the "
    "difference still be not told apart.",
    "'Not told apart' is not 'equal': few seeds and many tests leave small differences unseen.",
    "Where all seeds give the same difference there is no spread to test against, and no test.",
    "Seeds stand for the chance in pre-training alone: images and test set stay the same.",
]
COSTS = {"epochs": ("epochs", 1.0), "PFLOP": ("flops", 1e15), "minutes": ("seconds", 60.0)}
"""Column -> attribute of a trial and unit."""
CURVES = {"loss": "training loss", "logistic": "linear probe while training", "knn": "k-NN while training"}
AXES = {"epoch": ("epochs", 1.0), "flops": ("PFLOP", 1e15)}
"""Key of a curve's point -> label and unit."""


def write_report(study: Study, folder: Path) -> None:
    """Write report.md, report.html and report.csv into `folder`, in place of earlier ones."""
    blocks = _blocks(study)
    texts = {"csv": _csv(study), "md": to_markdown(blocks), "html": _html(study, blocks)}
    for kind, text in texts.items():
        with atomic(folder / f"report.{kind}") as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")


def _blocks(study: Study) -> list[Block]:
    differences = paired_differences(study)
    blocks: list[Block] = [Heading(study.title, 1), Code(study.command)]
    blocks += [Bullets(study.notes)] if study.notes else []
    blocks += [Heading("Findings"), Bullets(findings(study, differences))]
    highest = f"Bold: the highest mean of the {study.compare} values in a setting; by itself no finding."
    for budget in study.budgets:
        blocks += [Heading(f"Accuracy and cost at {budget}"), _scores(study, budget), Paragraph(highest)]
    if curves := [c for of in product(study.budgets, CURVES, AXES) if (c := _curves(study, *of)).panels]:
        blocks += [Heading("Learning curves"), Paragraph("Thick: mean over seeds. Thin: single seeds."), *curves]
    if differences:
        blocks += [Heading("Paired differences"), _differences(differences)]
    if missing := [[trial.name, trial.status, trial.reason] for trial in study.trials if trial.status != "finished"]:
        blocks += [Heading("Runs without a result"), Table(["run", "status", "reason"], missing)]
    if of_one_seed(differences):
        return blocks
    return [*blocks, Heading("What the intervals and tests are"), Bullets(METHOD)]


def _scores(study: Study, budget: str) -> Table:
    """Tabulate mean accuracies and costs, a row for each setting and compared value, then the baselines."""
    rows = []
    for setting in study.settings:
        scores = {
            (value, measure): list(study.scores(budget, setting, value, measure).values())
            for value, measure in product(study.values, study.measures)
        }
        for value in study.values:
            if trials := study.select(budget, setting, value):
                row = [*(level for _, level in setting), value]
                for measure in study.measures:
                    rivals = [fmean(own) for other in study.values if (own := scores[other, measure])]
                    row.append(_accuracy(scores[value, measure], rivals))
                rows.append(row + [_cost(trials, *cost) for cost in COSTS.values()])
    for name, known in study.baselines.items():
        accuracies = [f"{known[measure]:.3f}" if _known(known, measure) else "-" for measure in study.measures]
        rows.append([*[""] * len(study.other_factors), name, *accuracies, *["-"] * len(COSTS)])
    return Table([*study.other_factors, study.compare, *study.measures, *COSTS], rows)


def _accuracy(scores: list[float], rivals: list[float]) -> str:
    """'0.512 ± 0.010 (3)', bold if the highest of several rivals, its own mean among them."""
    if not scores:
        return "-"
    mean, width = mean_and_interval(scores)
    text = f"{mean:.3f}{'' if width is None else f' ± {width:.3f}'} ({len(scores)})"
    return Bold(text) if len(rivals) > 1 and mean == max(rivals) else text


def _cost(trials: list[TrialResult], attribute: str, unit: float) -> str:
    """Mean over the runs that are done."""
    values = [
        value for trial in trials if trial.status == "finished" and (value := getattr(trial, attribute)) is not None
    ]
    mean = fmean(values) / unit if values else nan
    return "-" if not isfinite(mean) else f"{mean:.3g}" if mean < 1000 else f"{mean:,.0f}"


def _differences(differences: list[Difference]) -> Table:
    rows = []
    for row in differences:
        where = in_words(row.settings[0]) if len(row.settings) == 1 else f"mean of {len(row.settings)} settings"
        low, high = (100 * (row.mean + side * (row.half_width or 0)) for side in (-1, 1))
        interval = "-" if row.half_width is None else f"{low:z.1f} to {high:z.1f}"
        pair = [row.budget, row.measure, f"{row.first} - {row.second}", where, f"{100 * row.mean:z.1f}"]
        rows.append([*pair, interval, str(row.seeds), p_value(row.p), p_value(row.p_holm), row.verdict])
    head = [
        "budget",
        "measure",
        "difference",
        "setting",
        "points",
        "95 % interval",
        "seeds",
        "p",
        "p (Holm)",
        "verdict",
    ]
    return Table(head, rows)


def _curves(study: Study, budget: str, measure: str, axis: str) -> Curves:
    """Draw a panel for each setting that has a curve; all have the same heights."""
    label, unit = AXES[axis]
    found: dict[str, list[tuple[int, list[tuple[float, float]]]]] = {}
    for setting, (i, value) in product(study.settings, enumerate(study.values)):
        for trial in study.select(budget, setting, value):
            line = sorted((point[axis] / unit, point[measure]) for point in trial.curve if _known(point, axis, measure))
            if line and trial.status == "finished":
                found.setdefault(in_words(setting), []).append((i, line))
    heights = [y for lines in found.values() for _, line in lines for _, y in line]
    name = CURVES[measure]
    panels = {where: plot_seeds(lines, label, name, (min(heights), max(heights))) for where, lines in found.items()}
    return Curves(f"{name[0].upper()}{name[1:]} against {label}, {budget}", study.values, panels)


def _known(numbers: dict[str, float], *keys: str) -> bool:
    return all(isfinite(numbers.get(key, nan)) for key in keys)


def _csv(study: Study) -> str:
    """One row a run; numbers unrounded, what is not known left empty."""
    file = io.StringIO()
    writer = csv.writer(file)
    factors, costs = [study.compare, *study.other_factors], [attribute for attribute, _ in COSTS.values()]
    writer.writerow(["name", *factors, "seed", "budgets", "status", "reason", *costs, *study.measures])
    for trial in study.trials:
        numbers = [*(getattr(trial, cost) for cost in costs), *(trial.scores.get(m) for m in study.measures)]
        known = ["" if number is None or not isfinite(number) else number for number in numbers]
        words = [trial.name, *(trial.factors[factor] for factor in factors), trial.seed, "; ".join(trial.budgets)]
        writer.writerow([*words, trial.status, trial.reason, *known])
    return "\ufeff" + file.getvalue()  # without this mark spreadsheets do not take it for UTF-8


def _html(study: Study, blocks: list[Block]) -> str:
    """Render blocks; ids in a drawing get a prefix, for they are a page's."""
    shown: list[Block] = []
    for number, block in enumerate(blocks):
        if isinstance(block, Curves):
            panels = {
                where: Markup(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>d{number}-{i}-", svg))
                for i, (where, svg) in enumerate(block.panels.items())
            }
            block = block._replace(panels=panels)
        shown.append(block)
    return render_study(title=study.title, blocks=shown, looks=[line_style(i) for i in range(len(study.values))])
