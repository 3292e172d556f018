"""Options of `debug-step`."""

from pathlib import Path
from typing import ClassVar

from mapet.config.shared import Device, Precision
from mapet.config.types import Source


class DebugStepConfig(Device):
    """Options of `debug-step`."""

    positional: ClassVar[str | None] = "bundle"
    bundle: Path
    """Folder that a run left when it stopped: RUN/debug/step-*."""
    images: Source | None = None
    """Where the images are now; automatic: where they were."""
    precision: Precision | None = None
    """Precision to try it in; automatic: the run's."""
    trust_teacher: str | None = None
    """Only for a tokenizer that runs your own package.module:function in the loop: repeat its name to allow that."""
