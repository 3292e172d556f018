"""The report of `mapet evaluate`: backbones side by side in Markdown, classes in CSV."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean

from mapet.evaluation.eval_context import ProtocolResult
from mapet.evaluation.intervals import MetricValue
from mapet.files import atomic
from mapet.reports.blocks import markdown_table

Results = Mapping[str, Mapping[str, ProtocolResult]]
"""Backbone -> protocol -> result."""
NUM_WORST_CLASSES = 12
METHOD = (
    "Brackets are 95 % intervals: Wilson's over test images for accuracies, Student's t over seeds where the row names seeds, else "
    "the bootstrap over test images. They say how sure the metric is for this backbone, these training images and this kind of "
    "test image; the chance in pre-training is not in them."
)


def write_evaluation(out: Path, results: Results, info: Mapping[str, str]) -> None:
    """Write evaluation.md and, where there are classes, per_class.csv."""
    texts = {"evaluation.md": render_markdown(results, info)}
    if any(result.per_class for own in results.values() for result in own.values()):
        texts["per_class.csv"] = per_class_csv(results)
    for name, text in texts.items():
        with atomic(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def render_markdown(results: Results, info: Mapping[str, str]) -> str:
    """Render the page: one table of all metrics, what was selected for them, the classes told apart worst."""
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in info.items()), "", METHOD, ""]
    lines += format_table("metric", results, format_metric)
    if any(
        metric.selected for own in results.values() for result in own.values() for metric in result.metrics.values()
    ):
        lines += ["## Selected on training images alone", ""]
        lines += format_table("metric", results, lambda metric: metric.selected or "-", lambda m: bool(m.selected))
    return "\n".join([*lines, *_layers(results), *_corruptions(results), *_worst_classes(results)])


def format_metric(metric: MetricValue) -> str:
    """Format as '0.543 (0.512 to 0.573)'."""
    value = _number(metric.value)
    if metric.ci_low is None or metric.ci_high is None:
        return value
    return f"{value} ({_number(metric.ci_low)} to {_number(metric.ci_high)})"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def format_table(
    head: str,
    results: Results,
    show: Callable[[MetricValue], str],
    wanted: Callable[[MetricValue], bool] = lambda metric: True,
) -> list[str]:
    """Format metrics down, backbones across."""
    columns = {
        source: {name: metric for result in own.values() for name, metric in result.metrics.items()}
        for source, own in results.items()
    }
    rows = []
    for name in dict.fromkeys(name for own in columns.values() for name, metric in own.items() if wanted(metric)):
        row = [own.get(name) for own in columns.values()]
        over = next((metric.over for metric in row if metric), "")
        rows.append([name, over, *(show(metric) if metric else "-" for metric in row)])
    return [*markdown_table([head, "over", *columns], rows).splitlines(), ""]


def _layers(results: Results) -> list[str]:
    """The SGD probe's score at each layer, on held-out training images."""
    lines = []
    for source, own in results.items():
        for name, details in (own["linear-sgd"].details if "linear-sgd" in own else {}).items():
            scores = ", ".join(f"{layer}: {score:.3f}" for layer, score in details["val_accuracy_by_layer"].items())
            lines.append(f"- {source}, {name}: {scores}")
    return ["## Layers (accuracy on a held-out fifth of the training images)", "", *lines, ""] if lines else []


def _corruptions(results: Results) -> list[str]:
    """Error under each corruption, mean over severities."""
    errors = {source: own["corruptions"].details["errors"] for source, own in results.items() if "corruptions" in own}
    if not errors:
        return []
    names = next(iter(errors.values()))
    rows = [[name, *(f"{fmean(own[name]):.3f}" for own in errors.values())] for name in names]
    return [
        "## Error under each corruption (mean over severities)",
        "",
        markdown_table(["corruption", *errors], rows),
        "",
    ]


def _worst_classes(results: Results) -> list[str]:
    """Classes of lowest accuracy over all backbones and metrics."""
    columns = list(_per_class(results))
    totals: dict[str, list[int]] = {}
    for _, _, classes in columns:
        for label, pair in classes.items():
            totals[label] = [sum(both) for both in zip(totals.get(label, (0, 0)), pair, strict=True)]
    worst = sorted((hit / count, label) for label, (hit, count) in totals.items() if count)[:NUM_WORST_CLASSES]
    if not worst:
        return []
    rows = []
    for _, label in worst:
        pairs = [classes.get(label, (0, 0)) for _, _, classes in columns]
        rows.append([label, *(f"{hit / count:.3f}" if count else "-" for hit, count in pairs)])
    table = markdown_table(["class", *(f"{source}, {name}" for source, name, _ in columns)], rows)
    return ["## Classes told apart worst (accuracy, or IoU; all of them are in per_class.csv)", "", table, ""]


def per_class_csv(results: Results) -> str:
    """Write one line for each class, backbone and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["backbone", "metric", "class", "correct", "of", "fraction"])
    for source, name, classes in _per_class(results):
        for label, (hit, count) in classes.items():
            writer.writerow([source, name, label, hit, count, f"{hit / count:.6f}" if count else ""])
    return text.getvalue()


def _per_class(results: Results) -> Iterator[tuple[str, str, dict[str, tuple[int, int]]]]:
    for source, own in results.items():
        for result in own.values():
            for name, classes in result.per_class.items():
                yield source, name, classes
