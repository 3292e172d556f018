"""Whether a tokenizer is any good: metrics, figures and warnings in words."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mapet.commands.command import command
from mapet.config.tokenizers import InspectTokenizerConfig
from mapet.errors import MapetError, option

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int
    from matplotlib.figure import Figure
    from torch import Tensor

    from mapet.data.image_list import ImageList
    from mapet.device import Compute
    from mapet.evaluation.tokens import Measures, Words
    from mapet.tokenizers.tokenizer import Tokenizer

log = logging.getLogger("mapet")
STABILITY_IMAGES = 250
"""Of the sample; each goes through the teacher seven times. 250 images of 196 patches tell a share to better than 1 %."""
IMAGES_PER_CLASS = 5
"""Fewer, on average, and a class cannot be learned from its images."""
SHOWN_IMAGES = 6
SHOWN_CODES, NEAREST = 12, 8
"""Codes of the figure of nearest codes, and how many of each."""


@command(InspectTokenizerConfig)
def inspect_tokenizer(config: InspectTokenizerConfig) -> list[Path]:
    """Measure a tokenizer: use of its codes, stability, what tokens say of neighbours, positions and classes; with figures.

    Example:
      mapet inspect-tokenizer runs/photos/tokenizer --images PHOTOS --out runs/tokenizer-report
    """
    from mapet.device import Compute
    from mapet.files import new_folder
    from mapet.tokenizers.tokenizer import load_tokenizer

    compute = Compute.choose(precision="float32")
    new_folder(config.out, create=False)
    tokenizer = load_tokenizer(config.tokenizer, trusted_teacher=config.trust_teacher).to(compute.device)
    words, measures = _measure(config, tokenizer, compute)
    return _write(config, tokenizer, measures, _plot(words, tokenizer))


def _measure(config: InspectTokenizerConfig, tokenizer: "Tokenizer", compute: "Compute") -> "tuple[Words, Measures]":
    """Tokenize a sample of the images, as they are and changed a little, and measure the tokens."""
    import numpy as np

    from mapet.data.sources import scan
    from mapet.data.token_store import TokenStore
    from mapet.evaluation.look import enough_images
    from mapet.evaluation.tokens import Sampler, measure

    images = scan(config.images)
    chosen = np.random.default_rng(0).permutation(len(images))[: config.sample]
    sample, few = images.subset(chosen), chosen[:STABILITY_IMAGES]
    sampler = Sampler(tokenizer, compute)
    patches = tokenizer.grid[0] * tokenizer.grid[1]
    words = sampler.words(sample, enough_images(SHOWN_IMAGES, tokenizer.vocab_size, patches, len(sample)))
    views = sampler.views(images.subset(few))
    if config.tokens is not None:
        try:
            store = TokenStore.open(config.tokens, images, tokenizer.hash)
        except MapetError as error:
            raise MapetError(
                f"{error}. Or leave out {option('tokens')}: the tokenizer is measured all the same"
            ) from None
        views["stored"] = sampler.stored(images, store, few)
    labels, test = _labels(images, chosen, words.image_index)
    return words, measure(words.ids, tokenizer.vocab_size, views, labels, test)


def _labels(
    images: "ImageList", chosen: "Int[np.ndarray, ' n']", measured: "Int[Tensor, ' m']"
) -> "tuple[Tensor | None, Tensor | None]":
    """Return the classes of measured images and which are to test on; (None, None) if there are too few of each class."""
    import numpy as np
    import torch

    from mapet.evaluation.datasets import LabelledSet, split

    found = images.classes()
    if found is None:
        return None, None
    classes, labels = found
    sample = images.subset(chosen)
    data = LabelledSet(sample, classes, labels[chosen])
    present = len(np.unique(data.labels))
    if present <= 1 or len(sample) < IMAGES_PER_CLASS * present:
        log.info(
            "%d images of %d classes: too few to compare tokens with classes; %s would do",
            len(sample), present, option("sample", IMAGES_PER_CLASS * len(classes)),
        )  # fmt: skip
        return None, None
    held_out = split(data)[1].images
    ids = {held_out.ids[index] for index in range(len(held_out))}
    test = torch.tensor([sample.ids[int(index)] in ids for index in measured])
    return torch.from_numpy(data.labels)[measured], test


def _plot(words: "Words", tokenizer: "Tokenizer") -> "dict[str, Figure]":
    import torch

    from mapet.evaluation.tokens import nearest_codes
    from mapet.reports import plots

    vocab_size, tokens = tokenizer.vocab_size, words.ids.flatten(1)
    shown, pictured = slice(0, SHOWN_IMAGES), tokens[: len(words.images)].flatten()
    patches = plots.patchify(words.images, tokenizer.grid).flatten(0, 1)
    figures = {
        "code_usage": plots.plot_code_usage(torch.bincount(tokens.flatten(), minlength=vocab_size)),
        "token_maps": plots.plot_token_maps(words.images[shown], tokens[shown], tokenizer.grid, vocab_size),
        "patches_by_code": plots.plot_patches_by_code(patches, pictured, vocab_size),
    }
    centroids = tokenizer.centroids  # codes that are no centroids (FSQ, LFQ) have none
    if centroids is not None and vocab_size > 1:
        counts = torch.bincount(pictured, minlength=vocab_size)
        codes = plots.spread_of_codes(counts, SHOWN_CODES)
        distances, nearest = nearest_codes(centroids.cpu(), codes, NEAREST)
        prototypes = plots.mean_patches(patches, pictured, vocab_size)
        figures["nearest_codes"] = plots.plot_nearest_codes(prototypes, counts, codes, nearest, distances)
    return figures


def _write(
    config: InspectTokenizerConfig, tokenizer: "Tokenizer", measures: "Measures", figures: "dict[str, Figure]"
) -> list[Path]:
    """Log the metrics and the warnings, and write them and the figures into the new folder."""
    import json
    from dataclasses import asdict

    from mapet.evaluation.tokens import warnings
    from mapet.files import atomic
    from mapet.reports.evaluation import tokenizer_markdown, tokenizer_metrics
    from mapet.reports.plots import save_figure
    from mapet.reports.run import TOKENIZER_METRICS

    for name, value in tokenizer_metrics(measures).items():
        log.info("%-28s %s", name, value)
    poor = list(warnings(measures))
    for line in poor:
        log.warning("%s", line)
    if not poor:
        log.info("no warnings")
    about = {"tokenizer": str(config.tokenizer), "hash": tokenizer.hash, "images": config.images}
    record = about | {"warnings": poor, "measures": asdict(measures)}
    texts = {
        TOKENIZER_METRICS: json.dumps(record, indent=2) + "\n",
        "tokenizer_report.md": tokenizer_markdown(measures, poor, f"Tokenizer {config.tokenizer}"),
    }
    for name, text in texts.items():
        with atomic(config.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for name, figure in figures.items():
        save_figure(figure, config.out / f"{name}.png")
    paths = [config.out / name for name in [*texts, *(f"{name}.png" for name in figures)]]
    log.info("in %s: %s", config.out, ", ".join(path.name for path in paths))
    return paths
