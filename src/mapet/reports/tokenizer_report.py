"""The metrics of a tokenizer as a short page: warnings in words, then each metric with what it means."""

from collections.abc import Sequence

from mapet.evaluation.tokens import CHANGES, Agreement, Information, Measures
from mapet.reports.blocks import markdown_table

MEANINGS = {
    "used codes": "codes that a patch of the sample has; with even use {m.usage.reachable_codes:,.0f} would be seen",
    "dead codes": "codes that no patch of the sample has; part of the output head for nothing",
    "perplexity": "as many equally frequent tokens would be as hard to guess; at most {m.vocab_size:,}",
    "entropy": "what a token says, at most log2 of the number of codes",
    "most frequent token": "of the patches have it: the majority baseline",
    "cover 50 %": "of the codes, the most frequent, take half of the patches",
    "cover 90 %": "of the codes take nine tenths of the patches",
    "same after": "patches whose token survives {change}",
    "same as beside": "neighbouring patches that share their token; near 100 % the task is copying",
    "token and neighbour": "what a token says of the token beside or below: about 0, nothing to predict",
    "position and token": "what the place alone says of the token: near 100 %, the image hardly matters",
    "token and class": "what one patch's token says of the image's class; small, yet above 0, for good tokens",
    "bag-of-tokens probe": "of {m.bag_of_tokens.test_images:,} test images classified by how often each token comes in them",
}
"""Metric, without what follows a colon -> what it means in one line."""


def markdown(measures: Measures, warnings: Sequence[str], title: str) -> str:
    """Render the page in Markdown."""
    sample = f"{measures.usage.patches:,} patches of {measures.images:,} images"
    told = [f"- **Warning:** {warning}." for warning in warnings] or ["No warnings: nothing here speaks against it."]
    table = markdown_table(["metric", "value", "what it means"], rows(measures))
    return "\n\n".join(
        [f"# {title}", f"{measures.vocab_size:,} codes, measured on {sample}.", "\n".join(told), table, ""]
    )


def rows(m: Measures) -> list[tuple[str, str, str]]:
    """List (name, value, meaning in one line) of each metric."""
    use = m.usage
    values = {
        "used codes": f"{use.used_codes:,} of {m.vocab_size:,}",
        "dead codes": f"{use.dead_codes:,}",
        "perplexity": f"{use.perplexity:.1f}",
        "entropy": f"{use.entropy:.2f} bits",
        "most frequent token": f"{use.commonest_share:.1%}",
        "cover 50 %": f"{use.codes_for_half:.1%}",
        "cover 90 %": f"{use.codes_for_most:.1%}",
    }
    values |= {f"same after: {name}": _agreement(pair) for name, pair in m.stability.items()}
    values |= {f"same as beside: {name}": _agreement(pair) for name, pair in m.coherence.items()}
    informed = {"token and neighbour": m.neighbour, "position and token": m.position, "token and class": m.label}
    values |= {name: _information(value) for name, value in informed.items() if value is not None}
    if (bag := m.bag_of_tokens) is not None:
        values["bag-of-tokens probe"] = f"{bag.accuracy:.1%} (majority baseline: {bag.chance:.1%})"
    return [(name, value, _meaning(name, m)) for name, value in values.items()]


def _meaning(name: str, m: Measures) -> str:
    kind, _, change = name.partition(": ")
    return MEANINGS[kind].format(m=m, change=CHANGES.get(change, change))


def _agreement(pair: Agreement) -> str:
    return f"{pair.share:.1%} (chance {pair.chance:.1%}, kappa {pair.kappa:.2f})"


def _information(value: Information) -> str:
    return f"{value.bits:.3f} bits, {value.share:.1%} of all (chance {value.chance:.3f} ± {value.error:.3f} taken off)"
