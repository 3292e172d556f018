"""Stage: what a run did, or several side by side, as one HTML file."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapet.commands.command import command
from mapet.commands.inspect import look
from mapet.config.report import ReportConfig
from mapet.run_state import pretrain_folder

if TYPE_CHECKING:
    from mapet.reports.images import Picture

log = logging.getLogger("mapet")


@command(ReportConfig)
def report(config: ReportConfig) -> Path:
    """One HTML page of a run (curves, warnings in words, tokenizer, predictions step by step, pictures), or of several.

    Example:
      mapet report runs/photos --out report.html
      mapet report runs/a runs/b runs/c --out comparison.html --pictures false
    """
    from mapet.errors import MapetError
    from mapet.files import atomic
    from mapet.reports.page import RunView, page
    from mapet.reports.run import RunFiles

    if config.out.suffix.lower() not in (".html", ".htm"):
        raise MapetError(f"--out {config.out}: a page for a browser needs a name that ends in .html")
    if config.out.exists():
        raise MapetError(f"{config.out} already exists: nothing is overwritten. Choose another --out")
    opened = [pretrain_folder(folder).resolve() for folder in config.run]
    if twice := [str(given) for given, folder in zip(config.run, opened, strict=True) if opened.count(folder) > 1]:
        raise MapetError(f"{' and '.join(twice)} are the same run: give each once")
    runs = [RunView.saved(RunFiles.open(folder)) for folder in config.run]
    for run in runs if config.pictures else ():
        try:
            run.pictures, run.step_through = _look(config, run.files.folder)
        except MapetError as error:
            log.warning("%s: no new pictures: %s", run.files.given, error)
            run.notes.append(f"No new pictures: {error}")
    text = page(runs)
    with atomic(config.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    log.info("%s: %.2g MB", config.out, config.out.stat().st_size / 1e6)
    return config.out


def _look(config: ReportConfig, folder: Path) -> "tuple[list[Picture], dict[str, Any]]":
    """Pictures and the step-through of a run, from its newest weights."""
    import matplotlib

    from mapet.device import Compute
    from mapet.reports.images import CAPTIONS, Picture

    matplotlib.use("Agg")
    figures, steps = look(folder, config, Compute.choose(config.device, "float32"))
    pictures = [Picture.of(name, CAPTIONS[name], figures[name]) for name in CAPTIONS if name in figures]
    matplotlib.pyplot.close("all")
    return pictures, steps
