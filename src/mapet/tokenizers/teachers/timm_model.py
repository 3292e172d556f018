"""Intermediate feature maps of any timm model, by its name there."""

import logging
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapet.config.shared import HUB_PREFIXES, Size
from mapet.errors import MapetError, option
from mapet.weights import read_weights

log = logging.getLogger("mapet")
TAKES_IMAGE_SIZE = ("vit_", "deit", "eva", "beit", "swin", "naflexvit", "flexivit", "samvit", "xcit")
"""Beginnings of the names of models that are created for a given image size."""


class TimmFeatures(nn.Module):
    """One of a timm model's intermediate feature maps, without prefix tokens.

    Args:
        teacher: name of the model.
        checkpoint: a local weights file; None: timm's pre-trained weights.
        channels: of the images; where the model's mean and std are of another number, their average is taken.
        teacher_size: (h, w) of the views; None: the model's own.
        layer: index of the map; negative ones count from the last.
        final_norm: apply the model's last normalization (k-CLIP does not: it takes the last stage before the attention pool).

    Raises:
        MapetError: weights that cannot be had or are another model's, or a model without such features.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        teacher: str,
        checkpoint: str | None,
        channels: int,
        teacher_size: Size | None,
        layer: int,
        final_norm: bool,
    ) -> None:
        super().__init__()
        self.name, self.final_norm = teacher, final_norm
        self.model = _create(teacher, checkpoint, channels, teacher_size)
        count = len(self.model.feature_info)
        if not -count <= layer < count:
            raise MapetError(f"layer {layer} of teacher '{teacher}': it has {count}, so {-count} to {count - 1}")
        self.layer = layer % count
        data = timm.data.resolve_model_data_config(self.model)
        self.image_size: tuple[int, int] = teacher_size or tuple(data["input_size"][1:])
        self.metadata = {}
        for key in ("mean", "std"):
            values = data[key] if len(data[key]) == channels else [sum(data[key]) / len(data[key])] * channels
            self.register_buffer(key, torch.tensor(values).view(-1, 1, 1), persistent=False)
            self.metadata[key] = getattr(self, key).flatten().tolist()
        self.metadata["prefix_tokens_dropped"] = getattr(self.model, "num_prefix_tokens", 0)

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


build = TimmFeatures


def _create(teacher: str, checkpoint: str | None, channels: int, size: Size | None) -> Any:
    """Create the model with its pre-trained weights, or those of a local file."""
    on_hub = teacher.startswith(HUB_PREFIXES)
    default_size = None if on_hub else tuple(timm.models.get_pretrained_cfg(teacher).input_size[1:])
    resize = size not in (None, default_size) and teacher.startswith(TAKES_IMAGE_SIZE)
    options: dict[str, Any] = {"in_chans": channels} | ({"img_size": size} if resize else {})
    if checkpoint:
        options["pretrained_cfg_overlay"] = {"state_dict": read_weights(checkpoint), "custom_load": False}
    elif not teacher.startswith("local-dir:"):
        log.info("weights of teacher %s: from this machine's cache, else from the Hub", teacher)
    try:
        # With the classifier it comes with: without one timm loads loosely, and a wrong file would pass unnoticed.
        model = timm.create_model(teacher, pretrained=True, **options)
    except Exception as error:  # hub, network, file and shape errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        fix = f"is {checkpoint} a checkpoint of it?" if checkpoint else f"give {option('teacher_checkpoint')} FILE"
        raise MapetError(f"cannot load the weights of teacher '{teacher}': {reason}; {fix}") from None
    if not hasattr(model, "forward_intermediates"):
        raise MapetError(f"teacher '{teacher}' gives no intermediate features in timm; choose another model")
    if size and on_hub and hasattr(model, "set_input_size"):  # its default size is known only now
        model.set_input_size(img_size=size)
    return model
