"""Stage: is the tokenizer any good, and what did the model learn? In pictures and, for a tokenizer, in figures."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapet.commands.command import command
from mapet.config.inspect import InspectConfig, Looking
from mapet.errors import MapetError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mapet.device import Compute

log = logging.getLogger("mapet")
STABILITY_IMAGES = 250
"""Of the sample; each goes through the teacher seven times. 250 images of 196 patches tell a share to better than 1 %."""
IMAGES_PER_CLASS = 5
"""Fewer, on average, and a class cannot be learned from its images."""


@command(InspectConfig)
def inspect(config: InspectConfig) -> list[Path]:
    """Pictures of a run (words, predictions, attention, neighbours, ...), which its reports show, or a tokenizer's tokenizer_report.

    Example:
      mapet inspect --run runs/photos --out pictures
      mapet inspect --tokenizer runs/photos/tokenizer --images PHOTOS --out health
    """
    from matplotlib import pyplot

    from mapet.device import Compute
    from mapet.files import atomic, new_folder

    compute = Compute.choose(config.device, "float32")
    new_folder(config.out, create=False)
    texts, figures = (_look_at_run if config.tokenizer is None else _measure_tokenizer)(config, compute)
    with atomic(config.out) as temporary:
        temporary.mkdir()
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name, figure in figures.items():
            figure.savefig(temporary / f"{name}.png", dpi=120)
            pyplot.close(figure)
    paths = [config.out / name for name in [*texts, *(f"{name}.png" for name in figures)]]
    log.info("in %s: %s", config.out, ", ".join(path.name for path in paths))
    return paths


def _look_at_run(config: InspectConfig, compute: "Compute") -> tuple[dict[str, str], dict[str, "Figure"]]:
    """The step-through as JSON, and the pictures of a run."""
    import json

    from mapet.reports.run import STEP_THROUGH

    assert config.run is not None
    figures, steps = look(config.run, config, compute)
    return {STEP_THROUGH: json.dumps(steps) + "\n"}, figures


def look(folder: Path, config: Looking, compute: "Compute") -> tuple[dict[str, "Figure"], dict[str, Any]]:
    """The pictures of a run by name, and its step-through, from its newest weights.

    Raises:
        MapetError: no run, no weights, or images that can't be looked at.
    """
    from mapet.data.sources import scan
    from mapet.evaluation.look import look_at
    from mapet.reports.run_pictures import pictures_of
    from mapet.reports.step_through import step_through
    from mapet.training.build import load_run

    run = load_run(folder, with_teacher=True, allow=config.trust_teacher).to(compute.device)
    images = scan(config.images or run.config.images)
    found = look_at(run.model, run.tokenizer, images, compute, config.num_images, run.config.patch_order, config.seed)
    names = [images.id(int(i)) for i in found.image_index[: found.shown]]
    figures = pictures_of(found, run.model, images, compute, config.num_workers)
    return figures, step_through(found, names, run.model.objective)


def _measure_tokenizer(config: InspectConfig, compute: "Compute") -> tuple[dict[str, str], dict[str, "Figure"]]:
    """The health of a tokenizer as JSON and Markdown, and its pictures."""
    import json
    from dataclasses import asdict

    import numpy as np
    import torch

    from mapet.data.sources import scan
    from mapet.data.token_store import TokenStore
    from mapet.evaluation.features import LabelledSet, split
    from mapet.evaluation.look import enough_images
    from mapet.evaluation.token_views import Sampler
    from mapet.evaluation.tokens import measure, nearest_codes, warnings
    from mapet.reports import pictures, tokenizer_report
    from mapet.tokenizers.codebook import load_tokenizer

    assert config.tokenizer is not None and config.images is not None
    tokenizer = load_tokenizer(config.tokenizer, allow=config.trust_teacher, checkpoint=config.teacher_checkpoint)
    tokenizer.to(compute.device)
    grid, vocab_size = tokenizer.grid, tokenizer.vocab_size
    images = scan(config.images)
    chosen = np.random.default_rng(config.seed).permutation(len(images))[: config.sample]
    sample, few = images.subset(chosen), chosen[:STABILITY_IMAGES]
    sampler = Sampler(tokenizer, compute, config.batch_size, config.num_workers)
    words = sampler.words(sample, enough_images(config.num_images, vocab_size, grid[0] * grid[1], len(sample)))
    views = sampler.views(images.subset(few), config.seed)
    if config.tokens is not None:
        try:
            store = TokenStore.open(config.tokens, images, tokenizer.hash)
        except MapetError as error:
            raise MapetError(f"{error}. Or leave out --tokens: the words are measured all the same") from None
        views["stored"] = sampler.stored(images, store, few)

    labels = test = None
    if (found := images.classes()) is not None:
        data = LabelledSet(sample, found[0], found[1][chosen])
        if len(sample) >= IMAGES_PER_CLASS * (present := len(np.unique(data.labels))) and present > 1:
            held = split(data)[1].images
            held_ids = {held.id_bytes(index) for index in range(len(held))}
            test = torch.tensor([sample.id_bytes(int(index)) in held_ids for index in words.image_index])
            labels = torch.from_numpy(data.labels)[words.image_index]
        else:
            log.info(
                "%d images of %d classes: too few to hold words against classes; --sample %d would do",
                len(sample), present, IMAGES_PER_CLASS * len(found[0]),
            )  # fmt: skip
    measures = measure(words.ids, vocab_size, views, labels, test, config.seed)
    found_poor = warnings(measures)
    for name, value, _ in tokenizer_report.rows(measures):
        log.info("%-28s %s", name, value)
    for line in found_poor:
        log.warning("%s", line)
    if not found_poor:
        log.info("no warnings")

    tokens = words.ids.flatten(1)
    pictured, shown = tokens[: len(words.images)].flatten(), slice(0, config.num_images)
    patches = pictures.patchify(words.images, grid).flatten(0, 1)
    counts = torch.bincount(tokens.flatten(), minlength=vocab_size)
    figures = {
        "usage": pictures.usage_histogram(counts),
        "token_maps": pictures.token_maps(words.images[shown], tokens[shown], grid, vocab_size),
        "words": pictures.code_montage(patches, pictured, vocab_size),
    }
    centroids = tokenizer.centroids  # words that are no nearest centroids have none
    if centroids is not None and vocab_size > 1:
        in_pictures = torch.bincount(pictured, minlength=vocab_size)
        codes = pictures.spread_of_codes(in_pictures, 12)
        distances, nearest = nearest_codes(centroids.cpu(), codes, 8)
        prototypes = pictures.mean_patches(patches, pictured, vocab_size)
        figures["nearest_words"] = pictures.nearest_codes(prototypes, in_pictures, codes, nearest, distances)
    record = {
        "tokenizer": str(config.tokenizer),
        "hash": tokenizer.hash,
        "images": str(config.images),
        "seed": config.seed,
    }
    texts = {
        "health.json": json.dumps(record | {"warnings": found_poor, "measures": asdict(measures)}, indent=2) + "\n",
        "health.md": tokenizer_report.markdown(measures, found_poor, f"Visual words of {config.tokenizer}"),
    }
    return texts, figures
