"""Raster images inside a page: data URIs that together stay below a size."""

import base64
import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("mapet")
TINY = 64
"""Images of up to so many pixels squared are kept as they are."""
SIDE = 384
"""Largest side of a photograph of the step-through."""
STEPS = ((1.0, 84), (0.8, 78), (0.6, 72), (0.45, 66), (0.3, 60))
"""Scale and WebP quality, tried in turn."""
CAPTIONS = {
    "token_maps": "Images and their visual tokens: one colour a token. Tokens should follow what is shown, not the place alone.",
    "patches_by_code": "Patches that share a token, for codes spread over the range of frequency. A row should look alike.",
    "nearest_codes": "Mean patches of codes and of the codes nearest to them in the teacher's space.",
    "code_usage": "How often each code comes, most frequent first, beside even use.",
    "attention_mask": "The attention mask as the model learns: a row may attend to its dark columns. Context: the given patches; target: "
    "the true patches to be predicted, each for those after it; mask: stand-ins for patches; query: what predicts.",
    "predictions": "Masked patches predicted in random order: given patches, order, true tokens, predicted tokens, and the "
    "probability of the true one, from 0 (dark) to the largest of the picture.",
    "cls_attention": "Where the class token looks in the last block: the mean over heads, then single heads.",
    "features": "Features of the patches: their first three principal components, over all images shown, as red, green and "
    "blue. Patches of one colour mean the same to the model.",
    "neighbours": "Images (left) and those whose features are nearest by cosine similarity. Where images have "
    "labels, a green frame is the same class and a dashed red one another; without labels, judge by eye.",
    "confusion": "Linear probe on frozen features: each row says what images of a class were taken for.",
}
"""Name -> what is to be seen, in the order of the report."""


class ReportImage(NamedTuple):
    """A raster image of a report, one of `CAPTIONS` or with its name as the caption."""

    name: str
    image: Image.Image

    @classmethod
    def draw(cls, name: str, figure: "Figure") -> "ReportImage":
        """Rasterize a figure."""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
        return cls(name, Image.open(file).convert("RGB"))

    @property
    def caption(self) -> str:
        return CAPTIONS.get(self.name, self.name)


class EmbeddedImage(NamedTuple):
    """An image as the page has it; `src` is a data URI."""

    name: str
    caption: str
    width: int
    height: int
    src: str


def open_images(paths: Iterable[Path]) -> list[ReportImage]:
    """Read PNG files in the order of the report, with a warning for one that can't be read."""
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                found.append(ReportImage(path.stem, image.convert("RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning("the report leaves out %s: %s", path, error)
    order = {name: place for place, name in enumerate(CAPTIONS)}
    return sorted(found, key=lambda image: order.get(image.name, len(order)))


def embed_images(images: list[ReportImage], budget: int) -> tuple[list[EmbeddedImage], list[str]]:
    """Encode images as large as `budget` bytes allow, leaving out the last first.

    Returns:
        images for the page, names of those left out.
    """
    encoded: list[EmbeddedImage] = []
    for scale, quality in STEPS:
        encoded = [_encode(image, scale, quality) for image in images]
        if sum(len(one.src) for one in encoded) <= budget:
            return encoded, []
    kept, size = [], 0
    for one in encoded:
        size += len(one.src)
        if size <= budget:
            kept.append(one)
    return kept, [one.name for one in encoded if one not in kept]


def _encode(picture: ReportImage, scale: float, quality: int) -> EmbeddedImage:
    width, height = (max(1, round(scale * side)) for side in picture.image.size)
    image = picture.image if scale == 1 else picture.image.resize((width, height), Image.Resampling.LANCZOS)
    src = _uri(image, "webp", quality=quality, method=4)
    return EmbeddedImage(picture.name, picture.caption, width, height, src)


def photo_uri(image: Image.Image) -> str:
    """A photograph at no more than `SIDE`; a tiny image as it is."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return tiles_uri(image)


def tiles_uri(image: Image.Image) -> str:
    """At its own size; exact as long as that takes little."""
    if image.width * image.height <= TINY**2:
        return _uri(image, "png", optimize=True)
    return _uri(image, "webp", quality=84, method=4)


def _uri(image: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
