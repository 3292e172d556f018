"""Raster images inside a page: data URIs that together stay below a size."""

import base64
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("mapet")
ORDER = (
    *("token_maps", "patches_by_code", "nearest_codes", "code_usage", "attention_mask", "predictions"),
    *("cls_attention", "features", "neighbours", "confusion"),
)
"""Names of figures in the order of the report."""
TINY = 64
"""Images of up to so many pixels squared are kept as they are."""
STEPS = ((1.0, 84), (0.8, 78), (0.6, 72), (0.45, 66), (0.3, 60))
"""Scale and WebP quality, tried in turn."""


class ReportImage(NamedTuple):
    """A raster image of a report."""

    name: str
    image: Image.Image


class EmbeddedImage(NamedTuple):
    """An image as the page has it; `src` is a data URI."""

    name: str
    width: int
    height: int
    src: str


def rasterize(name: str, figure: "Figure") -> ReportImage:
    """Make an image of a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return ReportImage(name, Image.open(file).convert("RGB"))


def open_images(paths: Iterable[Path]) -> list[ReportImage]:
    """Read PNG files in the order of the report, with a warning for one that can't be read."""
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                found.append(ReportImage(path.stem, image.convert("RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning("the report leaves out %s: %s", path, error)
    return sorted(found, key=lambda image: [*ORDER, image.name].index(image.name))


def embed_images(images: Sequence[ReportImage], budget: int) -> tuple[list[EmbeddedImage], list[str]]:
    """Encode images as large as `budget` bytes allow, leaving out the last first.

    Returns:
        images for the page, names of those left out.
    """
    kept: list[EmbeddedImage] = []
    for scale, quality in STEPS:
        kept = []
        for name, image in images:
            width, height = (max(1, round(scale * side)) for side in image.size)
            shrunk = image if scale == 1 else image.resize((width, height), Image.Resampling.LANCZOS)
            kept.append(EmbeddedImage(name, width, height, _uri(shrunk, "webp", quality=quality, method=4)))
        if sum(len(one.src) for one in kept) <= budget:
            break
    while sum(len(one.src) for one in kept) > budget:
        kept.pop()
    return kept, [name for name, _ in images[len(kept) :]]


def image_uri(image: Image.Image, side: int | None = None) -> str:
    """Encode an image, at its own size or no larger than `side`; exact as long as that takes little."""
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if image.width * image.height <= TINY**2:
        return _uri(image, "png", optimize=True)
    return _uri(image, "webp", quality=84, method=4)


def _uri(image: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
