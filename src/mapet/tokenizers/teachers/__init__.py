"""Encoders that can be teachers; `mapet.tokenizers.tokenizer.BUILDERS` says what they must be."""
