"""What figures of a run show."""

import numpy as np
import torch

from mapet.reports.plots import plot_predictions


def test_small_probabilities_are_distinguishable():
    """With 1,000 codes a confident prediction has a few percent: on a scale from 0 to 1 the row would be black."""
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    tokens, permutation = torch.tensor([[1, 2, 3, 4]] * 2), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    logits = torch.zeros(2, 3, 1000)
    logits[0, 0, 2] = 3.0  # the true token of patch 1
    figure = plot_predictions(images, tokens, permutation, logits, torch.zeros(1000, 1, 2, 2), (2, 2))
    row = [axis.images[0] for axis in figure.axes[-2:]]
    likeliest = np.exp(3) / (np.exp(3) + 999)
    for image in row:
        np.testing.assert_allclose(image.get_clim(), (0, likeliest), rtol=1e-5)
    shown = row[0].get_array()
    np.testing.assert_allclose(shown[0, 1], likeliest, rtol=1e-5)
    assert shown.mask.tolist() == [[True, False], [False, False]]  # what was given is not predicted
    assert figure.axes[-2].get_ylabel() == "p(true)\n0 to 0.02"
