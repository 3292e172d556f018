"""What reading a file may cost: one table of defaults, in force for the whole process while a command runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import PositiveFloat, PositiveInt

from mapet.config.base import Config


class Limits(Config):
    """What reading a file may cost: an image beyond is unreadable, an archive refused. No file of real data sets comes near."""

    image_pixels: PositiveInt = 500_000_000
    """Pixels of an image: a scene of 20,000 x 20,000 px has 400 million."""
    image_bytes: PositiveInt = 4 << 30
    """Bytes of an image file, and of memory that its pixels may take while it is decoded (24 for each pixel that Pillow decodes)."""
    image_seconds: PositiveFloat = 30
    """Seconds of computation that decoding an image may take; waiting for a disk or a busy processor does not count."""
    archive_members: PositiveInt = 20_000_000
    """Images of a tar shard."""
    archive_bytes: PositiveInt = 64 << 30
    """Bytes of a file of weights, and of the tensors in it."""
    read_timeout: PositiveFloat = 300
    """Seconds without a sign of an image that is read, as from a share that is away, after which the command stops."""


class LimitOptions(Config):
    """Files of others are read."""

    limits: Limits = Limits()
    """What reading a file may cost."""


_current = Limits()


def limits() -> Limits:
    """Return the limits in force: those of the command that runs, or the defaults."""
    return _current


@contextmanager
def use_limits(limits: Limits) -> Iterator[None]:
    """Put limits in force in this process until the context ends; workers that load data are given them, too."""
    global _current
    before, _current = _current, limits
    try:
        yield
    finally:
        _current = before
