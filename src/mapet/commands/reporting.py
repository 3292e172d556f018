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
from mapet.config.shared import AS_STORED
from mapet.config.tokenizers import InspectTokenizerConfig
from mapet.data.image_list import ImageList
from mapet.data.sources import list_as_trained
from mapet.data.token_store import TokenStore
from mapet.device import ComputeContext
from mapet.errors import MapetError, option
from mapet.evaluation import inspection
from mapet.evaluation.datasets import LabeledSet, heldout_mask
from mapet.evaluation.inspection import TokenSample
from mapet.evaluation.token_metrics import TokenMetrics, compute_token_metrics, token_warnings
from mapet.files import atomic_write, is_empty_dir, write_json, write_text
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
"""Images that the figures and the step-through show."""
NUM_STABILITY_IMAGES = 250
"""Images of the sample that are perturbed; each goes through the teacher seven times. With 196 patches each, a fraction is known
to better than 1 %."""
POLL_INTERVAL_S = 0.2
"""Seconds between looks of the live server for Ctrl-C."""
MIN_IMAGES_PER_CLASS = 5
"""Fewer, on average, and a class cannot be learned from its images."""


def report(config: ReportConfig) -> Path | None:
    """Write an HTML page of pre-training runs or the figures of one run, or serve the live page of one run.

    Figures and the step-through (an image's masked patches, predicted one after the other) are computed from the newest weights of each
    run. With `config.figures` False, or where they can't be computed, the page shows those in the run's folder, if there are any.

    Args:
        config: options of `mapet report`.

    Returns:
        The page `config.out`; without `out` the folder `config.figures_dir`; None after serving.

    Raises:
        MapetError: an output exists already; a run is given twice or can't be read; the figures for `figures_dir` can't be computed.
    """
    if config.serve:
        _serve(config.run[0])  # with `serve` the config has one run
        return None
    out, figures_dir = config.out, config.figures_dir
    _check_paths(config)
    views = [RunView.from_files(RunFiles.open(folder)) for folder in config.run]
    for view in views if config.figures else ():
        try:
            view.images, view.step_through = _draw_run(config, view.files.folder)
        except MapetError as error:
            if figures_dir is not None:
                raise  # the figures are what was asked for; a page is useful without them
            log.warning(
                "%s: no new figures, earlier ones are shown if there are any: %s", view.files.user_folder, error
            )
            view.notes.append(f"No new figures: {error}")
    if figures_dir is not None:
        _write_figures(views[0], figures_dir)  # with `figures_dir` the config has one run
    if out is not None:
        write_text(out, render_page(views))
        log.info("wrote %s (%.2g MB)", out, out.stat().st_size / 1e6)
    return out or figures_dir


def _check_paths(config: ReportConfig) -> None:
    """Check the paths of `report` before anything is computed.

    Raises:
        MapetError: `out` does not end in .html, `figures_dir` is a file or a folder that is not empty, or two of `run` are
            the same run (a `mapet run` folder and the `pretrain` folder in it are the same).
    """
    out, figures_dir = config.out, config.figures_dir
    folders = [pretrain_folder(folder).resolve() for folder in config.run]
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise MapetError(f"{option('out')} {out}: the name of the page must end in .html", field="out", value=out)
    if figures_dir is not None and not is_empty_dir(figures_dir):
        name = option("figures_dir")
        message = f"{name} {figures_dir} already exists, and nothing is overwritten: choose another {name}"
        raise MapetError(message, field="figures_dir", value=figures_dir)
    duplicates = [str(run) for run, folder in zip(config.run, folders, strict=True) if folders.count(folder) > 1]
    if duplicates:
        message = f"{option('run')}: {' and '.join(duplicates)} are the same run: give each run once"
        raise MapetError(message, field="run", value=config.run)


def _draw_run(config: ReportConfig, folder: Path) -> tuple[dict[str, Image.Image], dict[str, Any]]:
    """Compute the figures and the step-through of a run from its newest weights, in float32.

    Args:
        config: `device` and `images` (None: the images that the run was trained on) are used.
        folder: of the `pretrain` run.

    Returns:
        Name of a figure ('token_maps', ...) -> image; the step-through's data as JSON (see `figures.step_through`).

    Raises:
        MapetError: there are no weights, or the images can't be read.
    """
    compute = ComputeContext.from_options(config.device, "float32")
    run = load_run(folder, with_teacher=True)
    images = list_as_trained(config.images or run.config.images, run.config, run.tokenizer.read_options)
    model, tokenizer = run.model.to(compute.device), run.tokenizer.to(compute.device)
    inspected = inspection.inspect_model(model, tokenizer, images, compute, NUM_SHOWN, run.config.patch_order)
    names = [images.id(index) for index in inspected.sample.image_index[:NUM_SHOWN].tolist()]
    figures = {name: rasterize(figure) for name, figure in plot_run(inspected, model, images, compute).items()}
    return figures, step_through(inspected, names, model.objective)


def _write_figures(view: RunView, folder: Path) -> None:
    """Write the figures of a run, NAME.png, and its step-through, step_through.json, into a new folder, atomically."""
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        (temporary / STEP_THROUGH).write_text(json.dumps(view.step_through) + "\n", encoding="utf-8")
        for name, image in view.images.items():
            image.save(temporary / f"{name}.png")
    log.info("wrote into %s: %s", folder, ", ".join([STEP_THROUGH, *(f"{name}.png" for name in view.images)]))


def _serve(folder: Path) -> None:
    """Serve the live page of a pre-training run until Ctrl-C.

    Args:
        folder: of `mapet pretrain`, `run` or `demo`; it may be missing or empty, and `run` and `demo` may not have started to
            pre-train: the page then waits for the run.

    Raises:
        MapetError: the folder is a file or another command's folder.
    """
    if folder.is_file():
        raise MapetError(f"{option('run')} {folder} is a file: give the run's folder", field="run", value=folder)
    if not (is_empty_dir(folder) or read_command(folder) in ("run", "demo")):
        check_is_pretraining(folder)
    with LiveServer(folder) as server:
        waiting = "" if RunFiles(folder).config else " (no run has started there yet: the page waits for it)"
        log.info("%s shows %s%s; Ctrl-C stops this server, not the run", server.url, folder, waiting)
        try:
            server.serve_forever(poll_interval=POLL_INTERVAL_S)
        except KeyboardInterrupt:
            log.info("the server has stopped")


def inspect_tokenizer(config: InspectTokenizerConfig) -> list[Path]:
    """Measure a tokenizer on a sample of images, and write metrics, warnings and figures into the folder `config.out`.

    Args:
        config: options of `mapet inspect-tokenizer`.

    Returns:
        Paths of tokenizer_metrics.json, tokenizer_report.md and the figures (PNG), in that order.

    Raises:
        MapetError: as for `_measure_tokens`, or the tokenizer can't be loaded.
    """
    compute = ComputeContext.from_options(precision="float32")
    tokenizer = load_tokenizer(config.tokenizer).to(compute.device)
    sample, metrics = _measure_tokens(config, tokenizer, compute)
    figures = plot_tokenizer(sample, tokenizer.quantizer.centroids, NUM_SHOWN)
    for name, value in format_token_metrics(metrics).items():
        log.info("%-28s %s", name, value)
    warnings = list(token_warnings(metrics))
    for warning in warnings:
        log.warning("%s", warning)
    if not warnings:
        log.info("no warnings: the metrics show no known problem of these tokens")
    content = {"tokenizer": str(config.tokenizer), "hash": tokenizer.hash, "images": config.images}
    content["label_free"] = tokenizer.description.get("label_free", False)
    write_json(config.out / TOKENIZER_METRICS, content | {"warnings": warnings, "metrics": asdict(metrics)})
    write_text(
        config.out / TOKENIZER_REPORT,
        render_tokenizer_report(metrics, warnings, str(config.tokenizer), tokenizer.description),
    )
    paths = [config.out / name for name in (TOKENIZER_METRICS, TOKENIZER_REPORT)]
    for name, figure in figures.items():
        paths.append(config.out / f"{name}.png")
        plots.save_figure(figure, paths[-1])
    log.info("wrote into %s: %s", config.out, ", ".join(path.name for path in paths))
    return paths


def _measure_tokens(
    config: InspectTokenizerConfig, tokenizer: Tokenizer, compute: ComputeContext
) -> tuple[TokenSample, TokenMetrics]:
    """Tokenize a sample of `config.sample` images, always the same ones, and compute the metrics of their tokens.

    The first `NUM_STABILITY_IMAGES` of them are tokenized under perturbations (flip, noise, ...) as well, and, with `config.tokens`,
    compared with the stored tokens: the fraction of tokens that stay the same is a metric.

    Args:
        config: options of `mapet inspect-tokenizer`.
        tokenizer: with its teacher, on `compute.device`.
        compute: device and precision of the teacher.

    Returns:
        The tokens of the sample, with the pixels of as many images as the figures need; the metrics.

    Raises:
        MapetError: more than half of the images can't be read, or the token store (tokens on disk, written by `mapet tokenize`) was
            made from other images or by another tokenizer.
    """
    images = list_as_trained(config.images, AS_STORED, tokenizer.read_options)
    sampled = np.random.default_rng(0).permutation(len(images))[: config.sample]
    sampler = inspection.TokenSampler(tokenizer, compute)
    num_patches = tokenizer.grid[0] * tokenizer.grid[1]
    num_pixels = inspection.num_images_for_figures(NUM_SHOWN, tokenizer.vocab_size, num_patches)
    sample = sampler.sample(images, sampled.tolist(), num_pixels)
    perturbed = sampled[:NUM_STABILITY_IMAGES].tolist()
    # name of a perturbation -> tokens of the same content (without it, with it)
    pairs = sampler.sample_perturbed(images, perturbed)
    if config.tokens is not None:
        try:
            store = TokenStore.open(config.tokens, images, tokenizer.hash)
        except MapetError as error:
            hint = f"Or omit {option('tokens')}: stored tokens are then not compared, all else is measured"
            raise MapetError(f"{error}. {hint}") from None
        pairs["stored"] = sampler.compare_stored(images, store, perturbed)
    labels, is_test = _read_labels(images, sampled, sample.image_index)
    return sample, compute_token_metrics(sample.ids, tokenizer.vocab_size, pairs, labels, is_test)


def _read_labels(
    images: ImageList, sampled: Int[np.ndarray, " n"], readable: Int[Tensor, " m"]
) -> tuple[Int[Tensor, " m"] | None, Bool[Tensor, " m"] | None]:
    """Return the labels of the tokenized images, and which of these images test the probe of tokens against classes.

    Args:
        images: all images.
        sampled: indices, in `images`, of the sample; a fifth of each class of the sample is held out for the test.
        readable: indices, in `images`, of the m images of the sample that could be read and were tokenized, in their order.

    Returns:
        The class index of each readable image, and whether it is a test image; (None, None) if `images` has no labels, or if the sample
        has a single class or fewer than `MIN_IMAGES_PER_CLASS` images per class on average.
    """
    if (classes_and_labels := images.classes()) is None:
        return None, None
    classes, labels = classes_and_labels
    num_present = len(np.unique(labels[sampled]))
    if num_present <= 1 or len(sampled) < MIN_IMAGES_PER_CLASS * num_present:
        enough = option("sample", MIN_IMAGES_PER_CLASS * len(classes))
        log.info(
            "sample of %d images of %d classes: too few to compare tokens with classes; %s would do",
            len(sampled), num_present, enough,
        )  # fmt: skip
        return None, None
    is_test = np.zeros(len(images), dtype=bool)
    is_test[sampled] = heldout_mask(LabeledSet(images, classes, labels).subset(sampled))
    return torch.from_numpy(labels)[readable], torch.from_numpy(is_test)[readable]
