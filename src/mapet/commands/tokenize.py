"""Command: the token ids of every image, once, into a memory-mapped store."""

from typing import TYPE_CHECKING

from mapet.commands.command import command
from mapet.config.tokenizers import TokenizeConfig

if TYPE_CHECKING:
    from mapet.data.token_store import TokenStore


@command(TokenizeConfig, distributed=True)
def tokenize(config: TokenizeConfig) -> "TokenStore":
    """Store the visual tokens of every image, bound to the codebook and the list of images.

    Example:
      mapet tokenize --images PHOTOS --tokenizer runs/tokenizer --out runs/tokens
      mapet tokenize --images PHOTOS --tokenizer runs/tokenizer --out runs/tokens --views random-crop --num-views 8
    """
    from mapet.tokenizers import stages

    return stages.tokenize(config)
