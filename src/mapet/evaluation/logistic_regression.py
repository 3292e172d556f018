"""The linear probe: multinomial logistic regression on standardized features, whose C is chosen by cross-validation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger("mapet")
C_CANDIDATES = tuple(10.0**exponent for exponent in range(-4, 7))
"""Values of C, the inverse strength of the L2 penalty, that are compared, in rising order."""
NUM_FOLDS, FEW_PER_CLASS, FEW_C = 5, 20, 0.1
"""Folds of the cross-validation that chooses C; with fewer than `FEW_PER_CLASS` images a class, on average, C is not chosen but `FEW_C`: so
few held-out images choose worse than that."""
FIT_LIMITS, CHOICE_LIMITS = (1000, 1e-10), (100, 1e-7)
"""Where L-BFGS stops, in a fit and in the fits that only choose C: after that many iterations, or once a step decreases the loss by a
smaller fraction."""
DAMPING = 0.01
"""Added to the variances that features are scaled by during the fit, as a fraction of the mean variance."""
MAX_ROTATED = 4096
"""Most dimensions of features that are rotated to their principal axes, which takes time in proportion to the cube."""
MIN_PARALLEL = 20_000_000
"""Products of rows and parameters from which several threads are used: below that, they wait for each other longer than they compute."""
CHUNK_BYTES = 64 << 20
"""Memory of the logits that are computed at once."""


@dataclass(frozen=True)
class LogisticProbe:
    """Multinomial logistic regression on standardized features, as one linear map to K classes.

    Attributes:
        mean, scale: mean and standard deviation of each feature, that features are standardized with.
        weight: (K, D), for standardized features; zero for classes without training images.
        bias: -inf for classes without training images, which are never predicted.
        C: inverse strength of the L2 penalty.
        at_edge: C was chosen and is the smallest or largest of the candidates.
    """

    mean: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    weight: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]
    C: float
    at_edge: bool = False

    def __call__(self, features: Float[Tensor, "n D"]) -> Float[Tensor, "n K"]:
        """Compute the logits of the K classes, on the CPU, from features on any device that are not standardized yet."""
        return (features.cpu() - self.mean) / self.scale @ self.weight.T + self.bias

    @property
    def selected(self) -> str:
        """C, for the tables, e.g. 'C 0.01' or 'C 0.0001 (edge of the grid)'."""
        return f"C {self.C:g}" + " (edge of the grid)" * self.at_edge


def fit_logistic(
    features: Float[Tensor, "n D"], labels: Int[Tensor, " n"], num_classes: int, C: float | None = None,
    scaler: StandardScaler | None = None,
) -> LogisticProbe:  # fmt: skip
    """Fit the linear probe: multinomial logistic regression on standardized features.

    Args:
        features: of the training images, on the CPU.
        labels: class index of each row.
        num_classes: number of classes, K; classes without training images are never predicted.
        C: inverse strength of the L2 penalty, as in scikit-learn. None: chosen among `C_CANDIDATES` by `choose_c`, with a warning if it
            is the smallest or the largest of them; `FEW_C` with fewer than `FEW_PER_CLASS` rows per class, on average.
        scaler: standardizes features; None: one is fitted on `features`. In few-shot evaluation it is fitted on all training images.

    Returns:
        The probe, fitted on all rows, with the C that was used.
    """
    scaler = scaler or StandardScaler().fit(features.numpy())
    mean, scale = (torch.from_numpy(part).float() for part in (scaler.mean_, scaler.scale_))
    classes, targets = labels.unique(return_inverse=True)
    weight, bias = torch.zeros(num_classes, features.shape[1]), torch.full((num_classes,), -torch.inf)
    bias[classes] = 0.0
    at_edge, is_few = False, len(features) < FEW_PER_CLASS * len(classes)
    if len(classes) > 1:
        x, axes = rotate((features - mean) / scale)
        params = torch.zeros(x.shape[1] + 1, 1, len(classes))
        if C is None and not is_few:
            C, params = choose_c(x, targets)
            at_edge = C in (C_CANDIDATES[0], C_CANDIDATES[-1])
        C = C or FEW_C
        params = minimize_loss(x, targets, C, torch.ones(len(x), 1, dtype=torch.bool), params, FIT_LIMITS)
        fitted = params[:-1, 0] if axes is None else axes @ params[:-1, 0]
        weight[classes], bias[classes] = fitted.T, params[-1, 0]
    if at_edge:
        message = "the linear probe's C %g is the %s of its candidates, %g to %g: a better value may lie beyond them"
        log.warning(message, C, "smallest" if C_CANDIDATES[0] == C else "largest", C_CANDIDATES[0], C_CANDIDATES[-1])
    return LogisticProbe(mean, scale, weight, bias, C or FEW_C, at_edge)


def choose_c(x: Float[Tensor, "n R"], targets: Int[Tensor, " n"]) -> tuple[float, Float[Tensor, "R1 1 K"]]:
    """Choose C among `C_CANDIDATES` by stratified cross-validation, always with the same `NUM_FOLDS` folds.

    Args:
        x: features, standardized and rotated; a progress bar is shown if this takes long.
        targets: class index of each row, each of the K classes at least once.

    Returns:
        The smallest C whose mean accuracy over the folds is within one standard error of the best one's, see
        `one_standard_error_rule`; and the mean of its folds' parameters, from which a fit on all rows starts.
    """
    # Shuffled rows, sorted by class and dealt out in turn: the folds' counts of each class differ by at most one.
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    fold = torch.empty_like(order)
    fold[order[targets[order].argsort(stable=True)]] = torch.arange(len(order)) % NUM_FOLDS
    is_test = F.one_hot(fold, NUM_FOLDS).bool()
    params = torch.zeros(x.shape[1] + 1, NUM_FOLDS, int(targets.max()) + 1)
    accuracies, means = [], []
    for C in tqdm(C_CANDIDATES, desc="linear probe, C", leave=False, delay=5, disable=None):
        params = minimize_loss(x, targets, C, ~is_test, params, CHOICE_LIMITS)
        predicted = torch.cat([logits(x[rows], params).argmax(2) for rows in chunks(params, len(x))])  # (n, folds)
        correct = (predicted == targets[:, None]) & is_test
        accuracies.append((correct.sum(0) / is_test.sum(0)).tolist())
        means.append(params.mean(1, keepdim=True))
    chosen = one_standard_error_rule(accuracies)
    return C_CANDIDATES[chosen], means[chosen]


def one_standard_error_rule(scores: Sequence[Sequence[float]]) -> int:
    """Return the index of the first candidate whose mean score is within one standard error of the best candidate's.

    The standard error is the best candidate's, over folds (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section
    7.10). It keeps noise of the scores from choosing a weak penalty.

    Args:
        scores: for each candidate, strongest regularization first, the scores of two or more folds.
    """
    means = np.mean(scores, axis=1)
    best = int(means.argmax())
    error = np.std(scores[best], ddof=1) / len(scores[best]) ** 0.5
    return int(np.flatnonzero(means >= means[best] - error)[0])


def rotate(x: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n R"], Float[Tensor, "D R"] | None]:
    """Rotate features to their principal axes, where L-BFGS needs tens of iterations in place of thousands.

    The L2 penalty and the logits are the same after a rotation, so the result of the fit is, too.

    Returns:
        The rotated rows, R = min(n, D), and the orthonormal axes; beyond `MAX_ROTATED` dimensions `x` itself and None.
    """
    if min(x.shape) > MAX_ROTATED:
        return x, None
    axes = torch.linalg.qr(x.T).Q if len(x) < x.shape[1] else torch.eye(x.shape[1])  # of the space that rows span
    x = x @ axes
    rotation = torch.linalg.eigh(x.T @ x).eigenvectors
    return x @ rotation, axes @ rotation


def chunks(params: Float[Tensor, "R1 S K"], num_rows: int) -> list[slice]:
    """Return slices of rows whose logits by the S classifiers take at most `CHUNK_BYTES` each, as float32."""
    size = max(1, CHUNK_BYTES // (4 * params[0].numel()))
    return [slice(first, first + size) for first in range(0, num_rows, size)]


def logits(x: Float[Tensor, "m R"], params: Float[Tensor, "R1 S K"]) -> Float[Tensor, "m S K"]:
    """Compute the logits of some rows by S classifiers; the last row of `params` is their biases."""
    return torch.addmm(params[-1].flatten(), x, params[:-1].flatten(1)).unflatten(1, params.shape[1:])


def minimize_loss(
    x: Float[Tensor, "n R"], targets: Int[Tensor, " n"], C: float, is_train: Bool[Tensor, "n S"],
    start: Float[Tensor, "R1 S K"], limits: tuple[int, float],
) -> Float[Tensor, "R1 S K"]:  # fmt: skip
    """Fit logistic regression to S subsets of the rows at once, by L-BFGS.

    The loss of a subset of m rows is scikit-learn's: mean cross-entropy + ||weight||^2 / (2 C m), without a penalty on the bias.

    Args:
        x: features of all rows.
        targets: class index of each row, 0 to K - 1.
        C: inverse strength of the L2 penalty.
        is_train: whether a row is in each subset.
        start: weights and, in the last row, biases to start from.
        limits: `FIT_LIMITS` or `CHOICE_LIMITS`.

    Returns:
        Weights and biases, as `start`.
    """
    counts, num_classes = is_train.sum(0), start.shape[2]
    row_weights = is_train / counts
    # scikit-learn has one logit w for two classes; here they are w / 2 and -w / 2, with half the squared norm.
    penalty = (1 / (C * counts) * (2 if num_classes == 2 else 1))[:, None]
    # Parameters are scaled such that the loss is about equally curved along all of them: at zero weights the second derivatives of the
    # cross-entropy are variance / K.
    variances = x.square().mean(0)
    variances = (variances + DAMPING * variances.mean())[:, None] / num_classes + penalty[:, 0]
    scale = torch.cat([variances, torch.full_like(variances[:1], 1 / num_classes)]).rsqrt()[..., None]
    slices = chunks(start, len(x))

    def loss_and_grad(flat: Float[np.ndarray, " p"]) -> tuple[float, Float[np.ndarray, " p"]]:
        params = torch.from_numpy(flat).view_as(start).float() * scale
        loss, grad = float((params[:-1].square() * penalty).sum()) / 2, torch.zeros_like(params)
        for rows in slices:
            log_p, index = logits(x[rows], params).log_softmax(2), targets[rows, None, None].expand(-1, len(counts), 1)
            loss -= float((log_p.gather(2, index)[..., 0] * row_weights[rows]).sum(dtype=torch.float64))
            # The gradient by the logits: probability - 1 for the true class.
            error = log_p.exp_().scatter_add_(2, index, -torch.ones(index.shape)) * row_weights[rows, :, None]
            grad[:-1] += (x[rows].T @ error.flatten(1)).unflatten(1, error.shape[1:])
            grad[-1] += error.sum(0)
        grad[:-1] += params[:-1] * penalty
        return loss, (grad * scale).double().flatten().numpy()

    options = {"maxiter": limits[0], "ftol": limits[1], "gtol": 0.0}
    flat = (start / scale).double().flatten().numpy()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads if len(x) * start.numel() >= MIN_PARALLEL else 1)
    try:
        solution = scipy.optimize.minimize(loss_and_grad, flat, jac=True, method="L-BFGS-B", options=options)
    finally:
        torch.set_num_threads(num_threads)
    return torch.from_numpy(solution.x).view_as(start).float() * scale
