"""Reports of `mapet evaluate`: backbones side by side in Markdown, classes in CSV; and of `mapet inspect-tokenizer`."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapet.evaluation.controls import Verdict
from mapet.evaluation.eval_context import MetricValue, ProtocolResult
from mapet.evaluation.token_metrics import PERTURBATIONS, TokenMetrics
from mapet.files import write_text
from mapet.reports.render import format_csv, markdown_table, render

Results = Mapping[str, Mapping[str, ProtocolResult]]
"""Backbone (path or name of the model) -> protocol ('logistic', 'knn', ...) -> result."""
ClassCounts = Mapping[tuple[str, str], Mapping[str, tuple[int, int]]]
"""(backbone, metric) -> class -> (correct, all) images; of segmentation, pixels of (intersection, union)."""
NUM_WORST_CLASSES = 12
"""Classes in the table of the classes of lowest accuracy."""


def write_evaluation(out: Path, results: Results, info: Mapping[str, str], verdicts: Sequence[Verdict] = ()) -> None:
    """Write evaluation.md (backbones side by side) and, if any result counts images by class, per_class.csv into a folder.

    Args:
        out: the folder; earlier files are replaced.
        results: backbone -> protocol -> result; the details of the protocol 'corruptions' have "errors": corruption -> error rates
            (0..1), one for each severity.
        info: name -> text, about the data and the machine, listed at the top.
        verdicts: backbones against the best control.
    """
    counts: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for source, by_protocol in results.items():
        for result in by_protocol.values():
            counts |= {(source, name): classes for name, classes in result.per_class.items()}
    errors = {
        source: by_protocol["corruptions"].details["errors"]
        for source, by_protocol in results.items()
        if "corruptions" in by_protocol
    }
    # errors: backbone -> corruption -> error rates; counts: (backbone, metric) -> class -> counts
    text = render(
        "evaluation.md", info=info, verdicts=verdicts, results=results, metrics=format_table(results, format_metric), counts=counts,
        corruption_errors=errors, selected=format_table(results, lambda metric: metric.selected), worst_classes=_worst_classes(counts),
    )  # fmt: skip
    write_text(out / "evaluation.md", text)
    if counts:
        rows: list[list[object]] = [["backbone", "metric", "class", "correct", "of", "fraction"]]
        for key, classes in counts.items():
            for name, (correct, count) in classes.items():
                rows.append([*key, name, correct, count, f"{correct / count:.6f}" if count else ""])
        write_text(out / "per_class.csv", format_csv(rows))


def format_metric(metric: MetricValue) -> str:
    """Format a metric and its 95 % interval, '0.543 (0.512 to 0.573)', without an unknown interval '0.543'; '1,437.0' from 10 on."""
    numbers = [number for number in (metric.value, metric.ci_low, metric.ci_high) if number is not None]
    value, *interval = [f"{number:.3f}" if abs(number) < 10 else f"{number:,.1f}" for number in numbers]
    return f"{value} ({' to '.join(interval)})" if interval else value


def format_table(results: Results, format_cell: Callable[[MetricValue], str]) -> str:
    """Return a Markdown table of metrics (rows) and backbones (columns); '' without rows.

    Its columns are the metric, what its interval counts over ('1,000 images'), then each backbone; '-' where a backbone lacks a metric.

    Args:
        results: backbone -> protocol -> result.
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
    """Return up to `NUM_WORST_CLASSES` names of the classes of lowest accuracy over all backbones and metrics, the lowest first.

    Args:
        counts: (backbone, metric) -> class -> (correct, all) images, or pixels of (intersection, union); classes without any are skipped.
    """
    correct, total = Counter[str](), Counter[str]()
    for classes in counts.values():
        for name, (part, whole) in classes.items():
            correct[name] += part
            total[name] += whole
    counted = [name for name in total if total[name]]
    return sorted(counted, key=lambda name: (correct[name] / total[name], name))[:NUM_WORST_CLASSES]


def format_token_metrics(metrics: TokenMetrics) -> dict[str, str]:
    """Return the metrics of a tokenizer, label -> formatted value ('perplexity' -> '301.2'); metrics that are None are omitted.

    The template token_metrics.txt renders each metric as a line of label, tab and value.
    """
    return dict(line.split("\t") for line in render("token_metrics.txt", m=metrics).splitlines())


def render_tokenizer_report(
    metrics: TokenMetrics, warnings: Sequence[str], name: str, description: Mapping[str, Any]
) -> str:
    """Render the Markdown report of a tokenizer: warnings, then a table of each metric, its value and its meaning.

    Args:
        warnings: sentences without a final period.
        name: the tokenizer's name for the user, in the title.
        description: the content of visual_tokenizer.json; "teacher" and "label_free" are shown.
    """
    values = format_token_metrics(metrics)
    return render(
        "tokenizer_report.md", m=metrics, warnings=warnings, name=name, values=values, perturbations=PERTURBATIONS, tokenizer=description,
    )  # fmt: skip
