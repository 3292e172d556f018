"""Types of options: sizes, ranges, and where images are."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PositiveInt


def _as_pair(value: Any) -> Any:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values


Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_as_pair)]
"""Height and width, pixels; one number means a square."""
Ratio = Annotated[tuple[float, float], BeforeValidator(_as_pair)]
"""A range of shares; one number means just that."""


HUGGING_FACE = "hf:"
"""How names of Hugging Face's data sets begin."""


def is_url(source: str) -> bool:
    """Whether a source of images is a URL, perhaps of several parts, rather than a path."""
    return "://" in source


def _as_source(value: Any) -> Any:
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    return text if not isinstance(text, str) or text.startswith(HUGGING_FACE) or is_url(text) else str(Path(text))


Source = Annotated[str, BeforeValidator(_as_source)]
"""Where images are: a path, a URL (of whose slashes a `Path` would lose one), or hf:NAME."""
