"""Images with a class for every pixel, or with boxes, in the layouts that such data sets come in."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from tqdm import tqdm

from mapet.data.image_list import ImageFiles, ImageList
from mapet.data.sources import scan
from mapet.errors import MapetError, option
from mapet.evaluation.features import held_out, unlabelled
from mapet.files import read_json

IGNORE_ID, IGNORE_INDEX = 255, -1
"""Value of pixels that don't count in masks of class ids, and their class index."""
ADE20K = ("images/training", "annotations/training", "images/validation", "annotations/validation")


@dataclass
class SegmentationSet:
    """Images and their masks.

    Attributes:
        masks: a PNG of each image.
        classes: names, in the order of indices.
        ids: value in the masks of each class; all others don't count.
        segments: COCO panoptic: of each image, segment id -> class index; then the masks hold segment ids.
    """

    images: ImageList
    masks: list[Path]
    classes: list[str]
    ids: list[int]
    segments: list[dict[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.masks)

    def subset(self, indices: Int[np.ndarray, " m"]) -> "SegmentationSet":
        """Select images."""
        chosen = indices.tolist()
        segments = None if self.segments is None else [self.segments[i] for i in chosen]
        masks = [self.masks[i] for i in chosen]
        return SegmentationSet(self.images.subset(chosen), masks, self.classes, self.ids, segments)

    def class_map(self, index: int) -> Int[np.ndarray, "H W"]:
        """Read the class index of each pixel of an image; `IGNORE_INDEX` where none counts."""
        values = read_mask(self.masks[index], panoptic=self.segments is not None)
        table = self.segments[index] if self.segments is not None else {id: i for i, id in enumerate(self.ids)}
        found, inverse = np.unique(values, return_inverse=True)
        return np.array([table.get(int(value), IGNORE_INDEX) for value in found])[inverse].reshape(values.shape)


@dataclass
class DetectionSet:
    """Images and what is in them, of COCO's instances JSON. Crowds (`iscrowd`) are left out of boxes, not of classes.

    Attributes:
        image_ids: the file's number of each image.
        classes: names, in the order of `category_ids`.
        boxes: of each image, (m, 4) left, top, right, bottom in pixels of the image; none is empty.
        labels: of each image, (m,) class index of each box.
        image_labels: (n, K) whether an image shows a class.
        record: the file's own content for these images, for the official evaluation.
    """

    images: ImageList
    image_ids: list[int]
    classes: list[str]
    category_ids: list[int]
    boxes: list[Float[np.ndarray, "m 4"]]
    labels: list[Int[np.ndarray, " m"]]
    image_labels: Int[np.ndarray, "n K"]
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.image_ids)

    def subset(self, indices: Int[np.ndarray, " m"]) -> "DetectionSet":
        """Select images."""
        chosen = indices.tolist()
        ids = [self.image_ids[i] for i in chosen]
        kept = set(ids)
        record = self.record | {
            "images": [image for image in self.record["images"] if image["id"] in kept],
            "annotations": [one for one in self.record["annotations"] if one["image_id"] in kept],
        }
        return DetectionSet(
            self.images.subset(chosen), ids, self.classes, self.category_ids, [self.boxes[i] for i in chosen],
            [self.labels[i] for i in chosen], self.image_labels[indices], record,
        )  # fmt: skip


AnnotatedSet = TypeVar("AnnotatedSet", SegmentationSet, DetectionSet)


def _train_and_test(sets: list[AnnotatedSet], sources: Sequence[Path | None]) -> tuple[AnnotatedSet, AnnotatedSet]:
    """Take both sets, or split the one there is.

    Raises:
        MapetError: they have different classes.
    """
    if len(sets) == 1:
        held = held_out(unlabelled(sets[0].images))
        return sets[0].subset(np.flatnonzero(~held)), sets[0].subset(np.flatnonzero(held))
    if sets[0].classes != sets[1].classes:
        raise MapetError(f"{sources[0]} and {sources[1]} have different categories")
    return sets[0], sets[1]


def detection_sets(
    images: Path, annotations: Path, test_images: Path | None, test_annotations: Path | None
) -> tuple[DetectionSet, DetectionSet]:
    """Read training and test images. Without test annotations a fifth is tested on.

    Raises:
        MapetError: not such files, images that aren't there, other categories in the two.
    """
    sets = [read_instances(annotations, images)]
    if test_annotations is not None:
        sets.append(read_instances(test_annotations, test_images or images))
    return _train_and_test(sets, (annotations, test_annotations))


def read_instances(annotations: Path, images: Path) -> DetectionSet:
    """Read a file of COCO's `instances_*.json` layout; images are sorted by name."""
    record = read_json(annotations, "COCO annotations")
    try:
        categories = sorted(record["categories"], key=lambda category: category["id"])
        column = {category["id"]: index for index, category in enumerate(categories)}
        listed = sorted(record["images"], key=lambda image: image["file_name"])
        row = {image["id"]: index for index, image in enumerate(listed)}
        boxes: list[list[list[float]]] = [[] for _ in listed]
        labels: list[list[int]] = [[] for _ in listed]
        image_labels = np.zeros((len(listed), len(categories)), np.int64)
        for one in record["annotations"]:
            image, label = row[one["image_id"]], column[one["category_id"]]
            image_labels[image, label] = 1
            left, top, width, height = one["bbox"]
            if not one.get("iscrowd", 0) and width > 0 and height > 0:
                boxes[image].append([left, top, left + width, top + height])
                labels[image].append(label)
        names = [image["file_name"] for image in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise MapetError(f"{annotations}: not COCO annotations of instances ({error!r})") from None
    return DetectionSet(
        listed_images(images, names, annotations), [image["id"] for image in listed],
        [str(category["name"]) for category in categories], [category["id"] for category in categories],
        [np.array(part, np.float64).reshape(-1, 4) for part in boxes], [np.array(part, np.int64) for part in labels],
        image_labels, record,
    )  # fmt: skip


def read_mask(path: Path, panoptic: bool = False) -> Int[np.ndarray, "H W"]:
    """Read class ids of a grey or palette PNG, or segment ids R + 256 G + 256^2 B of a panoptic one.

    Raises:
        MapetError: not a readable image, or of another kind.
    """
    try:
        with Image.open(path) as image:
            if panoptic:
                return np.asarray(image.convert("RGB")).astype(np.int64) @ np.array([1, 256, 256 * 256])
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                raise MapetError(f"{path}: a mask of class ids is a grey or palette PNG, this one is {image.mode}")
            return np.asarray(image).astype(np.int64)
    except OSError as error:
        raise MapetError(f"cannot read the mask {path}: {error.strerror or error}") from None


def segmentation_sets(
    images: Path, masks: Path | None, test_images: Path | None, test_masks: Path | None, ignore: Sequence[int] = ()
) -> tuple[SegmentationSet, SegmentationSet] | None:
    """Read training and test images with masks; None where there are no masks.

    Layouts: a folder of masks beside `images`, paired by name (a/b.jpg and a/b.png); one folder that holds images/ and masks/;
    ADE20K's (images/ and annotations/, each with training/ and validation/; 0 doesn't count); a COCO panoptic JSON, beside which
    the folder of its PNGs lies under the same name.

    Args:
        ignore: class ids that don't count, beside 255.

    Raises:
        MapetError: nothing fits together.
    """
    ignored = {IGNORE_ID, *ignore}
    ade = [images / folder for folder in ADE20K]
    if masks is None and all(folder.is_dir() for folder in ade):
        if test_images is not None or test_masks is not None:
            raise MapetError(
                f"{images} is ADE20K's folder, which is tested on its own validation images: leave out other ones"
            )
        images, masks, test_images, test_masks = ade
        ignored.add(0)
    if masks is None and (images / "images").is_dir() and (images / "masks").is_dir():
        images, masks = images / "images", images / "masks"
    if masks is None:
        return None
    if test_images is not None and test_masks is None:
        raise MapetError(f"{images} has masks, so {option('test_images')} need {option('test_seg_masks')}")
    sources = [(images, masks)] + ([(test_images or images, test_masks)] if test_masks is not None else [])
    sets = [(_read_panoptic if source[1].suffix == ".json" else _pair)(*source) for source in sources]
    if sets[0].segments is None:
        sets = _find_classes(sets, ignored)
    return _train_and_test(sets, (masks, test_masks))


def _pair(images: Path, masks: Path) -> SegmentationSet:
    """Pair images of one folder with masks of another; those without a mask are left out."""
    listed = scan(images)
    names = [os.path.splitext(listed.id(index))[0] + ".png" for index in range(len(listed))]
    kept = [index for index, name in enumerate(names) if (masks / name).is_file()]
    if not kept:
        raise MapetError(f"no image of {images} has a mask in {masks}: expected {names[0]} there, and so on")
    return SegmentationSet(listed.subset(kept), [masks / names[index] for index in kept], [], [])


def _find_classes(sets: list[SegmentationSet], ignored: set[int]) -> list[SegmentationSet]:
    """Read all masks once: classes are the ids that occur."""
    found: set[int] = set()
    for path in tqdm([path for one in sets for path in one.masks], desc="masks", disable=None, leave=False):
        found |= set(np.unique(read_mask(path)).tolist())
    ids = sorted(found - ignored)
    if len(ids) < 2:
        raise MapetError(
            f"the masks hold {len(ids)} classes beside {sorted(ignored)}, which don't count: at least two are needed"
        )
    return [SegmentationSet(one.images, one.masks, [str(i) for i in ids], ids) for one in sets]


def _read_panoptic(images: Path, annotations: Path) -> SegmentationSet:
    """Read COCO panoptic: categories of segments, things and stuff alike."""
    record = read_json(annotations, "COCO panoptic annotations")
    folder = annotations.with_suffix("")
    try:
        categories = sorted(record["categories"], key=lambda category: category["id"])
        column = {category["id"]: index for index, category in enumerate(categories)}
        files = {image["id"]: image["file_name"] for image in record["images"]}
        rows = sorted((files[one["image_id"]], one["file_name"], one["segments_info"]) for one in record["annotations"])
        segments = [{part["id"]: column[part["category_id"]] for part in parts} for _, _, parts in rows]
        names = [str(category["name"]) for category in categories]
    except (KeyError, TypeError) as error:
        raise MapetError(
            f"{annotations}: not COCO panoptic annotations ({error} is missing or of another kind)"
        ) from None
    masks = [folder / mask for _, mask, _ in rows]
    if masks and not masks[0].is_file():
        raise MapetError(f"{annotations}: its masks are expected in {folder}; {masks[0].name} is not there")
    listed = listed_images(images, [name for name, _, _ in rows], annotations)
    return SegmentationSet(listed, masks, names, list(column), segments)


def listed_images(folder: Path, names: Sequence[str], source: Path) -> ImageList:
    """List the images that an annotation file names, in its order.

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
    return ImageList(ImageFiles(folder, [os.fsencode(name) for name in names], sizes))
