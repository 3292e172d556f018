"""The linear probe's choice of C, and its fit against scikit-learn's."""

import logging

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mapet.evaluation import logistic_regression
from mapet.evaluation.logistic_regression import fit_logistic, one_standard_error_rule


@pytest.fixture(scope="module")
def pixels():
    x, y = load_digits(return_X_y=True)
    return x.astype(np.float32), y


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_fit_equals_newtons_method_of_scikit_learn(pixels, num_classes, C):
    x, y = pixels[0][:1437], pixels[1][:1437] % num_classes
    scaled = StandardScaler().fit_transform(x.astype(np.float64))
    expected = LogisticRegression(C=C, max_iter=1000, tol=1e-9, solver="newton-cg").fit(scaled, y)
    result = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), num_classes, C)(torch.from_numpy(x))
    assert result.softmax(1).numpy() == pytest.approx(expected.predict_proba(scaled), abs=3e-3)


@pytest.mark.parametrize("max_rotated", [0, 4096])
def test_features_of_more_dimensions_than_images(monkeypatch, max_rotated):
    monkeypatch.setattr(logistic_regression, "MAX_ROTATED", max_rotated)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 100, generator=generator), torch.arange(40) % 3
    scaled = StandardScaler().fit_transform(x.double().numpy())
    expected = LogisticRegression(C=0.1, max_iter=1000, tol=1e-9, solver="newton-cg").fit(scaled, y.numpy())
    assert fit_logistic(x, y, 3, C=0.1).weight.numpy() == pytest.approx(expected.coef_, abs=1e-3)


def test_c_is_chosen_by_scikit_learns_cross_validation_and_the_one_standard_error_rule(pixels):
    x, y = pixels[0][:1000], pixels[1][:1000]
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = [
        cross_val_score(make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000)), x, y, cv=folds)
        for C in logistic_regression.C_CANDIDATES
    ]
    best = max(range(len(scores)), key=lambda i: scores[i].mean())
    margin = scores[best].std(ddof=1) / 5**0.5
    expected = next(i for i in range(len(scores)) if scores[i].mean() >= scores[best].mean() - margin)
    result = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 10)
    assert logistic_regression.C_CANDIDATES[expected] == result.C
    assert not result.at_edge and result.selected == f"C {result.C:g}"


def test_features_that_need_a_weak_penalty_get_one():
    """A direction of small variance among others that drown it, as in an untrained ViT; C up to 1 misses it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 2
    common = torch.randn(600, 1, generator=generator)
    x = common + 1e-3 * torch.randn(600, 20, generator=generator)
    x[:, 0] += 2e-3 * (2 * y - 1)
    probe = fit_logistic(x[:300], y[:300], 2)
    weak = fit_logistic(x[:300], y[:300], 2, 1.0)
    accuracies = [float((each(x[300:]).argmax(1) == y[300:]).float().mean()) for each in (weak, probe)]
    assert probe.C >= 10 and accuracies[1] > max(0.9, accuracies[0] + 0.05)


def test_smallest_candidate_within_one_standard_error_of_the_best():
    best = [0.90, 0.92, 0.94]  # mean 0.92, standard error 0.02 / sqrt(3) = 0.01155
    assert one_standard_error_rule([[0.90] * 3, [0.91] * 3, best, [0.92, 0.92, 0.91]]) == 1


def test_few_images_a_class_get_a_fixed_c(pixels):
    rows = np.concatenate([np.flatnonzero(pixels[1] == k)[:19] for k in range(10)])
    probe = fit_logistic(torch.from_numpy(pixels[0][rows]), torch.from_numpy(pixels[1][rows]), 10)
    assert (probe.C, probe.at_edge) == (0.1, False)


def test_c_at_an_edge_of_the_candidates_is_warned_of_and_shown(caplog):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.arange(60) % 2  # noise: no C beats the smallest
    with caplog.at_level(logging.WARNING, "mapet"):
        probe = fit_logistic(x, y, 2)
    assert probe.selected == "C 1e-06 (edge of the grid)"
    assert "smallest of its candidates, 1e-06 to 1e+08" in caplog.text


def test_a_class_of_fewer_images_than_folds_is_no_hindrance(pixels):
    rows = np.concatenate([np.flatnonzero(pixels[1] == 0)[:2], *(np.flatnonzero(pixels[1] == k)[:60] for k in (1, 2))])
    x, y = (torch.from_numpy(part[rows]) for part in pixels)
    assert float((fit_logistic(x, y, 3)(x).argmax(1) == y).float().mean()) > 0.95
