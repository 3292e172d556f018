"""Calibration of a classifier's probabilities on held-out images: temperature scaling (Guo et al. 2017, arXiv 1706.04599)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

MIN_IMAGES = 50
"""Fewer held-out images do not calibrate anything."""
MAX_TEMPERATURE = 20.0
"""Largest temperature; the smallest is one over it."""


class Calibration(NamedTuple):
    """Temperature of a classifier's probabilities, and how much it improves them.

    Attributes:
        temperature: T; calibrated probabilities are softmax(logits / T).
        num_images: number of held-out images.
        nll_before, nll: mean negative log-likelihood of these images' labels, nats, for T = 1 and for this T.
    """

    temperature: float
    num_images: int
    nll_before: float
    nll: float


def fit_temperature(logits: Float[Tensor, "n K"], labels: Int[Tensor, " n"]) -> Calibration | None:
    """Find the temperature T of lowest negative log-likelihood of held-out labels under softmax(logits / T).

    The target of an image is its label less 1 / (n + 2), spread over all classes, as in Laplace's rule of succession: where no image is
    misclassified, T would otherwise be 0, and every probability 1. With many images it changes nothing.

    Args:
        logits: of images that the classifier was not trained on.
        labels: their class indices.

    Returns:
        None for fewer than `MIN_IMAGES` images.
    """
    if len(labels) < MIN_IMAGES:
        return None
    logits = logits.double()

    def loss(log_temperature: float, smoothing: float = 1 / (len(labels) + 2)) -> float:
        """Return the mean negative log-likelihood of the labels, nats."""
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels, label_smoothing=smoothing))

    limit = math.log(MAX_TEMPERATURE)
    best = float(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x)
    return Calibration(math.exp(best), len(labels), loss(0.0, 0.0), loss(best, 0.0))


def probabilities(logits: Float[Tensor, "B K"], temperature: float | None) -> Float[Tensor, "B K"]:
    """Return softmax(logits / temperature) in float64; None stands for a temperature of 1."""
    return torch.softmax(logits.double() / (temperature or 1.0), dim=1)
