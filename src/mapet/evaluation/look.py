"""What a pre-trained model makes of a sample of images: their words, what it predicts, where it looks, its features."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mapet.data.dataset import Batch, ViewDataset
from mapet.data.image_list import ImageList
from mapet.data.views import OrderKind, ViewSpec
from mapet.device import Compute
from mapet.errors import MapetError
from mapet.evaluation.features import must_be_finite_features, normalize
from mapet.models.pretraining import ViTForPreTraining
from mapet.tokenizers.tokenizer import Tokenizer

MOST = 2000
"""Images whose patches show what words mean."""
PATCHES_PER_WORD = 60


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
    model: ViTForPreTraining,
    tokenizer: Tokenizer,
    images: ImageList,
    compute: Compute,
    shown: int,
    order: OrderKind = "random",
    seed: int = 0,
) -> Look:
    """Draw images at random and run tokenizer and model over them.

    Args:
        model, tokenizer: on `compute.device`, the tokenizer with its teacher.
        shown: images to predict words of; of others only words are made, enough for about 60 patches of each.

    Raises:
        MapetError: none of the images can be read, or features are not finite.
    """
    assert tokenizer.teacher is not None, "loaded without its teacher"
    vit = model.vit
    height, width = vit.patch_embed.img_size
    dataset = ViewDataset(
        images, ViewSpec(image_size=(height, width)), vit.in_chans, (height, width), tokenizer.teacher.image_size,
        grid=tokenizer.grid, order=order, seed=seed,
    )  # fmt: skip
    wanted = enough_images(shown, tokenizer.vocab_size, model.num_patches, len(images))
    batch = dataset.batch([(0, int(i)) for i in np.random.default_rng(seed).permutation(len(images))[:wanted]])
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
    """Images whose patches show what a word means: about 60 of each word."""
    return min(available, max(shown, -(-PATCHES_PER_WORD * vocab_size // num_patches)), MOST)


def attention_of_cls(vit: Any, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B heads N"]:
    """Attention weights of the class token to the patches in the last block."""
    found: list[Tensor] = []
    block = vit.blocks[-1]
    hook = block.attn.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    try:
        vit.forward_features(images)
    finally:
        hook.remove()
    attention, x = block.attn, found[0]
    q, k, _ = attention.qkv(x).view(*x.shape[:2], 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
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
