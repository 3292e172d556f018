"""Evaluate frozen backbones side by side."""

import logging
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mapet.config.evaluation import EvaluateConfig
from mapet.data.dataset import inference_batch_size
from mapet.data.sources import list_images
from mapet.device import ComputeContext, free_memory
from mapet.errors import Interrupted, MapetError, did_you_mean, option
from mapet.evaluation.datasets import labeled
from mapet.evaluation.eval_context import EvalContext, EvalData, ProtocolResult, load_eval_data
from mapet.evaluation.features import BackboneWrapper, CacheConfig
from mapet.evaluation.inspection import render_neighbors
from mapet.evaluation.protocols import PROTOCOLS, add_mce
from mapet.reports.evaluation import format_metric, format_table, write_evaluation
from mapet.reports.plots import plot_neighbors, save_figure
from mapet.run_state import record

log = logging.getLogger("mapet")


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """Run each protocol on each backbone; return backbone -> metric -> value."""
    compute = ComputeContext.from_options(config.device, config.precision)
    for name in config.protocols or ():
        if name not in PROTOCOLS:
            known = f"{did_you_mean(name, PROTOCOLS) or '.'} There are: {', '.join(PROTOCOLS)}"
            raise MapetError(f"unknown protocol '{name}'{known}", field="protocols", value=name)
    data = load_eval_data(config)
    names = _choose_protocols(config, data)
    config = _fit_few_shot(config, data, names)
    memory, scratch = free_memory(torch.device("cpu")) // 4, config.out or Path(tempfile.gettempdir())
    for source in config.backbone:  # what can't be loaded is told before hours of work
        BackboneWrapper.load(source, compute, config.seed)
    info = _describe_data(config, data) | {"machine": f"{platform.machine()}, {compute}, torch {torch.__version__}"}
    results: dict[str, dict[str, ProtocolResult]] = {}
    for source in config.backbone:
        backbone = BackboneWrapper.load(source, compute, config.seed)
        cache = CacheConfig(memory, scratch, inference_batch_size(backbone.image_size))
        context = EvalContext(backbone, data, cache, config)
        log.info("--- %s: %s, %d x %d px", source, type(backbone.model).__name__, *backbone.image_size)
        results[source] = {}
        try:
            for name in names:
                result = results[source][name] = PROTOCOLS[name].run(context)
                for row, metric in result.metrics.items():
                    log.info("%-28s %s  %s", row, format_metric(metric), metric.selected)
                add_mce(results)
                if config.out is not None:  # what is done is not lost
                    _draw_neighbors(result, context, config.out / "figures" / f"nearest-neighbors-{len(results)}.png")
                    write_evaluation(config.out, results, info)
                    found = {source: {name: _as_json(r) for name, r in own.items()} for source, own in results.items()}
                    record(config.out, results={"backbones": found})
        except KeyboardInterrupt:
            if config.out is None or not any(results.values()):
                raise
            again = f"the other {option('protocols')}, and a new {option('out')}"
            raise Interrupted(f"interrupted; the protocols that had ended are in {config.out}", again) from None
        finally:
            context.close()
    if len(results) > 1:
        for line in format_table(results, format_metric).splitlines():
            log.info("%s", line)
    if config.out is not None:
        log.info("table, metrics and figures in %s", config.out)
    return {
        source: {row: metric.value for result in found.values() for row, metric in result.metrics.items()}
        for source, found in results.items()
    }


def _describe_data(config: EvaluateConfig, data: EvalData) -> dict[str, str]:
    """Describe what is evaluated on, for the report."""
    info = {
        "images": f"{config.images} ({len(data.train.images):,} images)",
        "test images": f"{config.test_images or 'a fifth of them, by name'} ({len(data.test.images):,} images)",
        "pooling": config.pool,
    }
    if data.has("labels"):
        info["classes"] = f"{len(data.train.classes):,}, majority accuracy {data.test.majority_accuracy:.3f}"
    return info


def _as_json(result: ProtocolResult) -> dict[str, Any]:
    """Turn metrics and details into JSON; classes are in per_class.csv."""
    return {"metrics": {row: metric._asdict() for row, metric in result.metrics.items()}, "details": result.details}


def _choose_protocols(config: EvaluateConfig, data: EvalData) -> list[str]:
    """Choose those asked for, or all that have their data and don't take long.

    Raises:
        MapetError: one that is asked for lacks its data.
    """
    if not config.protocols:
        cheap = {name: protocol for name, protocol in PROTOCOLS.items() if not protocol.expensive}
        if not data.has("labels") and data.masks is None and data.boxes is None:
            lacking = [name for name, protocol in cheap.items() if protocol.requires == "labels"]
            log.warning("%s has no class folders: %s are left out", config.images, ", ".join(lacking))
        return [name for name, protocol in cheap.items() if data.has(protocol.requires)]
    hints = {
        "labels": "labels: every image in one of two or more class folders, CLASS/image.jpg",
        "masks": f"masks: {option('seg_masks')}, or a folder {option('images')} that holds images/ and masks/",
        "annotations": f"COCO annotations: {option('annotations')} instances.json",
        "ood": f"another labeled folder, {option('ood_images')} NAME=FOLDER, beside labels of {option('images')}",
    }
    for name in config.protocols:
        requires = PROTOCOLS[name].requires
        if requires == "labels" and not data.has("labels"):
            try:
                labeled(list_images(config.images))
            except MapetError as error:
                raise MapetError(f"protocol '{name}' needs labels: {error}") from None
        if not data.has(requires):
            raise MapetError(f"protocol '{name}' needs {hints[requires]}", field="protocols", value=name)
    return list(dict.fromkeys(config.protocols))


def _fit_few_shot(config: EvaluateConfig, data: EvalData, protocols: list[str]) -> EvaluateConfig:
    """Leave out those of the default few-shot splits that the smallest class is too small for.

    Raises:
        MapetError: it is too small for a split that was asked for.
    """
    if "few-shot" not in protocols:
        return config
    smallest = int(np.bincount(data.train.labels).min())
    possible = tuple(amount for amount in config.few_shot if amount <= max(1, smallest))
    if possible == config.few_shot:
        return config
    if "few_shot" in config.model_fields_set or config.protocols:
        raise MapetError(
            f"{option('few_shot')}: the smallest class has {smallest} images to learn from, fewer than the {max(config.few_shot):g} asked for",
            field="few_shot", value=config.few_shot,
        )  # fmt: skip
    left_out = set(config.few_shot) - set(possible)
    log.warning("few-shot splits of %s left out: the smallest class has %d images", left_out, smallest)
    return config.model_copy(update={"few_shot": possible})


def _draw_neighbors(result: ProtocolResult, context: EvalContext, path: Path) -> None:
    """Draw the neighbors that a protocol found, if it did."""
    if "nearest" in result.details:
        data, details, backbone = context.data, result.details, context.backbone
        shown = data.train, data.test, details["queries"], details["nearest"]
        rows = render_neighbors(backbone.image_size, backbone.channels, *shown)
        save_figure(plot_neighbors(rows, labeled=bool(data.train.classes)), path)
