"""Images with a class for every pixel, in the layouts that such data sets come in."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from tqdm import tqdm

from mapet.data.image_list import ImageList
from mapet.data.sources import scan
from mapet.errors import MapetError
from mapet.evaluation.features import held_out, unlabelled
from mapet.files import read_json

VOID = 255
"""Value of pixels that don't count, in masks of class ids."""
NOWHERE = -1
"""Index of pixels that don't count."""


@dataclass
class MaskedSet:
    """Images and their masks.

    Attributes:
        masks: a PNG of each image.
        classes: names, in the order of indices.
        ids: value in the masks of each class; all others are void.
        segments: COCO panoptic: of each image, segment id -> class index; then the masks hold segment ids.
    """

    images: ImageList
    masks: list[Path]
    classes: list[str]
    ids: list[int]
    segments: list[dict[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.masks)

    def subset(self, indices: Int[np.ndarray, " m"]) -> "MaskedSet":
        chosen = indices.tolist()
        segments = None if self.segments is None else [self.segments[i] for i in chosen]
        return MaskedSet(self.images.subset(chosen), [self.masks[i] for i in chosen], self.classes, self.ids, segments)

    def classes_of(self, index: int) -> Int[np.ndarray, "H W"]:
        """The class index of each pixel; `NOWHERE` where none counts."""
        values = read_mask(self.masks[index], panoptic=self.segments is not None)
        table = (
            dict(zip(self.ids, range(len(self.ids)), strict=True)) if self.segments is None else self.segments[index]
        )
        known = np.array(sorted(table), np.int64)
        if not len(known):
            return np.full(values.shape, NOWHERE)
        place = np.searchsorted(known, values).clip(max=len(known) - 1)
        indices = np.array([table[int(value)] for value in known])[place]
        return np.where(known[place] == values, indices, NOWHERE)


def read_mask(path: Path, panoptic: bool = False) -> Int[np.ndarray, "H W"]:
    """Class ids of a grey or palette PNG, or segment ids R + 256 G + 256^2 B of a panoptic one.

    Raises:
        MapetError: not a readable image, or of another kind.
    """
    try:
        with Image.open(path) as image:
            if panoptic:
                rgb: UInt8[np.ndarray, "H W 3"] = np.asarray(image.convert("RGB"))
                return rgb.astype(np.int64) @ np.array([1, 256, 256 * 256])
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                raise MapetError(f"{path}: a mask of class ids is a grey or palette PNG, this one is {image.mode}")
            return np.asarray(image).astype(np.int64)
    except OSError as error:
        raise MapetError(f"cannot read the mask {path}: {error.strerror or error}") from None


def masked_sets(
    images: Path, masks: Path | None, test_images: Path | None, test_masks: Path | None, void: Sequence[int] = ()
) -> tuple[MaskedSet, MaskedSet] | None:
    """Training and test images with masks; None where there are no masks.

    Layouts: a folder of masks beside `images`, paired by name (a/b.jpg and a/b.png); one folder that holds images/ and masks/;
    ADE20K's (images/ and annotations/, each with training/ and validation/; 0 is void); a COCO panoptic JSON, beside which
    the folder of its PNGs lies under the same name.

    Args:
        void: class ids that don't count, beside 255.

    Raises:
        MapetError: nothing fits together.
    """
    ade = [images / kind / part for part in ("training", "validation") for kind in ("images", "annotations")]
    if masks is None and all(folder.is_dir() for folder in ade):
        if test_images is not None or test_masks is not None:
            raise MapetError(
                f"{images} is ADE20K's folder, which is tested on its own validation images: leave out other ones"
            )
        train, test = _with_classes([_paired(ade[i], ade[i + 1]) for i in (0, 2)], {0, VOID, *void})
        return train, test
    if masks is None and (images / "images").is_dir() and (images / "masks").is_dir():
        images, masks = images / "images", images / "masks"
    if masks is None:
        return None
    sets = [_panoptic(images, masks) if masks.suffix == ".json" else _paired(images, masks)]
    if test_masks is not None:
        where = test_images or images
        sets.append(_panoptic(where, test_masks) if test_masks.suffix == ".json" else _paired(where, test_masks))
    if sets[0].segments is None:
        sets = _with_classes(sets, {VOID, *void})
    elif len(sets) == 2 and sets[0].classes != sets[1].classes:
        raise MapetError(f"{masks} and {test_masks} have different categories")
    if len(sets) == 2:
        return sets[0], sets[1]
    held = held_out(unlabelled(sets[0].images))
    return sets[0].subset(np.flatnonzero(~held)), sets[0].subset(np.flatnonzero(held))


def _paired(images: Path, masks: Path) -> MaskedSet:
    """Images of one folder with masks of another; those without a mask are left out."""
    listed = scan(images)
    kept, paths = [], []
    for index in range(len(listed)):
        mask = masks / (os.path.splitext(listed.id(index))[0] + ".png")
        if mask.is_file():
            kept.append(index)
            paths.append(mask)
    if not kept:
        raise MapetError(
            f"no image of {images} has a mask in {masks}: expected {os.path.splitext(listed.id(0))[0]}.png there, and so on"
        )
    return MaskedSet(listed.subset(kept), paths, [], [])


def _with_classes(sets: list[MaskedSet], void: set[int]) -> list[MaskedSet]:
    """All masks are read once: classes are the ids that occur."""
    found: set[int] = set()
    for path in tqdm([path for one in sets for path in one.masks], desc="masks", disable=None, leave=False):
        found |= set(np.unique(read_mask(path)).tolist())
    ids = sorted(found - void)
    if len(ids) < 2:
        raise MapetError(f"the masks hold {len(ids)} classes beside void ({sorted(void)}): at least two are needed")
    return [MaskedSet(one.images, one.masks, [str(i) for i in ids], ids) for one in sets]


def _panoptic(images: Path, annotations: Path) -> MaskedSet:
    """COCO panoptic: categories of segments, things and stuff alike."""
    record = read_json(annotations, "COCO panoptic annotations")
    folder = annotations.with_suffix("")
    try:
        categories = sorted(record["categories"], key=lambda category: category["id"])
        place = {category["id"]: number for number, category in enumerate(categories)}
        names = {image["id"]: image["file_name"] for image in record["images"]}
        rows = sorted(
            (
                names[one["image_id"]],
                folder / one["file_name"],
                {s["id"]: place[s["category_id"]] for s in one["segments_info"]},
            )
            for one in record["annotations"]
        )
    except (KeyError, TypeError) as error:
        raise MapetError(
            f"{annotations}: not COCO panoptic annotations ({error} is missing or of another kind)"
        ) from None
    for _, mask, _ in rows[:1]:
        if not mask.is_file():
            raise MapetError(f"{annotations}: its masks are expected in {folder}; {mask.name} is not there")
    listed = listed_images(images, [name for name, _, _ in rows], annotations)
    ids = [category["id"] for category in categories]
    names_of = [str(category["name"]) for category in categories]
    return MaskedSet(listed, [mask for _, mask, _ in rows], names_of, ids, [segments for _, _, segments in rows])


def listed_images(folder: Path, names: Sequence[str], source: Path) -> ImageList:
    """Images that an annotation file names, in its order.

    Raises:
        MapetError: one is not there.
    """
    sizes = []
    for name in names:
        try:
            sizes.append((folder / name).stat().st_size)
        except OSError as error:
            raise MapetError(f"{source} names {name}, which is not in {folder}: {error.strerror}") from None
    if not sizes:
        raise MapetError(f"{source} names no images")
    return ImageList(folder, [os.fsencode(name) for name in names], sizes)
