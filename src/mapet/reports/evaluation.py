"""Reports of `mapet evaluate`: backbones side by side in Markdown, classes in CSV; and of `mapet inspect-tokenizer`."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from mapet.evaluation.eval_context import MetricValue, ProtocolResult
from mapet.evaluation.token_metrics import PERTURBATIONS, Agreement, MutualInformation, TokenMetrics
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
    text = render(
        "evaluation.md", info=info, results=results, metrics=format_table(results, format_metric),
        selected=format_table(results, lambda metric: metric.selected), worst=_worst_classes(counts),
        corruptions=_corruption_errors(results),
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
        format_cell: returns the text of a metric; a row in which all texts are '' is left out.
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


def _corruption_errors(results: Results) -> str:
    """Return a table of the mean error over severities of each corruption (rows) and backbone; '' if none was evaluated."""
    errors = {source: own["corruptions"].details["errors"] for source, own in results.items() if "corruptions" in own}
    names = next(iter(errors.values()), ())
    rows = [[name, *(f"{fmean(own[name]):.3f}" for own in errors.values())] for name in names]
    return markdown_table(["corruption", *errors], rows) if errors else ""


def _worst_classes(counts: ClassCounts) -> str:
    """Return a table of the classes of lowest accuracy, over all backbones and metrics; '' where nothing was counted."""
    correct, total = Counter[str](), Counter[str]()
    for classes in counts.values():
        correct.update({name: part for name, (part, _) in classes.items()})
        total.update({name: whole for name, (_, whole) in classes.items()})
    worst = sorted((correct[name] / count, name) for name, count in total.items() if count)[:NUM_WORST_CLASSES]
    rows = []
    for _, name in worst:
        cells = [classes.get(name, (0, 0)) for classes in counts.values()]
        rows.append([name, *(f"{part / whole:.3f}" if whole else "-" for part, whole in cells)])
    return markdown_table(["class", *map(", ".join, counts)], rows) if rows else ""


def format_token_metrics(metrics: TokenMetrics) -> dict[str, str]:
    """Return the metrics of a tokenizer as text, by name; those that were not measured are left out."""

    def format_agreement(agreement: Agreement) -> str:
        return f"{agreement.share:.1%} (chance {agreement.chance:.1%}, kappa {agreement.kappa:.2f})"

    def format_information(information: MutualInformation) -> str:
        bias = f"chance {information.chance:.3f} ± {information.error:.3f} subtracted"
        return f"{information.bits:.3f} bits, {information.share:.1%} of all ({bias})"

    usage, bag = metrics.usage, metrics.bag_of_tokens
    pairs = {
        "token and neighbor": metrics.neighbor,
        "position and token": metrics.position,
        "token and class": metrics.label,
    }
    texts = {
        "used codes": f"{usage.used_codes:,} of {metrics.vocab_size:,}",
        "dead codes": f"{usage.dead_codes:,}",
        "perplexity": f"{usage.perplexity:.1f}",
        "entropy": f"{usage.entropy:.2f} bits",
        "most frequent token": f"{usage.top_code_fraction:.1%}",
        "cover 50 %": f"{usage.codes_for_half:.1%}",
        "cover 90 %": f"{usage.codes_for_most:.1%}",
    }
    texts |= {f"same after: {name}": format_agreement(pair) for name, pair in metrics.stability.items()}
    texts |= {f"same as beside: {name}": format_agreement(pair) for name, pair in metrics.coherence.items()}
    texts |= {name: format_information(information) for name, information in pairs.items() if information is not None}
    if bag is not None:
        texts["bag-of-tokens probe"] = f"{bag.accuracy:.1%} (majority baseline: {bag.chance:.1%})"
    return texts


def render_tokenizer_report(metrics: TokenMetrics, warnings: Sequence[str], name: str) -> str:
    """Render the metrics of a tokenizer, by the name it has for the user: warnings, then each metric and what it means."""
    values = format_token_metrics(metrics)
    return render(
        "tokenizer_report.md", m=metrics, warnings=warnings, name=name, values=values, perturbations=PERTURBATIONS
    )
