"""Metrics of visual tokens: how evenly codes are used, how stable tokens are, and what they tell of position, context and class.

Entropies and mutual information are in bits. Each agreement has the one expected by chance beside it: if one token takes 90 % of
the patches, two patches drawn independently agree 81 % of the time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, log, sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score
from torch import Tensor

from mapet.errors import option
from mapet.evaluation.imbalance import score_classifier
from mapet.evaluation.logistic_regression import fit_logistic

TokenPair = tuple[Int[Tensor, "..."], Int[Tensor, "..."]]
"""Token ids of corresponding patches, two tensors of one shape."""

NUM_SHUFFLES = 20
"""Shuffled pairings that measure the bias of mutual information; its standard deviation is known to a sixth, 1 / sqrt(2 * 19)."""
MIN_STANDARD_ERRORS = 3
"""Standard errors above chance that count as more than chance; by chance alone one in 700 goes so far."""
MAX_DEAD_FRACTION = 0.2
"""Dead codes over codes: with more, over a fifth of the output head is never trained."""
MIN_PERPLEXITY_FRACTION = 0.25
"""Perplexity over K: below a quarter, two of the log2 K bits of each token are lost; K / 4 evenly used codes carry as much."""
MAX_TOP_CODE_FRACTION = 0.5
"""Most frequent token, from 1 / K (even use) to 1 (no other): past the middle the majority baseline scores well."""
MIN_KAPPA_SMALL_CHANGE = 0.5
"""Kappa under changes that are hardly visible: below a half more tokens change than stay, so targets are mostly noise."""
MIN_KAPPA_SHIFT = 0.25
"""Kappa when the window moves: below a quarter a token tells the position of its patch rather than its content."""
MAX_POSITION_FRACTION = 0.5
"""Information on position over the token's entropy: past a half, most of a token can be predicted without the image."""
ROUNDING = 1e-12
"""Allowance for the rounding of sums of float64 fractions."""
MAX_NEIGHBOR_AGREEMENT = 0.9
"""Neighbors with the same token: past nine in ten, copying the token beside solves the task, and little is learned."""
PATCHES_PER_CODE = 5
"""With fewer patches used codes are missed by chance: of evenly used ones exp(-5) = 0.7 %, of rarer ones more."""

PERTURBATIONS = {
    "flip": "mirroring", "shift": "moving the window by whole patches", "jitter": "a slight change of colors",
    "noise": "slight noise", "jpeg": "JPEG compression", "stored": "reading the token store",
}  # fmt: skip
"""Key of `TokenMetrics.stability` -> what was done to the second view."""


@dataclass(frozen=True)
class CodeUsage:
    """How evenly the patches of a sample use the codes.

    Attributes:
        used_codes: codes that at least one patch has.
        dead_codes: codes that no patch has.
        reachable_codes: expected number of used codes if all K were equally frequent among n patches, K (1 - (1 - 1/K)^n).
        entropy: -sum p log2 p, bits per patch; at most log2 K.
        perplexity: 2 to the entropy: as many equally frequent codes are as hard to predict (VQ-VAE, arXiv 1711.00937).
        top_code_fraction: fraction of patches that have the most frequent code.
        codes_for_half, codes_for_most: fraction of the codes, most frequent first, that cover 50 % and 90 % of the patches.
        patches: number of patches in the sample.
    """

    used_codes: int
    dead_codes: int
    reachable_codes: float
    entropy: float
    perplexity: float
    top_code_fraction: float
    codes_for_half: float
    codes_for_most: float
    patches: int


@dataclass(frozen=True)
class Agreement:
    """How often two patches have the same token.

    Attributes:
        fraction: fraction of the pairs with the same token.
        chance: fraction expected if both tokens were drawn independently, sum p_k q_k.
        kappa: (fraction - chance) / (1 - chance): 0 chance, 1 all (Cohen 1960, doi 10.1177/001316446002000104).
    """

    fraction: float
    chance: float
    kappa: float


@dataclass(frozen=True)
class MutualInformation:
    """Mutual information of two properties x and y of a patch, e.g. its token and the class of its image, in bits per patch.

    Attributes:
        bits: mutual information minus `chance`: about 0, or a little below, where x and y are independent.
        chance: bias of the plain estimate, which it gives for shuffled pairings; it grows with the number of codes.
        error: standard error of `bits` where x and y are independent.
        fraction: `bits` over the entropy of y; 1 if x determines y.
    """

    bits: float
    chance: float
    error: float
    fraction: float


@dataclass(frozen=True)
class BagOfTokens:
    """Result of a linear probe on how often each token occurs in an image.

    Attributes:
        accuracy: top-1 accuracy on the test images, 0 to 1.
        balanced_accuracy: mean recall of their classes, which leads where they are imbalanced (`is_imbalanced`); None where they are not.
        chance: of what leads, the balanced accuracy or the accuracy, if always the most frequent class of the test images is predicted.
        error: standard error of what leads, for predictions at chance.
        test_images: number of test images.
    """

    accuracy: float
    balanced_accuracy: float | None
    chance: float
    error: float
    test_images: int


@dataclass(frozen=True)
class TokenMetrics:
    """All metrics of one tokenizer's tokens on a sample of images; `tokenizer_metrics.json` holds these fields.

    Attributes:
        vocab_size: number of codes, K.
        images: number of images in the sample.
        stability: key of `PERTURBATIONS` -> how often tokens of the same content stay the same.
        coherence: 'horizontal', 'vertical' -> how often neighboring patches have the same token.
        neighbor: what a token tells of the neighboring token; None for grids of one patch.
        position: what the position of a patch tells of its token.
        label: what a token tells of the class of its image; None without labels.
        bag_of_tokens: what all tokens of an image tell of its class; None without labels.
    """

    vocab_size: int
    images: int
    usage: CodeUsage
    stability: Mapping[str, Agreement]
    coherence: Mapping[str, Agreement]
    neighbor: MutualInformation | None
    position: MutualInformation
    label: MutualInformation | None = None
    bag_of_tokens: BagOfTokens | None = None


def code_usage(ids: Int[Tensor, "..."], vocab_size: int) -> CodeUsage:
    """Measure how evenly the patches of a sample use the codes of the codebook.

    Args:
        ids: token ids of all patches, of any shape.
        vocab_size: number of codes, K.
    """
    counts = torch.bincount(ids.flatten(), minlength=vocab_size)
    num_patches, num_used = int(counts.sum()), int((counts > 0).sum())
    covered = counts.sort(descending=True).values.double().cumsum(0) / num_patches
    # Number of codes, most frequent first, that cover 50 % and 90 % of the patches.
    fifty_percent, ninety_percent = (
        torch.searchsorted(covered, torch.tensor([0.5, 0.9]).double() - ROUNDING) + 1
    ).tolist()
    bits = float(entropy(counts, base=2))
    return CodeUsage(
        num_used, vocab_size - num_used, reachable_codes=vocab_size * (1 - (1 - 1 / vocab_size) ** num_patches), entropy=bits,
        perplexity=2**bits, top_code_fraction=float(covered[0]), codes_for_half=fifty_percent / vocab_size,
        codes_for_most=ninety_percent / vocab_size, patches=num_patches,
    )  # fmt: skip


def agreement(first: Int[Tensor, "..."], second: Int[Tensor, "..."]) -> Agreement:
    """Measure how often corresponding patches have the same token, and compare it with chance.

    Args:
        first: token ids of patches, of any shape.
        second: token ids of the corresponding patches, of the same shape.

    Returns:
        Fractions, 0 to 1, and kappa; kappa is 1 if both tensors hold one and the same code alone.
    """
    num_codes = int(max(first.max(), second.max())) + 1
    p, q = (torch.bincount(ids.flatten(), minlength=num_codes).double() / ids.numel() for ids in (first, second))
    fraction, chance = float((first == second).double().mean()), float(p @ q)
    # If both tensors hold one and the same code alone, chance is 1 up to rounding, and the formula divides by zero.
    kappa = 1 - (1 - fraction) / (1 - chance) if chance < 1 - ROUNDING else 1.0
    return Agreement(fraction, chance, kappa)


def neighbor_pairs(ids: Int[Tensor, "B rows columns"]) -> dict[str, TokenPair]:
    """Pair the tokens of patches that are neighbors in the grid of an image.

    Returns:
        'horizontal' -> (left, right) tokens, 'vertical' -> (upper, lower) tokens, each two tensors of one shape. A direction in which
        the grid is one patch long is omitted.
    """
    pairs = {"horizontal": (ids[:, :, :-1], ids[:, :, 1:]), "vertical": (ids[:, :-1], ids[:, 1:])}
    return {name: pair for name, pair in pairs.items() if pair[0].numel()}


def mutual_information(x: Int[Tensor, " n"], y: Int[Tensor, " n"], block_length: int = 1) -> MutualInformation:
    """Estimate I(x; y) = H(x) + H(y) - H(x, y) in bits, minus the bias of the plain estimate.

    The plain estimate is biased upwards, by about (K - 1)(C - 1) / 2n nats if n patches are independent (Miller 1955); those of
    one image are not. The mean over shuffled pairings measures the bias without that assumption, as in adjusted mutual
    information (Vinh et al. 2010, JMLR 11). Where x tells much of y and pairs are few, the measured bias is too large, and
    `bits` a lower estimate.

    Args:
        x, y: integers of n patches, e.g. token ids and class indices.
        block_length: values of y that belong together, as the class of all patches of an image: blocks of so many consecutive ones are
            shuffled as wholes. n is a multiple of it.

    Returns:
        Information, its measured bias and standard error, in bits; and the information as a fraction of the entropy of y.
    """
    generator, blocks = torch.Generator().manual_seed(0), y.view(-1, block_length)
    shuffles = (blocks[torch.randperm(len(blocks), generator=generator)].flatten() for _ in range(NUM_SHUFFLES))
    plain = mutual_info_score(x, y) / log(2)  # scikit-learn returns nats
    shuffled = torch.tensor([mutual_info_score(x, other) for other in shuffles], dtype=torch.float64) / log(2)
    chance = float(shuffled.mean())
    error = float(shuffled.std()) * sqrt(1 + 1 / NUM_SHUFFLES)  # of the estimate itself, and of the mean subtracted
    bits = plain - chance
    entropy_of_y = float(entropy(y.unique(return_counts=True)[1], base=2))
    return MutualInformation(bits, chance, error, bits / entropy_of_y if entropy_of_y > 0 else 0.0)


def label_information(ids: Int[Tensor, "B rows columns"], labels: Int[Tensor, " B"]) -> MutualInformation:
    """Estimate the mutual information of the token of a patch and the class of its image, as a fraction of the entropy of the class, too.

    To measure the bias of the estimate, labels are shuffled between images, so that all patches of an image keep one label.

    Args:
        ids: token ids of each image's grid of patches.
        labels: class index of each image.
    """
    num_patches = ids[0].numel()
    return mutual_information(ids.flatten(), labels.repeat_interleave(num_patches), block_length=num_patches)


def position_information(ids: Int[Tensor, "B rows columns"]) -> MutualInformation:
    """Estimate the mutual information of the position of a patch in its image and its token, as a fraction of the token's entropy, too.

    Args:
        ids: token ids of each image's grid of patches; a position is an index in the grid.
    """
    return mutual_information(torch.arange(ids[0].numel()).repeat(len(ids)), ids.flatten())


def neighbor_information(ids: Int[Tensor, "B rows columns"]) -> MutualInformation | None:
    """Estimate the mutual information of the token of a patch and the token to its right or below it; None for a grid of one patch.

    Args:
        ids: token ids of each image's grid of patches. Pairs in both directions are pooled.
    """
    pairs = neighbor_pairs(ids).values()
    if not pairs:
        return None
    x, y = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    return mutual_information(x, y)


def bags_of_tokens(ids: Int[Tensor, "B rows columns"], vocab_size: int) -> Float[Tensor, "B K"]:
    """Compute a bag-of-tokens histogram of each image: the square root of the fraction of its patches that have each of the K tokens.

    The root keeps tokens that fill half an image (sky, black) from dominating: Euclidean distances are then Hellinger distances
    (Arandjelovic and Zisserman 2012, doi 10.1109/CVPR.2012.6248018).

    Args:
        ids: token ids of each image's grid of patches.
        vocab_size: number of codes, K.
    """
    counts = torch.stack([torch.bincount(tokens, minlength=vocab_size) for tokens in ids.flatten(1)])
    return (counts / ids[0].numel()).sqrt()


def bag_of_tokens_probe(
    ids: Int[Tensor, "B rows columns"], labels: Int[Tensor, " B"], is_test: Bool[Tensor, " B"], vocab_size: int
) -> BagOfTokens:
    """Train logistic regression on the histograms of tokens (`bags_of_tokens`) of some images, and test it on the others.

    Args:
        ids: token ids of each image.
        labels: class index of each image.
        is_test: True for test images; the probe is trained on the other images.
        vocab_size: number of codes.

    Returns:
        Accuracy on the test images, also balanced where they are imbalanced, with its chance level. If no token occurs in two training
        images, nothing is fitted, and the most frequent class of the test images is predicted.
    """
    bags = bags_of_tokens(ids, vocab_size)
    # Keep tokens that occur in two or more training images: a token of a single one identifies that image, not its class.
    bags = bags[:, (bags[~is_test] > 0).sum(0) > 1]
    truth, num_classes = labels[is_test], int(labels.max()) + 1
    counts = torch.bincount(truth)
    if bags.shape[1]:
        logits = fit_logistic(bags[~is_test], labels[~is_test], num_classes)(bags[is_test])
    else:
        logits = F.one_hot(counts.argmax(), num_classes).float().expand(len(truth), -1)
    scores = score_classifier(logits, truth)
    counts = counts[counts > 0].double()
    if "balanced_accuracy" in scores:
        chance, effective_count = 1 / len(counts), float(len(counts) ** 2 / counts.reciprocal().sum())
    else:
        chance, effective_count = float(counts.max() / counts.sum()), float(counts.sum())
    error = sqrt(chance * (1 - chance) / effective_count)
    return BagOfTokens(scores["accuracy"], scores.get("balanced_accuracy"), chance, error, len(truth))


def nearest_codes(
    centroids: Float[Tensor, "K F"], codes: Int[Tensor, " n"], num_nearest: int
) -> tuple[Float[Tensor, "n count"], Int[Tensor, "n count"]]:
    """Find for some codes the other codes of the codebook whose centroids are nearest.

    Args:
        centroids: feature vector of each of the K codes.
        codes: the n codes, rows of `centroids`, to find neighbors of; a code is not a neighbor of its own.
        num_nearest: number of neighbors of each; at most K - 1 are returned.

    Returns:
        Euclidean distances and codes, nearest first, each (n, min(num_nearest, K - 1)).
    """
    distances = torch.cdist(centroids[codes].double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances.scatter_(1, codes[:, None], torch.inf)
    nearest = distances.topk(min(num_nearest, len(centroids) - 1), dim=1, largest=False)
    return nearest.values.float(), nearest.indices


def compute_token_metrics(
    ids: Int[Tensor, "B rows columns"], vocab_size: int, perturbed: Mapping[str, TokenPair] = {},
    labels: Int[Tensor, " B"] | None = None, is_test: Bool[Tensor, " B"] | None = None,
) -> TokenMetrics:  # fmt: skip
    """Compute all metrics of the visual tokens of a sample of images.

    Args:
        ids: token ids of each image's grid of patches.
        vocab_size: number of codes.
        perturbed: perturbation, a key of `PERTURBATIONS` -> (token ids of the same content without the perturbation, with it).
        labels: class index of each image; None: the fields `label` and `bag_of_tokens` of the result are None.
        is_test: True for the images that the bag-of-tokens probe is tested on, the others train it; None: `bag_of_tokens` is None.
    """
    label = None if labels is None else label_information(ids, labels)
    bag = None if labels is None or is_test is None else bag_of_tokens_probe(ids, labels, is_test, vocab_size)
    stability = {name: agreement(*pair) for name, pair in perturbed.items()}
    coherence = {name: agreement(*pair) for name, pair in neighbor_pairs(ids).items()}
    information = neighbor_information(ids), position_information(ids), label
    return TokenMetrics(vocab_size, len(ids), code_usage(ids, vocab_size), stability, coherence, *information, bag)


def token_warnings(metrics: TokenMetrics) -> Iterator[str]:
    """Yield a warning for each metric of a tokenizer that makes its tokens poor targets, with the value and what to change.

    In order: too few patches for these metrics; dead codes; low perplexity; one code that most patches have, or a vocabulary of one; for each
    perturbation of `metrics.stability`, tokens that change under jitter, noise, JPEG or a shift, or stored tokens that differ from
    computed ones; tokens that follow from the position; neighbors with equal tokens; tokens that tell nothing of their neighbors; tokens
    that tell nothing of the class. There is no threshold for 'flip'. Thresholds are the constants of this module, such as
    `MAX_DEAD_FRACTION`, each explained there. Nothing is yielded if all metrics are good.

    Args:
        metrics: of the tokens of a sample of images, as `compute_token_metrics` returns them.
    """
    yield from _usage_warnings(metrics)
    yield from _stability_warnings(metrics)
    yield from _information_warnings(metrics)


def _usage_warnings(metrics: TokenMetrics) -> Iterator[str]:
    """Yield the warnings of `token_warnings` about how often codes are used."""
    usage, K = metrics.usage, metrics.vocab_size
    if usage.patches < PATCHES_PER_CODE * K:
        # Number of images that have PATCHES_PER_CODE patches for each code.
        enough = option("sample", ceil(PATCHES_PER_CODE * K * metrics.images / usage.patches))
        yield f"only {usage.patches:,} patches for {K:,} codes: dead codes and perplexity are rough estimates; measure more images with {enough}"
    if usage.used_codes < (1 - MAX_DEAD_FRACTION) * usage.reachable_codes:
        expected = f"{K - usage.reachable_codes:,.0f}"
        yield f"{usage.dead_codes:,} of {K:,} codes are dead ({expected} with even use): fit fewer codes, or use more varied images"
    if usage.perplexity < MIN_PERPLEXITY_FRACTION * usage.reachable_codes:
        yield f"perplexity {usage.perplexity:.1f} with {K:,} codes: a few tokens take most patches; fit fewer codes, or use more varied images"
    top = usage.top_code_fraction
    if top > 1 / K + MAX_TOP_CODE_FRACTION * (1 - 1 / K) or K == 1:  # halfway between even use, 1 / K, and 1
        yield f"one token takes {top:.0%} of the patches: always predicting it scores well; crop even borders, or use more varied images"


def _stability_warnings(metrics: TokenMetrics) -> Iterator[str]:
    """Yield the warnings of `token_warnings` about tokens that change under perturbations, or differ from stored ones."""
    for name, pair in metrics.stability.items():
        changed, change = f"{1 - pair.fraction:.0%}", PERTURBATIONS[name]
        if name == "stored" and pair.fraction < 1:
            yield (
                f"{1 - pair.fraction:.1%} of the stored tokens differ from those of their images (chance: {1 - pair.chance:.1%}): the "
                "store belongs to other images or another tokenizer; run `mapet tokenize` again"
            )
        elif name in ("jitter", "noise", "jpeg") and pair.kappa < MIN_KAPPA_SMALL_CHANGE:
            yield f"{changed} of the tokens change under {change}, hardly visible: targets are mostly noise; try fewer codes or another teacher"
        elif name == "shift" and pair.kappa < MIN_KAPPA_SHIFT:
            yield f"{changed} of the tokens change under {change}: they tell the position rather than the content; try another teacher"


def _information_warnings(metrics: TokenMetrics) -> Iterator[str]:
    """Yield the warnings of `token_warnings` about what a token tells of its position, its neighbors and the class of its image.

    Args:
        metrics: see `token_warnings`.
    """
    usage, position, bag = metrics.usage, metrics.position.fraction, metrics.bag_of_tokens
    if position > MAX_POSITION_FRACTION:
        yield f"position alone tells {position:.0%} of a token: much of the task needs no image; tokenize random crops, or try another teacher"
    neighbors_agree = min((pair.fraction for pair in metrics.coherence.values()), default=0.0)
    if neighbors_agree > MAX_NEIGHBOR_AGREEMENT:
        yield f"{neighbors_agree:.0%} of neighboring patches share their token: copying nearly solves the task; fit more codes, or use larger patches"
    neighbor, label = metrics.neighbor, metrics.label
    if neighbor is not None and usage.used_codes > 1 and neighbor.bits <= MIN_STANDARD_ERRORS * neighbor.error:
        yield f"a token tells {neighbor.bits:.2f} bits of its neighbor, not above chance: check the order of tokens, or try another teacher"
    if label is not None and label.bits <= MIN_STANDARD_ERRORS * label.error:
        yield f"a token tells {label.bits:.2f} bits of its image's class, not above chance: check that labels fit the images, or try another teacher"
    if bag is not None:
        metric, score = "accuracy", bag.accuracy
        if bag.balanced_accuracy is not None:
            metric, score = "balanced accuracy", bag.balanced_accuracy
        if score < bag.chance + MIN_STANDARD_ERRORS * bag.error:
            scores = f"{metric} {score:.1%}, majority baseline {bag.chance:.1%}, {bag.test_images} test images"
            yield f"all tokens of an image tell its class no better than chance ({scores}): measure more images, or try another teacher"
