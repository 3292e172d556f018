"""The tokenizer of BEiT v2, with a built-in codebook: a published file, or one that `train-tokenizer` made."""

from mapet.tokenizers.vqkd import VQKD, vqkd_encoder


def build(checkpoint: str | None) -> VQKD:
    """Read the tokenizer; see `vqkd_encoder`."""
    return vqkd_encoder(checkpoint)
