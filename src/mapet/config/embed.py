"""Options of `embed`."""

from pathlib import Path
from typing import Literal

from mapet.config.shared import BackboneSource, BadImages, Device, Loading, ModelArgs, Precision
from mapet.config.types import Size, Source


class EmbedConfig(ModelArgs, BadImages, Loading, Device):
    """Options of `embed`."""

    backbone: BackboneSource
    """A run, a model folder of timm or Hugging Face, a weights file (MaPeT's released ones, MAE, DINO, timm, ...), or timm:NAME."""
    images: Source
    """Folder of images, or text file of paths."""
    out: Path
    """New folder for the features."""
    pool: Literal["avg", "token", "none"] = "avg"
    """Features of an image: mean of its patch tokens; the class token; none: all patch tokens, row by row."""
    format: Literal["npy", "parquet"] = "npy"
    """npy: features.npy and ids.json; parquet: features.parquet, a folder of files with the columns id and features."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the numbers on disk."""
    image_size: Size | None = None
    """Height and width of the input, pixels; positions are interpolated; automatic: the backbone's own."""
    precision: Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""
    resume: bool = False
    """Go on with an interrupted job in `out`."""
