"""Stage: backbones judged side by side as the field does it."""

import logging
import platform
from pathlib import Path
from typing import Any

from mapet.commands.command import command
from mapet.config.evaluate import EvaluateConfig
from mapet.errors import Interrupted, MapetError, did_you_mean

log = logging.getLogger("mapet")


@command(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """Backbones side by side in one table: probes, few labels, clusters, rank, shifts, dense tasks; returns backbone -> figure -> value.

    Example:
      mapet evaluate --backbone runs/photos random:vit_tiny_patch16_224 --images labelled/train --out evaluation
      mapet evaluate --backbone runs/a timm:vit_tiny_patch16_224 --images labelled/train --test-images labelled/test --protocols knn linear --out ab
    """
    import numpy as np
    import torch

    from mapet.device import Compute, free_memory
    from mapet.evaluation.bank import Place
    from mapet.evaluation.bench import Bench, Outcome
    from mapet.evaluation.encoder import Encoder
    from mapet.evaluation.protocols import PROTOCOLS
    from mapet.evaluation.shifts import relative_to_first
    from mapet.files import new_folder
    from mapet.reports.evaluation import cell, table, write_evaluation

    refuse_unknown(config)
    new_folder(config.out, create=False)
    compute = Compute.choose(config.device, config.precision)
    sets = gather(config)
    chosen = choose_protocols(config, sets)
    if "few-label" in chosen:  # before hours of work
        fewest = int(np.bincount(sets.train.labels).min())
        possible = tuple(n for n in config.few_labels if n <= max(1, fewest))
        if possible != config.few_labels:
            if "few_labels" in config.model_fields_set or config.protocols:
                raise MapetError(
                    f"--few-labels: the smallest class has {fewest} images to learn from, fewer than the {max(config.few_labels):g} asked for"
                )
            log.warning(
                "few-label splits of %s left out: the smallest class has %d images",
                set(config.few_labels) - set(possible),
                fewest,
            )
            config = config.model_copy(update={"few_labels": possible})
    memory = int(config.memory * 1e9) if config.memory else free_memory(torch.device("cpu")) // 4
    place = Place(memory, config.scratch or config.out, config.batch_size, config.num_workers)
    for source in config.backbone:  # what can't be loaded is told before hours of work
        _ = Bench(Encoder.load(source, compute, config.seed, config.model_args), sets, place, config).layers
    new_folder(config.out)
    about = {
        "images": f"{config.images} ({len(sets.train.images):,} images)",
        "test images": f"{config.test_images or 'a fifth of them, by name'} ({len(sets.test.images):,} images)",
        "classes": f"{len(sets.train.classes):,}",
        "machine": f"{platform.machine()}, {compute}, torch {torch.__version__}",
        "pooling": config.pool,
    }
    found: dict[str, dict[str, Outcome]] = {}
    for source in config.backbone:
        encoder = Encoder.load(source, compute, config.seed, config.model_args)
        log.info("--- %s: %s, %d x %d px", source, type(encoder.model).__name__, *encoder.image_size)
        bench = Bench(encoder, sets, place, config)
        found[source] = {}
        try:
            for name in chosen:
                outcome = found[source][name] = PROTOCOLS[name].run(bench)
                for row, figure in outcome.figures.items():
                    log.info("%-28s %s  %s", row, cell(figure), figure.choice)
                _draw(name, outcome, bench, config.out, len(found))
                relative_to_first(found)
                write_evaluation(config.out, found, about, config.model_dump(mode="json"))  # what is done is not lost
        except KeyboardInterrupt:
            if not any(found.values()):
                raise
            raise Interrupted(
                f"interrupted; the protocols that had ended are in {config.out}",
                "the other --protocols, and a new --out",
            ) from None
        finally:
            bench.close()
    if len(found) > 1:
        for line in table("figure", found, cell):
            log.info("%s", line)
    log.info("table, figures and pictures in %s", config.out)
    return {
        source: {row: figure.value for outcome in outcomes.values() for row, figure in outcome.figures.items()}
        for source, outcomes in found.items()
    }


def refuse_unknown(config: EvaluateConfig) -> None:
    """Raises MapetError for protocols and corruptions that there aren't."""
    from mapet.evaluation.corruptions import KINDS
    from mapet.evaluation.protocols import PROTOCOLS

    for what, names, known in (
        ("protocol", config.protocols, tuple(PROTOCOLS)),
        ("corruption", config.corruption_kinds, KINDS),
    ):
        for name in names or []:
            if name not in known:
                raise MapetError(
                    f"unknown {what} '{name}'{did_you_mean(name, known) or '.'} There are: {', '.join(known)}"
                )


def choose_protocols(config: EvaluateConfig, sets: Any) -> list[str]:
    """Those asked for, or all that have their data and don't take long.

    Raises:
        MapetError: one that is asked for lacks its data.
    """
    from mapet.evaluation.protocols import PROTOCOLS

    if not config.protocols:
        lacking = [name for name, p in PROTOCOLS.items() if not p.costly and p.needs == "labels"]
        if not _there("labels", sets) and sets.masks is None and sets.boxes is None:
            log.warning("%s has no class folders: %s are left out", config.images, ", ".join(lacking))
        return [name for name, p in PROTOCOLS.items() if not p.costly and _there(p.needs, sets)]
    for name in config.protocols:
        if not _there(PROTOCOLS[name].needs, sets):
            raise MapetError(f"protocol '{name}' needs {MISSING[PROTOCOLS[name].needs]}")
    return list(dict.fromkeys(config.protocols))


MISSING = {
    "labels": "labels: every image in one of two or more class folders, CLASS/image.jpg",
    "masks": "masks: --masks, or a folder --images that holds images/ and masks/",
    "annotations": "COCO annotations: --annotations instances.json",
    "others": "another labelled folder, --other-images NAME=FOLDER, beside labels of --images",
}


def _there(needs: str, sets: Any) -> bool:
    labels = bool(sets.train.classes)
    there = {
        "images": True,
        "labels": labels,
        "others": labels and bool(sets.others),
        "masks": sets.masks is not None,
        "annotations": sets.boxes is not None,
    }
    return there[needs]


def gather(config: EvaluateConfig) -> Any:
    """The images, with labels where folders give them."""
    from mapet.data.sources import scan
    from mapet.evaluation.annotated.coco import coco_sets
    from mapet.evaluation.annotated.masks import masked_sets
    from mapet.evaluation.bench import Sets
    from mapet.evaluation.features import labelled, split, train_and_test, unlabelled

    folder, test_folder = Path(config.images), None if config.test_images is None else Path(config.test_images)
    if config.other_images and (config.annotations or config.masks or not scan(config.images).classes()):
        raise MapetError(
            "--other-images are matched by class folders, which --images has not or which --annotations or --masks take the place of"
        )
    boxes = coco_sets(folder, config.annotations, test_folder, config.test_annotations)
    if boxes is not None and config.masks is not None:
        raise MapetError("--annotations and --masks list images each in its own way: evaluate one after the other")
    if boxes is not None:
        if config.test_masks is not None or config.void_labels:
            raise MapetError("--test-masks and --void-labels need masks, not --annotations")
        train, test = (unlabelled(part.images) for part in boxes)
        return Sets(train, test, boxes=boxes)
    masks = masked_sets(folder, config.masks, test_folder, config.test_masks, config.void_labels)
    if masks is not None:
        if test_folder is not None and config.test_masks is None:
            raise MapetError(f"{config.images} holds masks, so --test-images need --test-masks")
        train, test = (unlabelled(part.images) for part in masks)
        return Sets(train, test, masks=masks)
    if config.test_masks is not None or config.void_labels:
        raise MapetError(
            f"--test-masks and --void-labels need masks: {config.images} has none, and --masks isn't given"
        )
    images = scan(config.images)
    if images.classes():
        others = {name: labelled(scan(folder)) for name, folder in config.other_images.items()}
        return Sets(*train_and_test(config.images, config.test_images), others)
    if config.test_images is None:
        return Sets(*split(unlabelled(images)))
    return Sets(unlabelled(images), unlabelled(scan(config.test_images)))


def _draw(name: str, outcome: Any, bench: Any, out: Path, number: int) -> None:
    """The pictures of a protocol that has some."""
    if name != "neighbours":
        return
    from mapet.data.views import ViewSpec, draw_view, render
    from mapet.reports.plots.base import save_figure
    from mapet.reports.plots.evaluation import plot_neighbours

    def pixels(data: Any, index: int) -> Any:
        picture = data.images.open(index, bench.encoder.channels)
        view = draw_view(ViewSpec(image_size=bench.encoder.image_size), picture.size, data.images.key(index), 0)
        return render(picture, view, bench.encoder.image_size)

    details, sets = outcome.details, bench.sets
    rows = [
        [(pixels(sets.test, query), sets.test.title(query))]
        + [(pixels(sets.train, other), sets.train.title(other)) for other in nearest]
        for query, nearest in zip(details["queries"], details["nearest"], strict=True)
    ]
    figure = plot_neighbours(rows, labelled=bool(sets.train.classes))
    save_figure(figure, out / "pictures" / f"neighbours-{number}.png")
