"""Options of `train-tokenizer`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mapet.config.shared import (
    FrozenTeacher,
    TrainerConfig,
    Views,
    VocabSize,
)
from mapet.config.types import Size, Source


class TrainTokenizerConfig(FrozenTeacher, Views, TrainerConfig):
    """Options of `train-tokenizer`. Defaults are the released recipe's (BEiT v2, arXiv 2208.06366) unless they say
    otherwise."""

    images: Source
    """Folder of images, text file of paths, .tar shards (also by URL), or hf:NAME[:SPLIT] of Hugging Face's `datasets`."""
    out: Path
    """New run folder; the tokenizer is OUT/vqkd/vqkd.safetensors."""
    teacher: str = "pixels"
    """Frozen encoder whose features the codes are to keep: 'pixels' (label-free), a timm model (the paper's:
    vit_base_patch16_clip_224.openai), or package.module:function."""
    image_size: Size = (224, 224)
    """Side of the square input, pixels: the student's, and the tokenizer's from then on."""
    patch_size: PositiveInt = 16
    """Side of the student's patches, pixels."""
    channels: PositiveInt = 3
    """Channels of the images: 1 grey, 3 RGB, others from .npy arrays."""

    model: str = "vit_tiny_patch16_224"
    """The tokenizer's encoder, a plain timm ViT with 64 numbers a head; the released one is vit_base_patch16_224."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further keywords of the ViT, e.g. embed_dim=128 depth=6 num_heads=2."""
    decoder_depth: PositiveInt = 3
    """Blocks of the decoder, which is as wide as the encoder and not needed afterwards."""
    vocab_size: VocabSize | None = None
    """V, number of codes; automatic: a power of two up to the paper's 8192, at least 64 patches for each."""
    codebook_dim: PositiveInt = 32
    """Numbers of a code."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the codes' moving averages, a step."""
    dead_code_threshold: float = Field(default=0.05, ge=0, lt=1)
    """A code with less than this part of an even share of the patches is moved to where one is; 0 for never, as released."""

    epochs: PositiveInt = 100
    """Passes over the images."""
    batch_size: PositiveInt = 64
    """Images a step (released: 512)."""
    lr: PositiveFloat | None = None
    """Peak learning rate; automatic: 2e-4 * sqrt(batch / 512)."""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW's."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the encoder's last block."""
    views: Literal["center", "center-flip", "random-crop"] = "random-crop"
    """center: largest centred box; center-flip: that and its mirror image; random-crop: random boxes, mirrored half the time."""
    min_crop_scale: float = Field(default=0.08, gt=0, le=1)
    """Smallest random box, as a share of the centred one's area (for random-crop)."""
    seed: NonNegativeInt = 0
    """Seed of weights, order, views and new codes."""

    @model_validator(mode="after")
    def _square(self) -> "TrainTokenizerConfig":
        height, width = self.image_size
        if height != width or height % self.patch_size:
            raise ValueError(
                f"image size {height} x {width}: a VQ-KD tokenizer takes squares that the patch size {self.patch_size} divides"
            )
        return self
