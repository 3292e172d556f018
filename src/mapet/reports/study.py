"""The report of a study: the same in Markdown and in HTML that needs no network, and its runs as CSV."""

import csv
import io
import re
from html import escape
from importlib.resources import files
from itertools import product
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from mapet.evaluation.intervals import mean_and_interval
from mapet.files import atomic
from mapet.reports.html import line_style
from mapet.studies.statistics import (
    Cell,
    Difference,
    Study,
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
"""Column -> attribute of a cell and unit."""
CURVES = {"loss": "training loss", "linear": "linear probe while training", "knn": "k-NN while training"}
AXES = {"epoch": ("epochs", 1.0), "flops": ("PFLOP", 1e15)}
"""Key of a curve's point -> label and unit."""
INK = "#010203"
"""What matplotlib draws that the page shall show in its own text colour, dark or light."""

Block = tuple[str, Any]
"""("h1" | "h2" | "p" | "pre", text), ("ul", lines), ("table", rows, the first of names), or
("curves", (title, names of the lines, {caption: SVG}))."""
Line = list[tuple[float, float]]
"""Points of one seed."""


class Bold(str):
    """A table entry that stands out."""


def write_report(study: Study, folder: Path) -> None:
    """Write report.md, report.html and report.csv into `folder`, in place of earlier ones."""
    blocks = _blocks(study)
    texts = {"csv": _csv(study), "md": _markdown(blocks), "html": _html(study.title, blocks)}
    for kind, text in texts.items():
        with atomic(folder / f"report.{kind}") as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")


def _blocks(study: Study) -> list[Block]:
    differences = paired_differences(study)
    blocks: list[Block] = [("h1", study.title), ("pre", study.command)]
    blocks += [("ul", study.notes)] if study.notes else []
    blocks += [("h2", "Findings"), ("ul", findings(study, differences))]
    for budget in study.budgets:
        blocks += [("h2", f"Accuracy and cost at {budget}"), ("table", _scores(study, budget))]
        blocks += [("p", f"Bold: the highest mean of the {study.compare} values in a setting; by itself no finding.")]
    if curves := [c for of in product(study.budgets, CURVES, AXES) if (c := _curves(study, *of))[2]]:
        blocks += [("h2", "Learning curves"), ("p", "Thick: mean over seeds. Thin: single seeds.")]
        blocks += [("curves", row) for row in curves]
    if differences:
        blocks += [("h2", "Paired differences"), ("table", _differences(differences))]
    if missing := [[cell.name, cell.status, cell.reason] for cell in study.cells if cell.status != "done"]:
        blocks += [("h2", "Runs without a result"), ("table", [["run", "status", "reason"], *missing])]
    if of_one_seed(differences):
        return blocks
    return [*blocks, ("h2", "What the intervals and tests are"), ("ul", METHOD)]


def _scores(study: Study, budget: str) -> list[list[str]]:
    rows = [[*study.other_factors, study.compare, *study.measures, *COSTS]]
    for setting in study.settings:
        scores = {
            (value, measure): list(study.scores(budget, setting, value, measure).values())
            for value, measure in product(study.values, study.measures)
        }
        for value in study.values:
            if cells := study.select(budget, setting, value):
                row = [*(level for _, level in setting), value]
                for measure in study.measures:
                    rivals = [fmean(own) for other in study.values if (own := scores[other, measure])]
                    row.append(_accuracy(scores[value, measure], rivals))
                rows.append(row + [_cost(cells, *cost) for cost in COSTS.values()])
    for name, known in study.baselines.items():
        accuracies = [f"{known[measure]:.3f}" if _known(known, measure) else "-" for measure in study.measures]
        rows.append([*[""] * len(study.other_factors), name, *accuracies, *["-"] * len(COSTS)])
    return rows


def _accuracy(scores: list[float], rivals: list[float]) -> str:
    """'0.512 ± 0.010 (3)', bold if the highest of several rivals, its own mean among them."""
    if not scores:
        return "-"
    mean, width = mean_and_interval(scores)
    text = f"{mean:.3f}{'' if width is None else f' ± {width:.3f}'} ({len(scores)})"
    return Bold(text) if len(rivals) > 1 and mean == max(rivals) else text


def _cost(cells: list[Cell], attribute: str, unit: float) -> str:
    """Mean over the runs that are done."""
    values = [value for cell in cells if cell.status == "done" and (value := getattr(cell, attribute)) is not None]
    mean = fmean(values) / unit if values else nan
    return "-" if not isfinite(mean) else f"{mean:.3g}" if mean < 1000 else f"{mean:,.0f}"


def _differences(differences: list[Difference]) -> list[list[str]]:
    names = ["budget", "measure", "difference", "setting", "points"]
    rows = [[*names, "95 % interval", "seeds", "p", "p (Holm)", "verdict"]]
    for row in differences:
        where = in_words(row.settings[0]) if len(row.settings) == 1 else f"mean of {len(row.settings)} settings"
        low, high = (100 * (row.mean + side * (row.half_width or 0)) for side in (-1, 1))
        interval = "-" if row.half_width is None else f"{low:z.1f} to {high:z.1f}"
        pair = [row.budget, row.measure, f"{row.first} - {row.second}", where, f"{100 * row.mean:z.1f}"]
        rows.append([*pair, interval, str(row.seeds), p_value(row.p), p_value(row.p_holm), row.verdict])
    return rows


def _curves(study: Study, budget: str, measure: str, axis: str) -> tuple[str, list[str], dict[str, str]]:
    """Title, names of the lines, and a panel of SVG for each setting that has a curve; all with the same heights."""
    label, unit = AXES[axis]
    found: dict[str, list[tuple[int, Line]]] = {}
    for setting, (i, value) in product(study.settings, enumerate(study.values)):
        for cell in study.select(budget, setting, value):
            line = sorted((point[axis] / unit, point[measure]) for point in cell.curve if _known(point, axis, measure))
            if line and cell.status == "done":
                found.setdefault(in_words(setting), []).append((i, line))
    heights = [y for lines in found.values() for _, line in lines for _, y in line]
    panels = {where: _draw(lines, label, CURVES[measure], min(heights), max(heights)) for where, lines in found.items()}
    name = CURVES[measure]
    return f"{name[0].upper()}{name[1:]} against {label}, {budget}", study.values, panels


def _known(numbers: dict[str, float], *keys: str) -> bool:
    return all(isfinite(numbers.get(key, nan)) for key in keys)


def _draw(lines: list[tuple[int, Line]], xlabel: str, ylabel: str, low: float, high: float) -> str:
    """SVG of the lines of seeds, each with the number of its value, and of their mean over the part that all have.

    No text of the user's is drawn: matplotlib would read `$` as mathematics and warn of letters that its font lacks.
    """
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    colors = dict.fromkeys(["axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mapet", **colors}):
        figure = Figure(figsize=(4, 2.8), layout="constrained")
        axis = figure.subplots()
        for i in sorted({i for i, _ in lines}):
            color, dashes = line_style(i)
            seeds = [np.array(line).T for number, line in lines if number == i]
            for x, y in seeds:
                axis.plot(x, y, color=color, linewidth=0.7, alpha=0.4)
            grid = np.unique(np.concatenate([x for x, _ in seeds]))
            grid = grid[(grid >= max(x[0] for x, _ in seeds)) & (grid <= min(x[-1] for x, _ in seeds))]
            mean = np.mean([np.interp(grid, x, y) for x, y in seeds], axis=0)
            axis.plot(grid, mean, color=color, linewidth=2, linestyle=(0, dashes), marker="." if len(grid) == 1 else "")
        pad = 0.05 * (high - low) or 0.05
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(low - pad, high + pad))
        axis.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])  # nothing that changes from call to call
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return file.getvalue()[file.getvalue().index("<svg") :].replace(INK, "currentColor")


def _csv(study: Study) -> str:
    """One row a run; numbers unrounded, what is not known left empty."""
    file = io.StringIO()
    writer = csv.writer(file)
    factors, costs = [study.compare, *study.other_factors], [attribute for attribute, _ in COSTS.values()]
    writer.writerow(["name", *factors, "seed", "budgets", "status", "reason", *costs, *study.measures])
    for cell in study.cells:
        numbers = [*(getattr(cell, cost) for cost in costs), *(cell.scores.get(m) for m in study.measures)]
        known = ["" if number is None or not isfinite(number) else number for number in numbers]
        words = [cell.name, *(cell.factors[factor] for factor in factors), cell.seed, "; ".join(cell.budgets)]
        writer.writerow([*words, cell.status, cell.reason, *known])
    return "\ufeff" + file.getvalue()  # without this mark spreadsheets do not take it for UTF-8


def _markdown(blocks: list[Block]) -> str:
    parts = []
    for block in blocks:
        match block:
            case "pre", text:
                parts.append(f"````\n{text}\n````")
            case "ul", lines:
                parts.append("\n".join(f"- {_plain(line)}" for line in lines))
            case "table", rows:
                entries = [[f"**{_plain(e)}**" if isinstance(e, Bold) else _plain(e) for e in row] for row in rows]
                entries.insert(1, ["---"] * len(rows[0]))
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in entries))
            case "curves", (title, _, _):
                parts.append(f"- {_plain(title)}: drawn in report.html")
            case tag, text:
                parts.append({"h1": "# ", "h2": "## ", "p": ""}[tag] + _plain(text))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """On one line, and with nothing that Markdown would take for its own."""
    return re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]<>|&]", r"\\\g<0>", " ".join(text.split()))


def _html(title: str, blocks: list[Block]) -> str:
    parts = []
    for number, block in enumerate(blocks):
        match block:
            case "ul", lines:
                parts.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>")
            case "table", (names, *rows):
                body = "\n".join([_row("th", names), *(_row("td", row) for row in rows)])
                parts.append(f'<div class="wide"><table>{body}</table></div>')
            case "curves", (caption, names, panels):
                parts.append(
                    f"<h3>{escape(caption)}</h3><p>{''.join(_key(i, name) for i, name in enumerate(names))}</p>"
                )
                figures = []
                for i, (where, svg) in enumerate(panels.items()):
                    svg = re.sub(
                        r'(\bid="|url\(#|href="#)', rf"\g<1>d{number}-{i}-", svg
                    )  # ids are a page's, not a drawing's
                    figures.append(f"<figure><figcaption>{escape(where)}</figcaption>{svg}</figure>")
                parts.append(f'<div class="panels">{"".join(figures)}</div>')
            case tag, text:
                parts.append(f"<{tag}>{escape(text)}</{tag}>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    page = [
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_style()}</style></head><body>',
        *parts,
        "</body></html>\n",
    ]
    return "\n".join(page)


def _style() -> str:
    return files("mapet.reports").joinpath("web/style.css").read_text(encoding="utf-8")


def _row(tag: str, entries: list[str]) -> str:
    texts = [f"<b>{escape(entry)}</b>" if isinstance(entry, Bold) else escape(entry) for entry in entries]
    return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"


def _key(i: int, name: str) -> str:
    """An entry of the legend: a piece of the line, and its name."""
    color, dashes = line_style(i)
    line = f'<line x2="32" y1="5" y2="5" stroke="{color}" stroke-width="3" stroke-dasharray="{" ".join(map(str, dashes))}"/>'
    return f'<span class="key"><svg width="32" height="10">{line}</svg> {escape(name)}</span>'
