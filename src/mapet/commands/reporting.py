"""Reports: of a run, or of several side by side, as a page, live or as files of its figures; and whether a tokenizer is any good."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from matplotlib.figure import Figure
from torch import Tensor

from mapet.config.pretraining import ReportConfig
from mapet.config.tokenizers import InspectTokenizerConfig
from mapet.data.image_list import ImageList
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.evaluation import inspection
from mapet.evaluation.datasets import LabeledSet, heldout_mask
from mapet.evaluation.inspection import TokenSample
from mapet.evaluation.token_metrics import TokenMetrics, compute_token_metrics, nearest_codes, token_warnings
from mapet.files import atomic_write, create_output_dir, is_empty_dir, write_json, write_text
from mapet.reports import plots
from mapet.reports.evaluation import tokenizer_markdown, tokenizer_metrics
from mapet.reports.figures import patches_and_tokens, plot_run, plot_tokens, step_through
from mapet.reports.page import LiveServer, ReportImage, RunView, page, rasterize
from mapet.reports.run import STEP_THROUGH, TOKENIZER_METRICS, RunFiles
from mapet.run_state import check_is_pretraining, pretrain_folder, read_command
from mapet.tokenizers.tokenizer import Tokenizer, load_tokenizer
from mapet.training.tasks.pretraining import load_run

log = logging.getLogger("mapet")
SHOWN_IMAGES = 6
STABILITY_IMAGES = 250
"""Of the sample; each goes through the teacher seven times. 250 images of 196 patches tell a share to better than 1 %."""
IMAGES_PER_CLASS = 5
"""Fewer, on average, and a class cannot be learned from its images."""
SHOWN_CODES, NEAREST = 12, 8
"""Codes of the figure of nearest codes, and how many of each."""


def report(config: ReportConfig) -> Path | None:
    """Write or serve the page, or write the figures."""
    if config.serve:
        _serve(config.run[0])
        return None
    out, figures_dir = config.out, config.figures_dir
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise MapetError(f"{option('out')} {out} must end in .html", field="out", value=out)
    if out is not None and out.exists():
        raise MapetError(f"{out} already exists: nothing is overwritten. Choose another {option('out')}")
    if figures_dir is not None:
        create_output_dir(figures_dir, create=False)
    opened = [pretrain_folder(folder).resolve() for folder in config.run]
    if twice := [str(given) for given, folder in zip(config.run, opened, strict=True) if opened.count(folder) > 1]:
        raise MapetError(f"{' and '.join(twice)} are the same run: give each once", field="run", value=config.run)
    views = [RunView.saved(RunFiles.open(folder)) for folder in config.run]
    for view in views if config.figures else ():
        try:
            view.images, view.step_through = _draw_run(config, view.files.folder)
        except MapetError as error:
            if figures_dir is not None:
                raise
            log.warning("%s: no new figures: %s", view.files.given, error)
            view.notes.append(f"No new figures: {error}")
    if figures_dir is not None:
        pictures = {f"{name}.png": image for name, image in views[0].images}
        with atomic_write(figures_dir) as temporary:
            temporary.mkdir()
            (temporary / STEP_THROUGH).write_text(json.dumps(views[0].step_through) + "\n", encoding="utf-8")
            for name, image in pictures.items():
                image.save(temporary / name)
        log.info("in %s: %s", figures_dir, ", ".join([STEP_THROUGH, *pictures]))
    if out is not None:
        write_text(out, page(views))
        log.info("%s: %.2g MB", out, out.stat().st_size / 1e6)
    return out or figures_dir


def _draw_run(config: ReportConfig, folder: Path) -> tuple[list[ReportImage], dict[str, Any]]:
    """Draw the figures of a run and collect its step-through, from its newest weights.

    Raises:
        MapetError: no weights, or images that can't be read.
    """
    compute = ComputeContext.from_options(config.device, "float32")
    run = load_run(folder, with_teacher=True, allow=config.trust_teacher)
    images = list_images(config.images or run.config.images)
    model, tokenizer = run.model.to(compute.device), run.tokenizer.to(compute.device)
    order = run.config.patch_order
    inspected = inspection.inspect_model(model, tokenizer, images, compute, SHOWN_IMAGES, order)
    names = [images.id(index) for index in inspected.sample.image_index[:SHOWN_IMAGES].tolist()]
    drawn = [rasterize(name, figure) for name, figure in plot_run(inspected, model, images, compute).items()]
    return drawn, step_through(inspected, names, model.objective)


def _serve(folder: Path) -> None:
    """Serve the live page of a run until Ctrl-C."""
    if folder.is_file():
        raise MapetError(f"{folder} is a file: give the run's folder")
    if not (is_empty_dir(folder) or read_command(folder) in ("run", "demo")):  # these may start to pre-train
        check_is_pretraining(folder)
    with LiveServer(folder) as server:
        waiting = "" if RunFiles(folder).recipe else ", waiting for a run there"
        log.info("%s shows %s%s; Ctrl-C ends this, not the run", server.url, folder, waiting)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            log.info("ended")


def inspect_tokenizer(config: InspectTokenizerConfig) -> list[Path]:
    """Measure a tokenizer on a sample of images, and write metrics, warnings and figures; return their paths."""
    compute = ComputeContext.from_options(precision="float32")
    tokenizer = load_tokenizer(config.tokenizer, trusted_teacher=config.trust_teacher).to(compute.device)
    sample, measures = _measure(config, tokenizer, compute)
    figures = _plot(sample, tokenizer)
    for name, value in tokenizer_metrics(measures).items():
        log.info("%-28s %s", name, value)
    poor = list(token_warnings(measures))
    for line in poor:
        log.warning("%s", line)
    if not poor:
        log.info("no warnings")
    about = {"tokenizer": str(config.tokenizer), "hash": tokenizer.hash, "images": config.images}
    content = about | {"warnings": poor, "measures": asdict(measures)}
    names = [TOKENIZER_METRICS, "tokenizer_report.md", *(f"{name}.png" for name in figures)]
    metrics, markdown, *pictures = paths = [config.out / name for name in names]
    write_json(metrics, content)
    write_text(markdown, tokenizer_markdown(measures, poor, f"Tokenizer {config.tokenizer}"))
    for path, figure in zip(pictures, figures.values(), strict=True):
        plots.save_figure(figure, path)
    log.info("in %s: %s", config.out, ", ".join(path.name for path in paths))
    return paths


def _measure(
    config: InspectTokenizerConfig, tokenizer: Tokenizer, compute: ComputeContext
) -> tuple[TokenSample, TokenMetrics]:
    """Tokenize a sample of the images, and a part of it under perturbations; return its tokens and their metrics."""
    images = list_images(config.images)
    drawn = np.random.default_rng(0).permutation(len(images))[: config.sample]
    sampler = inspection.TokenSampler(tokenizer, compute)
    num_patches = tokenizer.grid[0] * tokenizer.grid[1]
    num_pixels = inspection.num_images_for_figures(SHOWN_IMAGES, tokenizer.vocab_size, num_patches)
    sample = sampler.sample(images, drawn.tolist(), num_pixels)
    few = drawn[:STABILITY_IMAGES].tolist()
    pairs = sampler.sample_perturbed(images, few)
    if config.tokens is not None:
        try:
            store = TokenStore.open(config.tokens, images, tokenizer.hash)
        except MapetError as error:
            hint = f"Or leave out {option('tokens')}: the tokenizer is measured all the same"
            raise MapetError(f"{error}. {hint}") from None
        pairs["stored"] = sampler.compare_stored(images, store, few)
    labels, is_test = _labels(images, drawn, sample.image_index)
    return sample, compute_token_metrics(sample.ids, tokenizer.vocab_size, pairs, labels, is_test)


def _labels(
    images: ImageList, drawn: Int[np.ndarray, " n"], readable: Int[Tensor, " m"]
) -> tuple[Int[Tensor, " m"] | None, Bool[Tensor, " m"] | None]:
    """Return the classes of the readable ones of the images drawn, and which of them are test images.

    Returns:
        (None, None) without labels, or with fewer than `IMAGES_PER_CLASS` images per class drawn.
    """
    if (found := images.classes()) is None:
        return None, None
    classes, labels = found
    num_present = len(np.unique(labels[drawn]))
    if num_present <= 1 or len(drawn) < IMAGES_PER_CLASS * num_present:
        enough = option("sample", IMAGES_PER_CLASS * len(classes))
        log.info(
            "%d images of %d classes: too few to compare tokens with classes; %s would do",
            len(drawn), num_present, enough,
        )  # fmt: skip
        return None, None
    is_test = np.zeros(len(images), dtype=bool)
    is_test[drawn] = heldout_mask(LabeledSet(images, classes, labels).subset(drawn))
    return torch.from_numpy(labels)[readable], torch.from_numpy(is_test)[readable]


def _plot(sample: TokenSample, tokenizer: Tokenizer) -> dict[str, Figure]:
    """Draw the use of codes, token maps, patches by code and, where codes are centroids, the nearest codes; by name."""
    vocab_size = tokenizer.vocab_size
    figures = {"code_usage": plots.plot_code_usage(torch.bincount(sample.ids.flatten(), minlength=vocab_size))}
    figures |= plot_tokens(sample, SHOWN_IMAGES)
    centroids = tokenizer.quantizer.centroids  # codes that are no centroids (FSQ, LFQ) have none
    if centroids is not None and vocab_size > 1:
        patches, tokens = patches_and_tokens(sample)
        counts = torch.bincount(tokens, minlength=vocab_size)
        codes = plots.spread_of_codes(counts, SHOWN_CODES)
        distances, nearest = nearest_codes(centroids.cpu(), codes, NEAREST)
        prototypes = plots.mean_patches(patches, tokens, vocab_size)
        figures["nearest_codes"] = plots.plot_nearest_codes(prototypes, counts, codes, nearest, distances)
    return figures
