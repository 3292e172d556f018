"""Token ids and model outputs of a sample of images, for metrics and figures."""

from collections.abc import Iterator, Sequence
from math import ceil, gcd
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvf
from jaxtyping import Float, Int, UInt8
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.data.dataset import (
    Batch,
    UnreadableImages,
    ViewDataset,
    inference_batch_size,
    position_batches,
    readable_batches,
)
from mapet.data.image_list import ImageList
from mapet.data.token_store import TokenStore
from mapet.data.views import PermutationKind, ViewSpec, color_jitter, normalize, sample_permutation
from mapet.device import ComputeContext
from mapet.errors import MapetError
from mapet.evaluation.datasets import LabeledSet
from mapet.evaluation.features import MAX_UNREADABLE, check_finite_features
from mapet.evaluation.logistic_regression import fit_logistic
from mapet.evaluation.probes import extract_features, fit_scaler, nearest_neighbors, sample_for_probe
from mapet.evaluation.token_metrics import TokenPair
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.tokenizer import Tokenizer

JITTER = 0.1
"""Largest change of brightness, contrast and saturation, as a fraction."""
NOISE_STD = 2.0
"""Standard deviation of the noise, of 255 gray levels: that of a good camera in good light."""
COLOR_QUANTILES, MIN_COLOR_RANGE = (0.01, 0.99), 1e-9
"""Quantiles of a principal component that become black and full color, and the smallest range between them that is divided by."""
JPEG_QUALITY = 75
"""libjpeg's default."""

PATCHES_PER_CODE_SHOWN, MAX_IMAGES_SHOWN = 60, 2000
"""Patches of each code, on average, that figures draw from, and the most images that are kept for them."""
NUM_QUERIES, NUM_NEAREST = 6, 7
"""Held-out images whose nearest training images are shown, and how many of each."""
TitledImage = tuple[UInt8[Tensor, "C H W"], str]
"""Pixels of an image's center view, and its class or name."""


class TokenSample(NamedTuple):
    """Token ids of the center views of the n images of a sample that can be read.

    Attributes:
        image_index: index of each image in the list of images.
        ids: token ids, on the CPU; codes from 0 to `vocab_size` - 1.
        images: pixels of the first m of the images, at the student's input size (the student is the ViT that is pre-trained).
        vocab_size: number of codes.
    """

    image_index: Int[Tensor, " n"]
    ids: Int[Tensor, "n rows columns"]
    images: UInt8[Tensor, "m C H W"]
    vocab_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches."""
        return self.ids.shape[1], self.ids.shape[2]


class TokenSampler:
    """Computes token ids of a sample of images, as they are and under perturbations.

    Args:
        tokenizer: with its teacher, the frozen encoder whose features it quantizes, on `compute.device`.
        compute: device and precision.
    """

    def __init__(self, tokenizer: Tokenizer, compute: ComputeContext) -> None:
        assert tokenizer.teacher is not None, "loaded without its teacher"
        self.tokenizer, self.compute = tokenizer, compute
        self.channels: int = tokenizer.description["teacher"]["channels"]
        self.teacher_size = tokenizer.teacher.image_size
        self.view_spec = ViewSpec(image_size=tokenizer.student_size)

    def sample(self, images: ImageList, indices: Sequence[int], num_pixels: int) -> TokenSample:
        """Compute the visual tokens of the center views of some images, and keep the pixels of the first readable ones.

        Unreadable images are excluded from the result, with a warning; readable ones are in the order of `indices`.

        Args:
            images: the list of images.
            indices: indices in `images` of the images to tokenize.
            num_pixels: number of readable images whose pixels are kept, at the student's input size.

        Raises:
            MapetError: none of the images at `indices` can be read, or more than the fraction `MAX_UNREADABLE` (a half) of the whole list
                cannot.
        """
        size = self.tokenizer.student_size
        dataset = ViewDataset(images, self.view_spec, self.channels, size, self.teacher_size)
        image_index, ids, pixels = [], [], []
        for batch in self._batches(dataset, indices, "tokens"):
            assert batch.images is not None
            image_index.append(batch.image_index)
            ids.append(self._tokenize(batch.teacher_images))
            pixels.append(batch.images[: max(0, num_pixels)])
            num_pixels -= len(batch)
        return TokenSample(torch.cat(image_index), torch.cat(ids), torch.cat(pixels), self.tokenizer.vocab_size)

    def sample_perturbed(self, images: ImageList, indices: Sequence[int]) -> dict[str, TokenPair]:
        """Compute the visual tokens of the center views of some images without and with each perturbation, to measure their stability.

        'flip' mirrors the teacher's input, and its tokens are compared with mirrored tokens. 'jitter' changes its colors, 'noise' adds
        Gaussian noise, and 'jpeg' compresses it; 'jpeg' is omitted for images of other than 1 or 3 channels. 'shift' compares two
        windows of the teacher's size in a larger rendering of the view, without padding: the lower right one is moved by the smallest
        number of whole patches that is a whole number of pixels. Tokens of the patches in both windows are compared. 'shift' is omitted
        if that number is the whole grid.

        Args:
            images: the list of images.
            indices: indices in `images` of the images to tokenize; unreadable ones are skipped.

        Returns:
            'flip', 'jitter', 'noise', 'jpeg', 'shift' -> (token ids without the perturbation, with it): (n, rows, columns) tensors in
            which the same position is the same content; for 'shift' with fewer rows and columns. n counts readable images.

        Raises:
            MapetError: none of the images at `indices` can be read, or more than the fraction `MAX_UNREADABLE` (a half) of the whole list
                cannot.
        """
        (height, width), (rows, columns) = self.teacher_size, self.tokenizer.grid
        # The shift, in patches and in pixels: the teacher's patches may be a fractional number of pixels, as the grid is the student's.
        down, right = rows // gcd(rows, height), columns // gcd(columns, width)
        down_px, right_px = height // gcd(rows, height), width // gcd(columns, width)
        # Size of the larger rendering, pixels, which `ViewDataset` returns as `Batch.images`; None: no rendering, and no shift.
        larger = (height + down_px, width + right_px) if down < rows and right < columns else None
        dataset = ViewDataset(images, self.view_spec, self.channels, larger, self.teacher_size, jitter=JITTER)
        batches: list[dict[str, TokenPair]] = []
        for batch in self._batches(dataset, indices, "perturbed views"):
            assert batch.teacher_images is not None and batch.jitter is not None
            view = batch.teacher_images.contiguous()
            tokens = self._tokenize(view)
            jittered = color_jitter(view.float(), batch.jitter)  # by factors drawn from each image's id
            pairs = {
                "flip": (tokens.flip(-1), self._tokenize(view.flip(-1))),
                "jitter": (tokens, self._tokenize(_to_uint8(jittered))),
                "noise": (tokens, self._tokenize(_to_uint8(view + self._sample_noise(images, batch)))),
            }
            if self.channels in (1, 3):
                pairs["jpeg"] = tokens, self._tokenize(tvf.jpeg(view, JPEG_QUALITY))
            if batch.images is not None:  # the larger rendering
                upper_left = self._tokenize(batch.images[..., :height, :width])
                lower_right = self._tokenize(batch.images[..., down_px:, right_px:])
                pairs["shift"] = upper_left[:, down:, right:], lower_right[:, : rows - down, : columns - right]
            batches.append(pairs)
        return {name: _concatenate([pairs[name] for pairs in batches]) for name in batches[0]}

    def compare_stored(self, images: ImageList, store: TokenStore, indices: Sequence[int]) -> TokenPair:
        """Compare a token store, the token ids on disk that pre-training reads, with tokens computed now from the same images.

        Args:
            images: the list of images.
            store: of these images; its `view_spec` says which views it has, of which view 0 is compared.
            indices: indices in `images` of the images to compare; unreadable ones are skipped.

        Returns:
            (token ids in the store, token ids computed now), each (n, N); equal if the store belongs to these images and tokenizer.

        Raises:
            MapetError: none of the images at `indices` can be read, or more than the fraction `MAX_UNREADABLE` (a half) of the whole list
                cannot.
        """
        dataset = ViewDataset(images, store.view_spec, self.channels, teacher_size=self.teacher_size)
        pairs = []
        for batch in self._batches(dataset, indices, "stored tokens"):
            ids = np.stack([store.read(index, 0) for index in batch.image_index.tolist()])
            pairs.append((torch.from_numpy(ids).long(), self._tokenize(batch.teacher_images).flatten(1)))
        return _concatenate(pairs)

    def _batches(self, dataset: ViewDataset, indices: Sequence[int], title: str) -> Iterator[Batch]:
        """Yield batches of view 0 of the readable images at `indices`, in this order.

        Args:
            dataset: renders the views, at the student's and the teacher's size.
            indices: indices of images in `dataset.images`.
            title: of the progress bar.

        Raises:
            MapetError: none of the images at `indices` can be read, or more than the fraction `MAX_UNREADABLE` (a half) of the whole list
                cannot.
        """
        batches = position_batches(indices, inference_batch_size(self.teacher_size))
        unreadable = UnreadableImages(dataset.images, MAX_UNREADABLE, is_option=False)
        yield from readable_batches(dataset, batches, unreadable, title)
        if unreadable.reasons.keys() >= {*indices}:
            reason = next(iter(unreadable.reasons.values()), "it is empty")
            problem = f"none of the {len(indices)} images of the sample can be read (the first: {reason})"
            raise MapetError(
                f"{problem}. `mapet check` lists the unreadable images: remove them, or sample more images"
            )

    @torch.inference_mode()
    def _tokenize(self, images: UInt8[Tensor, "B C h w"] | None) -> Int[Tensor, "B rows columns"]:
        """Compute the token ids, on the CPU, of uint8 images at the teacher's input size.

        `images` may not be None; the type allows it because `Batch.teacher_images` is None in batches without teacher images.
        """
        assert images is not None
        return self.tokenizer(self.compute.to(images)).cpu()

    def _sample_noise(self, images: ImageList, batch: Batch) -> Float[Tensor, "B C h w"]:
        """Draw Gaussian noise of standard deviation `NOISE_STD` (of 255 gray levels) for each image of a batch, seeded by its id alone.

        Args:
            images: the list that has the ids.
            batch: of B images, whose `image_index` are indices in `images`.

        Returns:
            Noise for images at the teacher's input size, float32, to be added to pixels of 0..255.
        """
        generators = [np.random.default_rng([0, images.key(index)]) for index in batch.image_index.tolist()]
        shape = (self.channels, *self.teacher_size)
        return torch.from_numpy(np.stack([rng.normal(0, NOISE_STD, shape).astype(np.float32) for rng in generators]))


def _to_uint8(pixels: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B C h w"]:
    """Round pixels of 0..255 to uint8."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _concatenate(pairs: Sequence[TokenPair]) -> TokenPair:
    """Concatenate the first tensors of pairs, and the second ones."""
    return torch.cat([first for first, _ in pairs]), torch.cat([second for _, second in pairs])


def num_images_for_figures(num_shown: int, vocab_size: int, num_patches: int) -> int:
    """Return how many images to tokenize for figures: enough for `PATCHES_PER_CODE_SHOWN` patches of each code on average.

    Args:
        num_shown: the least number of images.
        vocab_size: number of codes.
        num_patches: patches per image.

    Returns:
        The number, at most `MAX_IMAGES_SHOWN`.
    """
    return min(MAX_IMAGES_SHOWN, max(num_shown, ceil(PATCHES_PER_CODE_SHOWN * vocab_size / num_patches)))


# ---- outputs of a model


class ModelInspection(NamedTuple):
    """Tokens of a sample of images, and a model's outputs for the first s images, of N patches each.

    Attributes:
        sample: tokens and pixels of all n readable images; the model was run on the first s of them.
        permutation: patch indices in the order in which they are revealed and predicted.
        logits: of the last p patches of the permutation, in that order; None if the model doesn't predict tokens.
        attention: weights from the class token to the patches in the last block; None without a class token.
        features: of the patches, after the last block and norm.
    """

    sample: TokenSample
    permutation: Int[Tensor, "s N"]
    logits: Float[Tensor, "s p V"] | None
    attention: Float[Tensor, "s heads N"] | None
    features: Float[Tensor, "s N D"]

    @property
    def images(self) -> UInt8[Tensor, "s C H W"]:
        """Return the pixels of the s images."""
        return self.sample.images[: len(self.permutation)]

    @property
    def tokens(self) -> Int[Tensor, "s N"]:
        """Return the token ids of the s images."""
        return self.sample.ids[: len(self.permutation)].flatten(1)


@torch.inference_mode()
def inspect_model(
    model: ViTForPreTraining, tokenizer: Tokenizer, images: ImageList, compute: ComputeContext, num_shown: int,
    order: PermutationKind,
) -> ModelInspection:  # fmt: skip
    """Draw images at random, the same ones every time; tokenize them, and run a pre-trained model on the first ones, for figures.

    Args:
        model: the pre-trained model, on `compute.device`.
        tokenizer: with its teacher, on `compute.device`.
        images: the list to draw from.
        compute: device and precision.
        num_shown: number of images that the model is run on; more are tokenized, for figures of what each code shows.
        order: how the permutation, in which an image's patches are predicted, is drawn, e.g. 'random'.

    Returns:
        Tokens of all readable drawn images; and of the first `num_shown` of them permutation, logits (None if the model does not predict
        tokens), attention (None without a class token) and patch features, all on the CPU.

    Raises:
        MapetError: unreadable images are more than the fraction `MAX_UNREADABLE` (a half) of the whole list, or features are NaN or infinite.
    """
    vit = model.vit
    num_images = num_images_for_figures(num_shown, tokenizer.vocab_size, model.num_patches)
    indices = np.random.default_rng(0).permutation(len(images))[:num_images]
    sample = TokenSampler(tokenizer, compute).sample(images, indices.tolist(), num_images)
    index = sample.image_index[:num_shown]
    generators = [np.random.default_rng([0, images.key(i), 0]) for i in index.tolist()]
    orders = [sample_permutation(order, sample.grid, model.num_context, rng) for rng in generators]
    permutation = torch.from_numpy(np.stack(orders))
    inputs = normalize(compute.to(sample.images[:num_shown]), vit.in_chans)
    batch = Batch(index, inputs, permutation=compute.to(permutation))
    logits = model.predict(batch).cpu() if model.target == "tokens" else None
    attention = cls_attention(vit, inputs).cpu() if vit.has_class_token else None
    features = vit.forward_features(inputs)[:, vit.num_prefix_tokens :].float().cpu()
    check_finite_features(features)
    return ModelInspection(sample, permutation, logits, attention, features)


def cls_attention(vit: VisionTransformer, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B heads N"]:
    """Compute the attention weights from the class token to the patches in the last block, for each head.

    Weights are of a softmax over all tokens, of which the class token and registers are cut off: they sum to less than 1.

    Args:
        vit: timm's ViT with a class token.
        images: normalized, on the ViT's device.
    """
    inputs: list[Tensor] = []
    attention = vit.blocks[-1].attn
    with attention.register_forward_hook(lambda module, args, output: inputs.append(args[0])):
        vit.forward_features(images)
    # timm's fused attention gives no weights: compute them from its input.
    qkv = attention.qkv(inputs[0]).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, tokens, head_dim)
    scores = (attention.q_norm(q)[:, :, :1] * attention.scale) @ attention.k_norm(k).transpose(-2, -1)
    return F.softmax(scores, dim=-1)[:, :, 0, vit.num_prefix_tokens :]


def pca_colors(features: Float[Tensor, "B N D"]) -> Float[np.ndarray, "B N 3"]:
    """Compute an RGB color in [0, 1] for each patch: the first three principal components of the features of all patches of all images.

    A component's 1 % quantile becomes 0, its 99 % quantile 1, and values beyond are clipped. If there are fewer than three
    components, the others are 0.

    Args:
        features: finite patch features of B images, on the CPU.
    """
    flat = features.flatten(0, 1).numpy()
    num_components = min(3, *flat.shape)
    components = np.zeros((len(flat), 3), np.float32)
    components[:, :num_components] = PCA(num_components, svd_solver="full").fit_transform(flat)
    low, high = np.quantile(components, COLOR_QUANTILES, axis=0)
    colors = ((components - low) / (high - low).clip(MIN_COLOR_RANGE)).clip(0, 1)
    return colors.reshape(*features.shape[:2], 3)


def retrieve_images(
    vit: VisionTransformer, images: ImageList, compute: ComputeContext
) -> tuple[list[list[TitledImage]], list[str], Int[np.ndarray, "K K"] | None]:
    """Find the training images nearest to some held-out images by a ViT's features, for a figure; and test a linear probe on them.

    Args:
        vit: on `compute.device`.
        images: with or without labels; a fifth is held out, and a fixed sample of both parts is used (`sample_for_probe`).
        compute: device and precision.

    Returns:
        Three items. Rows of (pixels, title), up to `NUM_QUERIES`: a held-out image, then the `NUM_NEAREST` training images nearest to it
        by cosine similarity of features (`extract_features`), nearest first. The class names; empty without labels. The confusion
        matrix of logistic regression on all readable held-out images, counts of true classes (rows) by predicted classes (columns); None
        without labels.

    Raises:
        MapetError: there are too few images to hold some out, more than half of the images of a part are unreadable, or features are NaN
            or infinite.
    """
    data = LabeledSet.from_images(images) if images.classes() else LabeledSet.without_labels(images)
    train, test = sample_for_probe(data)
    train_cache, test_cache = (extract_features(vit, part, compute) for part in (train, test))
    features, confusion = test_cache.layer_features(), None
    if train.classes:
        num_classes = len(train.classes)
        probe = fit_logistic(train_cache.layer_features(), train_cache.labels, num_classes)
        confusion = confusion_matrix(test_cache.labels, probe(features).argmax(1), labels=range(num_classes))
    # Rows of the cache are in random order; sorted by image, the queries are spread evenly over the list of images.
    spread = np.linspace(0, len(test_cache) - 1, min(NUM_QUERIES, len(test_cache))).round().astype(int)
    queries = test_cache.index.argsort()[spread]
    _, nearest = nearest_neighbors(train_cache.blocks(), features[queries], NUM_NEAREST, fit_scaler(train_cache))
    indices = test_cache.index[queries].tolist(), train_cache.index[nearest].tolist()
    rows = render_neighbors(vit.patch_embed.img_size, vit.in_chans, train, test, *indices)
    return rows, train.classes, confusion


def render_neighbors(
    size: tuple[int, int], channels: int, train: LabeledSet, test: LabeledSet, queries: Sequence[int],
    nearest: Sequence[Sequence[int]],
) -> list[list[TitledImage]]:  # fmt: skip
    """Render the center views of some test images and of the training images nearest to each, for a figure.

    Args:
        size: (height, width) of the views, pixels.
        channels: of the views, e.g. 3.
        train: training images.
        test: test images.
        queries: indices in `test` of readable images.
        nearest: for each query, indices in `train` of readable images, nearest first.

    Returns:
        A row for each query: (pixels, title) of the query, then of its nearest images. A title is a class, or without labels a file name.
    """

    def render_titled(data: LabeledSet, indices: Sequence[int]) -> list[TitledImage]:
        """Read the center views of some images of `data`, which are known to be readable, with titles."""
        views = ViewDataset(data.images, ViewSpec(image_size=size), channels, size).batch([(0, i) for i in indices])
        assert views.images is not None
        return [(image, data.title(index)) for image, index in zip(views.images, indices, strict=True)]

    pairs = zip(queries, nearest, strict=True)
    return [render_titled(test, [query]) + render_titled(train, row) for query, row in pairs]
