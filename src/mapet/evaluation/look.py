"""What a pre-trained model makes of a sample of images: tokens, predictions, attention, features, the nearest other images."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.data.dataset import Batch, ViewDataset
from mapet.data.image_list import ImageList
from mapet.data.views import OrderKind, ViewSpec, draw_view, normalize, render
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.datasets import LabelledSet, labelled, split, unlabelled
from mapet.evaluation.features import must_be_finite_features
from mapet.evaluation.probes import MAX_TEST, MAX_TRAIN, ONLINE_C, extract_sample, fit_logistic, nearest_neighbors
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.tokenizer import Tokenizer

MAX_IMAGES, PATCHES_PER_CODE = 2000, 60
"""Images whose patches show what tokens mean: at most, and enough for about 60 patches of each code."""
NUM_QUERIES, NUM_NEAREST = 6, 7
"""Held-out images whose nearest ones are shown, and how many of each."""
Titled = tuple[UInt8[Tensor, "C H W"], str]
"""Pixels of a centred view, and the name of the image."""


class Look(NamedTuple):
    """Centred views of a sample and what tokenizer and model say of them. n images, of which the first s are shown.

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
    model: ViTForPreTraining, tokenizer: Tokenizer, images: ImageList, compute: Compute, shown: int, order: OrderKind
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
    must_be_finite_features(features)
    return Look(
        batch.image_index, batch.images, tokens, permutation, logits, attention, features, tokenizer.grid, tokenizer.vocab_size
    )  # fmt: skip


def enough_images(shown: int, vocab_size: int, num_patches: int, available: int) -> int:
    """Count images whose patches show what a token means."""
    return min(available, max(shown, -(-PATCHES_PER_CODE * vocab_size // num_patches)), MAX_IMAGES)


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
    centred = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ directions[:3].T
    scores = F.pad(scores, (0, 3 - scores.shape[1]))
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    return ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).view(*features.shape[:2], 3)


def retrieve(
    vit: VisionTransformer, images: ImageList, compute: Compute
) -> tuple[list[list[Titled]], list[str], Int[np.ndarray, "K K"] | None]:
    """Find the images nearest to some of a fixed sample, a fifth of which is held out.

    Returns:
        Rows of a held-out image and the others nearest to it, best first; names of the classes, none without labels; images of
        each true class (row) by the class that the linear probe gave them, None without labels.

    Raises:
        MapetError: too few images to hold some out, or too many that can't be read.
    """
    train, test = split(labelled(images) if images.classes() else unlabelled(images))
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
    size: tuple[int, int], channels: int, train: LabelledSet, test: LabelledSet, queries: list[int],
    nearest: list[list[int]],
) -> list[list[Titled]]:  # fmt: skip
    """Show each query, a test image, and after it its nearest training images."""

    def titled(data: LabelledSet, index: int) -> Titled:
        picture = data.images.open(index, channels)
        view = draw_view(ViewSpec(image_size=size), picture.size, data.images.key(index), 0)
        return render(picture, view, size), data.title(index)

    return [
        [titled(test, query), *(titled(train, other) for other in others)]
        for query, others in zip(queries, nearest, strict=True)
    ]
