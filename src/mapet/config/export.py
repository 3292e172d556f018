"""Options of `export`."""

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from mapet.config.shared import BackboneSource, ModelArgs
from mapet.config.types import Size, Source

FormatName = Literal["timm", "transformers", "onnx", "torch-export"]


class ExportConfig(ModelArgs):
    """Options of `export`."""

    backbone: BackboneSource
    """A run, finished or not (then its newest checkpoint is taken), a fine-tuned model, a model folder of timm or Hugging Face, a
    weights file (MaPeT's released ones, MAE, DINO, timm, ...), or timm:NAME."""
    out: Path
    """New folder: a timm model folder with its model card; other formats lie in folders of it."""
    format: tuple[FormatName, ...] = ()
    """Formats beside timm's, several if wanted: transformers, onnx, torch-export."""
    image_size: Size | None = None
    """Height and width of the input, pixels; positions are interpolated; automatic: the backbone's own."""
    patch_size: PositiveInt | None = None
    """Side of a patch, pixels; the patch embedding is resampled; automatic: the backbone's own."""
    channels: PositiveInt | None = None
    """Channels of the input; the patch embedding is adapted; automatic: the backbone's own."""
    images: Source | None = None
    """Images to check the formats on; automatic: the run's own."""
    license: str = "other"
    """Licence of the weights, for the model card, e.g. apache-2.0."""
