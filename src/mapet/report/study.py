"""The report of a study: the same in Markdown and in HTML that needs no network, and its runs as CSV."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from math import isfinite
from pathlib import Path
from statistics import fmean

from mapet.files import atomic
from mapet.report.comparison import (
    Cell,
    Difference,
    Setting,
    Study,
    best_values,
    in_words,
    mean_and_interval,
    p_value,
    paired_differences,
    sentence,
)

METHOD = [
    "Accuracies are means over the seeds that are done; ± is half of a 95 % interval of that mean by Student's t. The number in brackets is the number of seeds. One seed gives no interval.",
    "A difference is taken seed by seed between runs alike in all else (paired), in percentage points. Its interval and p value are Student's t for paired values, two-sided.",
    "A difference over several settings is their mean for each seed first, then tested over seeds: the settings of a seed are not independent. Where a run is missing, the mean is over the settings left to that seed.",
    "p values are corrected by Holm's method over all tests of one budget and one measure. At a corrected p below 0.05 a difference is called higher or lower. Intervals are not corrected, so one may leave out nought while the verdict is 'not told apart'.",
    "'Not told apart' is not 'equal': few seeds and many tests leave small differences unseen. Where all seeds give the same difference there is no spread to test against, and no test.",
    "Seeds stand for the chance in pre-training only: images and test set are the same throughout.",
]
COSTS: dict[str, Callable[[Cell], float | None]] = {
    "epochs": lambda cell: cell.epochs,
    "PFLOP": lambda cell: cell.flops and cell.flops / 1e15,
    "minutes": lambda cell: cell.seconds and cell.seconds / 60,
}
CURVES = {"loss": "training loss", "linear": "linear probe while training", "knn": "k-NN while training"}
AXES = {"epoch": ("epochs", 1.0), "flops": ("PFLOP", 1e15)}
"""Key of a curve's point -> label and unit."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's, told apart by the colour-blind; dashes help further."""
DASHES = ((), (6, 2), (2, 2), (6, 2, 2, 2))
INK = "#010203"
"""What matplotlib draws in the page's own text colour, dark or light."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c22; --paper: #ffffff; --line: #d5d5dd; --soft: #f3f3f7 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ee; --paper: #17171c; --line: #3c3c46; --soft: #24242b } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
th, pre { background: var(--soft) }
pre { padding: .7rem; white-space: pre-wrap }
.panels { display: flex; flex-wrap: wrap; gap: 1rem }
.key { margin-right: 1.5rem }
figure { margin: 0 }
svg { max-width: 100%; height: auto }
"""


class Bold(str):
    """A table entry to stand out."""


@dataclass(frozen=True)
class Text:
    tag: str
    """h1, h2, p or pre."""
    text: str


@dataclass(frozen=True)
class Items:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Curves:
    """A row of panels, (caption, SVG), one a setting."""

    title: str
    keys: list[str]
    panels: list[tuple[str, str]]


Line = list[tuple[float, float]]
"""A curve of one seed."""
Block = Text | Items | Table | Curves


def write_report(study: Study, folder: Path) -> None:
    """Write report.md, report.html and report.csv into `folder`, in place of earlier ones."""
    blocks = _blocks(study)
    texts = {"report.csv": _csv(study), "report.md": _markdown(blocks), "report.html": _html(study.title, blocks)}
    for name, text in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")


def _blocks(study: Study) -> list[Block]:
    differences = paired_differences(study)
    blocks: list[Block] = [Text("h1", study.title), Text("pre", study.command)]
    blocks += [Items(study.notes)] if study.notes else []
    blocks += [Text("h2", "Findings"), Items(_findings(study, differences))]
    for budget in study.budgets:
        blocks += [
            Text("h2", f"Accuracy and cost at {budget}"),
            Text("p", f"Bold: the highest mean of the {study.compare} values in a setting; by itself no finding."),
            _scores(study, budget),
        ]
    if curves := [c for where in product(study.budgets, CURVES, AXES) if (c := _curves(study, *where)).panels]:
        blocks += [Text("h2", "Learning curves"), Text("p", "Thick: mean over seeds. Thin: single seeds."), *curves]
    if differences:
        blocks += [Text("h2", "Paired differences"), _differences(differences)]
    if missing := [cell for cell in study.cells if cell.status != "done"]:
        rows = [[cell.name, cell.status, cell.reason or "–"] for cell in missing]
        blocks += [Text("h2", "Runs without a result"), Table(["run", "status", "reason"], rows)]
    return [*blocks, Text("h2", "What the intervals and tests are"), Items(METHOD)]


def _findings(study: Study, differences: list[Difference]) -> list[str]:
    if all(cell.status != "done" for cell in study.cells):
        return ["No run has finished: there is nothing to compare yet."]
    found = [sentence(row) for row in differences if row.headline]
    single = [row for row in differences if not row.headline]
    told = [row for row in single if row.verdict in ("higher", "lower")]
    found += [sentence(row) for row in told]
    if single:
        found.append(
            f"Of {len(single)} differences in single settings {len(told)} can be told from nought; the table has all."
        )
    if not differences:
        found.append(f"No two values of {study.compare} share a finished seed and setting: there are no pairs to test.")
    return found + best_values(study)


def _scores(study: Study, budget: str) -> Table:
    others = study.other_factors
    rows = []
    for setting in study.settings:
        chosen = {value: study.select(budget, setting, value) for value in study.values}
        scores = {
            (value, measure): mean_and_interval(list(found.values()))
            for value, measure in product(study.values, study.measures)
            if (found := study.scores(budget, setting, value, measure))
        }
        for value, cells in chosen.items():
            if not cells:
                continue
            row = [level for _, level in setting] + [value]
            for measure in study.measures:
                rivals = [scores[other, measure][0] for other in study.values if (other, measure) in scores]
                if (value, measure) not in scores:
                    row.append("–")
                    continue
                mean, width = scores[value, measure]
                count = len(study.scores(budget, setting, value, measure))
                text = f"{mean:.3f} ({count})" if width is None else f"{mean:.3f} ± {width:.3f} ({count})"
                row.append(Bold(text) if len(rivals) > 1 and mean == max(rivals) else text)
            done = [cell for cell in cells if cell.status == "done"]
            row += [_mean_cost([cost(cell) for cell in done]) for cost in COSTS.values()]
            rows.append(row)
    for name, known in study.baselines.items():
        blank = [""] * len(others)
        accuracies = [f"{known[m]:.3f}" if _known(known, m) else "–" for m in study.measures]
        rows.append([*blank, name, *accuracies, *["–"] * len(COSTS)])
    return Table([*others, study.compare, *study.measures, *COSTS], rows)


def _mean_cost(values: list[float | None]) -> str:
    known = [value for value in values if value is not None and isfinite(value)]
    return "–" if not known else f"{fmean(known):.3g}" if fmean(known) < 1000 else f"{fmean(known):,.0f}"


def _differences(differences: list[Difference]) -> Table:
    rows = []
    for row in differences:
        width = row.half_width
        interval = "–" if width is None else f"{100 * (row.mean - width):z.1f} to {100 * (row.mean + width):z.1f}"
        where = f"mean of {len(row.settings)} settings" if len(row.settings) > 1 else in_words(row.settings[0]) or "–"
        pair, points = f"{row.first} - {row.second}", f"{100 * row.mean:z.1f}"
        tests = [interval, str(row.seeds), p_value(row.p), p_value(row.p_holm), row.verdict]
        rows.append([row.budget, row.measure, pair, where, points, *tests])
    header = [
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
    return Table(header, rows)


def _curves(study: Study, budget: str, measure: str, axis: str) -> Curves:
    title = f"{CURVES[measure]} against {AXES[axis][0]}, {budget}"
    panels: dict[Setting, dict[str, list[Line]]] = {}
    for setting, value in product(study.settings, study.values):
        done = [cell for cell in study.select(budget, setting, value) if cell.status == "done"]
        lines = [
            sorted((p[axis] / AXES[axis][1], p[measure]) for p in c.curve if _known(p, axis, measure)) for c in done
        ]
        if lines := [line for line in lines if line]:
            panels.setdefault(setting, {})[value] = lines
    heights = [y for lines in panels.values() for seeds in lines.values() for line in seeds for _, y in line]
    drawn = []
    for setting, lines in panels.items():
        looks = [(_look(study.values.index(value)), seeds) for value, seeds in lines.items()]
        drawn.append((in_words(setting), _draw(looks, AXES[axis][0], CURVES[measure], (min(heights), max(heights)))))
    return Curves(title, study.values, drawn)


def _known(numbers: dict[str, float], *keys: str) -> bool:
    return all(key in numbers and isfinite(numbers[key]) for key in keys)


def _look(i: int) -> tuple[str, tuple[int, ...]]:
    """Colour and dashes of the i-th compared value."""
    return COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]


def _draw(
    lines: list[tuple[tuple[str, tuple[int, ...]], list[Line]]], xlabel: str, ylabel: str, heights: tuple[float, float]
) -> str:
    """One panel as SVG: a mean over the part that all seeds have, and each seed, for each look.

    No text of the user's is drawn: matplotlib would read `$` as mathematics and warn of letters its font lacks.

    Args:
        heights: lowest and highest point of all panels of the row, which share an axis.
    """
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    colors = dict.fromkeys(["axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mapet", **colors}):
        figure = Figure(figsize=(4, 2.8), layout="constrained")
        axis = figure.subplots()
        for (color, dashes), seeds in lines:
            xs, ys = zip(*(np.array(line).T for line in seeds), strict=True)
            grid = np.unique(np.concatenate(xs))
            grid = grid[(grid >= max(x[0] for x in xs)) & (grid <= min(x[-1] for x in xs))]
            mean = np.mean([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)], axis=0)
            for x, y in zip(xs, ys, strict=True):
                axis.plot(x, y, color=color, linewidth=0.7, alpha=0.4)
            axis.plot(
                grid, mean, color=color, linewidth=2, linestyle=(0, dashes), marker="." if len(grid) == 1 else None
            )
        pad = 0.05 * (heights[1] - heights[0]) or 0.05
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(heights[0] - pad, heights[1] + pad))
        axis.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _csv(study: Study) -> str:
    """One row a run; numbers unrounded, what is not known left empty."""
    file = io.StringIO()
    file.write("\ufeff")  # without it spreadsheets do not take the file for UTF-8
    factors = [study.compare, *study.other_factors] if study.cells else []
    writer = csv.writer(file)
    writer.writerow(
        ["name", *factors, "seed", "budgets", "status", "reason", "epochs", "flops", "seconds", *study.measures]
    )
    for cell in study.cells:
        numbers = [cell.epochs, cell.flops, cell.seconds, *(cell.scores.get(measure) for measure in study.measures)]
        settings = [cell.factors[factor] for factor in factors]
        writer.writerow(
            [cell.name, *settings, cell.seed, "; ".join(cell.budgets), cell.status, cell.reason]
            + ["" if number is None or not isfinite(number) else number for number in numbers]
        )
    return file.getvalue()


def _markdown(blocks: list[Block]) -> str:
    parts = []
    for block in blocks:
        match block:
            case Text("pre", text):
                parts.append(f"````\n{text}\n````")
            case Text(tag, text):
                parts.append({"h1": "# ", "h2": "## "}.get(tag, "") + _plain(text))
            case Items(lines):
                parts.append("\n".join(f"- {_plain(line)}" for line in lines))
            case Table(header, rows):
                entries = [[f"**{_plain(e)}**" if isinstance(e, Bold) else _plain(e) for e in row] for row in rows]
                table = [[_plain(name) for name in header], ["---"] * len(header), *entries]
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in table))
            case Curves(title):
                parts.append(f"{_plain(title)}: drawn in report.html.")
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """On one line, and with nothing that Markdown would take for its own."""
    return re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]<>|&]", r"\\\g<0>", " ".join(text.split()))


def _html(title: str, blocks: list[Block]) -> str:
    parts = []
    for number, block in enumerate(blocks):
        match block:
            case Text(tag, text):
                parts.append(f"<{tag}>{escape(text)}</{tag}>")
            case Items(lines):
                parts.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>")
            case Table(header, rows):
                lines = [_row("th", header), *(_row("td", row) for row in rows)]
                parts.append(f'<div class="wide"><table>{"".join(lines)}</table></div>')
            case Curves(caption, keys, panels):
                parts += [
                    f"<h3>{escape(caption)}</h3>",
                    f"<p>{''.join(_key(i, key) for i, key in enumerate(keys))}</p>",
                ]
                figures = [
                    # ids are unique in a drawing, not on the page
                    f"<figure><figcaption>{escape(where)}</figcaption>"
                    + re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>d{number}-{i}-", svg)
                    + "</figure>"
                    for i, (where, svg) in enumerate(panels)
                ]
                parts.append(f'<div class="panels">{"".join(figures)}</div>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _row(tag: str, entries: list[str]) -> str:
    texts = [f"<b>{escape(entry)}</b>" if isinstance(entry, Bold) else escape(entry) for entry in entries]
    return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>\n"


def _key(i: int, name: str) -> str:
    """An entry of the legend: a piece of the line, and its name."""
    color, dashes = _look(i)
    line = f'<line x2="32" y1="5" y2="5" stroke="{color}" stroke-width="3" stroke-dasharray="{" ".join(map(str, dashes))}"/>'
    return f'<span class="key"><svg width="32" height="10">{line}</svg> {escape(name)}</span>'
