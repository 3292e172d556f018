"""Reports of `mapet evaluate`: backbones side by side in Markdown, classes in CSV; and of `mapet inspect-tokenizer`."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mapet.evaluation.eval_context import MetricValue, ProtocolResult
from mapet.evaluation.token_metrics import PERTURBATIONS, TokenMetrics
from mapet.files import write_text
from mapet.reports.render import markdown_table, render

Results = Mapping[str, Mapping[str, ProtocolResult]]
"""Backbone -> protocol -> result."""
ClassCounts = Mapping[tuple[str, str], Mapping[str, tuple[int, int]]]
"""(backbone, metric) -> class -> (correct, all) images; of segmentation, pixels of (intersection, union)."""
NUM_WORST_CLASSES = 12


def write_evaluation(out: Path, results: Results, info: Mapping[str, str]) -> None:
    """Write evaluation.md and, where there are classes, per_class.csv.

    Args:
        info: name -> text, about the data and the machine.
    """
    counts = {
        (source, name): classes
        for source, protocols in results.items()
        for result in protocols.values()
        for name, classes in result.per_class.items()
    }
    errors = {source: own["corruptions"].details["errors"] for source, own in results.items() if "corruptions" in own}
    text = render(
        "evaluation.md", info=info, results=results, metrics=format_table(results, format_metric), counts=counts,
        corruption_errors=errors, selected=format_table(results, lambda metric: metric.selected), worst_classes=_worst_classes(counts),
    )  # fmt: skip
    write_text(out / "evaluation.md", text)
    if counts:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["backbone", "metric", "class", "correct", "of", "fraction"])
        for key, classes in counts.items():
            for name, (correct, count) in classes.items():
                writer.writerow([*key, name, correct, count, f"{correct / count:.6f}" if count else ""])
        write_text(out / "per_class.csv", file.getvalue())


def format_metric(metric: MetricValue) -> str:
    """Format a metric and its 95 % interval, if that is known: '0.543 (0.512 to 0.573)'."""
    numbers = [number for number in (metric.value, metric.ci_low, metric.ci_high) if number is not None]
    value, *interval = [f"{number:.3f}" if abs(number) < 10 else f"{number:,.1f}" for number in numbers]
    return f"{value} ({' to '.join(interval)})" if interval else value


def format_table(results: Results, format_cell: Callable[[MetricValue], str]) -> str:
    """Return a Markdown table of metrics (rows) and backbones (columns); '' without rows.

    Args:
        format_cell: returns the text of a metric; a row in which all texts are '' is omitted.
    """
    columns = [
        {name: metric for result in protocols.values() for name, metric in result.metrics.items()}
        for protocols in results.values()
    ]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [format_cell(column[name]) if name in column else "" for column in columns]
        if any(cells):
            over = next(column[name].over for column in columns if name in column)
            rows.append([name, over, *(cell or "-" for cell in cells)])
    return markdown_table(["metric", "over", *results], rows) if rows else ""


def _worst_classes(counts: ClassCounts) -> list[str]:
    """Return the classes of lowest accuracy over all backbones and metrics, the lowest first."""
    correct, total = Counter[str](), Counter[str]()
    for classes in counts.values():
        for name, (part, whole) in classes.items():
            correct[name] += part
            total[name] += whole
    counted = [name for name in total if total[name]]
    return sorted(counted, key=lambda name: (correct[name] / total[name], name))[:NUM_WORST_CLASSES]


def format_token_metrics(metrics: TokenMetrics) -> dict[str, str]:
    """Return the metrics of a tokenizer as text, by name; those that were not measured are omitted."""
    return dict(line.split("\t") for line in render("token_metrics.txt", m=metrics).splitlines())


def render_tokenizer_report(metrics: TokenMetrics, warnings: Sequence[str], name: str) -> str:
    """Render the metrics of a tokenizer, by the name it has for the user: warnings, then each metric and what it means."""
    values = format_token_metrics(metrics)
    return render(
        "tokenizer_report.md", m=metrics, warnings=warnings, name=name, values=values, perturbations=PERTURBATIONS
    )
