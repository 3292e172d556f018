"""Intermediate feature maps of any timm model, by its name there."""

import logging
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapet.config.shared import HUBS
from mapet.errors import MapetError, option
from mapet.weights import read_weights

log = logging.getLogger("mapet")
TAKES_IMAGE_SIZE = ("vit_", "deit", "eva", "beit", "swin", "naflexvit", "flexivit", "samvit", "xcit")
"""Beginnings of the names of models that are created for a given image size."""


def build(
    teacher: str,
    checkpoint: str | None,
    channels: int,
    teacher_size: tuple[int, int] | None,
    layer: int,
    final_norm: bool,
) -> nn.Module:
    """Create the model with its pre-trained weights, or those of a local file.

    Raises:
        MapetError: weights that cannot be had or are another model's, or a model without such features.
    """
    on_hub = teacher.startswith(HUBS)
    default_size = None if on_hub else tuple(timm.models.get_pretrained_cfg(teacher).input_size[1:])
    resize = teacher_size not in (None, default_size) and teacher.startswith(TAKES_IMAGE_SIZE)
    if not checkpoint and not teacher.startswith("local-dir:"):
        log.info("weights of teacher %s: from this machine's cache, else from the Hub", teacher)
    overlay = {"state_dict": read_weights(checkpoint), "custom_load": False} if checkpoint else None
    try:
        # With the classifier it comes with: without one timm loads loosely, and a wrong file would pass unnoticed.
        model = timm.create_model(
            teacher, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=channels,
            **({"img_size": teacher_size} if resize else {}),
        )  # fmt: skip
    except Exception as error:  # hub, network, file and shape errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        fix = (
            f"is {checkpoint} a checkpoint of it?"
            if checkpoint
            else f"give a local file: {option('teacher_checkpoint')} FILE"
        )
        raise MapetError(f"cannot load the weights of teacher '{teacher}': {reason}; {fix}") from None
    if not hasattr(model, "forward_intermediates"):
        raise MapetError(f"teacher '{teacher}' gives no intermediate features in timm; choose another model")
    if teacher_size and on_hub and hasattr(model, "set_input_size"):  # its default size is known only now
        model.set_input_size(img_size=teacher_size)
    count = len(model.feature_info)
    if not -count <= layer < count:
        raise MapetError(f"layer {layer} of teacher '{teacher}': it has {count}, so {-count} to {count - 1}")
    return TimmFeatures(teacher, model, channels, teacher_size, layer % count, final_norm)


class TimmFeatures(nn.Module):
    """One of a timm model's intermediate feature maps, without prefix tokens.

    Args:
        channels: of the images; where the model's mean and std are of another number, their average is taken.
        layer: index of the map.
        final_norm: apply the model's last normalization (k-CLIP does not: it takes the last stage before the attention pool).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, model: Any, channels: int, size: tuple[int, int] | None, layer: int, final_norm: bool
    ) -> None:
        super().__init__()
        self.name, self.model, self.layer, self.final_norm = name, model, layer, final_norm
        data = timm.data.resolve_model_data_config(model)
        self.image_size: tuple[int, int] = size or tuple(data["input_size"][1:])
        self.metadata = {}
        for key in ("mean", "std"):
            values = data[key] if len(data[key]) == channels else [sum(data[key]) / len(data[key])] * channels
            self.register_buffer(key, torch.tensor(values).view(-1, 1, 1), persistent=False)
            self.metadata[key] = getattr(self, key).flatten().tolist()
        self.metadata["prefix_tokens_dropped"] = getattr(model, "num_prefix_tokens", 0)

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        normalized = (images - self.mean) / self.std
        try:
            return self.model.forward_intermediates(
                normalized, indices=[self.layer], norm=self.final_norm, intermediates_only=True, output_fmt="NCHW"
            )[0]
        except AssertionError as error:  # timm's check of sizes
            raise MapetError(
                f"teacher '{self.name}' takes no views of {images.shape[2]} x {images.shape[3]} px: {error}; choose another "
                f"{option('teacher_image_size')}, or leave it out"
            ) from None
