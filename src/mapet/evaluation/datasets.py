"""Sets of images with annotations: a class per image, a class per pixel, or boxes; and training and test sets of them."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from tqdm import tqdm

from mapet.config.shared import AS_STORED, GroupBy, ReadOptions
from mapet.data.groups import find_groups
from mapet.data.image_list import ImageFiles, ImageList
from mapet.data.readers.image import ImageFile, Orientation
from mapet.data.readers.open import read_orientation
from mapet.data.sources import list_images
from mapet.errors import MapetError, option, pluralize
from mapet.files import read_json

log = logging.getLogger("mapet")
HELD_OUT = 0.2
"""Fraction of a set that is held out as its test set, or to choose hyperparameters by."""
IGNORE_ID, IGNORE_INDEX = 255, -1
"""Mask value of pixels without a class, and their class index."""
MASK_MODES = ("L", "P", "I", "I;16", "1")
"""Pillow's modes of gray and palette PNGs."""
ADE20K = ("images/training", "annotations/training", "images/validation", "annotations/validation")
"""Folders of training images and masks, and of test images and masks."""


@dataclass
class ImageSet:
    """Images and their annotations, which subclasses have.

    Attributes:
        classes: names; class indices are indices into them.
    """

    PER_IMAGE: ClassVar[tuple[str, ...]] = ()
    """Fields that hold a value for each image."""
    images: ImageList
    classes: list[str]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def subset(self, indices: Int[np.ndarray, " m"]) -> Self:
        """Return a set of the images at `indices` with their annotations, in this order; `self` is not changed.

        `PER_IMAGE` names the fields with one value per image, NumPy arrays or lists, of which the values at the same indices are taken;
        other fields, such as `classes`, stay as they are.
        """
        selected: dict[str, Any] = {}
        for name in self.PER_IMAGE:
            values = getattr(self, name)
            selected[name] = values[indices] if isinstance(values, np.ndarray) else [values[i] for i in indices]
        return replace(self, images=self.images.subset(indices), **selected)


@dataclass
class LabeledSet(ImageSet):
    """Images with the class of each. Without labels there are no classes, and all labels are 0."""

    PER_IMAGE = ("labels",)
    labels: Int[np.ndarray, " n"]

    @classmethod
    def from_images(cls, images: ImageList) -> "LabeledSet":
        """Label images by the labels of their source (e.g. a Hugging Face data set), or by their class folders.

        Raises:
            MapetError: the source has no labels, and its images are not all in one of two or more class folders.
        """
        if (labels := images.classes()) is not None:  # (class names, class index of each image)
            return cls(images, *labels)
        if images.label_note:
            raise MapetError(f"{images.root} has no labels: {images.label_note}")
        stray = [index for index in range(len(images)) if b"/" not in images.ids[index]]
        folders = {image_id.split(b"/")[0] for image_id in images.ids if b"/" in image_id}
        outside = f"{pluralize(len(stray), 'image')} outside of them" + (f" ({images.id(stray[0])!r})" if stray else "")
        raise MapetError(
            f"{images.root} has no labels: expected every image in one of two or more class folders, CLASS/image.jpg; found "
            f"{pluralize(len(folders), 'class folder')}, and {outside}: move each image into the folder of its class"
        )

    @classmethod
    def without_labels(cls, images: ImageList) -> "LabeledSet":
        """Return a set of these images without classes: `classes` is empty, and all labels are 0."""
        return cls(images, [], np.zeros(len(images), np.int64))

    def sample(self, count: int) -> "LabeledSet":
        """Return the `count` images with the smallest hashes of their ids, in their order, or all if there are no more.

        The choice is a function of the ids alone: it is the same every time.
        """
        return self if len(self) <= count else self.subset(np.sort(np.argsort(self.images.keys())[:count]))

    def title(self, index: int) -> str:
        """Return the caption of an image in a figure: the name of its class, or without labels its file name without extension.

        Characters that cannot be encoded as UTF-8 (of undecodable file names) become '?'.
        """
        name = self.classes[self.labels[index]] if self.classes else Path(self.images.id(index)).stem
        return name.encode(errors="replace").decode()

    @property
    def majority_accuracy(self) -> float:
        """Return the accuracy, in [0, 1], of always predicting the most frequent class of this set."""
        return float(np.bincount(self.labels).max() / len(self))


@dataclass
class SegmentationSet(ImageSet):
    """Images with a mask of each: a class of every pixel.

    Attributes:
        masks: path of the PNG mask of each image.
        class_of: for each image, value in its mask -> class index; pixels of other values have no class.
        panoptic: masks hold segment ids, as COCO's panoptic ones do, not class ids.
        as_stored: masks whose size fits the stored and the upright image were drawn on images as they are stored, before EXIF rotation.
    """

    PER_IMAGE = ("masks", "class_of")
    masks: list[Path]
    class_of: list[dict[int, int]]
    panoptic: bool = False
    as_stored: bool = False

    def class_map(self, index: int) -> Int[np.ndarray, "H W"]:
        """Read the mask of the image at `index`, upright, and return the class index of each pixel; `IGNORE_INDEX` (-1) where it has none.

        `self.class_of[index]` maps values of that mask, class ids or panoptic segment ids, to class indices.

        Raises:
            MapetError: the mask cannot be read.
        """
        mask = read_mask(self.masks[index], self.panoptic)
        orientation = read_orientation(self.images.file(index))
        if orientation.is_as_stored(mask.shape, self.as_stored):
            mask = orientation.turn.apply(mask)
        values, inverse = np.unique(mask, return_inverse=True)
        classes = np.array([self.class_of[index].get(value, IGNORE_INDEX) for value in values.tolist()])
        return classes[inverse].reshape(mask.shape)


@dataclass
class DetectionSet(ImageSet):
    """Images with the boxes of their objects, as COCO's instances JSON has them. Crowds (`iscrowd`) have labels, but no boxes.

    Attributes:
        category_ids: COCO category id of each class.
        image_ids: COCO image id of each image.
        boxes: for each image, (m, 4) left, top, right, bottom in pixels of the image; none is empty.
        labels: for each image, (m,) class index of each box.
        image_labels: (n, K), 1 where an image shows a class, else 0.
        record: content of the JSON file, for pycocotools.
    """

    PER_IMAGE = ("image_ids", "boxes", "labels", "image_labels")
    category_ids: list[int]
    image_ids: list[int]
    boxes: list[Float[np.ndarray, "m 4"]]
    labels: list[Int[np.ndarray, " m"]]
    image_labels: Int[np.ndarray, "n K"]
    record: dict[str, Any]


@dataclass
class AnnotationOrientation:
    """Finds out whether annotations of a set were drawn on the images as they are stored, or upright, as EXIF turns them.

    A size that fits only one of the two decides; half turns, mirrorings and squares follow the majority of those that are decided.

    Attributes:
        num_stored, num_upright: annotations whose size fits images as stored, or upright, alone.
        num_unknown: annotations of turned images whose size fits both.
    """

    num_stored: int = 0
    num_upright: int = 0
    num_unknown: int = 0

    def add(self, file: ImageFile, size: tuple[int, ...]) -> None:
        """Count an annotation of the image in a file.

        Args:
            file: path or bytes of the image.
            size: height and width of the mask, or that the annotation gives for the image, pixels.
        """
        image = read_orientation(file)
        is_stored = image.is_stored_by_size(size)
        self.num_stored += is_stored is True
        self.num_upright += is_stored is False
        self.num_unknown += is_stored is None and image.turn != Orientation()

    def as_stored(self, source: object) -> bool:
        """Return whether annotations whose size fits both were drawn on the images as stored; warn if no size decides."""
        if self.num_unknown and not (self.num_stored or self.num_upright):
            text = (
                "%s: the sizes of %d annotations of images that EXIF turns do not show whether they are turned, too: they are taken as upright; "
                "if they are not, turn the images' pixels and remove their EXIF orientation"
            )
            log.warning(text, source, self.num_unknown)
        return self.num_stored > self.num_upright


NUM_CLASSES_SHOWN = 5
"""Classes that a message names."""
AnyImageSet = TypeVar("AnyImageSet", bound=ImageSet)


# ---- splits


def _by_class(labels: Int[np.ndarray, " n"], num_classes: int, keys: Int[np.ndarray, " n"]) -> list[np.ndarray]:
    """Return for each class the indices of its images, sorted by ascending key; an empty array for a class without images.

    Args:
        labels: class index of each image, below `num_classes`.
        keys: hash of each image, by which images of a class are ordered.
    """
    return np.split(np.lexsort((keys, labels)), np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def heldout_mask(data: ImageSet, group_by: GroupBy | None = None) -> Bool[np.ndarray, " n"]:
    """Choose the images of the test set where none is given: for each image whether it is held out.

    Of each class about the fraction `HELD_OUT` (20 %) is held out, the images with the smallest hashes of their ids, each with its whole
    group (see `find_groups`): as many groups as fit into the fraction, at least one. A group without which a class would have no image
    to train on is not held out. Images without a class each, such as those with masks or boxes, count as one class. The choice is the
    same every time.
    """
    # Without labels all images are of class 0; `_by_class` then returns empty arrays for the other classes.
    labels = data.labels if isinstance(data, LabeledSet) else np.zeros(len(data), np.int64)
    groups = find_groups([data.images], group_by)[0]
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    mask, left = np.zeros(len(data), dtype=bool), np.bincount(labels, minlength=len(data.classes))
    held, targets = np.zeros_like(left), np.maximum(1, (HELD_OUT * left).round())

    def count(group: int) -> Int[np.ndarray, " K"]:
        return np.bincount(labels[members[group]], minlength=len(left))

    def can_be_held_out(group: int) -> bool:
        return not mask[members[group][0]] and bool((left > count(group))[count(group) > 0].all())

    def hold_out(group: int) -> None:
        nonlocal held, left
        mask[members[group]], held, left = True, held + count(group), left - count(group)

    for label, own in enumerate(_by_class(labels, len(data.classes), data.images.keys())):
        for group in groups[own].tolist():
            if held[label] >= targets[label]:
                break
            if held[label] + count(group)[label] <= targets[label] and can_be_held_out(group):
                hold_out(group)
        possible = [] if held[label] else [*filter(can_be_held_out, dict.fromkeys(groups[own].tolist()))]
        if possible:  # all are larger than a fifth
            hold_out(min(possible, key=lambda group: len(members[group])))
    return mask


def split_train_test(data: AnyImageSet, group_by: GroupBy | None = None) -> tuple[AnyImageSet, AnyImageSet]:
    """Split a set into (training set, test set) by `heldout_mask`, which holds out a fifth: the same way every time.

    Raises:
        MapetError: every class has one image or group at most, so that none is left to train on.
    """
    held_out = heldout_mask(data, group_by)
    of = "image" if group_by is None else "group"
    if not held_out.any():
        root, hint = data.images.root, f"add images or give {option('test_images')}"
        raise MapetError(f"{root}: no class has a second {of} of other content, so no test set can be held out: {hint}")
    if isinstance(data, LabeledSet):
        untested = np.setdiff1d(data.labels, data.labels[held_out])
        if len(untested):
            log.warning(
                "%d of %d classes of %s have one %s: it is trained on, and the class is not tested",
                len(untested), len(data.classes), data.images.root, of,
            )  # fmt: skip
    return data.subset(np.flatnonzero(~held_out)), data.subset(np.flatnonzero(held_out))


def _drop_tested(train: AnyImageSet, test: AnyImageSet, group_by: GroupBy | None) -> AnyImageSet:
    """Return the training set without images that are test images, too, or of their groups (see `find_groups`), with a warning.

    Where none would be left, as of one folder given as both, all stay: the warning then says that accuracies are those of training images.
    """
    own, tested = find_groups([train.images, test.images], group_by)
    is_tested = np.isin(own, tested)
    if not is_tested.any():
        return train
    index = int(np.flatnonzero(is_tested)[0])
    same = f"are test images{'' if group_by is None else ' or of their groups'}, too, e.g. {train.images.id(index)!r}"
    found = f"{is_tested.sum():,} of {len(train):,} training images of {train.images.root} {same}"
    if is_tested.all():
        fix = f"give other {option('test_images')}, or omit them, and a fifth is held out"
        log.warning("%s: accuracies are those of training images: %s", found, fix)
        return train
    log.warning("%s: they are not trained on", found)
    return train.subset(np.flatnonzero(~is_tested))


def _pair_or_split(
    sets: list[AnyImageSet], sources: Sequence[object], group_by: GroupBy | None
) -> tuple[AnyImageSet, AnyImageSet]:
    """Return (training set, test set): the two items of `sets`, or the parts of its only item. No group is in both.

    Args:
        sets: the training set and, if the user gave one, the test set.
        sources: files or folders of the training and the test set, for the error.
        group_by: option of this name.

    Raises:
        MapetError: the two have different classes, or nothing is left to train on.
    """
    if len(sets) == 1:
        return split_train_test(sets[0], group_by)
    train, test = sets
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:NUM_CLASSES_SHOWN])
        problem = f"{sources[0]} and {sources[1]} have different classes: only one of them has {odd}"
        raise MapetError(f"{problem}; add these classes to the other, or remove them")
    return _drop_tested(train, test, group_by), test


def load_train_test(
    train: str | Path, test: str | Path | None, options: ReadOptions = AS_STORED, group_by: GroupBy | None = None
) -> tuple[LabeledSet, LabeledSet]:
    """List labeled training and test images; see `LabeledSet.from_images` for labels.

    Args:
        train: source of the training images, e.g. a folder of class folders.
        test: source of the test images; None: a fifth of the training images is held out, the same one every time.
        options: how the images are read.
        group_by: option of this name.

    Returns:
        (training set, test set) with the same classes, and no group in both.

    Raises:
        MapetError: a source is missing or has no labels, the two have different classes, or there are too few images to split.
    """
    # Both are listed before labels are read, so that a missing folder is reported first.
    lists = [list_images(source, options) for source in (train, test) if source is not None]
    return _pair_or_split([LabeledSet.from_images(images) for images in lists], (train, test), group_by)


def few_shot_split(data: LabeledSet, amount: float, seed: int) -> Int[np.ndarray, " m"]:
    """Return the sorted indices of the images of a few-shot split: of each class, those with the smallest hashes.

    An image's hash is the 8-byte BLAKE2b digest, read as a little-endian integer, of the text `SEED:ID` (UTF-8); the id is its path
    below the data set's folder with forward slashes, CLASS/image.jpg. Other programs can compute the same split. Smaller splits of
    a seed are subsets of its larger ones.

    Args:
        data: labeled images.
        amount: below 1 the fraction of each class to take (at least one image), else the number of images per class.
        seed: splits of different seeds are independent.

    Raises:
        MapetError: a class has fewer than `amount` images.
    """
    digests = [hashlib.blake2b(b"%d:" % seed + image_id, digest_size=8).digest() for image_id in data.images.ids]
    hashes = np.frombuffer(b"".join(digests), "<u8")
    selected = []
    for name, members in zip(data.classes, _by_class(data.labels, len(data.classes), hashes), strict=True):
        count = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        if count > len(members):
            problem = f"class '{name}' has {pluralize(len(members), 'training image')}"
            raise MapetError(
                f"{problem}, expected {count:,} or more: add images to {data.images.root}, or ask for fewer"
            )
        selected.append(members[:count])
    return np.sort(np.concatenate(selected))


# ---- boxes


@contextmanager
def _read_coco(path: Path, kind: str) -> Iterator[Any]:
    """Yield the parsed content of a COCO JSON file; turn KeyError, TypeError and ValueError of the `with` block into MapetError.

    Args:
        kind: what the file should be, for the message, e.g. 'COCO panoptic annotations'.

    Raises:
        MapetError: the file is not JSON, or the block finds that it has another layout.
    """
    try:
        yield read_json(path, kind)
    except (KeyError, TypeError, ValueError) as error:
        raise MapetError(f"{path} is not a file of {kind} ({error!r}): give a file in COCO's layout") from None


def _read_categories(record: Mapping[str, Any]) -> tuple[list[str], dict[int, int]]:
    """Read the list `categories` of a parsed COCO file.

    Returns:
        Names of the classes, sorted by category id; and category id -> class index, the place in these names.
    """
    categories = sorted(record["categories"], key=lambda category: category["id"])
    names = [str(category["name"]) for category in categories]
    return names, {category["id"]: index for index, category in enumerate(categories)}


def _list_named_images(folder: Path, names: Sequence[str], source: Path) -> ImageList:
    """List the images of an annotation file, in the order of `names`.

    Args:
        folder: folder of the images.
        names: paths of the images below `folder`, which are their ids.
        source: the annotation file, for the errors.

    Returns:
        The list, with the size of each file in bytes; no image is opened.

    Raises:
        MapetError: `names` is empty, or an image is not in the folder.
    """
    if not names:
        raise MapetError(f"{source} lists no images: give annotations of the images in {folder}")
    for name in names:
        if not (folder / name).is_file():
            raise MapetError(f"{source} lists {name}, which is not in {folder}: give the folder of its images")
    sizes = [(folder / name).stat().st_size for name in names]
    return ImageFiles(folder, [os.fsencode(name) for name in names], sizes)


def load_detection_sets(
    images: Path,
    annotations: Path,
    test_images: Path | None,
    test_annotations: Path | None,
    group_by: GroupBy | None = None,
) -> tuple[DetectionSet, DetectionSet]:
    """Read (training images, test images) with boxes, in COCO's format.

    Args:
        images: folder of the training images.
        annotations: their COCO instances JSON.
        test_images: folder of the test images; None: `images`.
        test_annotations: COCO instances JSON of the test images; None: a fifth of the training images is held out for the test set.
        group_by: option of this name.

    Returns:
        (training set, test set), with the same classes.

    Raises:
        MapetError: a file is not in COCO's layout or lists a missing image, the two have different categories, or there is only one image
            to split.
    """
    pairs = (annotations, images), (test_annotations, test_images or images)
    sets = [read_instances(path, folder) for path, folder in pairs if path is not None]
    return _pair_or_split(sets, (annotations, test_annotations), group_by)


def read_instances(annotations: Path, images: Path) -> DetectionSet:
    """Read a COCO instances JSON. Images are sorted by file name, classes by category id.

    Crowds (`iscrowd`) and boxes without width or height count for `image_labels`, the classes that an image shows, but are not
    among its boxes.

    Args:
        annotations: the JSON file.
        images: folder of the images.

    Returns:
        The images with their boxes, turned upright where `AnnotationOrientation` says so.

    Raises:
        MapetError: the file has another layout, lists no image, or lists a missing one.
    """
    with _read_coco(annotations, "COCO annotations of instances") as record:
        classes, class_of = _read_categories(record)
        listed = sorted(record["images"], key=lambda image: image["file_name"])
        # row_of: COCO image id -> index of the image. class_of: COCO category id -> class index.
        row_of = {image["id"]: row for row, image in enumerate(listed)}
        images_listed = _list_named_images(images, [image["file_name"] for image in listed], annotations)
        orientation = AnnotationOrientation()
        for row, image in enumerate(listed):
            if "width" in image:
                orientation.add(images_listed.file(row), (image["height"], image["width"]))
        as_stored = orientation.as_stored(annotations)
        boxes: list[list[list[float]]] = [[] for _ in listed]
        labels: list[list[int]] = [[] for _ in listed]
        image_labels = np.zeros((len(listed), len(classes)), np.int64)
        for annotation in record["annotations"]:
            row, label = row_of[annotation["image_id"]], class_of[annotation["category_id"]]
            image_labels[row, label] = 1
            turned = read_orientation(images_listed.file(row))
            size = listed[row].get("height", 0), listed[row].get("width", 0)
            if turned.is_as_stored(size, as_stored):
                annotation["bbox"] = turned.turn_box(*annotation["bbox"])  # pycocotools reads it, too
            left, top, width, height = annotation["bbox"]
            if not annotation.get("iscrowd", 0) and width > 0 and height > 0:
                boxes[row].append([left, top, left + width, top + height])
                labels[row].append(label)
        return DetectionSet(
            images_listed, classes, list(class_of),
            list(row_of), [np.array(part, np.float64).reshape(-1, 4) for part in boxes],
            [np.array(part, np.int64) for part in labels], image_labels, record,
        )  # fmt: skip


# ---- masks


def read_mask(path: Path, panoptic: bool = False) -> Int[np.ndarray, "H W"]:
    """Read the value of each pixel of a mask, (H, W) int64: a class id, or the segment id of a panoptic mask.

    Args:
        path: of a PNG; a mask of class ids is gray or has a palette, whose indices are the class ids.
        panoptic: the PNG is RGB, as in COCO, and segment ids are R + 256 G + 256^2 B.

    Raises:
        MapetError: the file cannot be read, or has another pixel format.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if panoptic:
                return np.asarray(image.convert("RGB")).astype(np.int64) @ np.array([1, 256, 256 * 256])
            if image.mode not in MASK_MODES:
                raise MapetError(
                    f"{path}: expected a mask of class ids, a gray or palette PNG, found {image.mode} pixels: convert it"
                )
            return np.asarray(image).astype(np.int64)
    except OSError as error:
        reason = error.strerror or error
        raise MapetError(f"cannot read the mask {path}: {reason}; replace it, or remove it and its image") from None


def load_segmentation_sets(
    images: Path,
    masks: Path | None,
    test_images: Path | None,
    test_masks: Path | None,
    ignore: Sequence[int] = (),
    group_by: GroupBy | None = None,
) -> tuple[SegmentationSet, SegmentationSet] | None:
    """Read (training images, test images) with masks; return None if `masks` is None and `images` has no masks in it.

    Four layouts are recognized:
        - a folder `masks` of PNGs that are paired with `images` by name (a/b.jpg and a/b.png);
        - a folder `images` with the subfolders images/ and masks/, paired likewise;
        - ADE20K's folder: images/ and annotations/, each with training/ and validation/; value 0 is no class;
        - a COCO panoptic JSON, with its PNGs in the folder beside it of the same name without '.json'.

    Args:
        images: folder of the training images, or one of the folders above.
        masks: folder of PNGs or panoptic JSON; None: masks are looked for in `images`.
        test_images: folder of the test images; None: `images`.
        test_masks: folder or panoptic JSON, as `masks`; None: a fifth of the images is held out. Without training masks these are not
            read; the caller refuses them (`EvalData.load`).
        ignore: mask values without a class, beside `IGNORE_ID` (255); panoptic masks ignore neither.
        group_by: option of this name.

    Returns:
        (training set, test set), with the same classes, or None. Images without a mask are excluded.

    Raises:
        MapetError: `test_images` are given without `test_masks`; either of the two is given with ADE20K's folder, which has both; no image
            has a mask, or a listed image or mask is missing; a mask or JSON cannot be read; the masks have fewer than two classes; or
            training and test classes differ.
    """
    ignored = {IGNORE_ID, *ignore}
    ade20k = [images / folder for folder in ADE20K]
    if masks is None and all(folder.is_dir() for folder in ade20k):
        if test_images is not None or test_masks is not None:
            problem = f"{images} has the layout of ADE20K, whose validation images are the test images"
            raise MapetError(f"{problem}: omit {option('test_images')} and {option('test_seg_masks')}")
        images, masks, test_images, test_masks = ade20k
        ignored.add(0)
    if masks is None and (images / "images").is_dir() and (images / "masks").is_dir():
        images, masks = images / "images", images / "masks"
    if masks is None:
        return None
    if test_images is not None and test_masks is None:
        hint = f"give {option('test_seg_masks')}"
        raise MapetError(f"{images} has masks, but {option('test_images')} {test_images} has none: {hint}")
    pairs = [(images, masks)]
    if test_masks is not None:
        pairs.append((test_images or images, test_masks))
    sets = [_read_panoptic(*pair) for pair in pairs] if masks.suffix == ".json" else _read_masks(pairs, ignored)
    return _pair_or_split(sets, (masks, test_masks), group_by)


def _read_masks(pairs: list[tuple[Path, Path]], ignored: set[int]) -> list[SegmentationSet]:
    """Read folders of images and masks of class ids, which are paired by name; images without a mask are excluded.

    All masks are read once to find the classes: the values that occur in any of them, of all pairs, in ascending order.

    Args:
        pairs: (folder of images, folder of PNG masks) of each set.
        ignored: mask values that are no class.

    Returns:
        A set for each pair; all have the same classes, named by their values.

    Raises:
        MapetError: no image of a folder has a mask, or there are fewer than two classes.
    """
    matched, values = [], set[int]()
    for images, masks in pairs:
        listed = list_images(images)
        paths = [masks / f"{os.path.splitext(listed.id(index))[0]}.png" for index in range(len(listed))]
        rows = [index for index, path in enumerate(paths) if path.is_file()]
        if not rows:
            raise MapetError(f"no image in {images} has a mask in {masks}: for the first expected {paths[0]}")
        matched.append((listed.subset(rows), [paths[index] for index in rows]))
    every = [(listed, index, path) for listed, paths in matched for index, path in enumerate(paths)]
    orientation = AnnotationOrientation()
    for listed, index, path in tqdm(every, desc="masks", disable=None, leave=False):
        mask = read_mask(path)
        orientation.add(listed.file(index), mask.shape)
        values |= set(np.unique(mask).tolist())
    as_stored = orientation.as_stored(pairs[0][1])
    ids = sorted(values - ignored)
    if len(ids) < 2:
        values_found = f"{pluralize(len(ids), 'class id')} beside the ignored {', '.join(map(str, sorted(ignored)))}"
        raise MapetError(f"the masks in {pairs[0][1]} hold {values_found}: give masks of two or more class ids")
    class_of = {value: index for index, value in enumerate(ids)}
    return [
        SegmentationSet(listed, list(map(str, ids)), paths, [class_of] * len(paths), as_stored=as_stored)
        for listed, paths in matched
    ]


def _read_panoptic(images: Path, annotations: Path) -> SegmentationSet:
    """Read images with COCO panoptic masks. Classes are all categories, things and stuff, by id; images are sorted by name.

    Args:
        images: folder of the images.
        annotations: the panoptic JSON; its PNG masks are in the folder of the same path without '.json'.

    Raises:
        MapetError: the file has another layout, lists a missing image, or its first mask is missing.
    """
    with _read_coco(annotations, "COCO panoptic annotations") as record:
        classes, class_of = _read_categories(record)
        image_names = {image["id"]: image["file_name"] for image in record["images"]}
        entries = record["annotations"]
        rows = sorted((image_names[entry["image_id"]], entry["file_name"], entry["segments_info"]) for entry in entries)
        class_of_segment = [{part["id"]: class_of[part["category_id"]] for part in parts} for _, _, parts in rows]
        folder = annotations.with_suffix("")
        masks = [folder / mask for _, mask, _ in rows]
        if masks and not masks[0].is_file():
            problem = f"{annotations} lists the mask {masks[0].name}, which is not in {folder}"
            raise MapetError(f"{problem}: put the masks of all images there")
        listed = _list_named_images(images, [name for name, _, _ in rows], annotations)
        return SegmentationSet(listed, classes, masks, class_of_segment, panoptic=True)
