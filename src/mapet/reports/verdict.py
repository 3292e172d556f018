"""The verdict of a run: one sentence on whether its backbone is any good, a small table, and what to do next."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mapet.reports.metrics import History

METRIC_TITLES = {"logistic": "linear probe", "logistic_balanced_accuracy": "linear probe, balanced accuracy"}
FEW_IMAGES = 5_000
"""Below so many images, more of them are the first advice."""


class RunVerdict(NamedTuple):
    """What a run ends with.

    Attributes:
        sentence: whether the backbone is better than what needs no pre-training; with a final period.
        advice: what to do next, one or two sentences.
        table: a head and rows of equally many texts; [] without labels.
    """

    sentence: str
    advice: str
    table: Sequence[Sequence[str]] = ()


def summarize_comparisons(comparisons: Sequence[Mapping[str, Any]], num_test: int, num_images: int) -> RunVerdict:
    """Summarize how a backbone compares with other features by a linear probe.

    Args:
        comparisons: fields of `evaluation.controls.Verdict`, of the backbone against each other one, by names for the user.
        num_test: test images.
        num_images: that it was pre-trained on.

    Returns:
        The verdict.
    """
    rows = sorted(
        (each for each in comparisons if each["metric"] in METRIC_TITLES), key=lambda each: -each["control_value"]
    )
    better_than = [each["control"] for each in rows if each["ci_low"] > 0]
    worse = [each["control"] for each in rows if each["ci_high"] < 0]
    equal = [each["control"] for each in rows if each["control"] not in (*better_than, *worse)]
    parts = [
        f"{text} {_join(names)}"
        for text, names in (
            ("clearly better than", better_than),
            ("not clearly different from", equal),
            ("clearly worse than", worse),
        )
        if names
    ]
    title, value = METRIC_TITLES[rows[0]["metric"]], rows[0]["value"]
    sentence = f"The pre-trained backbone is {_join(parts)}: {title} {value:.3f} on {num_test:,} test images."
    table = [["features", title, "pre-trained minus this, 95 % interval"], ["pre-trained", f"{value:.3f}", ""]]
    for each in rows:
        interval = f"{each['difference']:+.3f} ({each['ci_low']:+.3f} to {each['ci_high']:+.3f})"
        table.append([each["control"], f"{each['control_value']:.3f}", interval])
    return RunVerdict(sentence, _advise(better_than, equal, worse, num_images), table)


def _advise(better: list[str], equal: list[str], worse: list[str], num_images: int) -> str:
    """Return what to do next, from the names of features that the backbone is better than, not clearly different from, and worse than."""
    public = "`mapet evaluate --backbone RUN timm:vit_small_patch16_224.augreg_in21k --images LABELED` compares a public backbone"
    if not equal and not worse:
        return f"Next: fine-tune it on your labels, `mapet finetune --backbone RUN --images LABELED`. {public}."
    if "untrained" in (*equal, *worse):
        return f"Next: pre-training has not paid yet; give it more time, `--time`, or another tokenizer, `--teacher`. {public}."
    ahead = _join(worse or equal)
    if "tokens" in worse or "teacher" in worse:
        return f"Next: more time, `--time`: it does not yet know what its tokens know. Until then {ahead} are as good or better. {public}."
    more = "more images, " if num_images < FEW_IMAGES else ""
    return f"Next: {more}more time, `--time`, or another tokenizer, `--teacher`. Until then {ahead} are as good or better. {public}."


def summarize_loss(history: History) -> RunVerdict:
    """Summarize a run without labels by its last loss and the unigram baseline.

    Args:
        history: metrics of the run.

    Returns:
        The verdict, without a table.
    """
    losses, unigram = history["loss"].values, history["unigram_entropy"].values
    learned = "It has learned something of the images"
    if losses and unigram:
        is_below = losses[-1] < unigram[-1]
        learned = (
            "It has learned something of the images"
            if is_below
            else "It has not learned more than how frequent tokens are"
        )
        learned += f": loss {losses[-1]:.3f}, and {unigram[-1]:.3f} from token frequencies alone"
    sentence = f"Without labels this run can't tell whether its features are good. {learned}."
    return RunVerdict(
        sentence,
        "Next: put a few hundred images into class folders, LABELED/CLASS/image.jpg, and "
        "`mapet evaluate --backbone RUN --images LABELED` says how it compares with features that need no pre-training.",
    )


def _join(texts: Sequence[str]) -> str:
    """Join texts as in a sentence: 'a', 'a and b', 'a, b and c'."""
    return " and ".join([*filter(None, [", ".join(texts[:-1])]), *texts[-1:]])


def format_rows(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are as wide as their longest text."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]
