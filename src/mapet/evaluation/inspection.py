"""What tokenizer and model make of a sample of images.

Are these tokens any good? Measures of token ids, as they are and under changes that leave what the patches show the same.

Entropies and information are in bits. Chance is always given beside a share, for a share alone says little: if one word
takes 90 % of the patches, two patches drawn blindly agree 81 % of the time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, log, sqrt
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvf
from jaxtyping import Float, Int, UInt8
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.data.dataset import Batch, UnreadableImages, ViewDataset, inference_batch_size, readable_batches
from mapet.data.image_list import ImageList
from mapet.data.token_store import TokenStore
from mapet.data.views import PermutationKind, ViewSpec, color_jitter, normalize, render_view, sample_view
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.evaluation.datasets import LabeledSet, labeled, split, unlabeled
from mapet.evaluation.features import MAX_UNREADABLE, check_finite_features
from mapet.evaluation.probes import MAX_TEST, MAX_TRAIN, ONLINE_C, extract_sample, fit_logistic, nearest_neighbors
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.tokenizer import Tokenizer

SHUFFLES = 20
"""Shuffled copies that tell what information chance alone would show; their spread is known to a sixth (1 / sqrt 38)."""
ERRORS = 3
"""Standard errors above chance that count as more than chance; by chance alone one in 700 goes so far."""

DEAD_SHARE = 0.2
"""Dead codes: a fifth of the output head is never trained, and the vocabulary is a fifth larger than it says."""
PERPLEXITY_SHARE = 0.25
"""Perplexity over K: below a quarter, two bits of each patch's log2 K are lost; K / 4 even words would say as much."""
MAX_TOP_CODE_FRACTION = 0.5
"""Commonest word, from 1 / K (even) to 1 (no other): past the middle, a model that always guesses it scores well."""
TINY_CHANGE = 0.5
"""Kappa under changes that a person hardly sees: below a half more words change than stay, so targets are mostly noise."""
SHIFT = 0.25
"""Kappa when the window moves: below a quarter a word names where the patch stands in the image, hardly what it shows."""
POSITION_SHARE = 0.5
"""Information on position over the word's entropy: past a half, most of a word could be had without looking."""
COPYING = 0.9
"""Share of neighbors that agree: past nine in ten, copying the patch beside solves the task, and little is learned."""
PATCHES_PER_CODE = 5
"""Below that, rare words are missing by chance: of words used evenly exp(-5), 0.7 %, aren't seen; of rarer ones more."""

JITTER, NOISE, JPEG_QUALITY = 0.1, 2.0, 75
"""Changes of brightness, contrast and saturation, up to a tenth; standard deviation of the noise, of 255 gray levels: that of a
good camera in good light; libjpeg's own default."""
CHANGES = {
    "flip": "mirroring", "shift": "moving the window by whole patches", "jitter": "a slight change of colors",
    "noise": "slight noise", "jpeg": "JPEG compression", "stored": "reading the token store",
}  # fmt: skip
"""Name of a pair of views -> what was done to the second."""

MAX_IMAGES, PATCHES_SHOWN = 2000, 60
"""Images whose patches show what tokens mean: at most, and enough for about 60 patches of each code."""
NUM_QUERIES, NUM_NEAREST = 6, 7
"""Held-out images whose nearest ones are shown, and how many of each."""
Titled = tuple[UInt8[Tensor, "C H W"], str]
"""Pixels of a centered view, and the name of the image."""


@dataclass(frozen=True)
class Usage:
    """How evenly the codes are used, in a sample.

    Attributes:
        used_codes: codes that at least one patch has.
        dead_codes: codes that none has.
        reachable_codes: codes that so many patches would show if all were equally common, K (1 - (1 - 1/K)^n).
        entropy: -sum p log2 p, bits a patch; at most log2 K.
        perplexity: 2 to the entropy: as many equally common codes would be as hard to guess (VQ-VAE, arXiv 1711.00937).
        top_code_fraction: share of patches that have the commonest code.
        codes_for_half, codes_for_most: share of the codes, commonest first, that cover 50 % and 90 % of the patches.
        patches: how many patches it was measured on.
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
    """How often two patches have the same word.

    Attributes:
        share: of the pairs.
        chance: share expected if both were drawn independently, sum p_k q_k (sum p_k^2 where both use words alike).
        kappa: (share - chance) / (1 - chance): 0 chance, 1 all (Cohen 1960, doi 10.1177/001316446002000104).
    """

    share: float
    chance: float
    kappa: float


@dataclass(frozen=True)
class MutualInformation:
    """What one thing says about another, bits a patch.

    Attributes:
        bits: mutual information less `chance`, so that it is about 0 (or a little below) where they are independent.
        chance: what the plain estimate gives when the pairing is shuffled: its bias, which grows with K.
        error: standard error of `bits` if there is nothing to be said.
        share: `bits` over the entropy of the other; 1 if it says all of it.
    """

    bits: float
    chance: float
    error: float
    share: float


@dataclass(frozen=True)
class BagOfTokens:
    """Linear probe on how often each word comes in an image.

    Attributes:
        accuracy: on the test images.
        chance: of always guessing the commonest class of the test images.
        test_images: how many.
    """

    accuracy: float
    chance: float
    test_images: int


@dataclass(frozen=True)
class TokenMetrics:
    """Everything measured of one tokenizer's words.

    Attributes:
        vocab_size: K.
        images: in the sample.
        stability: change of view -> how often the word of the same content stays the same.
        coherence: 'horizontal', 'vertical' -> how often neighboring patches have the same word.
        neighbor: what a patch's word says about its neighbor's.
        position: what a patch's place in the image says about its word.
        label: what a patch's word says about the image's class; None without labels.
        bag_of_tokens: what all words of an image say about its class; None without labels.
    """

    vocab_size: int
    images: int
    usage: Usage
    stability: Mapping[str, Agreement]
    coherence: Mapping[str, Agreement]
    neighbor: MutualInformation | None
    position: MutualInformation
    label: MutualInformation | None = None
    bag_of_tokens: BagOfTokens | None = None


def usage(ids: Int[Tensor, "..."], vocab_size: int) -> Usage:
    """How evenly the codes are used."""
    counts = torch.bincount(ids.flatten(), minlength=vocab_size)
    total, used = int(counts.sum()), int((counts > 0).sum())
    covered = counts.sort(descending=True).values.double().cumsum(0) / total
    bits = float(entropy(counts, base=2))
    half, most = (int((covered < share - 1e-12).sum()) + 1 for share in (0.5, 0.9))
    reachable = vocab_size * (1 - (1 - 1 / vocab_size) ** total)
    top = float(covered[0])
    return Usage(used, vocab_size - used, reachable, bits, 2**bits, top, half / vocab_size, most / vocab_size, total)


def agreement(first: Int[Tensor, "..."], second: Int[Tensor, "..."]) -> Agreement:
    """How often the words of corresponding patches are the same."""
    size = int(max(first.max(), second.max())) + 1
    p, q = (torch.bincount(ids.flatten(), minlength=size).double() / ids.numel() for ids in (first, second))
    share, chance = float((first == second).double().mean()), float(p @ q)
    return Agreement(share, chance, 1 - (1 - share) / (1 - chance) if chance < 1 - 1e-12 else 1.0)


def neighbors(ids: Int[Tensor, "B rows columns"]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of patches side by side and one above the other; a grid of one column or row has no such pairs."""
    pairs = {"horizontal": (ids[:, :, :-1], ids[:, :, 1:]), "vertical": (ids[:, :-1], ids[:, 1:])}
    return {name: pair for name, pair in pairs.items() if pair[0].numel()}


def mutual_information(x: Int[Tensor, " n"], y: Int[Tensor, " n"], together: int = 1) -> MutualInformation:
    """I(x; y) = H(x) + H(y) - H(x, y) in bits, its bias taken off.

    The plain estimate is biased upwards, by about (K - 1)(C - 1) / 2n nats if n patches are independent (Miller 1955), as
    those of one image are not. What it gives for shuffled pairings measures the bias without that assumption, as the
    adjusted mutual information does (Vinh et al. 2010, JMLR 11). It takes off too much where x says a lot and
    pairs are few for the number of tokens, so that `bits` is then a lower estimate.

    Args:
        together: so many of y in a row are shuffled as one.
    """
    generator, groups = torch.Generator().manual_seed(0), y.view(-1, together)
    shuffled = (groups[torch.randperm(len(groups), generator=generator)].flatten() for _ in range(SHUFFLES))
    plain = torch.tensor([mutual_info_score(x, other) for other in (y, *shuffled)], dtype=torch.float64) / log(2)
    chance, error = float(plain[1:].mean()), float(plain[1:].std()) * sqrt(1 + 1 / SHUFFLES)
    bits, bits_of_y = float(plain[0]) - chance, float(entropy(y.unique(return_counts=True)[1], base=2))
    return MutualInformation(bits, chance, error, bits / bits_of_y if bits_of_y > 0 else 0.0)


def label_information(ids: Int[Tensor, "B rows columns"], labels: Int[Tensor, " B"]) -> MutualInformation:
    """Measure what a token says about the class of its image. Labels are shuffled over whole images."""
    patches = ids[0].numel()
    return mutual_information(ids.flatten(), labels.repeat_interleave(patches), together=patches)


def position_information(ids: Int[Tensor, "B rows columns"]) -> MutualInformation:
    """Measure what a patch's position in the image says about its token."""
    return mutual_information(torch.arange(ids[0].numel()).repeat(len(ids)), ids.flatten())


def neighbor_information(ids: Int[Tensor, "B rows columns"]) -> MutualInformation | None:
    """Measure what a token says about the token beside or below it; None for a single patch."""
    pairs = neighbors(ids).values()
    if not pairs:
        return None
    x, y = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    return mutual_information(x, y)


def bags_of_tokens(ids: Int[Tensor, "B rows columns"], vocab_size: int) -> Float[Tensor, "B K"]:
    """Square roots of the share of an image's patches that each word takes.

    The root keeps words that fill half an image (sky, black) from drowning the others: distances are then Hellinger's
    (Arandjelovic and Zisserman 2012, doi 10.1109/CVPR.2012.6248018).
    """
    counts = torch.stack([torch.bincount(tokens, minlength=vocab_size) for tokens in ids.flatten(1)])
    return (counts / ids[0].numel()).sqrt()


def bag_of_tokens(
    ids: Int[Tensor, "B rows columns"], labels: Int[Tensor, " B"], test: Tensor, vocab_size: int
) -> BagOfTokens:
    """Linear probe on bags of tokens.

    Args:
        test: (B,) bool, the images to test on; the others are trained on.
    """
    bags = bags_of_tokens(ids, vocab_size)
    # A word of one training image tells that image, not its class; one of none would be divided by a spread of nought.
    bags = bags[:, (bags[~test] > 0).sum(0) > 1]
    chance = float(torch.bincount(labels[test]).max() / test.sum())
    if not bags.shape[1]:
        return BagOfTokens(chance, chance, int(test.sum()))
    predicted = fit_logistic(bags[~test], labels[~test], int(labels.max()) + 1)(bags[test]).argmax(1)
    return BagOfTokens(float((predicted == labels[test]).double().mean()), chance, int(test.sum()))


def nearest_codes(
    centroids: Float[Tensor, "K F"], codes: Int[Tensor, " n"], count: int
) -> tuple[Float[Tensor, "n count"], Int[Tensor, "n count"]]:
    """Distances and numbers of the `count` other codes (fewer if there are fewer) whose centroids are nearest."""
    distances = torch.cdist(centroids[codes].double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances.scatter_(1, codes[:, None], torch.inf)
    found = distances.topk(min(count, len(centroids) - 1), dim=1, largest=False)
    return found.values.float(), found.indices


def measure(
    ids: Int[Tensor, "B rows columns"], vocab_size: int, views: Mapping[str, tuple[Tensor, Tensor]] = {},
    labels: Int[Tensor, " B"] | None = None, test: Tensor | None = None,
) -> TokenMetrics:  # fmt: skip
    """Everything.

    Args:
        views: change of view -> words of the same content, without it and with it.
        labels: class of each image, with `test`: (B,) bool, the images that the bag-of-tokens probe is tested on.
    """
    stability, coherence = (
        {name: agreement(*pair) for name, pair in pairs.items()} for pairs in (views, neighbors(ids))
    )
    label = None if labels is None else label_information(ids, labels)
    bag = None if labels is None or test is None else bag_of_tokens(ids, labels, test, vocab_size)
    about = neighbor_information(ids), position_information(ids), label
    return TokenMetrics(vocab_size, len(ids), usage(ids, vocab_size), stability, coherence, *about, bag)


def warnings(m: TokenMetrics) -> Iterator[str]:
    """Say what is poor, in plain sentences; nothing for tokens that look fit to learn from."""
    use, K, bag = m.usage, m.vocab_size, m.bag_of_tokens
    if use.patches < PATCHES_PER_CODE * K:
        enough = option("sample", -(-PATCHES_PER_CODE * K * m.images // use.patches))
        yield f"only {use.patches:,} patches for {K:,} codes: dead codes and perplexity are rough; {enough} tells more"
    if use.used_codes < (1 - DEAD_SHARE) * use.reachable_codes:
        even = f"{K - use.reachable_codes:,.0f}"
        yield f"{use.dead_codes:,} of {K:,} codes are dead ({even} would be by even use): fit fewer codes, or to more varied images"
    if use.perplexity < PERPLEXITY_SHARE * use.reachable_codes:
        yield f"perplexity {use.perplexity:.1f} of {K:,}: a few tokens take most patches, and as many even ones would say as much"
    if use.top_code_fraction > 1 / K + MAX_TOP_CODE_FRACTION * (1 - 1 / K) or K == 1:
        yield f"one token takes {use.top_code_fraction:.0%} of the patches: always guessing it is already a good prediction"
    for name, view in m.stability.items():
        share = f"{1 - view.share:.0%}"
        if name == "stored" and view.share < 1:
            yield (
                f"{1 - view.share:.1%} of the stored tokens are not those of their images (chance: {1 - view.chance:.1%}): "
                "the store belongs to other images or another tokenizer; tokenize again"
            )
        elif name in ("jitter", "noise", "jpeg") and view.kappa < TINY_CHANGE:
            yield f"{share} of the tokens change under {CHANGES[name]}, hardly visible: targets are mostly noise; try fewer codes or another teacher"
        elif name == "shift" and view.kappa < SHIFT:
            yield f"{share} of the tokens change as the window moves by whole patches: they name the place, hardly what is there"
    if m.position.share > POSITION_SHARE:
        yield f"position alone tells {m.position.share:.0%} of a token: much of the task can be done without looking"
    agreeing = min((pair.share for pair in m.coherence.values()), default=0.0)
    if agreeing > COPYING:
        yield f"{agreeing:.0%} of neighboring patches share their token: copying the patch beside nearly solves the task"
    if m.neighbor is not None and use.used_codes > 1 and m.neighbor.bits <= ERRORS * m.neighbor.error:
        yield "a token says nothing of the tokens beside it: nothing can be predicted from context (are tokens mixed up?)"
    if m.label is not None and m.label.bits <= ERRORS * m.label.error:
        yield "a token says nothing of the class of its image (are tokens paired with the wrong images?)"
    if bag and bag.accuracy < bag.chance + ERRORS * sqrt(bag.chance * (1 - bag.chance) / bag.test_images):
        found = f"{bag.accuracy:.1%}, majority baseline {bag.chance:.1%}, {bag.test_images} test images"
        yield f"from all tokens of an image its class is told no better than by chance ({found})"


# ---- tokens of images


class Words(NamedTuple):
    """Words of the centered views of a sample.

    Attributes:
        image_index: of each image that could be read, in the list.
        images: the first of them, at the student's size.
    """

    image_index: Int[Tensor, " n"]
    ids: Int[Tensor, "n rows columns"]
    images: UInt8[Tensor, "m C H W"]


class Sampler:
    """Runs a tokenizer over images.

    Args:
        tokenizer: with its teacher, on `compute.device`.
    """

    def __init__(self, tokenizer: Tokenizer, compute: ComputeContext) -> None:
        assert tokenizer.teacher is not None, "loaded without its teacher"
        self.tokenizer, self.compute = tokenizer, compute
        self.channels: int = tokenizer.description["teacher"]["channels"]
        self.teacher_size = tokenizer.teacher.image_size
        self.size: tuple[int, int] = tokenizer.student_size

    def words(self, images: ImageList, shown: int) -> Words:
        """Words of all images, and the pixels of the first `shown`.

        Raises:
            MapetError: more than half of the images cannot be read.
        """
        dataset = ViewDataset(images, ViewSpec(image_size=self.size), self.channels, self.size, self.teacher_size)
        parts = []
        for batch in self._batches(dataset, range(len(images)), "words"):
            assert batch.images is not None
            parts.append((batch.image_index, self._ids(batch.teacher_images), batch.images[: max(0, shown)]))
            shown -= len(batch)
        return Words(*map(torch.cat, zip(*parts, strict=True)))

    def views(self, images: ImageList) -> dict[str, tuple[Tensor, Tensor]]:
        """Change of view -> words of the same content, without it and with it; see `CHANGES`.

        The shift is by whole patches that are whole pixels of the teacher's view, diagonally, between two windows of one
        larger rendering: nothing is padded. Where only the whole grid is whole pixels, and for JPEG with neither 1 nor 3
        channels, that view is left out.
        """
        (height, width), (rows, columns) = self.teacher_size, self.tokenizer.grid
        down, right = rows // gcd(rows, height), columns // gcd(columns, width)  # patches
        below, beside = height // gcd(rows, height), width // gcd(columns, width)  # pixels
        larger = (height + below, width + beside) if down < rows and right < columns else None
        spec = ViewSpec(image_size=self.size)
        dataset = ViewDataset(images, spec, self.channels, larger, self.teacher_size, jitter=JITTER)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for batch in self._batches(dataset, range(len(images)), "changed views"):
            assert batch.teacher_images is not None and batch.jitter is not None
            view = batch.teacher_images.contiguous()
            words = self._ids(view)
            pairs = {
                "flip": (words.flip(-1), self._ids(view.flip(-1))),
                "jitter": (words, self._ids(_bytes(color_jitter(view.float(), batch.jitter)))),
                "noise": (words, self._ids(_bytes(view + self._noise(images, batch)))),
            }
            if self.channels in (1, 3):
                pairs["jpeg"] = words, self._ids(tvf.jpeg(view, JPEG_QUALITY))
            if batch.images is not None:
                here = self._ids(batch.images[..., :height, :width])[:, down:, right:]
                there = self._ids(batch.images[..., below:, beside:])[:, : rows - down, : columns - right]
                pairs["shift"] = here, there
            for name, pair in pairs.items():
                found.setdefault(name, []).append(pair)
        return {name: _joined(pairs) for name, pairs in found.items()}

    def stored(self, images: ImageList, store: TokenStore, chosen: Int[np.ndarray, " n"]) -> tuple[Tensor, Tensor]:
        """Words of the chosen images' first views: those in the store, and those they have now."""
        dataset = ViewDataset(images, store.view_spec, self.channels, teacher_size=self.teacher_size)
        pairs = []
        for batch in self._batches(dataset, chosen.tolist(), "stored words"):
            ids = np.stack([store.read(int(index), 0) for index in batch.image_index])
            pairs.append((torch.from_numpy(ids).long(), self._ids(batch.teacher_images).flatten(1)))
        return _joined(pairs)

    def _batches(self, dataset: ViewDataset, indices: Sequence[int], title: str) -> Iterator[Batch]:
        size = inference_batch_size(self.teacher_size)
        batches = [[(0, i) for i in indices[start : start + size]] for start in range(0, len(indices), size)]
        return readable_batches(dataset, batches, UnreadableImages(dataset.images, MAX_UNREADABLE), title)

    @torch.inference_mode()
    def _ids(self, images: Tensor | None) -> Int[Tensor, "B rows columns"]:
        assert images is not None
        return self.tokenizer(self.compute.to(images)).cpu()

    def _noise(self, images: ImageList, batch: Batch) -> Tensor:
        """A function of the image alone, whatever the batch."""
        generators = [np.random.default_rng([0, images.key(int(index))]) for index in batch.image_index]
        shape = (self.channels, *self.teacher_size)
        return torch.from_numpy(np.stack([each.normal(0, NOISE, shape).astype(np.float32) for each in generators]))


def _bytes(pixels: Tensor) -> UInt8[Tensor, "B C h w"]:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = map(torch.cat, zip(*pairs, strict=True))
    return first, second


# ---- what a model makes of images


class Look(NamedTuple):
    """Centered views of a sample and what tokenizer and model say of them. n images, of which the first s are shown.

    Attributes:
        image_index: of each image in the list.
        logits: of the p hidden patches of each shown image, in its permutation's order; None if no words are predicted.
        attention: of the class token to the patches in the last block; None without one.
        features: of the patches, after the last block.
    """

    image_index: Int[Tensor, " n"]
    images: UInt8[Tensor, "n C H W"]
    tokens: Int[Tensor, "n N"]
    permutation: Int[Tensor, "s N"]
    logits: Float[Tensor, "s p V"] | None
    attention: Float[Tensor, "s heads N"] | None
    features: Float[Tensor, "s N D"]
    grid: tuple[int, int]
    vocab_size: int

    @property
    def shown(self) -> int:
        return len(self.permutation)


@torch.inference_mode()
def look_at(
    model: ViTForPreTraining,
    tokenizer: Tokenizer,
    images: ImageList,
    compute: ComputeContext,
    shown: int,
    order: PermutationKind,
) -> Look:
    """Draw images at random and run tokenizer and model over them.

    Args:
        model, tokenizer: on `compute.device`, the tokenizer with its teacher.
        shown: images to predict tokens of; of others only tokens are made, enough for about 60 patches of each code.

    Raises:
        MapetError: none of the images can be read, or features are not finite.
    """
    assert tokenizer.teacher is not None, "loaded without its teacher"
    vit = model.vit
    size: tuple[int, int] = vit.patch_embed.img_size
    sizes = vit.in_chans, size, tokenizer.teacher.image_size
    dataset = ViewDataset(images, ViewSpec(image_size=size), *sizes, grid=tokenizer.grid, order=order)
    count = enough_images(shown, tokenizer.vocab_size, model.num_patches, len(images))
    batch = dataset.batch([(0, int(i)) for i in np.random.default_rng(0).permutation(len(images))[:count]])
    if batch.images is None or batch.teacher_images is None or batch.permutation is None:
        raise MapetError(f"none of the images tried in {images.root} could be read; `mapet check` says why")
    tokens = torch.cat([tokenizer(compute.to(part)).flatten(1).cpu() for part in batch.teacher_images.split(64)])
    normal = normalize(compute.to(batch.images[:shown]), vit.in_chans)
    permutation = batch.permutation[:shown]
    pretrain_batch = Batch(batch.image_index[:shown], normal, permutation=compute.to(permutation))
    logits = model.predict(pretrain_batch).cpu() if model.target == "tokens" else None
    attention = attention_of_cls(vit, normal).cpu() if vit.has_class_token else None
    features = vit.forward_features(normal)[:, vit.num_prefix_tokens :].float().cpu()
    check_finite_features(features)
    return Look(
        batch.image_index, batch.images, tokens, permutation, logits, attention, features, tokenizer.grid, tokenizer.vocab_size
    )  # fmt: skip


def enough_images(shown: int, vocab_size: int, num_patches: int, available: int) -> int:
    """Count images whose patches show what a token means."""
    return min(available, max(shown, -(-PATCHES_SHOWN * vocab_size // num_patches)), MAX_IMAGES)


def attention_of_cls(vit: VisionTransformer, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B heads N"]:
    """Attention weights of the class token to the patches in the last block."""
    found: list[Tensor] = []
    attention = vit.blocks[-1].attn
    with attention.register_forward_hook(lambda module, inputs, output: found.append(inputs[0])):
        vit.forward_features(images)
    qkv = attention.qkv(found[0]).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    scores = (attention.q_norm(q)[:, :, :1] * attention.scale) @ attention.k_norm(k).transpose(-2, -1)
    return F.softmax(scores, dim=-1)[:, :, 0, vit.num_prefix_tokens :]


def principal_colors(features: Float[Tensor, "B N D"]) -> Float[Tensor, "B N 3"]:
    """The first three principal components of all patches together, each stretched to [0, 1] between its 1 % and 99 % points."""
    flat = features.flatten(0, 1)
    centered = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(centered, full_matrices=False)
    scores = centered @ directions[:3].T
    scores = F.pad(scores, (0, 3 - scores.shape[1]))
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    return ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).view(*features.shape[:2], 3)


def retrieve(
    vit: VisionTransformer, images: ImageList, compute: ComputeContext
) -> tuple[list[list[Titled]], list[str], Int[np.ndarray, "K K"] | None]:
    """Find the images nearest to some of a fixed sample, a fifth of which is held out.

    Returns:
        Rows of a held-out image and the others nearest to it, best first; names of the classes, none without labels; images of
        each true class (row) by the class that the linear probe gave them, None without labels.

    Raises:
        MapetError: too few images to hold some out, or too many that can't be read.
    """
    train, test = split(labeled(images) if images.classes() else unlabeled(images))
    train, test = train.sample(MAX_TRAIN), test.sample(MAX_TEST)
    fit, check = extract_sample(vit, train, test, compute)
    features, confusion = check.layer_features(), None
    if train.classes:
        count = len(train.classes)
        predicted = fit_logistic(fit.layer_features(), fit.labels, count, C=ONLINE_C)(features).argmax(1)
        confusion = torch.bincount(check.labels * count + predicted, minlength=count**2).view(count, count).numpy()
    order = check.index.argsort()
    chosen = order[np.linspace(0, len(order) - 1, min(NUM_QUERIES, len(order))).round().astype(int)]
    _, found = nearest_neighbors(fit.layer_blocks(), features[chosen], NUM_NEAREST)
    size, channels = vit.patch_embed.img_size, vit.in_chans
    rows = neighbor_rows(size, channels, train, test, check.index[chosen].tolist(), fit.index[found].tolist())
    return rows, train.classes, confusion


def neighbor_rows(
    size: tuple[int, int], channels: int, train: LabeledSet, test: LabeledSet, queries: list[int],
    nearest: list[list[int]],
) -> list[list[Titled]]:  # fmt: skip
    """Show each query, a test image, and after it its nearest training images."""

    def titled(data: LabeledSet, index: int) -> Titled:
        picture = data.images.open(index, channels)
        view = sample_view(ViewSpec(image_size=size), picture.size, data.images.key(index), 0)
        return render_view(picture, view, size), data.title(index)

    return [
        [titled(test, query), *(titled(train, other) for other in others)]
        for query, others in zip(queries, nearest, strict=True)
    ]
