"""The report of a run, or of several side by side, as one HTML file, as a live page, or as files of its figures."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapet.commands.command import command
from mapet.config.pretraining import ReportConfig
from mapet.errors import MapetError, option
from mapet.run_state import check_is_pretraining, command_of, pretrain_folder

if TYPE_CHECKING:
    from mapet.reports.images import ReportImage

log = logging.getLogger("mapet")
SHOWN_IMAGES = 6


@command(ReportConfig)
def report(config: ReportConfig) -> Path | None:
    """One HTML page of a run (curves, warnings in words, tokenizer, predictions step by step, figures), or of several.

    Example:
      mapet report runs/photos --out report.html
      mapet report runs/a runs/b runs/c --out comparison.html --no-figures
      mapet report runs/photos --serve
      mapet report runs/photos --figures-dir figures
    """
    if config.serve:
        _serve(config.run[0])
        return None
    from mapet.files import atomic, new_folder
    from mapet.reports.page import RunView, page
    from mapet.reports.run import RunFiles

    if config.out is not None:
        _check_file(config.out)
    if config.figures_dir is not None:
        new_folder(config.figures_dir, create=False)
    _check_runs_differ(config.run)
    views = [RunView.saved(RunFiles.open(folder)) for folder in config.run]
    for view in views if config.figures else ():
        try:
            view.images, view.step_through = _inspect(config, view.files.folder)
        except MapetError as error:
            if config.figures_dir is not None:
                raise
            log.warning("%s: no new figures: %s", view.files.given, error)
            view.notes.append(f"No new figures: {error}")
    if config.figures_dir is not None:
        _write_figures(views[0].images, views[0].step_through, config.figures_dir)
    if config.out is not None:
        text = page(views)
        with atomic(config.out) as temporary:
            temporary.write_text(text, encoding="utf-8")
        log.info("%s: %.2g MB", config.out, config.out.stat().st_size / 1e6)
    return config.out or config.figures_dir


def _check_file(out: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise MapetError(f"{option('out')} {out} must end in .html")
    if out.exists():
        raise MapetError(f"{out} already exists: nothing is overwritten. Choose another {option('out')}")


def _check_runs_differ(runs: Sequence[Path]) -> None:
    opened = [pretrain_folder(folder).resolve() for folder in runs]
    if twice := [str(given) for given, folder in zip(runs, opened, strict=True) if opened.count(folder) > 1]:
        raise MapetError(f"{' and '.join(twice)} are the same run: give each once")


def _inspect(config: ReportConfig, folder: Path) -> "tuple[list[ReportImage], dict[str, Any]]":
    """Draw the figures of a run and collect its step-through, from its newest weights.

    Raises:
        MapetError: no weights, or images that can't be read.
    """
    from mapet.data.sources import scan
    from mapet.device import Compute
    from mapet.evaluation.look import look_at
    from mapet.reports.figures import plot_run, step_through
    from mapet.reports.images import rasterize
    from mapet.training.tasks.pretraining import load_run

    compute = Compute.choose(config.device, "float32")
    run = load_run(folder, with_teacher=True, allow=config.trust_teacher)
    images = scan(config.images or run.config.images)
    model, tokenizer = run.model.to(compute.device), run.tokenizer.to(compute.device)
    look = look_at(model, tokenizer, images, compute, SHOWN_IMAGES, run.config.patch_order)
    names = [images.id(int(i)) for i in look.image_index[: look.shown]]
    figures = plot_run(look, model, images, compute)
    drawn = [rasterize(name, figure) for name, figure in figures.items()]
    return drawn, step_through(look, names, model.objective)


def _write_figures(images: "Sequence[ReportImage]", step_through: dict[str, Any] | None, folder: Path) -> None:
    import json

    from mapet.files import atomic
    from mapet.reports.run import STEP_THROUGH

    with atomic(folder) as temporary:
        temporary.mkdir()
        (temporary / STEP_THROUGH).write_text(json.dumps(step_through) + "\n", encoding="utf-8")
        for image in images:
            image.image.save(temporary / f"{image.name}.png")
    log.info("in %s: %s", folder, ", ".join([STEP_THROUGH, *(f"{image.name}.png" for image in images)]))


def _serve(folder: Path) -> None:
    """Serve the live page of a run until Ctrl-C."""
    from mapet.files import is_free
    from mapet.reports.live import LiveServer
    from mapet.reports.run import RunFiles

    if folder.is_file():
        raise MapetError(f"{folder} is a file: give the run's folder")
    may_start = not folder.exists() or is_free(folder) or command_of(folder) in ("run", "demo")  # before it pre-trains
    if not may_start:
        check_is_pretraining(folder)
    with LiveServer(folder) as server:
        waiting = "" if RunFiles(folder).recipe else ", waiting for a run there"
        log.info("%s shows %s%s; Ctrl-C ends this, not the run", server.url, folder, waiting)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            log.info("ended")
