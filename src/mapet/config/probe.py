"""Options of `probe`."""

from pathlib import Path
from typing import ClassVar, Literal

from mapet.config.base import Source
from mapet.config.shared import BackboneSource, Device, Loading, ModelArgs, Precision


class ProbeOptions(ModelArgs, Loading):
    """Options of `probe` that a larger config has as a section."""

    pool: Literal["avg", "token"] = "avg"
    """Feature of an image: mean of its patch tokens, or the class token."""
    untrained: bool = True
    """Also probe the same ViT with random weights, for comparison."""
    precision: Precision = "auto"
    """Of matrix products; auto takes bfloat16 where it is fast."""


class ProbeConfig(ProbeOptions, Device):
    """Options of `probe`."""

    out_is_file: ClassVar[bool] = True

    backbone: BackboneSource
    """A run, a model folder of timm or Hugging Face, a weights file, or timm:NAME."""
    images: Source
    """Labelled images, CLASS/image.jpg, to train the probes on."""
    test_images: Source | None = None
    """Labelled images to test on; automatic: a fifth of `images`, chosen by image name."""
    seed: int = 0
    """Seed of the random weights."""
    out: Path | None = None
    """JSON file for the figures."""
