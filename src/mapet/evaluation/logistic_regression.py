"""The linear probe: multinomial logistic regression on standardized features, whose C is chosen by cross-validation."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Bool, Float, Int
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger("mapet")
C_CANDIDATES = tuple(10.0**exponent for exponent in range(-6, 9))
"""Values of C, the inverse strength of the L2 penalty, that are compared, in rising order."""
NUM_FOLDS, FEW_PER_CLASS, FEW_C = 5, 20, 0.1
"""C is chosen by cross-validation with `NUM_FOLDS` folds. With fewer than `FEW_PER_CLASS` training images per class on average it is `FEW_C`
instead, which is better than what so few held-out images choose."""
FIT_LIMITS, CHOICE_LIMITS = (1000, 1e-10), (100, 1e-7)
"""When L-BFGS stops, (iterations, relative decrease of the loss in a step): after so many iterations, or after a step with a smaller decrease.
`CHOICE_LIMITS` are for the fits of the cross-validation that chooses C, `FIT_LIMITS` for the final fit."""
DAMPING = 0.01
"""Fraction of the features' mean variance that is added to each variance where `minimize_loss` scales parameters by them: features of
hardly any variance would be scaled too much."""
MAX_ROTATED = 4096
"""Features are rotated to their principal axes if the smaller of their number and their dimension is at most this: the time grows with its
cube."""
MIN_PARALLEL = 20_000_000
"""Rows times parameters from which L-BFGS uses several threads: below, threads wait for each other longer than they compute."""
CHUNK_BYTES = 64 << 20
"""Bytes of the logits that are computed at once, see `chunks`."""


@dataclass(frozen=True)
class LogisticProbe:
    """Multinomial logistic regression on standardized features, as one linear map to K classes.

    Attributes:
        mean, scale: mean and standard deviation of each of the D features, by which features are standardized.
        weight: (K, D), for standardized features; zero for classes without training images.
        bias: -inf for classes without training images, which are never predicted.
        C: inverse strength of the L2 penalty.
    """

    mean: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    weight: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]
    C: float

    def __call__(self, features: Float[Tensor, "n D"]) -> Float[Tensor, "n K"]:
        """Compute the logits of the K classes, on the CPU, from features on any device that are not standardized yet."""
        return (features.cpu() - self.mean) / self.scale @ self.weight.T + self.bias

    @property
    def at_edge(self) -> bool:
        """Return whether C is the smallest or largest of `C_CANDIDATES`."""
        return self.C in (C_CANDIDATES[0], C_CANDIDATES[-1])

    @property
    def selected(self) -> str:
        """Return the selected C for tables of results, e.g. 'C 0.01' or 'C 1e-06 (edge of the grid)'."""
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
        scaler: fitted scaler whose mean and scale standardize features; None: those of `features`. Few-shot evaluation gives that of all
            training images, of which `features` are a part.

    Returns:
        The probe, fitted on all rows, with the C that was used. If all rows have one class, it always predicts that class.
    """
    scaler = scaler or StandardScaler().fit(features.numpy())
    mean, scale = (torch.from_numpy(part).float() for part in (scaler.mean_, scaler.scale_))
    classes, targets = labels.unique(return_inverse=True)
    weight, bias = torch.zeros(num_classes, features.shape[1]), torch.full((num_classes,), -torch.inf)
    bias[classes] = 0.0
    if len(classes) > 1:
        x, axes = rotate((features - mean) / scale)
        params = torch.zeros(x.shape[1] + 1, 1, len(classes))
        if C is None and len(features) >= FEW_PER_CLASS * len(classes):
            C, params = choose_c(x, targets)
        C = C or FEW_C
        params = minimize_loss(x, targets, C, torch.ones(len(x), 1, dtype=torch.bool), params, FIT_LIMITS)
        coefficients = params[:-1, 0] if axes is None else axes @ params[:-1, 0]
        weight[classes], bias[classes] = coefficients.T, params[-1, 0]
    probe = LogisticProbe(mean, scale, weight, bias, C or FEW_C)
    warn_at_edge("the linear probe's C", probe.C, C_CANDIDATES)
    return probe


def warn_at_edge(name: str, value: float, candidates: Sequence[float]) -> None:
    """Log a warning if a hyperparameter, called `name` in it, was chosen at an edge of its candidates, which are in ascending order."""
    if value in (candidates[0], candidates[-1]):
        message = "%s %g is the %s of its candidates, %g to %g: a better value may lie beyond them"
        edge = "smallest" if value == candidates[0] else "largest"
        log.warning(message, name, value, edge, candidates[0], candidates[-1])


def choose_c(x: Float[Tensor, "n R"], targets: Int[Tensor, " n"]) -> tuple[float, Float[Tensor, "R1 1 K"]]:
    """Choose C among `C_CANDIDATES` by cross-validation with `NUM_FOLDS` folds of scikit-learn's StratifiedKFold, always the same ones.

    The classifiers of all folds are fitted at once for each C, and start from the parameters of the C before. A progress bar is shown
    if this takes longer than 5 s.

    Args:
        x: features of all rows, standardized and rotated (`rotate`).
        targets: class index of each row, 0 to K - 1, each class at least once.

    Returns:
        (the smallest C whose mean accuracy over the folds is within one standard error of the best one's, see
        `one_standard_error_rule`; the mean over the folds of the parameters fitted with this C, from which a fit on all rows can start,
        R + 1 rows as in `minimize_loss`)
    """
    is_test = torch.zeros(len(targets), NUM_FOLDS, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class of fewer rows than folds, which some folds then lack
        for fold, (_, rows) in enumerate(StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0).split(x, targets)):
            is_test[rows, fold] = True
    params = torch.zeros(x.shape[1] + 1, NUM_FOLDS, int(targets.max()) + 1)
    accuracies, means = [], []
    for C in tqdm(C_CANDIDATES, desc="linear probe, C", leave=False, delay=5, disable=None):
        params = minimize_loss(x, targets, C, ~is_test, params, CHOICE_LIMITS)
        predicted = torch.cat([logits(x[rows], params).argmax(2) for rows in chunks(params, len(x))])  # (n, folds)
        correct = (predicted == targets[:, None]) & is_test
        accuracies.append((correct.sum(0) / is_test.sum(0)).tolist())
        means.append(params.mean(1, keepdim=True))
    best = one_standard_error_rule(accuracies)
    return C_CANDIDATES[best], means[best]


def one_standard_error_rule(scores: Sequence[Sequence[float]]) -> int:
    """Return the index of the first candidate whose mean score is within one standard error of the best candidate's.

    The standard error is that of the best candidate's mean over folds (Hastie, Tibshirani and Friedman, The Elements of Statistical
    Learning, section 7.10). Without this rule noise of the scores may choose too weak a penalty.

    Args:
        scores: for each candidate, strongest regularization first, the scores of two or more folds.
    """
    means = np.mean(scores, axis=1)
    best = int(means.argmax())
    error = np.std(scores[best], ddof=1) / len(scores[best]) ** 0.5
    return int(np.flatnonzero(means >= means[best] - error)[0])


def rotate(x: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n R"], Float[Tensor, "D R"] | None]:
    """Rotate features to their principal axes, where L-BFGS needs tens of iterations instead of thousands.

    The L2 penalty and the logits are the same after a rotation, so the classifier that is fitted is the same, too.

    Args:
        x: standardized features. With n < D their rows span at most n dimensions; the others, in which all are 0, are dropped.

    Returns:
        (the rotated rows, x @ axes; the axes, orthonormal columns), with R = min(n, D). If R exceeds `MAX_ROTATED`: (`x`, None), R = D.
    """
    if min(x.shape) > MAX_ROTATED:
        return x, None
    axes = torch.linalg.qr(x.T).Q if len(x) < x.shape[1] else torch.eye(x.shape[1])  # a basis of the span of the rows
    x = x @ axes
    rotation = torch.linalg.eigh(x.T @ x).eigenvectors
    return x @ rotation, axes @ rotation


def chunks(params: Float[Tensor, "R1 S K"], num_rows: int) -> list[slice]:
    """Divide the row indices 0 to `num_rows` - 1 into slices, whose logits by S classifiers take at most `CHUNK_BYTES` each in float32.

    Args:
        params: see `minimize_loss`; only its shape is used.
        num_rows: number of rows of features.
    """
    size = max(1, CHUNK_BYTES // (4 * params[0].numel()))
    return [slice(first, first + size) for first in range(0, num_rows, size)]


def logits(x: Float[Tensor, "m R"], params: Float[Tensor, "R1 S K"]) -> Float[Tensor, "m S K"]:
    """Compute the logits of m rows of R features by S classifiers of K classes.

    Args:
        x: features.
        params: R rows of weights, then a row of biases.
    """
    return torch.addmm(params[-1].flatten(), x, params[:-1].flatten(1)).unflatten(1, params.shape[1:])


def minimize_loss(
    x: Float[Tensor, "n R"], targets: Int[Tensor, " n"], C: float, is_train: Bool[Tensor, "n S"],
    start: Float[Tensor, "R1 S K"], limits: tuple[int, float],
) -> Float[Tensor, "R1 S K"]:  # fmt: skip
    """Fit a logistic regression to each of S subsets of the rows, all at once, by L-BFGS.

    The loss of a subset of m rows is scikit-learn's: mean cross-entropy + ||weight||^2 / (2 C m), without a penalty on the bias. The sum
    of the S losses is minimized, whose minimum is that of each.

    Args:
        x: R features of each of n rows.
        targets: class index of each row, 0 to K - 1.
        C: inverse strength of the L2 penalty.
        is_train: whether each row is in each subset.
        start: parameters to start from, for each subset and class: R rows of weights, then a row of biases (R1 = R + 1).
        limits: when to stop: `FIT_LIMITS` or `CHOICE_LIMITS`.

    Returns:
        The fitted parameters, of the shape of `start`.
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
        """Return the sum of the losses at the flattened parameters / `scale`, and its gradient, for `scipy.optimize.minimize`."""
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
