"""Sets of images with annotations: a class per image, a class per pixel, or boxes; and training and test sets of them."""

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
        """Return the set of some of the images, in the order of `indices`."""
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
        """Label images as their data set does, or by their class folders.

        Raises:
            MapetError: there are no labels, and the images do not lie in two or more class folders.
        """
        if (labels := images.classes()) is not None:
            return cls(images, *labels)
        stray = [index for index in range(len(images)) if b"/" not in images.ids[index]]
        folders = {image_id.split(b"/")[0] for image_id in images.ids if b"/" in image_id}
        outside = f"{pluralize(len(stray), 'image')} outside of them" + (f" ({images.id(stray[0])!r})" if stray else "")
        raise MapetError(
            f"{images.root} has no labels: expected every image in one of two or more class folders, CLASS/image.jpg; found "
            f"{pluralize(len(folders), 'folder')}, and {outside}"
        )

    @classmethod
    def without_labels(cls, images: ImageList) -> "LabeledSet":
        """Return images without classes."""
        return cls(images, [], np.zeros(len(images), np.int64))

    def sample(self, count: int) -> "LabeledSet":
        """Return at most `count` of the images, chosen by a hash of their ids: the same ones every time."""
        return self if len(self) <= count else self.subset(np.sort(np.argsort(self.images.keys())[:count]))

    def title(self, index: int) -> str:
        """Return the name of an image in a figure: its class, or without labels the stem of its file."""
        name = self.classes[self.labels[index]] if self.classes else Path(self.images.id(index)).stem
        return name.encode(errors="replace").decode()

    @property
    def majority_accuracy(self) -> float:
        """Return the accuracy of always predicting the most frequent class."""
        return float(np.bincount(self.labels).max() / len(self))


@dataclass
class SegmentationSet(ImageSet):
    """Images with a mask of each: a class of every pixel.

    Attributes:
        masks: a PNG of each image.
        class_of: of each image, value in its mask -> class index; pixels of other values have no class.
        panoptic: the masks hold segment ids, as COCO's panoptic ones do, not class ids.
    """

    PER_IMAGE = ("masks", "class_of")
    masks: list[Path]
    class_of: list[dict[int, int]]
    panoptic: bool = False

    def class_map(self, index: int) -> Int[np.ndarray, "H W"]:
        """Read the class index of each pixel of an image; `IGNORE_INDEX` where it has none."""
        mask = read_mask(self.masks[index], self.panoptic)
        values, inverse = np.unique(mask, return_inverse=True)
        classes = np.array([self.class_of[index].get(value, IGNORE_INDEX) for value in values.tolist()])
        return classes[inverse].reshape(mask.shape)


@dataclass
class DetectionSet(ImageSet):
    """Images with the boxes of their objects, as COCO's instances JSON has them. Crowds (`iscrowd`) have labels, but no boxes.

    Attributes:
        category_ids: the file's id of each class.
        image_ids: the file's id of each image.
        boxes: of each image, (m, 4) left, top, right, bottom in pixels of the image; none is empty.
        labels: of each image, (m,) class index of each box.
        image_labels: (n, K), 1 where an image shows a class, else 0.
        record: the file's whole content, also of other images, for COCO's own evaluation.
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
    """Return the indices of the images of each class, in ascending order of their keys."""
    return np.split(np.lexsort((keys, labels)), np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def heldout_mask(data: ImageSet) -> Bool[np.ndarray, " n"]:
    """Choose the images to hold out: `HELD_OUT` of each class of labeled images, at least one, by a hash of the image id."""
    mask = np.zeros(len(data), dtype=bool)
    labels = data.labels if isinstance(data, LabeledSet) else np.zeros(len(data), np.int64)
    for members in _by_class(labels, len(data.classes), data.images.keys()):
        mask[members[: max(1, round(HELD_OUT * len(members)))]] = True
    return mask


def split_train_test(data: AnyImageSet) -> tuple[AnyImageSet, AnyImageSet]:
    """Split into training and test set, by `heldout_mask`: the same way every time.

    Raises:
        MapetError: no class has a second image.
    """
    held_out = heldout_mask(data)
    if held_out.all():
        raise MapetError(f"{data.images.root}: no class has a second image to hold out; give {option('test_images')}")
    return data.subset(np.flatnonzero(~held_out)), data.subset(np.flatnonzero(held_out))


def _pair_or_split(sets: list[AnyImageSet], sources: Sequence[object]) -> tuple[AnyImageSet, AnyImageSet]:
    """Return the training and the test set that `sets` holds, or split the only set in it.

    Args:
        sources: where the sets come from, for the message.

    Raises:
        MapetError: the two have different classes, or the only one cannot be split.
    """
    if len(sets) == 1:
        return split_train_test(sets[0])
    train, test = sets
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
        raise MapetError(
            f"{sources[0]} and {sources[1]} have different classes: {odd}; give each class in both, or in none"
        )
    return train, test


def load_train_test(train: str | Path, test: str | Path | None) -> tuple[LabeledSet, LabeledSet]:
    """Open a labeled training and test set; without `test` a part of `train` is held out, the same one every time.

    Raises:
        MapetError: there are no labels, the two sets have different classes, or no class has a second image to hold out.
    """
    lists = [
        list_images(source) for source in (train, test) if source is not None
    ]  # a missing folder is reported first
    return _pair_or_split([LabeledSet.from_images(images) for images in lists], (train, test))


def few_shot_split(data: LabeledSet, amount: float, seed: int) -> Int[np.ndarray, " m"]:
    """Return the sorted indices of the images of a few-shot split.

    The split is a function of the images' ids and a seed that any language can compute. An image's hash is the first 8 bytes,
    little-endian, of the BLAKE2b digest (8 bytes long) of the UTF-8 text `SEED:ID`, the id being its path below the data set's
    folder with forward slashes (`CLASS/image.jpg`). Of each class the images of smallest hash are taken. So smaller splits are
    parts of larger ones, and adding or removing an image moves no other one.

    Args:
        amount: below 1 a fraction of each class (at least one image), else the number of images per class.

    Raises:
        MapetError: a class has fewer images.
    """
    digests = [hashlib.blake2b(b"%d:" % seed + image_id, digest_size=8).digest() for image_id in data.images.ids]
    hashes = np.frombuffer(b"".join(digests), "<u8")
    chosen = []
    for name, members in zip(data.classes, _by_class(data.labels, len(data.classes), hashes), strict=True):
        count = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        if count > len(members):
            found = pluralize(len(members), "training image")
            raise MapetError(
                f"class '{name}' has {found}, fewer than the {count:,} asked for: ask for fewer, or add images"
            )
        chosen.append(members[:count])
    return np.sort(np.concatenate(chosen))


# ---- boxes


@contextmanager
def _read_coco(path: Path, kind: str) -> Iterator[Any]:
    """Read a JSON file of COCO's for the block, and raise MapetError for what the block does not find in it.

    Args:
        kind: what the file should be, for the message.
    """
    try:
        yield read_json(path, kind)
    except (KeyError, TypeError, ValueError) as error:
        raise MapetError(f"{path}: not {kind} ({error!r}); give a file in COCO's layout") from None


def _read_categories(record: Any) -> tuple[list[str], dict[int, int]]:
    """Return the names of the classes of a COCO file, sorted by category id, and category id -> class index."""
    categories = sorted(record["categories"], key=lambda category: category["id"])
    names = [str(category["name"]) for category in categories]
    return names, {category["id"]: index for index, category in enumerate(categories)}


def _list_named_images(folder: Path, names: Sequence[str], source: Path) -> ImageList:
    """List the images that an annotation file, `source`, names, in its order.

    Raises:
        MapetError: it names none, or one that is not in the folder.
    """
    if not names:
        raise MapetError(f"{source} names no images: give annotations of the images in {folder}")
    for name in names:
        if not (folder / name).is_file():
            raise MapetError(f"{source} names {name}, which is not in {folder}: give the folder of its images")
    sizes = [(folder / name).stat().st_size for name in names]
    return ImageFiles(folder, [os.fsencode(name) for name in names], sizes)


def load_detection_sets(
    images: Path, annotations: Path, test_images: Path | None, test_annotations: Path | None
) -> tuple[DetectionSet, DetectionSet]:
    """Read training and test images with boxes.

    Args:
        test_images: folder of the test images; None: `images`.
        test_annotations: None: a fifth of the images is held out.

    Raises:
        MapetError: the files are not COCO's, name missing images, or have different categories.
    """
    pairs = (annotations, images), (test_annotations, test_images or images)
    sets = [read_instances(path, folder) for path, folder in pairs if path is not None]
    return _pair_or_split(sets, (annotations, test_annotations))


def read_instances(annotations: Path, images: Path) -> DetectionSet:
    """Read a file of COCO's `instances_*.json` layout. Images are sorted by file name, classes by category id.

    Args:
        images: folder of the images.

    Raises:
        MapetError: the file has another layout, or names a missing image.
    """
    with _read_coco(annotations, "COCO annotations of instances") as record:
        classes, class_of = _read_categories(record)
        listed = sorted(record["images"], key=lambda image: image["file_name"])
        row_of = {image["id"]: row for row, image in enumerate(listed)}
        boxes: list[list[list[float]]] = [[] for _ in listed]
        labels: list[list[int]] = [[] for _ in listed]
        image_labels = np.zeros((len(listed), len(classes)), np.int64)
        for annotation in record["annotations"]:
            row, label = row_of[annotation["image_id"]], class_of[annotation["category_id"]]
            image_labels[row, label] = 1
            left, top, width, height = annotation["bbox"]
            if not annotation.get("iscrowd", 0) and width > 0 and height > 0:
                boxes[row].append([left, top, left + width, top + height])
                labels[row].append(label)
        return DetectionSet(
            _list_named_images(images, [image["file_name"] for image in listed], annotations), classes, list(class_of),
            list(row_of), [np.array(part, np.float64).reshape(-1, 4) for part in boxes],
            [np.array(part, np.int64) for part in labels], image_labels, record,
        )  # fmt: skip


# ---- masks


def read_mask(path: Path, panoptic: bool = False) -> Int[np.ndarray, "H W"]:
    """Read a mask's value of each pixel: the class id of a gray or palette PNG, or the segment id of a panoptic one.

    Args:
        panoptic: the PNG is RGB, and segment ids are R + 256 G + 256^2 B.

    Raises:
        MapetError: the file cannot be read, or has another pixel format.
    """
    try:
        with Image.open(path) as image:
            if panoptic:
                return np.asarray(image.convert("RGB")).astype(np.int64) @ np.array([1, 256, 256 * 256])
            if image.mode not in MASK_MODES:
                raise MapetError(
                    f"{path}: a mask of class ids must be a gray or palette PNG, this one is {image.mode}: convert it"
                )
            return np.asarray(image).astype(np.int64)
    except OSError as error:
        raise MapetError(
            f"cannot read the mask {path}: {error.strerror or error}; replace it, or remove its image"
        ) from None


def load_segmentation_sets(
    images: Path, masks: Path | None, test_images: Path | None, test_masks: Path | None, ignore: Sequence[int] = ()
) -> tuple[SegmentationSet, SegmentationSet] | None:
    """Read training and test images with masks; return None if there are no masks.

    Layouts: a folder of masks beside `images`, paired by name (a/b.jpg and a/b.png); one folder that holds images/ and masks/;
    ADE20K's (images/ and annotations/, each with training/ and validation/; 0 is no class); a COCO panoptic JSON, beside which
    the folder of its PNGs lies under the same name. Without test masks a fifth of the images is held out.

    Args:
        masks: folder or panoptic JSON; None: they are looked for in `images`.
        test_images: folder of the test images; None: `images`.
        test_masks: folder or panoptic JSON, as `masks`.
        ignore: mask values without a class, beside `IGNORE_ID`.

    Raises:
        MapetError: images and masks don't fit together, are of fewer than two classes, or training and test classes differ.
    """
    ignored = {IGNORE_ID, *ignore}
    ade20k = [images / folder for folder in ADE20K]
    if masks is None and all(folder.is_dir() for folder in ade20k):
        if test_images is not None or test_masks is not None:
            own = f"{images} is ADE20K's folder, tested on its own validation images"
            raise MapetError(f"{own}: omit {option('test_images')} and {option('test_seg_masks')}")
        images, masks, test_images, test_masks = ade20k
        ignored.add(0)
    if masks is None and (images / "images").is_dir() and (images / "masks").is_dir():
        images, masks = images / "images", images / "masks"
    if masks is None:
        return None
    if test_images is not None and test_masks is None:
        raise MapetError(f"{images} has masks, so {option('test_images')} need {option('test_seg_masks')}")
    pairs = [(images, masks)]
    if test_masks is not None:
        pairs.append((test_images or images, test_masks))
    panoptic = masks.suffix == ".json"
    sets = [_read_panoptic(*pair) for pair in pairs] if panoptic else _read_masks(pairs, ignored)
    return _pair_or_split(sets, (masks, test_masks))


def _read_masks(pairs: list[tuple[Path, Path]], ignored: set[int]) -> list[SegmentationSet]:
    """Pair images and masks by name, and read all masks once, to find the classes: the values that occur in any of them.

    Args:
        pairs: folders of (images, masks); images without a mask are excluded.
        ignored: values that are no class.

    Raises:
        MapetError: a folder's images have no masks, or there are fewer than two classes.
    """
    matched, values = [], set[int]()
    for images, masks in pairs:
        listed = list_images(images)
        paths = [masks / f"{os.path.splitext(listed.id(index))[0]}.png" for index in range(len(listed))]
        rows = [index for index, path in enumerate(paths) if path.is_file()]
        if not rows:
            raise MapetError(f"no image of {images} has a mask in {masks}: expected {paths[0]}, and so on")
        matched.append((listed.subset(rows), [paths[index] for index in rows]))
    for path in tqdm([path for _, paths in matched for path in paths], desc="masks", disable=None, leave=False):
        values |= set(np.unique(read_mask(path)).tolist())
    ids = sorted(values - ignored)
    if len(ids) < 2:
        found = f"{pluralize(len(ids), 'value')} beside the ignored {sorted(ignored)}"
        raise MapetError(f"the masks hold {found}: segmentation needs at least two classes")
    class_of = {value: index for index, value in enumerate(ids)}
    names = [str(value) for value in ids]
    return [SegmentationSet(listed, names, paths, [class_of] * len(paths)) for listed, paths in matched]


def _read_panoptic(images: Path, annotations: Path) -> SegmentationSet:
    """Read a COCO panoptic JSON: classes are the categories of segments, things and stuff alike; images are sorted by name.

    Raises:
        MapetError: the file has another layout, or names a missing image, or its masks are missing.
    """
    with _read_coco(annotations, "COCO panoptic annotations") as record:
        classes, class_of = _read_categories(record)
        image_names = {image["id"]: image["file_name"] for image in record["images"]}
        entries = record["annotations"]
        rows = sorted((image_names[one["image_id"]], one["file_name"], one["segments_info"]) for one in entries)
        class_of_segment = [{part["id"]: class_of[part["category_id"]] for part in parts} for _, _, parts in rows]
        folder = annotations.with_suffix("")
        masks = [folder / mask for _, mask, _ in rows]
        if masks and not masks[0].is_file():
            raise MapetError(f"{annotations}: its masks are expected in {folder}; {masks[0].name} is not there")
        listed = _list_named_images(images, [name for name, _, _ in rows], annotations)
        return SegmentationSet(listed, classes, masks, class_of_segment, panoptic=True)
