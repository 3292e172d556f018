"""Encoders that can be teachers: one module each, found by its name.

A module `NAME.py` has a function `build`; the keywords it takes, among those of `make_teacher` and `grid`, are the options
that `--teacher NAME` uses. It returns a module that maps (B, C, h, w) floats in [0, 1] to features (B, F, rows, columns),
with these attributes where they apply:

    image_size   (h, w) of its input, if not the student's
    metadata     what the tokenizer's JSON should say of it
    codebook     (K, F) tensor: a token is the nearest code by cosine
    num_logits   a token is the largest of so many features
"""
