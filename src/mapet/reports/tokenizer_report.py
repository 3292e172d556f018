"""The health of a tokenizer's words as a short page: warnings in words, then each figure with what it means."""

from collections.abc import Sequence

from mapet.evaluation.tokens import CHANGES, Agreement, Information, Measures

Row = tuple[str, str, str]


def markdown(measures: Measures, warnings: Sequence[str], title: str) -> str:
    """The page, in Markdown."""
    lines = [f"# {title}", ""]
    lines += [
        f"{measures.vocab_size:,} words, measured on {measures.usage.patches:,} patches of {measures.images:,} images.",
        "",
        *(
            [f"- **Warning:** {warning}." for warning in warnings]
            or ["No warnings: nothing here speaks against these words."]
        ),
        "",
        "| measure | value | what it means |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {value} | {meaning} |" for name, value, meaning in rows(measures)]
    return "\n".join(lines) + "\n"


def rows(m: Measures) -> list[Row]:
    """(name, value, meaning in one line) of each figure."""
    use = m.usage
    table = [
        (
            "used codes",
            f"{use.used_codes:,} of {m.vocab_size:,}",
            f"codes that a patch of the sample has; with even use {use.reachable_codes:,.0f} would be seen",
        ),
        (
            "dead codes",
            f"{use.dead_codes:,}",
            "codes that no patch of the sample has; part of the output head for nothing",
        ),
        (
            "perplexity",
            f"{use.perplexity:.1f}",
            f"as many equally common words would be as hard to guess; at most {m.vocab_size:,}",
        ),
        ("entropy", f"{use.entropy:.2f} bits", "what a word says, at most log2 of the number of words"),
        ("commonest word", f"{use.commonest_share:.1%}", "of the patches have it: what always guessing it would score"),
        ("cover 50 %", f"{use.codes_for_half:.1%}", "of the codes, the commonest, take half of the patches"),
        ("cover 90 %", f"{use.codes_for_most:.1%}", "of the codes take nine tenths of the patches"),
    ]
    table += [
        (f"same after: {name}", _agreement(pair), f"patches whose word survives {CHANGES.get(name, name)}")
        for name, pair in m.stability.items()
    ]
    table += [
        (
            f"same as beside: {name}",
            _agreement(pair),
            "neighbouring patches that share their word; near 100 % the task is copying",
        )
        for name, pair in m.coherence.items()
    ]
    told = [
        (
            "word and neighbour",
            m.neighbour,
            "what a word says of the word beside or below: about 0, nothing to predict",
        ),
        (
            "position and word",
            m.position,
            "what the place alone says of the word: near 100 %, the image hardly matters",
        ),
        (
            "word and class",
            m.label,
            "what one patch's word says of the image's class; small, yet above 0, for good words",
        ),
    ]
    table += [(name, _information(value), meaning) for name, value, meaning in told if value is not None]
    if m.bag_of_tokens is not None:
        bag = m.bag_of_tokens
        table.append(
            (
                "bag-of-tokens probe",
                f"{bag.accuracy:.1%} (one class for all: {bag.chance:.1%})",
                f"of {bag.test_images:,} test images classified by how often each word comes in them",
            )
        )
    return table


def _agreement(pair: Agreement) -> str:
    return f"{pair.share:.1%} (chance {pair.chance:.1%}, kappa {pair.kappa:.2f})"


def _information(value: Information) -> str:
    return f"{value.bits:.3f} bits, {value.share:.1%} of all (chance {value.chance:.3f} ± {value.error:.3f} taken off)"
