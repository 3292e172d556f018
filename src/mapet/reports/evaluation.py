"""Reports of `mapet evaluate`: backbones side by side in Markdown, classes in CSV; and of `mapet inspect-tokenizer`."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from mapet.evaluation.eval_context import MetricValue, ProtocolResult
from mapet.evaluation.token_metrics import PERTURBATIONS, Agreement, MutualInformation, TokenMetrics
from mapet.files import write_text
from mapet.reports.render import markdown_table, render

Results = Mapping[str, Mapping[str, ProtocolResult]]
"""Backbone -> protocol -> result."""
NUM_WORST_CLASSES = 12


def write_evaluation(out: Path, results: Results, info: Mapping[str, str]) -> None:
    """Write evaluation.md and, where there are classes, per_class.csv."""
    errors = {source: own["corruptions"].details["errors"] for source, own in results.items() if "corruptions" in own}
    names = next(iter(errors.values()), ())
    rows = [[name, *(f"{fmean(own[name]):.3f}" for own in errors.values())] for name in names]
    per_class = {
        f"{source}, {name}": (source, name, classes)
        for source, own in results.items()
        for result in own.values()
        for name, classes in result.per_class.items()
    }
    text = render(
        "evaluation.md", info=info, results=results, metrics=format_table(results, format_metric),
        selected=format_table(results, lambda metric: metric.selected), worst=_worst_classes(per_class),
        corruptions=markdown_table(["corruption", *errors], rows) if errors else "",
    )  # fmt: skip
    write_text(out / "evaluation.md", text)
    if per_class:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["backbone", "metric", "class", "correct", "of", "fraction"])
        for source, name, classes in per_class.values():
            for label, (hit, count) in classes.items():
                writer.writerow([source, name, label, hit, count, f"{hit / count:.6f}" if count else ""])
        write_text(out / "per_class.csv", file.getvalue())


def format_metric(metric: MetricValue) -> str:
    """Format as '0.543 (0.512 to 0.573)'."""
    value, *ends = (
        "" if number is None else f"{number:.3f}" if abs(number) < 10 else f"{number:,.1f}" for number in metric[:3]
    )
    return f"{value} ({' to '.join(ends)})" if all(ends) else value


def format_table(results: Results, show: Callable[[MetricValue], str]) -> str:
    """Tabulate metrics down, backbones across, without rows of which nothing is shown; empty without rows."""
    columns = [
        {k: metric for result in own.values() for k, metric in result.metrics.items()} for own in results.values()
    ]
    rows = []
    for name in dict.fromkeys(name for own in columns for name in own):
        metrics = [own.get(name) for own in columns]
        if any(shown := [show(metric) if metric else "" for metric in metrics]):
            over = next(metric.over for metric in metrics if metric)
            rows.append([name, over, *(text or "-" for text in shown)])
    return markdown_table(["metric", "over", *results], rows) if rows else ""


def _worst_classes(per_class: Mapping[str, tuple[str, str, Mapping[str, tuple[int, int]]]]) -> str:
    """Tabulate classes of lowest accuracy over all backbones and metrics; empty where nothing was counted."""
    columns = [classes for _, _, classes in per_class.values()]
    labels = dict.fromkeys(label for classes in columns for label in classes)
    totals = {label: [sum(classes.get(label, (0, 0))[i] for classes in columns) for i in (0, 1)] for label in labels}
    worst = sorted((hit / count, label) for label, (hit, count) in totals.items() if count)[:NUM_WORST_CLASSES]
    pairs = {label: [classes.get(label, (0, 0)) for classes in columns] for _, label in worst}
    rows = [[label, *(f"{hit / count:.3f}" if count else "-" for hit, count in own)] for label, own in pairs.items()]
    return markdown_table(["class", *per_class], rows) if rows else ""


def tokenizer_metrics(m: TokenMetrics) -> dict[str, str]:
    """Write each metric of a tokenizer: name -> value."""

    def agreement(pair: Agreement) -> str:
        return f"{pair.share:.1%} (chance {pair.chance:.1%}, kappa {pair.kappa:.2f})"

    def information(value: MutualInformation) -> str:
        taken_off = f"chance {value.chance:.3f} ± {value.error:.3f} taken off"
        return f"{value.bits:.3f} bits, {value.share:.1%} of all ({taken_off})"

    use, bag = m.usage, m.bag_of_tokens
    told = {"token and neighbor": m.neighbor, "position and token": m.position, "token and class": m.label}
    return {
        "used codes": f"{use.used_codes:,} of {m.vocab_size:,}",
        "dead codes": f"{use.dead_codes:,}",
        "perplexity": f"{use.perplexity:.1f}",
        "entropy": f"{use.entropy:.2f} bits",
        "most frequent token": f"{use.top_code_fraction:.1%}",
        "cover 50 %": f"{use.codes_for_half:.1%}",
        "cover 90 %": f"{use.codes_for_most:.1%}",
        **{f"same after: {name}": agreement(pair) for name, pair in m.stability.items()},
        **{f"same as beside: {name}": agreement(pair) for name, pair in m.coherence.items()},
        **{name: information(value) for name, value in told.items() if value is not None},
        **({"bag-of-tokens probe": f"{bag.accuracy:.1%} (majority baseline: {bag.chance:.1%})"} if bag else {}),
    }


def tokenizer_markdown(measures: TokenMetrics, warnings: Sequence[str], title: str) -> str:
    """Render the metrics of a tokenizer: warnings in words, then each metric with what it means."""
    values = tokenizer_metrics(measures)
    return render(
        "tokenizer_report.md", m=measures, warnings=warnings, title=title, values=values, changes=PERTURBATIONS
    )
