"""Commands on trained backbones: `evaluate` compares them side by side, `export` writes one for other libraries."""

import logging
import math
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.config.evaluation import EvaluateConfig, ExportConfig
from mapet.config.shared import AS_STORED, ReadOptions
from mapet.data.dataset import ViewDataset, inference_batch_size
from mapet.data.dataset_stats import warn_outside_range
from mapet.data.sources import list_as_trained, list_images
from mapet.data.views import ViewSpec, normalize
from mapet.device import ComputeContext, free_memory
from mapet.errors import Interrupted, MapetError, did_you_mean, format_size, option, pluralize
from mapet.evaluation.controls import (
    Verdict,
    adapt_options,
    compare_with_controls,
    compare_with_each,
    mark_controls,
    plan_controls,
    select_protocols,
)  # fmt: skip
from mapet.evaluation.datasets import LabeledSet
from mapet.evaluation.eval_context import EvalContext, EvalData, ProtocolResult
from mapet.evaluation.features import BackboneWrapper, CacheConfig, check_finite_features
from mapet.evaluation.imbalance import is_imbalanced
from mapet.evaluation.inspection import render_neighbors
from mapet.evaluation.protocols import PROTOCOLS, add_mce
from mapet.files import atomic_write
from mapet.models.backbone import get_read_options, load_backbone, save_backbone
from mapet.models.export_formats import FORMATS, ExportWrapper, compute_outputs, require_packages
from mapet.models.pooling import pooled_features
from mapet.reports.evaluation import format_metric, format_table, write_evaluation
from mapet.reports.model_card import read_provenance, render_model_card
from mapet.reports.plots import plot_neighbors, save_figure
from mapet.run_state import pretrain_folder, read_command, record, try_read_state
from mapet.training.tasks.pretraining import load_run

log = logging.getLogger("mapet")
TOLERANCE = 1e-4
"""Largest difference of an exported model's output, as a fraction of the output's root mean square."""
NUM_CHECK_IMAGES = 8
"""Images on which an export is checked."""
FLOAT32_BYTES = 4
MEMORY_FRACTION = 1 / 4
"""Fraction of the free memory that the features of each of the two image sets may take."""


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """Run each protocol (a way to evaluate, such as 'knn') on each backbone, and log metrics and a table of them.

    Options are checked, and every backbone is loaded once, before the first protocol runs. With the option `out` the results so far
    are written there after each protocol, so that an interruption loses only the protocol that was running.

    Args:
        config: options of `mapet evaluate`.

    Returns:
        Backbone, as in the option `backbone`, or name of a control -> metric -> value, without intervals; accuracies are fractions.

    Raises:
        MapetError: a protocol is unknown, options do not fit the images, a backbone cannot be loaded or lacks a layer of `layers`, a named
            control cannot be loaded, more than half of the images of a set are unreadable, or features are NaN or infinite.
        Interrupted: by Ctrl-C, after a protocol has written its results to `out`; before that, KeyboardInterrupt is raised on.
    """
    compute = ComputeContext.from_options(config.device, config.precision)
    for name in set(config.protocols or ()) - PROTOCOLS.keys():
        hint = f"{did_you_mean(name, PROTOCOLS) or '.'} Known: {', '.join(PROTOCOLS)}"
        raise MapetError(f"unknown protocol '{name}'{hint}", field="protocols", value=name)
    data = EvalData.load(config)
    names = _choose_protocols(config, data)
    if "few-shot" in names:
        config = _drop_large_few_shot_splits(config, data.train)
    loaders = {source: partial(BackboneWrapper.load, source, compute, config.seed) for source in config.backbone}
    controls = plan_controls(config, names, data.train, (load() for load in loaders.values()))
    info = _describe_evaluation(config, data, compute)
    results: dict[str, dict[str, ProtocolResult]] = {}
    first_started = time.monotonic()
    try:
        for load in loaders.values():
            last_started = time.monotonic()
            backbone = load()
            with closing(_open_context(backbone, data, config, backbone.read_options)) as context:
                _run_protocols(names, context, results, info)
        for name, load_control in controls.items():  # they read the images as the last backbone does
            now = time.monotonic()
            if 2 * now - last_started - first_started > 60 * (config.max_control_minutes or math.inf):
                log.warning("control %s is skipped: there is no time left for it", name)
                continue
            last_started = now
            with closing(_open_context(load_control(), data, config, backbone.read_options)) as context:
                _run_control(names, context, results, info)
    except KeyboardInterrupt:
        if config.out is None or not any(results.values()):
            raise
        command = f"the same command with the {option('protocols')} that are left and a new {option('out')}"
        raise Interrupted(f"interrupted; the results of the finished protocols are in {config.out}", command) from None
    verdicts, comparisons = compare_with_controls(results, config), compare_with_each(results, config)
    if len(results) > 1:
        for line in [*format_table(mark_controls(results, config), format_metric).splitlines(), *map(str, verdicts)]:
            log.info("%s", line)
    if config.out is not None:
        _write_results(config, results, info, verdicts)
        record(config.out, results={"comparisons": [each.to_json() for each in comparisons]})
        log.info("table, metrics and figures in %s", config.out)
    return {
        source: {row: metric.value for result in by_protocol.values() for row, metric in result.metrics.items()}
        for source, by_protocol in results.items()
    }


def _describe_evaluation(config: EvaluateConfig, data: EvalData, compute: ComputeContext) -> dict[str, str]:
    """Return the facts for the head of evaluation.md, name -> text: images, features, machine and, of labeled images, classes."""
    info = {
        "images": f"{config.images} ({len(data.train):,} images)",
        "test images": f"{config.test_images or 'a fifth of them, by name'} ({len(data.test):,} images)",
        "features": config.features_description,
        "machine": f"{platform.machine()}, {compute}, torch {torch.__version__}",
    }
    if data.train.classes:
        info["classes"] = f"{len(data.train.classes):,}, majority accuracy {data.test.majority_accuracy:.3f}"
        if is_imbalanced(data.test.labels):
            info["classes"] += "; test images are imbalanced: balanced accuracy and AUROC stand before the accuracy"
    return info


def _open_context(
    backbone: BackboneWrapper, data: EvalData, config: EvaluateConfig, read_options: ReadOptions | None
) -> EvalContext:
    """Open the context of all protocols of a backbone or control, and log which it is; the caller closes it.

    Args:
        backbone: or control.
        data: all images.
        config: options of `mapet evaluate`.
        read_options: how the images are read, unless `config` says otherwise.
    """
    memory = int(free_memory(torch.device("cpu")) * MEMORY_FRACTION)
    cache = CacheConfig(memory, config.out or Path(tempfile.gettempdir()), inference_batch_size(backbone.image_size))
    kind, image_size = type(backbone.model).__name__, format_size(backbone.image_size)
    log.info("--- %s: %s, %s px; 95 %% intervals in parentheses", backbone.name, kind, image_size)
    data = data.read_as_trained(config, read_options)
    warn_outside_range(data.test.images, backbone.channels)
    return EvalContext(backbone, data, cache, config)


def _run_control(
    names: list[str], context: EvalContext, results: dict[str, dict[str, ProtocolResult]], info: dict[str, str]
) -> None:
    """Run those of the protocols that a control takes part in; skip it with a warning if its features are larger than `context.cache.memory`.

    Args:
        names: protocols that are run.
        context: the control with its data; its `options` are adapted to the control.
        results: backbone or control -> protocol -> result; the control's are added in place.
        info: facts for the head of evaluation.md, see `_run_protocols`.
    """
    model = context.backbone.model
    context.options = adapt_options(model, context.options)
    num_bytes, memory = FLOAT32_BYTES * len(context.data.train) * context.num_features, context.cache.memory
    if num_bytes > memory:
        size = f"{num_bytes / 1e9:.1f} GB, expected at most {memory / 1e9:.1f} GB, a quarter of the free memory"
        log.warning("control %s is skipped: its features of the training images take %s", context.backbone.name, size)
        return
    _run_protocols(select_protocols(model, names), context, results, info)


def _choose_protocols(config: EvaluateConfig, data: EvalData) -> list[str]:
    """Return the names of `config.protocols`, without repetitions; without that option, all inexpensive protocols whose data is there.

    Without the option and without any annotation of the images, a warning lists the protocols that are skipped.

    Args:
        config: options of `mapet evaluate`; its `protocols` are known ones.
        data: images with what annotations there are.

    Raises:
        MapetError: the data of a named protocol is missing; for missing labels, with the first image that has no class.
    """
    if not config.protocols:
        cheap = {name: protocol.requires for name, protocol in PROTOCOLS.items() if not protocol.is_expensive}
        if not (data.has("labels") or data.has("masks") or data.has("annotations")):
            skipped = ", ".join(name for name, requirement in cheap.items() if requirement == "labels")
            log.warning("%s has no class folders, CLASS/image.jpg: skipped protocols %s", config.images, skipped)
        return [name for name, requirement in cheap.items() if data.has(requirement)]
    hints = {
        "labels": f"labels, which are not read beside masks or annotations: omit {option('annotations')} and {option('seg_masks')}",
        "masks": f"masks: give {option('seg_masks')}, or a folder {option('images')} that holds images/ and masks/",
        "annotations": f"COCO annotations: give {option('annotations')} instances.json",
        "ood": f"another labeled folder: give {option('ood_images')} NAME=FOLDER, and {option('images')} with labels",
    }
    for name in config.protocols:
        requirement = PROTOCOLS[name].requires
        if not data.has(requirement):
            if requirement == "labels":
                LabeledSet.from_images(list_images(config.images))  # names an image without a class in its error
            raise MapetError(f"protocol '{name}' needs {hints[requirement]}", field="protocols", value=name)
    return list(dict.fromkeys(config.protocols))


def _drop_large_few_shot_splits(config: EvaluateConfig, train: LabeledSet) -> EvaluateConfig:
    """Return the options without the `few_shot` amounts above the number of training images of the smallest class, with a warning.

    Amounts of 1 and more are images per class; amounts below 1 are fractions of each class, which always fit.

    Args:
        config: options of `mapet evaluate`.
        train: labeled training images, before any is found unreadable.

    Raises:
        MapetError: an amount is too large, and the user has given the option `few_shot` or `protocols`.
    """
    smallest = int(np.bincount(train.labels).min())
    too_large = [amount for amount in config.few_shot if amount > max(1, smallest)]
    if too_large:
        amounts = " and ".join(f"{amount:g}" for amount in too_large)
        problem = f"{option('few_shot')}: the smallest class has {pluralize(smallest, 'training image')}, too few for {amounts} per class"
        if config.protocols or "few_shot" in config.model_fields_set:
            raise MapetError(f"{problem}: give smaller values", field="few_shot", value=config.few_shot)
        log.warning("%s: skipped; add images to this class, or give smaller values", problem)
    return config.model_copy(update={"few_shot": tuple(n for n in config.few_shot if n not in too_large)})


def _run_protocols(
    names: list[str], context: EvalContext, results: dict[str, dict[str, ProtocolResult]], info: dict[str, str]
) -> None:
    """Run protocols on one backbone, log their metrics, and write the results so far after each, if the option `out` is given.

    Written are evaluation.md with its tables and figures, the figure of 'nearest-neighbors', and `results` in run.json.

    Args:
        names: protocols to run, in this order.
        context: the backbone, its data and the options of `mapet evaluate`.
        results: backbone -> protocol -> result, of all backbones so far; this backbone's results are added in place, and mCE, which
            compares corruption errors with those of the first backbone, to all.
        info: facts for the head of evaluation.md: name -> text.
    """
    out, by_protocol = context.options.out, results.setdefault(context.backbone.name, {})
    for name in names:
        result = by_protocol[name] = PROTOCOLS[name].run(context)
        for row, metric in result.metrics.items():
            log.info("%-28s %s  %s", row, format_metric(metric), metric.selected)
        add_mce(results)
        if out is None:
            continue
        if name == "nearest-neighbors":
            data, backbone, details = context.data, context.backbone, result.details
            sets = data.train, data.test, details["queries"], details["nearest"]
            rows = render_neighbors(backbone.image_size, backbone.channels, *sets)
            figure = plot_neighbors(rows, labeled=bool(context.classes))
            save_figure(figure, out / "figures" / f"nearest-neighbors-{len(results)}.png")
        _write_results(context.options, results, info)


def _write_results(
    config: EvaluateConfig, results: dict[str, dict[str, ProtocolResult]], info: dict[str, str], verdicts: Sequence[Verdict] = ()
) -> None:  # fmt: skip
    """Write evaluation.md and per_class.csv into the folder `config.out`, and `results` into its run.json.

    In run.json "backbones" and "controls" have the results by name and protocol, "verdicts" the fields of each `Verdict`.

    Args:
        config: options of `mapet evaluate`.
        results: backbone or control -> protocol -> result.
        info: facts for the head of evaluation.md: name -> text.
        verdicts: on the backbones, once all have been evaluated.
    """
    assert config.out is not None
    write_evaluation(config.out, mark_controls(results, config), info, verdicts)
    as_json: dict[str, dict[str, object]] = {"backbones": {}, "controls": {}}
    for name, by_protocol in results.items():
        part = as_json["backbones" if name in config.backbone else "controls"]
        part[name] = {protocol: result.to_json() for protocol, result in by_protocol.items()}
    record(config.out, results={**as_json, "verdicts": [verdict.to_json() for verdict in verdicts]})


def export(config: ExportConfig) -> Path:
    """Write a backbone in each format with model cards, load it again and compare its outputs; return the folder `config.out`.

    The format 'timm' is always written, into `config.out` itself, each other format into a subfolder of its name. The outputs that
    are compared are those of the backbone and of each export on a few images, see `_make_sample`, for each library that can load the
    export. The folder appears whole or not at all.

    Args:
        config: options of `mapet export`.

    Returns:
        The folder `config.out`.

    Raises:
        MapetError: a library is missing, the backbone cannot be loaded, lacks features of the options `pool` and `layers` or does not
            fit a format, its outputs are NaN or infinite, an export's outputs differ by more than `TOLERANCE`, or `config.images` are
            unreadable; then nothing is written.
    """
    formats: list[str] = list(dict.fromkeys(["timm", *config.format]))
    for name in formats:
        require_packages(name)
    vit, provenance = _load_backbone(config), read_provenance(config.backbone)
    classes = [str(name) for name in provenance.classes] if vit.num_classes else []
    views, description = _make_sample(config, vit)
    pixels = normalize(views, vit.in_chans)
    expected = compute_outputs(ExportWrapper(vit), pixels)
    for output in [*expected.values(), pooled_features(vit, pixels, config.pool, config.layers)]:
        check_finite_features(output, config.backbone)
    differences: dict[str, float] = {}
    with atomic_write(config.out) as folder:
        folders = {name: folder if name == "timm" else folder / name for name in formats}
        for name, format_folder in folders.items():
            FORMATS[name].write(vit, format_folder, classes)
            for loader, compute in FORMATS[name].read(format_folder).items():
                differences[loader] = _check_outputs(loader, compute(pixels), expected)
        if "transformers" in folders and (folders["transformers"] / "preprocessor_config.json").is_file():
            processed, loader = _normalize_by_processor(folders["transformers"], views), "transformers, image processor"
            differences[loader] = _check_outputs(loader, {"pixels": processed}, {"pixels": pixels})
        for name in [name for name in folders if name in ("timm", "transformers")]:
            card = render_model_card(config, folders, vit, provenance, differences, description, TOLERANCE, name)
            (folders[name] / "README.md").write_text(card, encoding="utf-8")
    for loader, difference in differences.items():
        log.info("%-40s largest relative difference from the backbone %.1e", loader, difference)
    log.info("exported to %s, checked on %s", config.out, description)
    return config.out


def _load_backbone(config: ExportConfig) -> VisionTransformer:
    """Load the ViT `config.backbone` in eval mode, adapted to `image_size`, `patch_size`, `channels` and `model_args` where given.

    Of a pre-training run that has not exported its backbone yet, it is the ViT of the newest checkpoint.

    Raises:
        MapetError: there is no such backbone, or the options do not fit it.
    """
    sizes = {"img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.channels}
    options = {key: value for key, value in sizes.items() if value is not None} | config.model_args
    run = pretrain_folder(Path(config.backbone))
    if read_command(run) != "pretrain" or (run / "backbone").is_dir():
        return load_backbone(config.backbone, **options).eval()
    with tempfile.TemporaryDirectory(prefix=f"{Path(config.backbone).name}-newest-checkpoint-") as folder:
        save_backbone(load_run(Path(config.backbone)).model.vit, Path(folder) / "backbone")
        return load_backbone(Path(folder) / "backbone", **options).eval()


def _make_sample(config: ExportConfig, vit: VisionTransformer) -> tuple[UInt8[Tensor, "B C H W"], str]:
    """Read up to `NUM_CHECK_IMAGES` center views, spread over the option `images`, else over the training images of the backbone's run.

    Args:
        config: options of `mapet export`; `backbone` and `images` are used.
        vit: the backbone, whose input size and channels the views have.

    Returns:
        Views, 0..255, without unreadable images, and a description of them, e.g. '8 images of train'. Without the option, where no
        training image is known or can be read, they are random pixels, with a warning.

    Raises:
        MapetError, OSError: the option `images` is given, and its images cannot be listed, or none that was tried is readable.
    """
    size: tuple[int, int] = vit.patch_embed.img_size
    folders = (pretrain_folder(Path(config.backbone)), Path(config.backbone).parent)  # of pre-training, of fine-tuning
    states = [state for folder in folders if (state := try_read_state(folder))]
    source = config.images or (states[0].config.get("images") if states else None)
    try:
        if not source:
            raise MapetError(f"no run.json in or above {config.backbone} names its training images")
        images = list_as_trained(source, AS_STORED, get_read_options(vit))
        indices = np.unique(np.linspace(0, len(images) - 1, NUM_CHECK_IMAGES).round().astype(int)).tolist()
        dataset = ViewDataset(images, ViewSpec(image_size=size), vit.in_chans, image_size=size)
        views = dataset.batch([(0, index) for index in indices]).images
        if views is None:
            raise MapetError(f"no image that was tried of {source} is readable: give others with {option('images')}")
        return views, f"{len(views)} images of {Path(source).name}"
    except (MapetError, OSError) as error:
        if config.images is not None:
            raise
        description = f"{NUM_CHECK_IMAGES} generated images"
        log.warning("export checked on %s, because %s; give real images with %s", description, error, option("images"))
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_CHECK_IMAGES, vit.in_chans, *size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), description


def _check_outputs(loader: str, outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest absolute difference between outputs, as a fraction of the root mean square of the expected output.

    Args:
        loader: how the export was loaded, for the error, e.g. 'timm'.
        outputs: outputs of the export, tensors by name; names that are not expected are ignored.
        expected: outputs of the backbone on the same images, by the same names.

    Raises:
        MapetError: the difference is above `TOLERANCE` or NaN, or an output is missing or of another shape.
    """
    differences = [
        float((outputs[name] - value).abs().max() / value.pow(2).mean().sqrt())
        if name in outputs and outputs[name].shape == value.shape
        else float("inf")
        for name, value in expected.items()
    ]
    difference = float(np.max(differences))  # NaN if one is
    if not difference <= TOLERANCE:
        raise MapetError(
            f"the export, loaded by {loader}, does not compute the backbone's outputs: the difference is {difference:.1e} of their root "
            f"mean square, at most {TOLERANCE:.0e} is allowed; nothing was written. Omit that {option('format')}"
        )
    return difference


def _normalize_by_processor(folder: Path, views: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Normalize views by the image processor of a Transformers export, to compare the result with mapet's own normalization.

    Args:
        folder: of the export; holds preprocessor_config.json.
        views: 0..255, of the model's input size, gray or RGB.
    """
    from transformers import AutoImageProcessor  # an extra

    images = [Image.fromarray(view.movedim(0, -1).squeeze(-1).numpy()) for view in views]
    processed = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    return torch.as_tensor(processed["pixel_values"])
