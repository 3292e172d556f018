"""Command: features of a folder of images, by any backbone."""

from pathlib import Path

from mapet.commands.command import command
from mapet.config.evaluation import EmbedConfig


@command(EmbedConfig)
def embed(config: EmbedConfig) -> Path:
    """Features of every image by a frozen backbone, with ids, as NumPy or Parquet files; an interrupted job can be resumed.

    Example:
      mapet embed --backbone runs/photos --images PHOTOS --out features
      mapet embed --backbone timm:vit_small_patch16_224.augreg_in21k --images PHOTOS --out features --format parquet --pool token
      mapet embed --backbone runs/photos --images PHOTOS --out features --resume
    """
    from mapet.evaluation import embeddings

    return embeddings.embed(config)
