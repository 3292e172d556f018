"""Temperature scaling, against scikit-learn's and against temperatures that are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from mapet.evaluation.calibration import fit_temperature, probabilities


def draw_logits(num_images, temperature, seed=0):
    """Logits, and labels that are drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_images, 4, generator=generator)
    return logits, torch.multinomial(torch.softmax(logits / temperature, 1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_the_labels_were_drawn_with_is_found(temperature):
    logits, labels = draw_logits(20_000, temperature)
    result = fit_temperature(logits, labels)
    assert result.temperature == pytest.approx(temperature, rel=0.05) and result.num_images == 20_000
    for value, at in ((result.nll, result.temperature), (result.nll_before, 1.0)):
        assert value == pytest.approx(float(F.cross_entropy(logits / at, labels)), rel=1e-5)
    assert torch.allclose(probabilities(logits, 2.0), torch.softmax(logits.double() / 2, 1))


def test_it_is_the_lowest_of_a_grid_with_targets_by_laplaces_rule():
    logits, labels = draw_logits(80, 2.0, seed=1)
    grid = torch.linspace(math.log(0.05), math.log(20), 20_001, dtype=torch.float64).exp()
    share = 1 / 82
    targets = (1 - share) * F.one_hot(labels, 4) + share / 4
    losses = [-(targets * torch.log_softmax(logits.double() / t, 1)).sum(1).mean() for t in grid]
    assert fit_temperature(logits, labels).temperature == pytest.approx(
        float(grid[torch.stack(losses).argmin()]), rel=1e-3
    )


def test_scikit_learn_finds_the_same():
    calibration = pytest.importorskip("sklearn.calibration")
    if not hasattr(calibration, "_TemperatureScaling"):
        pytest.skip("this scikit-learn has no temperature scaling")
    logits, labels = draw_logits(4000, 2.5)
    expected = calibration._TemperatureScaling().fit(logits.numpy(), labels.numpy())
    assert fit_temperature(logits, labels).temperature == pytest.approx(1 / expected.beta_, rel=0.01)


def test_images_that_are_all_right_make_nothing_certain_and_few_calibrate_nothing():
    labels = torch.arange(100) % 4
    right = 5.0 * F.one_hot(labels, 4)
    result = fit_temperature(right, labels)
    assert 1 - float(probabilities(right, result.temperature).max()) == pytest.approx(1 / 102 * 3 / 4, rel=0.05)
    assert fit_temperature(right[:49], labels[:49]) is None
