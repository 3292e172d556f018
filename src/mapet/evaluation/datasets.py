"""Sets of images with what is known of each: its class, a class for every pixel, or boxes; training and test sets of them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from tqdm import tqdm

from mapet.data.image_list import ImageFiles, ImageList
from mapet.data.sources import list_images
from mapet.errors import MapetError, option, pluralize
from mapet.files import read_json

HELD_OUT = 0.2
"""Fraction of a set that is held out where no test set is given."""
IGNORE_ID, IGNORE_INDEX = 255, -1
"""Value of pixels that don't count in masks of class ids, and their class index."""
ADE20K = ("images/training", "annotations/training", "images/validation", "annotations/validation")


@dataclass
class ImageSet:
    """Images and what is known of each.

    Attributes:
        classes: names; class indices are indices into them.
    """

    PER_IMAGE: ClassVar[tuple[str, ...]] = ()
    """Fields that hold a value for each image."""
    images: ImageList
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Int[np.ndarray, " m"]) -> Self:
        """Select images."""
        values = {name: getattr(self, name) for name in self.PER_IMAGE}
        chosen = {k: v[indices] if isinstance(v, np.ndarray) else [v[i] for i in indices] for k, v in values.items()}
        return replace(self, images=self.images.subset(indices), **chosen)


@dataclass
class LabeledSet(ImageSet):
    """Images with the class of each. Without labels there are no classes, and all labels are 0."""

    PER_IMAGE = ("labels",)
    labels: Int[np.ndarray, " n"]

    def sample(self, count: int) -> "LabeledSet":
        """Select at most `count` images by a hash of their ids: the same ones every time."""
        return self if len(self) <= count else self.subset(np.sort(np.argsort(self.images.keys())[:count]))

    def title(self, index: int) -> str:
        """Name an image in a figure: by its class, without labels by the stem of its file."""
        name = self.classes[self.labels[index]] if self.classes else Path(self.images.id(index)).stem
        return name.encode(errors="replace").decode()

    @property
    def majority_accuracy(self) -> float:
        """Accuracy of always guessing the most frequent class."""
        return float(np.bincount(self.labels).max() / len(self))


@dataclass
class SegmentationSet(ImageSet):
    """Images and their masks.

    Attributes:
        masks: a PNG of each image.
        class_of: of each image, value in its mask -> class index; all other values don't count.
        panoptic: the masks hold segment ids, as COCO's panoptic ones do.
    """

    PER_IMAGE = ("masks", "class_of")
    masks: list[Path]
    class_of: list[dict[int, int]]
    panoptic: bool = False

    def class_map(self, index: int) -> Int[np.ndarray, "H W"]:
        """Read the class index of each pixel of an image; `IGNORE_INDEX` where none counts."""
        values = read_mask(self.masks[index], self.panoptic)
        found, inverse = np.unique(values, return_inverse=True)
        classes = np.array([self.class_of[index].get(int(value), IGNORE_INDEX) for value in found])
        return classes[inverse].reshape(values.shape)


@dataclass
class DetectionSet(ImageSet):
    """Images and what is in them, of COCO's instances JSON. Crowds (`iscrowd`) are left out of boxes, not of classes.

    Attributes:
        category_ids: the file's number of each class.
        image_ids: the file's number of each image.
        boxes: of each image, (m, 4) left, top, right, bottom in pixels of the image; none is empty.
        labels: of each image, (m,) class index of each box.
        image_labels: (n, K) whether an image shows a class.
        record: the file's own content, also of other images, for the official evaluation.
    """

    PER_IMAGE = ("image_ids", "boxes", "labels", "image_labels")
    category_ids: list[int]
    image_ids: list[int]
    boxes: list[Float[np.ndarray, "m 4"]]
    labels: list[Int[np.ndarray, " m"]]
    image_labels: Int[np.ndarray, "n K"]
    record: dict[str, Any]


AnyImageSet = TypeVar("AnyImageSet", bound=ImageSet)


# ---- splits


def _by_class(labels: Int[np.ndarray, " n"], num_classes: int, keys: Int[np.ndarray, " n"]) -> list[np.ndarray]:
    """Return the indices of each class, in the order of their keys."""
    return np.split(np.lexsort((keys, labels)), np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def heldout_mask(data: ImageSet) -> Bool[np.ndarray, " n"]:
    """Choose the images to hold out: `HELD_OUT` of each class of labeled images, at least one, by a hash of the image id."""
    mask = np.zeros(len(data), dtype=bool)
    labels = data.labels if isinstance(data, LabeledSet) else np.zeros(len(data), np.int64)
    for members in _by_class(labels, len(data.classes), data.images.keys()):
        mask[members[: max(1, round(HELD_OUT * len(members)))]] = True
    return mask


def split(data: AnyImageSet) -> tuple[AnyImageSet, AnyImageSet]:
    """Split into training and test set, by `heldout_mask`: the same way every time.

    Raises:
        MapetError: no class has a second image.
    """
    held_out = heldout_mask(data)
    if held_out.all():
        raise MapetError(f"{data.images.root}: no class has a second image to hold out; give {option('test_images')}")
    return data.subset(np.flatnonzero(~held_out)), data.subset(np.flatnonzero(held_out))


def _train_and_test(sets: list[AnyImageSet], sources: Sequence[object]) -> tuple[AnyImageSet, AnyImageSet]:
    """Take both sets, or split the one there is.

    Raises:
        MapetError: they have different classes.
    """
    if len(sets) == 1:
        return split(sets[0])
    train, test = sets
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
        raise MapetError(f"{sources[0]} and {sources[1]} have different classes: {odd}")
    return train, test


def few_shot_split(data: LabeledSet, amount: float, seed: int) -> Int[np.ndarray, " m"]:
    """Select the images of a few-shot split: their sorted indices.

    It is the same for everybody: a function of the images' ids and a seed, in any language. An image's number is the first 8
    bytes, little-endian, of the BLAKE2b digest (8 bytes long) of the UTF-8 text `SEED:ID`, the id being its path below the data
    set's folder with forward slashes (`CLASS/image.jpg`). Of each class the images of smallest number are taken. So smaller
    splits are parts of larger ones, and adding or removing an image moves no other one.

    Args:
        amount: below 1 a fraction of each class (at least one image), else so many images of each class.

    Raises:
        MapetError: a class has fewer images.
    """
    digests = (hashlib.blake2b(b"%d:" % seed + data.images.ids[i], digest_size=8) for i in range(len(data)))
    numbers = np.fromiter((int.from_bytes(digest.digest(), "little") for digest in digests), np.uint64, len(data))
    kept = []
    for name, members in zip(data.classes, _by_class(data.labels, len(data.classes), numbers), strict=True):
        count = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        if count > len(members):
            there = pluralize(len(members), "image")
            raise MapetError(f"class '{name}' has {there} to learn from, fewer than the {count:,} asked for")
        kept.append(members[:count])
    return np.sort(np.concatenate(kept))


# ---- labels


def labeled(images: ImageList) -> LabeledSet:
    """Read the labels a data set gives, or those of class folders.

    Raises:
        MapetError: there are none, and the images do not lie in two or more class folders.
    """
    if (found := images.classes()) is not None:
        return LabeledSet(images, *found)
    stray = [i for i in range(len(images)) if b"/" not in images.ids[i]]
    instead = f", but {images.id(stray[0])!r} lies in none" if stray else ", but they all lie in one"
    instead = "" if len(stray) == len(images) else instead
    raise MapetError(
        f"{images.root} has no labels: expected every image in one of two or more class folders, CLASS/image.jpg{instead}"
    )


def unlabeled(images: ImageList) -> LabeledSet:
    """Take images without classes."""
    return LabeledSet(images, [], np.zeros(len(images), np.int64))


def train_and_test(train: str | Path, test: str | Path | None) -> tuple[LabeledSet, LabeledSet]:
    """Open two labeled sets, or one split by image id, the same way every time.

    Raises:
        MapetError: no labels, or other classes in the two sets.
    """
    images = [
        list_images(source) for source in (train, test) if source is not None
    ]  # both exist, before labels are needed
    return _train_and_test([labeled(one) for one in images], (train, test))


# ---- boxes


@contextmanager
def _annotations(path: Path, what: str) -> Iterator[Any]:
    """Read a JSON file of COCO's; what is missing in it as it is used is a MapetError."""
    try:
        yield read_json(path, what)
    except (KeyError, TypeError, ValueError) as error:
        raise MapetError(f"{path}: not {what} ({error!r})") from None


def _categories(record: Any) -> tuple[list[str], dict[int, int]]:
    """Names of the classes, and id -> class index, both by id."""
    categories = sorted(record["categories"], key=lambda category: category["id"])
    names = [str(category["name"]) for category in categories]
    return names, {category["id"]: index for index, category in enumerate(categories)}


def listed_images(folder: Path, names: Sequence[str], source: Path) -> ImageList:
    """List the images that an annotation file names, in its order.

    Raises:
        MapetError: one is not there.
    """
    if not names:
        raise MapetError(f"{source} names no images")
    for name in names:
        if not (folder / name).is_file():
            raise MapetError(f"{source} names {name}, which is not in {folder}")
    sizes = [(folder / name).stat().st_size for name in names]
    return ImageFiles(folder, [os.fsencode(name) for name in names], sizes)


def detection_sets(
    images: Path, annotations: Path, test_images: Path | None, test_annotations: Path | None
) -> tuple[DetectionSet, DetectionSet]:
    """Read training and test images. Without test annotations a fifth is tested on.

    Raises:
        MapetError: not such files, images that aren't there, other categories in the two.
    """
    pairs = (annotations, images), (test_annotations, test_images or images)
    sets = [read_instances(path, folder) for path, folder in pairs if path is not None]
    return _train_and_test(sets, (annotations, test_annotations))


def read_instances(annotations: Path, images: Path) -> DetectionSet:
    """Read a file of COCO's `instances_*.json` layout; images are sorted by name."""
    with _annotations(annotations, "COCO annotations of instances") as record:
        classes, column = _categories(record)
        listed = sorted(record["images"], key=lambda image: image["file_name"])
        row = {image["id"]: index for index, image in enumerate(listed)}
        boxes: list[list[list[float]]] = [[] for _ in listed]
        labels: list[list[int]] = [[] for _ in listed]
        image_labels = np.zeros((len(listed), len(classes)), np.int64)
        for one in record["annotations"]:
            image, label = row[one["image_id"]], column[one["category_id"]]
            image_labels[image, label] = 1
            left, top, width, height = one["bbox"]
            if not one.get("iscrowd", 0) and width > 0 and height > 0:
                boxes[image].append([left, top, left + width, top + height])
                labels[image].append(label)
        return DetectionSet(
            listed_images(images, [image["file_name"] for image in listed], annotations), classes, list(column), list(row),
            [np.array(part, np.float64).reshape(-1, 4) for part in boxes], [np.array(part, np.int64) for part in labels],
            image_labels, record,
        )  # fmt: skip


# ---- masks


def read_mask(path: Path, panoptic: bool = False) -> Int[np.ndarray, "H W"]:
    """Read class ids of a gray or palette PNG, or segment ids R + 256 G + 256^2 B of a panoptic one.

    Raises:
        MapetError: not a readable image, or of another kind.
    """
    try:
        with Image.open(path) as image:
            if panoptic:
                return np.asarray(image.convert("RGB")).astype(np.int64) @ np.array([1, 256, 256 * 256])
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                raise MapetError(f"{path}: a mask of class ids is a gray or palette PNG, this one is {image.mode}")
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
            raise MapetError(f"{images} is ADE20K's folder, tested on its own validation images: leave out other ones")
        images, masks, test_images, test_masks = ade
        ignored.add(0)
    if masks is None and (images / "images").is_dir() and (images / "masks").is_dir():
        images, masks = images / "images", images / "masks"
    if masks is None:
        return None
    if test_images is not None and test_masks is None:
        raise MapetError(f"{images} has masks, so {option('test_images')} need {option('test_seg_masks')}")
    sources = [(images, masks)] + ([(test_images or images, test_masks)] if test_masks is not None else [])
    panoptic = masks.suffix == ".json"
    sets = [_read_panoptic(*source) for source in sources] if panoptic else _read_masks(sources, ignored)
    return _train_and_test(sets, (masks, test_masks))


def _read_masks(sources: list[tuple[Path, Path]], ignored: set[int]) -> list[SegmentationSet]:
    """Pair the images of each folder that have a mask with it. All masks are read once: classes are the ids that occur."""
    sets, found = [], set[int]()
    for images, masks in sources:
        listed = list_images(images)
        paths = [masks / f"{os.path.splitext(listed.id(index))[0]}.png" for index in range(len(listed))]
        kept = [index for index, path in enumerate(paths) if path.is_file()]
        if not kept:
            raise MapetError(f"no image of {images} has a mask in {masks}: expected {paths[0]}, and so on")
        sets.append((listed.subset(kept), [paths[index] for index in kept]))
    for path in tqdm([path for _, paths in sets for path in paths], desc="masks", disable=None, leave=False):
        found |= set(np.unique(read_mask(path)).tolist())
    ids = sorted(found - ignored)
    if len(ids) < 2:
        raise MapetError(f"the masks hold {len(ids)} classes beside {sorted(ignored)}: at least two are needed")
    class_of = {id: index for index, id in enumerate(ids)}
    return [SegmentationSet(listed, [str(id) for id in ids], paths, [class_of] * len(paths)) for listed, paths in sets]


def _read_panoptic(images: Path, annotations: Path) -> SegmentationSet:
    """Read COCO panoptic: categories of segments, things and stuff alike."""
    with _annotations(annotations, "COCO panoptic annotations") as record:
        classes, column = _categories(record)
        files = {image["id"]: image["file_name"] for image in record["images"]}
        rows = sorted((files[one["image_id"]], one["file_name"], one["segments_info"]) for one in record["annotations"])
        class_of = [{part["id"]: column[part["category_id"]] for part in parts} for _, _, parts in rows]
        folder = annotations.with_suffix("")
        masks = [folder / mask for _, mask, _ in rows]
        if masks and not masks[0].is_file():
            raise MapetError(f"{annotations}: its masks are expected in {folder}; {masks[0].name} is not there")
        listed = listed_images(images, [name for name, _, _ in rows], annotations)
        return SegmentationSet(listed, classes, masks, class_of, panoptic=True)
