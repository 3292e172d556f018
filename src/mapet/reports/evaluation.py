"""The report of `mapet evaluate`: backbones side by side in Markdown, everything in JSON, classes in CSV."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from mapet.evaluation.bench import Outcome
from mapet.evaluation.intervals import Figure
from mapet.files import atomic

Found = Mapping[str, Mapping[str, Outcome]]
"""Backbone -> protocol -> outcome."""
LISTED_CLASSES = 12
METHOD = """Brackets are 95 % intervals: Wilson's over test images for accuracies, Student's t over seeds where the row names seeds, else
the bootstrap over test images. They say how sure the figure is for this backbone, these training images and this kind of
test image; the chance in pre-training is not in them."""


def write_evaluation(out: Path, found: Found, about: Mapping[str, str], options: Mapping[str, Any]) -> None:
    """evaluation.md, evaluation.json and, where there are classes, per_class.csv."""
    record = {
        "about": dict(about),
        "options": dict(options),
        "backbones": {
            source: {
                name: {
                    "figures": {row: figure._asdict() for row, figure in outcome.figures.items()},
                    "per_class": {
                        row: {label: list(pair) for label, pair in tabled.items()}
                        for row, tabled in outcome.per_class.items()
                    },
                    "details": outcome.details,
                }
                for name, outcome in outcomes.items()
            }
            for source, outcomes in found.items()
        },
    }
    texts = {"evaluation.json": json.dumps(record, indent=2) + "\n", "evaluation.md": markdown(found, about)}
    if any(outcome.per_class for outcomes in found.values() for outcome in outcomes.values()):
        texts["per_class.csv"] = per_class_csv(found)
    for name, text in texts.items():
        with atomic(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def markdown(found: Found, about: Mapping[str, str]) -> str:
    """The page: one table of all figures, what was chosen for them, the classes told apart worst."""
    lines = [
        "# Evaluation",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
        METHOD.replace("\n", " "),
        "",
    ]
    lines += table("figure", found, lambda figure: cell(figure))
    if any(figure.choice for figure in _figures(found)):
        lines += ["## What was chosen, on training images alone", ""]
        lines += table("figure", found, lambda figure: figure.choice or "-", lambda figure: bool(figure.choice))
    lines += _layers(found)
    lines += _corruptions(found)
    lines += _worst_classes(found)
    return "\n".join(lines)


def cell(figure: Figure) -> str:
    """'0.543 (0.512 to 0.573)'."""
    value = _number(figure.value)
    if figure.low is None or figure.high is None:
        return value
    return f"{value} ({_number(figure.low)} to {_number(figure.high)})"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def table(
    head: str, found: Found, show: Callable[[Figure], str], wanted: Callable[[Figure], bool] = lambda figure: True
) -> list[str]:
    """Figures down, backbones across."""
    by_source = {
        source: {row: figure for outcome in outcomes.values() for row, figure in outcome.figures.items()}
        for source, outcomes in found.items()
    }
    rows = dict.fromkeys(row for figures in by_source.values() for row, figure in figures.items() if wanted(figure))
    lines = [f"| {head} | over | {' | '.join(by_source)} |", "|---|---|" + "---|" * len(by_source)]
    for row in rows:
        own = [figures.get(row) for figures in by_source.values()]
        over = next((figure.of for figure in own if figure), "")
        lines.append(f"| {row} | {over} | {' | '.join(show(figure) if figure else '-' for figure in own)} |")
    return [*lines, ""]


def _figures(found: Found) -> list[Figure]:
    return [f for outcomes in found.values() for outcome in outcomes.values() for f in outcome.figures.values()]


def _layers(found: Found) -> list[str]:
    """The linear probe's score at each layer, on held-out training images."""
    lines = []
    for source, outcomes in found.items():
        for name, details in (outcomes["linear"].details if "linear" in outcomes else {}).items():
            scores = ", ".join(f"{layer}: {score:.3f}" for layer, score in details["held_out_by_layer"].items())
            lines.append(f"- {source}, {name}: {scores}")
    return ["## Layers (accuracy on a held-out fifth of the training images)", "", *lines, ""] if lines else []


def _corruptions(found: Found) -> list[str]:
    """Error of each kind, mean over severities."""
    errors = {s: own["corruptions"].details["errors"] for s, own in found.items() if "corruptions" in own}
    if not errors:
        return []
    lines = ["## Error under each corruption (mean over severities)", "", f"| kind | {' | '.join(errors)} |"]
    lines.append("|---|" + "---|" * len(errors))
    for kind in next(iter(errors.values())):
        lines.append(f"| {kind} | {' | '.join(f'{fmean(own[kind]):.3f}' for own in errors.values())} |")
    return [*lines, ""]


def _worst_classes(found: Found) -> list[str]:
    """Classes of lowest accuracy over all backbones and figures."""
    columns = _columns(found)
    totals: dict[str, list[int]] = {}
    for tabled in columns.values():
        for label, pair in tabled.items():
            totals[label] = [sum(both) for both in zip(totals.get(label, (0, 0)), pair, strict=True)]
    seen = sorted(
        (label for label, (_, count) in totals.items() if count), key=lambda label: totals[label][0] / totals[label][1]
    )
    if not seen:
        return []
    lines = ["## Classes told apart worst (accuracy, or IoU; all of them are in per_class.csv)", ""]
    lines += [
        f"| class | {' | '.join(f'{source}, {row}' for source, row in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for label in seen[:LISTED_CLASSES]:
        cells = [_ratio(*tabled.get(label, (0, 0))) for tabled in columns.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _ratio(hit: int, count: int) -> str:
    return f"{hit / count:.3f}" if count else "-"


def per_class_csv(found: Found) -> str:
    """One line for each class, backbone and figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["backbone", "figure", "class", "correct", "of", "share"])
    for (source, row), tabled in _columns(found).items():
        for label, (hit, count) in tabled.items():
            writer.writerow([source, row, label, hit, count, f"{hit / count:.6f}" if count else ""])
    return text.getvalue()


def _columns(found: Found) -> dict[tuple[str, str], dict[str, tuple[int, int]]]:
    return {
        (source, row): tabled
        for source, outcomes in found.items()
        for outcome in outcomes.values()
        for row, tabled in outcome.per_class.items()
    }
