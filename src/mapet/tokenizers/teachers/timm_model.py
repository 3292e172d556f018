"""Intermediate feature maps of any timm model, by its name there."""

import logging
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mapet.config.shared import HUB_PREFIXES, Size
from mapet.errors import MapetError, first_line, format_size, option
from mapet.weights import read_weights

log = logging.getLogger("mapet")
TAKES_IMAGE_SIZE = ("vit_", "deit", "eva", "beit", "swin", "naflexvit", "flexivit", "samvit", "xcit")
"""Beginnings of the names of models that are created for a given image size."""


class TimmFeatures(nn.Module):
    """One of a timm model's intermediate feature maps, without prefix tokens.

    Attributes:
        image_size: (h, w) of the images it takes, pixels.
        metadata: the mean and std that images in [0, 1] are normalized with, and the number of prefix tokens that are dropped.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, teacher: str, checkpoint: str | None, channels: int, teacher_size: Size | None, layer: int, output: str
    ) -> None:  # fmt: skip
        """Create the model with its weights, and look up how it takes images.

        Args:
            teacher: name of the model.
            checkpoint: a local weights file; None: timm's pre-trained weights.
            channels: channels of the images. If the model has mean and std for another number, their average is taken for every channel.
            teacher_size: (h, w) of the images; None: the model's own.
            layer: index of the feature map; negative ones count from the last.
            output: 'block', the feature map as it is (k-CLIP); 'norm', after the model's final norm; 'projection', after final norm and
                head, of a CLIP its visual projection (BEiT v2's VQ-KD).

        Raises:
            MapetError: the weights cannot be had or are another model's, or the model has no such features, final norm or projection.
        """
        super().__init__()
        self.name, self.output = teacher, output
        self.model = _create(teacher, checkpoint, channels, teacher_size)
        count = len(self.model.feature_info)
        if not -count <= layer < count:
            allowed = f"must be from {-count} to {count - 1}, got {layer}"
            raise MapetError(f"teacher '{teacher}' has {count} feature maps: {option('teacher_layer')} {allowed}")
        self.layer = layer % count
        norm, head = (getattr(self.model, name, None) for name in ("norm", "head"))
        no_norm = isinstance(norm, nn.Identity | None)  # a ResNet has none, a BEiT normalizes the mean of its tokens
        if (no_norm and output != "block") or (output == "projection" and not isinstance(head, nn.Linear)):
            problem = f"teacher '{teacher}' has no {output} that applies to patch tokens"
            hint = f"give {option('teacher_output', 'block')} or choose another teacher"
            raise MapetError(f"{problem}: {hint}", field="teacher_output", value=output)
        config = timm.data.resolve_model_data_config(self.model)
        self.image_size: tuple[int, int] = teacher_size or tuple(config["input_size"][1:])
        self.metadata = {"prefix_tokens_dropped": getattr(self.model, "num_prefix_tokens", 0)}
        for name in ("mean", "std"):
            values = list(config[name])
            if len(values) != channels:
                values = [sum(values) / len(values)] * channels
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
            self.metadata[name] = getattr(self, name).flatten().tolist()

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F rows columns"]:
        """Return the feature map of images in [0, 1].

        Args:
            images: pixels in [0, 1].

        Raises:
            MapetError: the model does not take images of this size.
        """
        normalized = (images - self.mean) / self.std
        try:
            (features,) = self.model.forward_intermediates(
                normalized,
                indices=[self.layer],
                norm=self.output != "block",
                intermediates_only=True,
                output_fmt="NCHW",
            )
        except AssertionError as error:  # timm's check of the image size
            problem = (
                f"teacher '{self.name}' takes no views of {format_size(images.shape[2:])} px ({first_line(error)})"
            )
            raise MapetError(f"{problem}: change or omit {option('teacher_image_size')}") from None
        if self.output == "projection":
            features = self.model.head(features.movedim(1, -1)).movedim(-1, 1)
        return features


def _create(teacher: str, checkpoint: str | None, channels: int, size: Size | None) -> Any:
    """Create a timm model with its pre-trained weights, or with those of a local file.

    Args:
        teacher: name of the model.
        checkpoint: a local weights file; None: timm's pre-trained weights.
        channels: channels of its input.
        size: (h, w) that a model of fixed image size is created for; None: its own.

    Returns:
        The model, with its classifier.

    Raises:
        MapetError: the weights cannot be had or do not fit, or timm offers no intermediate features of the model.
    """
    on_hub = teacher.startswith(HUB_PREFIXES)
    default_size = None if on_hub else tuple(timm.models.get_pretrained_cfg(teacher).input_size[1:])
    options: dict[str, Any] = {"in_chans": channels}
    if size not in (None, default_size) and teacher.startswith(TAKES_IMAGE_SIZE):
        options["img_size"] = size
    if checkpoint:
        options["pretrained_cfg_overlay"] = {"state_dict": read_weights(checkpoint), "custom_load": False}
    elif not teacher.startswith("local-dir:"):
        log.info("weights of teacher %s: from the local cache, else from the Hub", teacher)
    try:
        # The classifier is kept: without it timm loads non-strictly, and a file of another model would pass unnoticed.
        model = timm.create_model(teacher, pretrained=True, **options)
    except Exception as error:  # hub, network, file and shape errors of many types
        hint = f"give a checkpoint of this model by {option('teacher_checkpoint')}"
        source = f" from {checkpoint}" if checkpoint else ""
        raise MapetError(
            f"cannot load the weights of teacher '{teacher}'{source} ({first_line(error)}): {hint}"
        ) from None
    if not hasattr(model, "forward_intermediates"):
        raise MapetError(f"timm gives no intermediate features of teacher '{teacher}': choose another model")
    # A hub model's default size is known only after its creation.
    if size and on_hub and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    return model
