"""Reports of runs, as a page, a live page or figures; and the report of a tokenizer."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
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
from mapet.evaluation.token_metrics import TokenMetrics, compute_token_metrics, token_warnings
from mapet.files import atomic_write, create_output_dir, is_empty_dir, write_json, write_text
from mapet.reports import plots
from mapet.reports.evaluation import format_token_metrics, render_tokenizer_report
from mapet.reports.figures import plot_run, plot_tokenizer, step_through
from mapet.reports.page import LiveServer, RunView, rasterize, render_page
from mapet.reports.run import STEP_THROUGH, TOKENIZER_METRICS, TOKENIZER_REPORT, RunFiles
from mapet.run_state import check_is_pretraining, pretrain_folder, read_command
from mapet.tokenizers.tokenizer import Tokenizer, load_tokenizer
from mapet.training.tasks.pretraining import load_run

log = logging.getLogger("mapet")
NUM_SHOWN = 6
"""Images of figures and of the step-through."""
NUM_STABILITY_IMAGES = 250
"""Images of the sample that are perturbed; each goes through the teacher seven times. With 196 patches each, a fraction is known
to better than 1 %."""
MIN_IMAGES_PER_CLASS = 5
"""Fewer, on average, and a class cannot be learned from its images."""


def report(config: ReportConfig) -> Path | None:
    """Write the page or the figures of runs, or serve the live page of one.

    Returns:
        the page, or the folder of the figures; None after serving.
    """
    if config.serve:
        _serve(config.run[0])
        return None
    out, figures_dir = config.out, config.figures_dir
    _check_paths(config)
    views = [RunView.from_files(RunFiles.open(folder)) for folder in config.run]
    for view in views if config.figures else ():
        try:
            view.images, view.step_through = _draw_run(config, view.files.folder)
        except MapetError as error:
            if figures_dir is not None:
                raise
            log.warning("%s: no new figures: %s", view.files.given, error)
            view.notes.append(f"No new figures: {error}")
    if figures_dir is not None:
        _write_figures(views[0], figures_dir)
    if out is not None:
        write_text(out, render_page(views))
        log.info("%s: %.2g MB", out, out.stat().st_size / 1e6)
    return out or figures_dir


def _check_paths(config: ReportConfig) -> None:
    """Check that the outputs are new and the runs different ones.

    Raises:
        MapetError: they are not, or `out` is no HTML file.
    """
    out, folders = config.out, [pretrain_folder(folder).resolve() for folder in config.run]
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise MapetError(f"{option('out')} {out} must end in .html", field="out", value=out)
    if out is not None and out.exists():
        message = f"{out} already exists, and nothing is overwritten: choose another {option('out')}"
        raise MapetError(message, field="out", value=out)
    if config.figures_dir is not None:
        create_output_dir(config.figures_dir, create=False)
    duplicates = [str(run) for run, folder in zip(config.run, folders, strict=True) if folders.count(folder) > 1]
    if duplicates:
        message = f"{' and '.join(duplicates)} are the same run: give each run once"
        raise MapetError(message, field="run", value=config.run)


def _draw_run(config: ReportConfig, folder: Path) -> tuple[dict[str, Image.Image], dict[str, Any]]:
    """Draw the figures of a run, by name, and collect its step-through, from its newest weights.

    Raises:
        MapetError: there are no weights, or the images can't be read.
    """
    compute = ComputeContext.from_options(config.device, "float32")
    run = load_run(folder, with_teacher=True, allow=config.trust_teacher)
    images = list_images(config.images or run.config.images)
    model, tokenizer = run.model.to(compute.device), run.tokenizer.to(compute.device)
    inspected = inspection.inspect_model(model, tokenizer, images, compute, NUM_SHOWN, run.config.patch_order)
    names = [images.id(index) for index in inspected.sample.image_index[:NUM_SHOWN].tolist()]
    figures = {name: rasterize(figure) for name, figure in plot_run(inspected, model, images, compute).items()}
    return figures, step_through(inspected, names, model.objective)


def _write_figures(view: RunView, folder: Path) -> None:
    """Write the figures of a run as PNG files, and its step-through as JSON, into a new folder."""
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        (temporary / STEP_THROUGH).write_text(json.dumps(view.step_through) + "\n", encoding="utf-8")
        for name, image in view.images.items():
            image.save(temporary / f"{name}.png")
    log.info("in %s: %s", folder, ", ".join([STEP_THROUGH, *(f"{name}.png" for name in view.images)]))


def _serve(folder: Path) -> None:
    """Serve the live page of a run until Ctrl-C.

    The folder may be missing or empty, or one of `run` or `demo`, which start to pre-train later.
    """
    if folder.is_file():
        raise MapetError(f"{folder} is a file: give the run's folder", field="run", value=folder)
    if not (is_empty_dir(folder) or read_command(folder) in ("run", "demo")):
        check_is_pretraining(folder)
    with LiveServer(folder) as server:
        waiting = "" if RunFiles(folder).config else ", waiting for a run there"
        log.info("%s shows %s%s; Ctrl-C ends this, not the run", server.url, folder, waiting)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            log.info("ended")


def inspect_tokenizer(config: InspectTokenizerConfig) -> list[Path]:
    """Measure a tokenizer on a sample of images, and write metrics, warnings and figures; return their paths."""
    compute = ComputeContext.from_options(precision="float32")
    tokenizer = load_tokenizer(config.tokenizer, trusted_teacher=config.trust_teacher).to(compute.device)
    sample, metrics = _measure(config, tokenizer, compute)
    figures = plot_tokenizer(sample, tokenizer.quantizer.centroids, NUM_SHOWN)
    for name, value in format_token_metrics(metrics).items():
        log.info("%-28s %s", name, value)
    warnings = list(token_warnings(metrics))
    for warning in warnings:
        log.warning("%s", warning)
    if not warnings:
        log.info("no warnings")
    content = {"tokenizer": str(config.tokenizer), "hash": tokenizer.hash, "images": config.images}
    write_json(config.out / TOKENIZER_METRICS, content | {"warnings": warnings, "measures": asdict(metrics)})
    write_text(config.out / TOKENIZER_REPORT, render_tokenizer_report(metrics, warnings, str(config.tokenizer)))
    paths = [config.out / name for name in (TOKENIZER_METRICS, TOKENIZER_REPORT)]
    for name, figure in figures.items():
        paths.append(config.out / f"{name}.png")
        plots.save_figure(figure, paths[-1])
    log.info("in %s: %s", config.out, ", ".join(path.name for path in paths))
    return paths


def _measure(
    config: InspectTokenizerConfig, tokenizer: Tokenizer, compute: ComputeContext
) -> tuple[TokenSample, TokenMetrics]:
    """Tokenize a sample of the images, and a part of it under perturbations; return its tokens and their metrics.

    Raises:
        MapetError: more than half of the images cannot be read, or the token store is not of these images and this tokenizer.
    """
    images = list_images(config.images)
    drawn = np.random.default_rng(0).permutation(len(images))[: config.sample]
    sampler = inspection.TokenSampler(tokenizer, compute)
    num_patches = tokenizer.grid[0] * tokenizer.grid[1]
    num_pixels = inspection.num_images_for_figures(NUM_SHOWN, tokenizer.vocab_size, num_patches)
    sample = sampler.sample(images, drawn.tolist(), num_pixels)
    perturbed = drawn[:NUM_STABILITY_IMAGES].tolist()
    pairs = sampler.sample_perturbed(images, perturbed)
    if config.tokens is not None:
        try:
            store = TokenStore.open(config.tokens, images, tokenizer.hash)
        except MapetError as error:
            hint = f"Or omit {option('tokens')}: the tokenizer is measured all the same"
            raise MapetError(f"{error}. {hint}") from None
        pairs["stored"] = sampler.compare_stored(images, store, perturbed)
    labels, is_test = _labels(images, drawn, sample.image_index)
    return sample, compute_token_metrics(sample.ids, tokenizer.vocab_size, pairs, labels, is_test)


def _labels(
    images: ImageList, drawn: Int[np.ndarray, " n"], readable: Int[Tensor, " m"]
) -> tuple[Int[Tensor, " m"] | None, Bool[Tensor, " m"] | None]:
    """Return the classes of the readable ones of the images drawn, and which of them are test images.

    Returns:
        (None, None) without labels, or with fewer than `MIN_IMAGES_PER_CLASS` images per class drawn.
    """
    if (classes_and_labels := images.classes()) is None:
        return None, None
    classes, labels = classes_and_labels
    num_present = len(np.unique(labels[drawn]))
    if num_present <= 1 or len(drawn) < MIN_IMAGES_PER_CLASS * num_present:
        enough = option("sample", MIN_IMAGES_PER_CLASS * len(classes))
        log.info(
            "%d images of %d classes: too few to compare tokens with classes; %s would do",
            len(drawn), num_present, enough,
        )  # fmt: skip
        return None, None
    is_test = np.zeros(len(images), dtype=bool)
    is_test[drawn] = heldout_mask(LabeledSet(images, classes, labels).subset(drawn))
    return torch.from_numpy(labels)[readable], torch.from_numpy(is_test)[readable]
