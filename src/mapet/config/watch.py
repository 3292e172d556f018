"""Options of `watch`."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mapet.config.base import Config


class WatchConfig(Config):
    """Options of `watch`."""

    positional: ClassVar[str | None] = "run"
    run: Path
    """Run folder of `pretrain` or `run`; it need not be there yet."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of 127.0.0.1 to serve on; 0 takes a free one."""
