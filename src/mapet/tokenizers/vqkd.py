"""The tokenizer of BEiT v2 (VQ-KD, arXiv 2208.06366): a ViT whose patch features are unit vectors with a codebook of their own.

Published files (`vqkd_encoder_base_decoder_3x768x12_clip` and its kin) and those that `train-tokenizer` makes are of one
layout, which is the released code's:

    encoder.*                    a ViT: class token, learned positions; its last norm is called fc_norm, and its attention has
                                 q_bias and v_bias but none for keys, which would change no softmax
    encode_task_layer.{0,2}.*    linear, tanh, linear: to the codebook's few dimensions
    quantize.embedding.weight    the codes, unit vectors
    quantize.*, decoder.*, decode_task_layer.*    of training alone
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError, by, option
from mapet.files import check_format, read_json
from mapet.weights import describe_mismatch, first_names, read_weights

FORMAT = 1
DESCRIPTION = "vqkd.json"
"""Beside the file, where `train-tokenizer` made it."""
HEAD_WIDTH = 64
"""Numbers an attention head has, in every ViT that the layout is for: the weights themselves don't tell."""
CODES = "quantize.embedding.weight"
TRAINING_ONLY = ("quantize.", "decoder.", "decode_task_layer.", "teacher", "scaling", "loss")
"""Beginnings of names that looking up codes has no use for."""
ROWS = 2048
"""Vectors at a time: their table of cosines with 8192 codes takes 64 MB."""


class VQKD(nn.Module):
    """Images -> one unit vector a patch, to be named by the code with the largest cosine.

    Attributes:
        encoder: timm's ViT.
        codebook: (K, d) unit vectors.
        image_size: (h, w) of the images, pixels.
        metadata: how it takes images, and what it was learned from if that is known (see `Teacher.metadata`).
    """

    codebook: Tensor

    def __init__(self, encoder: VisionTransformer, codebook: Float[Tensor, "K d"]) -> None:
        super().__init__()
        self.encoder = encoder
        self.encode_task_layer = task_layer(encoder.embed_dim, codebook.shape[1])
        self.register_buffer("codebook", F.normalize(codebook, dim=1))
        height, width = encoder.patch_embed.img_size
        self.image_size: tuple[int, int] = (height, width)
        half = [0.5] * encoder.in_chans
        self.metadata: dict[str, Any] = {"mean": half, "std": half, "prefix_tokens_dropped": encoder.num_prefix_tokens}

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B d rows columns"]:
        """Unit vectors of images in [0, 1]. The task layer computes in its own precision, also within autocast.

        Raises:
            MapetError: images of another size.
        """
        if tuple(images.shape[2:]) != self.image_size:
            raise MapetError(
                f"this VQ-KD tokenizer is for images of {by(self.image_size)} px, got {by(images.shape[2:])}"
            )
        tokens = self.encoder.forward_features(2 * images - 1)[:, self.encoder.num_prefix_tokens :]
        with torch.autocast(images.device.type, enabled=False):
            features = self.encode_task_layer(tokens.to(self.encode_task_layer[0].weight.dtype))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(features, dim=2).transpose(1, 2).unflatten(2, self.encoder.patch_embed.grid_size)

    def weights(self) -> dict[str, Tensor]:
        """In the published layout; `from_weights` takes them back."""
        return {
            **prefixed("encoder", to_beit2_state_dict(self.encoder)),
            **prefixed("encode_task_layer", self.encode_task_layer.state_dict()),
            CODES: self.codebook,
        }

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], source: object = "these weights") -> "VQKD":
        """Sizes are those of the weights; images are square.

        Args:
            source: what errors name.

        Raises:
            MapetError: something is missing, too much, or of another shape.
        """
        with torch.device("meta"):  # every number comes from the file
            model = cls(_empty_encoder(weights, source), torch.empty_like(weights[CODES], device="meta"))
        expected = model.weights()
        given = {name: tensor for name, tensor in weights.items() if name in expected or not _for_training_only(name)}
        if mismatch := describe_mismatch(given, expected):
            raise MapetError(f"{source}: {NO_VQKD}: {mismatch}")
        encoder = from_beit2_state_dict(
            {name[8:]: tensor for name, tensor in given.items() if name.startswith("encoder.")}
        )
        task = {name: tensor for name, tensor in given.items() if name.startswith("encode_task_layer.")}
        codebook = F.normalize(given[CODES].float(), dim=1)
        state = prefixed("encoder", encoder) | task | {"codebook": codebook}
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        return model


NO_VQKD = "not a VQ-KD tokenizer as BEiT v2 publishes them"


def vqkd_encoder(checkpoint: str | Path | None) -> VQKD:
    """The tokenizer of a file: a published one, or one that `train-tokenizer` made.

    Raises:
        MapetError: no such file, damaged, with code in it, or not a VQ-KD tokenizer.
    """
    if checkpoint is None:
        raise MapetError(f"a VQ-KD tokenizer comes from a file: give {option('teacher_checkpoint')} FILE")
    description, learned_from = Path(checkpoint).with_name(DESCRIPTION), None
    if description.exists():
        try:
            content = read_json(description, "VQ-KD tokenizer")
            check_format(content["format_version"], FORMAT, "VQ-KD tokenizer", description)
            learned_from = {name: content.get(name) for name in ("teacher", "teacher_weights_hash", "teacher_metadata")}
            learned_from |= {name: content["training"][name] for name in ("images_hash", "num_images")}
        except (ValueError, KeyError, TypeError) as error:
            raise MapetError(f"{description}: not of a VQ-KD tokenizer ({error})") from None
    model = VQKD.from_weights(read_weights(checkpoint), checkpoint).eval()
    model.metadata["learned_from"] = learned_from
    return model


def nearest_code(features: Float[Tensor, "n d"], codebook: Float[Tensor, "K d"]) -> Int[Tensor, " n"]:
    """The code with the largest cosine of each unit vector, in the vectors' own precision, also within autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return torch.cat([(block @ codebook.T).argmax(1) for block in features.split(ROWS)])


def task_layer(width: int, out: int) -> nn.Sequential:
    """Linear, tanh, linear: between a transformer and what it is to give."""
    first, last = nn.Linear(width, width), nn.Linear(width, out)
    for linear in (first, last):
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.Tanh(), last)


def num_heads_for(width: int) -> int:
    """Attention heads of a ViT of this width."""
    return max(1, width // HEAD_WIDTH)


def to_beit2_state_dict(vit: VisionTransformer) -> dict[str, Tensor]:
    """A timm ViT's weights under the released code's names. A bias of the keys is left out: it changes no output."""
    weights: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        name = re.sub(r"^norm\.", "fc_norm.", name)
        if name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            weights |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            weights[name] = tensor
    return weights


def from_beit2_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `to_beit2_state_dict`."""
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith("attn.q_bias"):
            v = weights[name.replace("q_bias", "v_bias")]
            renamed[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(v), v])
        elif not name.endswith("attn.v_bias"):
            renamed[re.sub(r"^fc_norm\.", "norm.", name)] = tensor
    return renamed


def prefixed(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}


def _for_training_only(name: str) -> bool:
    return name.startswith(TRAINING_ONLY) and name != CODES


def _empty_encoder(weights: Mapping[str, Tensor], source: object) -> VisionTransformer:
    """The ViT that the weights are of, on the device of the context."""
    try:
        width, channels, patch, _ = weights["encoder.patch_embed.proj.weight"].shape
        side = math.isqrt(weights["encoder.pos_embed"].shape[1] - 1)
        depth = 1 + max(int(found[1]) for name in weights if (found := re.match(r"encoder\.blocks\.(\d+)\.", name)))
        hidden, _ = weights["encoder.blocks.0.mlp.fc1.weight"].shape
        codes, _ = weights[CODES].shape
        ratio = (hidden + 0.5) / width  # timm rounds down
        return VisionTransformer(
            side * patch,
            patch,
            channels,
            0,
            embed_dim=width,
            depth=depth,
            num_heads=num_heads_for(width),
            mlp_ratio=ratio,
        )
    except KeyError as error:
        raise MapetError(
            f"{source}: {NO_VQKD}: it has no {error.args[0]!r}, but {first_names(sorted(weights)) or 'nothing'}"
        ) from None
    except (ValueError, IndexError, ZeroDivisionError, AssertionError):
        raise MapetError(f"{source}: {NO_VQKD}: its sizes don't fit together") from None
