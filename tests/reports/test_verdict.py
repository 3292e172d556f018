"""The verdict of a run: a sentence, a table and advice, from paired comparisons."""

import numpy as np
import pytest
import torch

from mapet.config.evaluation import EvaluateConfig
from mapet.evaluation.controls import compare_with_controls, compare_with_each
from mapet.evaluation.eval_context import ProtocolResult
from mapet.reports.metrics import History
from mapet.reports.verdict import format_rows, summarize_comparisons, summarize_loss


def comparisons(**num_correct: int) -> list[dict[str, object]]:
    """Fields of the verdicts of 'pretrained' against the others, each of which has so many of 1,000 test images right, the first ones."""
    labels = torch.arange(1000) % 10
    results = {
        name: {"logistic": ProtocolResult({}, correct={"logistic": (torch.arange(1000) < count, labels)})}
        for name, count in num_correct.items()
    }
    config = EvaluateConfig(backbone=["pretrained"], images="a")
    return [each.to_json() for each in compare_with_each(results, config)]


def test_better_equal_and_worse_are_named_in_plain_english():
    result = comparisons(pretrained=600, untrained=400, kmeans=700, hog=598, pixels=300)
    verdict = summarize_comparisons(result, 1000, 500)
    assert verdict.sentence == (
        "The pre-trained backbone is clearly better than untrained and pixels, not clearly different from hog and clearly worse than "
        "kmeans: linear probe 0.600 on 1,000 test images."
    )
    assert [row[0] for row in verdict.table] == ["features", "pre-trained", "kmeans", "hog", "untrained", "pixels"]
    assert "more images" in verdict.advice and "public backbone" in verdict.advice
    assert len({line.index("0.") for line in format_rows(verdict.table)[1:]}) == 1  # columns are aligned


@pytest.mark.parametrize(("value", "advice"), [(900, "fine-tune"), (405, "has not paid"), (500, "Until then hog")])
def test_what_to_do_next(value, advice):
    assert advice in summarize_comparisons(comparisons(pretrained=value, untrained=400, hog=600), 1000, 10**6).advice


def test_clearly_is_a_paired_interval_without_zero():
    """Against scipy's interval of the mean difference: same images, so that a small but consistent lead is clear."""
    [ahead] = comparisons(pretrained=520, hog=500)
    differences = (np.arange(1000) < 520).astype(float) - (np.arange(1000) < 500)
    half = 1.96 * differences.std(ddof=1) / 1000**0.5
    assert (ahead["ci_low"], ahead["ci_high"]) == pytest.approx((0.02 - half, 0.02 + half), abs=0.004)
    assert "clearly better than hog" in summarize_comparisons([ahead], 1000, 500).sentence


def test_the_best_control_is_one_of_the_comparisons():
    labels = torch.arange(100) % 2
    correct = {"a": 90, "b": 95, "hog": 80, "kmeans": 85}
    results = {
        name: {"logistic": ProtocolResult({}, correct={"logistic": (torch.arange(100) < count, labels)})}
        for name, count in correct.items()
    }
    config = EvaluateConfig(backbone=["a", "b"], images="c")
    assert [(each.backbone, each.control) for each in compare_with_controls(results, config)] == [
        ("a", "kmeans"),
        ("b", "kmeans"),
    ]
    pairs = [(each.backbone, each.control) for each in compare_with_each(results, config)]
    assert pairs == [("a", "b"), ("a", "hog"), ("a", "kmeans"), ("b", "a"), ("b", "hog"), ("b", "kmeans")]


@pytest.mark.parametrize(("loss", "learned"), [(3.9, "has learned something"), (5.5, "has not learned more")])
def test_without_labels_it_says_that_it_cannot_tell(loss, learned, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": {loss}, "unigram_entropy": 5.378}}\n')
    verdict = summarize_loss(History.read(path))
    assert "can't tell" in verdict.sentence and learned in verdict.sentence and "class folders" in verdict.advice
    assert not format_rows(verdict.table)
