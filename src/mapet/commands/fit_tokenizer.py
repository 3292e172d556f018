"""Command: frozen teacher features -> a codebook of visual tokens."""

from typing import TYPE_CHECKING

from mapet.commands.command import command
from mapet.config.tokenizers import FitTokenizerConfig

if TYPE_CHECKING:
    from mapet.tokenizers.tokenizer import Tokenizer


@command(FitTokenizerConfig, distributed=True)
def fit_tokenizer(config: FitTokenizerConfig) -> "Tokenizer":
    """Cluster a frozen teacher's patch features into a codebook of visual tokens.

    Example:
      mapet fit-tokenizer --images PHOTOS --out runs/tokenizer
      mapet fit-tokenizer --images PHOTOS --out runs/kclip --teacher resnet50x64_clip.openai --kmeans-n-init 5
    """
    from mapet.tokenizers import stages

    return stages.fit_tokenizer(config)
