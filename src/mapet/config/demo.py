"""Options of `demo`."""

from pathlib import Path

from pydantic import NonNegativeInt

from mapet.config.base import Config


class DemoConfig(Config):
    """Options of `demo`."""

    out: Path = Path("demo")
    """New folder for the digits, the run and the pictures."""
    seed: NonNegativeInt = 0
    """Seed of everything."""
    resume: bool = False
    """Go on with a demo that was stopped."""
