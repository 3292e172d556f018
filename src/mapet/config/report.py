"""Options of `report`."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mapet.config.shared import Device, Loading
from mapet.config.types import Source
from mapet.errors import option


class FigureOptions(Loading):
    """Options of `report` that a larger config has as a section."""

    num_images: PositiveInt = 6
    """Images shown."""


class ReportConfig(FigureOptions, Device):
    """Options of `report`."""

    positional: ClassVar[str | None] = "run"
    out_is_file: ClassVar[bool] = True
    run: list[Path] = Field(min_length=1, max_length=40)
    """Run folders of `pretrain` or `run`; several are compared, with shared axes."""
    out: Path | None = None
    """New HTML file, under 5 MB; it opens from disk and connects to nothing."""
    figures_dir: Path | None = None
    """New folder for the figures (PNG) and the step-through (JSON) as files."""
    serve: bool = False
    """Show the page of one run in a browser on this machine and update it while the run trains; Ctrl-C ends it. The run's folder need
    not exist yet."""
    port: int = Field(default=0, ge=0, le=65535)
    """With `serve`: port of 127.0.0.1; 0 takes a free one."""
    figures: bool = True
    """Compute figures and the step-through from the newest weights; otherwise those in the run's folder are shown."""
    images: Source | None = None
    """Images for the figures; automatic: those the run was trained on."""
    seed: NonNegativeInt = 0
    """Seed of the choice of images and of the order of prediction."""
    trust_teacher: str | None = None
    """Only for a tokenizer that runs your own package.module:function: repeat its name to allow that."""

    @model_validator(mode="after")
    def _one_kind_of_output(self) -> "ReportConfig":
        if self.serve and (self.out or self.figures_dir or len(self.run) > 1):
            raise ValueError(
                f"{option('serve', True)} shows one run and writes nothing: leave out {option('out')} and {option('figures_dir')}"
            )
        if not self.serve and not self.out and not self.figures_dir:
            raise ValueError(
                f"give {option('out')} FILE.html, {option('figures_dir')} FOLDER or {option('serve', True)}"
            )
        if self.figures_dir and (not self.figures or len(self.run) > 1):
            raise ValueError(
                f"{option('figures_dir')} takes the figures of one run: leave out {option('figures', False)} and other runs"
            )
        if self.port and not self.serve:
            raise ValueError(f"{option('port')} is for {option('serve', True)}")
        return self
