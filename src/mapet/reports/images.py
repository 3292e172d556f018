"""Raster pictures inside a page: data URIs that together stay below a size."""

import base64
import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    "token_maps": "Images and their visual words: one colour a word. Words should follow what is shown, not the place alone.",
    "words": "Patches that share a visual word, for words spread over the range of frequency. A row should look alike.",
    "nearest_words": "Mean patches of words and of the words nearest to them in the teacher's space.",
    "usage": "How often each word comes, commonest first, beside even use.",
    "visibility": "Who sees whom as the model learns: a row may attend to its dark columns. Context: the given patches; target: the true "
    "patches to be predicted, each for those after it; mask: stand-ins for patches; query: what predicts.",
    "predictions": "Hidden patches predicted in random order: given patches, order, true words, predicted words, and the "
    "probability of the true one, from nought (dark) to the largest of the picture.",
    "cls_attention": "Where the class token looks in the last block: the mean over heads, then single heads.",
    "features": "Features of the patches: their first three principal components, over all images shown, as red, green and "
    "blue. Patches of one colour mean the same to the model.",
    "neighbours": "Images (left) and those whose features are nearest by cosine similarity. Where images have "
    "labels, a green frame is the same class and a dashed red one another; without labels, judge by eye.",
    "confusion": "Linear probe on frozen features: each row says what images of a class were taken for.",
}
"""Name -> what is to be seen, in the order of the report."""


class Picture(NamedTuple):
    """A picture to be shown."""

    name: str
    caption: str
    image: Image.Image

    @classmethod
    def of(cls, name: str, caption: str, figure: "Figure") -> "Picture":
        """Draws the figure."""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
        return cls(name, caption, Image.open(file).convert("RGB"))


def open_pictures(paths: Iterable[Path]) -> list[Picture]:
    """PNG files in the order of the report; one that can't be read is left out."""
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                found.append(Picture(path.stem, CAPTIONS.get(path.stem, path.stem), image.convert("RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning("the report leaves out %s: %s", path, error)
    order = {name: place for place, name in enumerate(CAPTIONS)}
    return sorted(found, key=lambda picture: order.get(picture.name, len(order)))


def embedded(pictures: list[Picture], budget: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(pictures for the page, names of those left out): as large as `budget` bytes allow, the last left out first."""
    encoded: list[dict[str, Any]] = []
    for scale, quality in STEPS:
        encoded = [_encoded(picture, scale, quality) for picture in pictures]
        if sum(len(one["src"]) for one in encoded) <= budget:
            return encoded, []
    kept, size = [], 0
    for one in encoded:
        size += len(one["src"])
        if size <= budget:
            kept.append(one)
    names = {one["name"] for one in kept}
    return kept, [picture.name for picture in pictures if picture.name not in names]


def _encoded(picture: Picture, scale: float, quality: int) -> dict[str, Any]:
    width, height = (max(1, round(scale * side)) for side in picture.image.size)
    image = picture.image if scale == 1 else picture.image.resize((width, height), Image.Resampling.LANCZOS)
    title = picture.name.replace("_", " ")
    return {"name": picture.name, "title": title, "caption": picture.caption, "width": width, "height": height} | {
        "src": _uri(image, "webp", quality=quality, method=4)
    }


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


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
