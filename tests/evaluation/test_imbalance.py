"""Balanced accuracy and AUROC against scikit-learn's, and when they lead."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from mapet.evaluation.eval_context import bootstrap_ci, measure_classifier
from mapet.evaluation.imbalance import balanced_accuracy, is_imbalanced, name_rows, one_vs_rest_auroc, score_classifier
from mapet.reports.metrics import History, summarize_metrics
from mapet.reports.plots import plot_confusion
from mapet.training.tasks.pretraining import PretrainingTask


def imbalanced(num_classes, seed=0, count=300, decimals=7):
    """Logits that say something of the labels, of which the first class has most."""
    rng = np.random.default_rng(seed)
    frequencies = np.arange(num_classes, 0, -1) ** 2
    labels = rng.choice(num_classes, count, p=frequencies / frequencies.sum())
    logits = rng.normal(size=(count, num_classes)).round(decimals)
    logits[np.arange(count), labels] += 1
    return torch.from_numpy(logits), labels, rng.integers(0, 4, count).astype(float)


def sklearn_auroc(logits, labels, weights=None):
    chances = torch.from_numpy(np.asarray(logits)).double().softmax(1).numpy()
    if chances.shape[1] == 2:
        return roc_auc_score(labels, chances[:, 1], sample_weight=weights)
    return roc_auc_score(labels, chances, sample_weight=weights, multi_class="ovr", average="macro")


@pytest.mark.parametrize("decimals", [7, 0])  # 0: many scores are equal
@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_weighted_forms_are_scikit_learns(num_classes, decimals):
    logits, labels, weights = imbalanced(num_classes, decimals=decimals)
    auroc, predicted = one_vs_rest_auroc(logits, labels), logits.argmax(1).numpy()
    for each in (np.ones(len(labels)), weights):
        assert auroc(each) == pytest.approx(sklearn_auroc(logits, labels, each), abs=1e-12)
        expected = balanced_accuracy_score(labels, predicted, sample_weight=each)
        assert balanced_accuracy(predicted == labels, labels, each) == pytest.approx(expected, abs=1e-12)
    scores = score_classifier(logits, torch.from_numpy(labels))
    assert list(scores) == ["balanced_accuracy", "auroc", "accuracy"]
    assert scores["accuracy"] == pytest.approx((predicted == labels).mean())


def test_classes_without_images_are_not_averaged():
    logits, labels, _ = imbalanced(3)
    one_more = torch.cat([logits[:, :1], torch.full((len(labels), 1), -torch.inf), logits[:, 1:]], 1)
    moved = np.where(labels > 0, labels + 1, 0)
    assert score_classifier(one_more, torch.from_numpy(moved)) == score_classifier(logits, torch.from_numpy(labels))


def test_images_of_one_class_have_no_auroc_and_diverged_scores_are_equal():
    logits, labels, _ = imbalanced(3)
    assert np.isnan(one_vs_rest_auroc(logits, labels)((labels == 1).astype(float)))
    assert one_vs_rest_auroc(torch.full_like(logits, torch.nan), labels)(np.ones(len(labels))) == 0.5


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((60, 40), False), ((61, 39), True), ((61, 0, 39), True), ((50, 0, 50), False), ((40, 30, 30), False), ((0, 9), False)],
)  # fmt: skip
def test_the_largest_class_decides(counts, expected):
    assert is_imbalanced(np.repeat(np.arange(len(counts)), counts)) is expected


def test_balanced_images_have_accuracy_alone():
    metrics = measure_classifier(torch.eye(4), torch.tensor([0, 1, 2, 2]))  # class 3 has no image; 2 of 4 in 3 classes
    assert list(metrics) == ["balanced_accuracy", "auroc", "accuracy"]
    metrics = measure_classifier(torch.eye(4), torch.tensor([0, 1, 2, 0]), "k 3")
    assert (
        list(measure_classifier(torch.eye(4), torch.arange(4))) == ["accuracy"] and metrics["auroc"].selected == "k 3"
    )
    assert list(name_rows("knn", metrics)) == ["knn_balanced_accuracy", "knn_auroc", "knn"]


@pytest.mark.parametrize("num_classes", [2, 5])
def test_intervals_are_the_plain_bootstraps(num_classes):
    """Of whole copies of the images, drawn here, by scikit-learn's metrics."""
    logits, labels, _ = imbalanced(num_classes)
    metrics = measure_classifier(logits, torch.from_numpy(labels))

    def drawn_again(statistic):
        def weighted(weights):
            rows = np.repeat(np.arange(len(weights)), weights.astype(int))
            return statistic(logits[rows], labels[rows])

        return bootstrap_ci(weighted, len(labels))

    plain = {
        "auroc": drawn_again(sklearn_auroc),
        "balanced_accuracy": drawn_again(lambda x, y: balanced_accuracy_score(y, x.argmax(1).numpy())),
    }
    for kind, expected in plain.items():
        assert metrics[kind][:3] == pytest.approx(expected[:3], abs=1e-12)
        assert metrics[kind].ci_low < metrics[kind].value < metrics[kind].ci_high


def test_figures_and_reports_name_balanced_accuracy_first():
    title = plot_confusion(np.array([[8, 0, 0], [1, 1, 0], [0, 0, 0]]), ["a", "b", "c"]).axes[0].get_title()
    assert title == "Linear probe: balanced accuracy 75.0%; 90.0% of 10 images"
    assert (
        plot_confusion(np.array([[2, 0], [1, 1]]), ["a", "b"]).axes[0].get_title() == "Linear probe: 75.0% of 4 images"
    )
    rows = {"logistic_balanced_accuracy": 0.5, "logistic_auroc": 0.6, "logistic": 0.7, "knn": 0.8}
    scores = {f"probe/{name}": value for name, value in rows.items()}
    message = "linear probe balanced accuracy 0.500, linear probe AUROC 0.600, linear probe 0.700, k-NN 0.800"
    assert PretrainingTask.format_scores(scores) == message
    history = History(Path("metrics.jsonl"))
    history.add({"step": 1, **scores})
    assert [label.split(" (")[0] for label in summarize_metrics(history)] == [
        "linear probe, balanced accuracy", "linear probe, AUROC", "linear probe", "k-NN probe",
    ]  # fmt: skip
