"""Options of `report`."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from mapet.config.inspect import Looking

Runs = Annotated[
    list[Path],
    BeforeValidator(lambda value: [value] if isinstance(value, (str, Path)) else value),
    Field(min_length=1, max_length=40),
]


class ReportConfig(Looking):
    """Options of `report`."""

    out_is_file: ClassVar[bool] = True

    positional: ClassVar[str | None] = "run"
    run: Runs
    """Run folders of `pretrain` or `run`; several are compared, with shared axes."""
    out: Path
    """New HTML file, under 5 MB; it opens from disk and asks for nothing."""
    pictures: bool = True
    """Compute pictures and the step-through from the newest weights; without, those that lie in the folder are shown."""
