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


def write_evaluation(
    out: Path, found: Found, classes: list[str], about: Mapping[str, str], options: Mapping[str, Any]
) -> None:
    """evaluation.md, evaluation.json and, where there are classes, per_class.csv."""
    record = {
        "about": dict(about),
        "options": dict(options),
        "backbones": {
            source: {
                name: {
                    "figures": {row: figure._asdict() for row, figure in outcome.figures.items()},
                    "per_class": {
                        row: {label: list(pair) for label, pair in zip(classes, table, strict=True)}
                        for row, table in outcome.per_class.items()
                    },
                    "details": outcome.details,
                }
                for name, outcome in outcomes.items()
            }
            for source, outcomes in found.items()
        },
    }
    texts = {"evaluation.json": json.dumps(record, indent=2) + "\n", "evaluation.md": markdown(found, classes, about)}
    if any(outcome.per_class for outcomes in found.values() for outcome in outcomes.values()):
        texts["per_class.csv"] = per_class_csv(found, classes)
    for name, text in texts.items():
        with atomic(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def markdown(found: Found, classes: list[str], about: Mapping[str, str]) -> str:
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
    lines += _worst_classes(found, classes)
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


def _worst_classes(found: Found, classes: list[str]) -> list[str]:
    """Classes of lowest accuracy over all backbones and figures."""
    columns = _columns(found)
    if not columns:
        return []
    hits = [sum(tabled[i][0] for tabled in columns.values()) for i in range(len(classes))]
    counts = [sum(tabled[i][1] for tabled in columns.values()) for i in range(len(classes))]
    seen = sorted((i for i in range(len(classes)) if counts[i]), key=lambda i: hits[i] / counts[i])[:LISTED_CLASSES]
    lines = ["## Classes told apart worst (accuracy; all of them are in per_class.csv)", ""]
    lines += [
        f"| class | images | {' | '.join(f'{s}, {row}' for s, row in columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for i in seen:
        own = [tabled[i] for tabled in columns.values()]
        cells = [f"{hit / count:.3f}" if count else "-" for hit, count in own]
        lines.append(f"| {classes[i]} | {own[0][1]:,} | {' | '.join(cells)} |")
    return [*lines, ""]


def per_class_csv(found: Found, classes: list[str]) -> str:
    """One line for each class, backbone and figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["backbone", "figure", "class", "correct", "images", "accuracy"])
    for (source, row), tabled in _columns(found).items():
        for name, (hit, count) in zip(classes, tabled, strict=True):
            writer.writerow([source, row, name, hit, count, f"{hit / count:.6f}" if count else ""])
    return text.getvalue()


def _columns(found: Found) -> dict[tuple[str, str], list[tuple[int, int]]]:
    return {
        (source, row): tabled
        for source, outcomes in found.items()
        for outcome in outcomes.values()
        for row, tabled in outcome.per_class.items()
    }
