"""Stage: a tokenizer of one's own, learned by distilling a teacher through a codebook (VQ-KD)."""

from pathlib import Path

from mapet.commands.command import command
from mapet.config.tokenizers import TrainTokenizerConfig


@command(TrainTokenizerConfig, distributed=True)
def train_tokenizer(config: TrainTokenizerConfig) -> Path:
    """Train a VQ-KD tokenizer: a ViT and codes that keep what a teacher sees; returns its safetensors file.

    Example:
      mapet train-tokenizer --images PHOTOS --out runs/vqkd --teacher vit_base_patch16_clip_224.openai
      mapet train-tokenizer runs/vqkd/config.yaml --resume
    """
    from mapet.training.tasks.vqkd import VQKDTask
    from mapet.training.trainer import Trainer

    return Trainer(VQKDTask(), config).fit()
