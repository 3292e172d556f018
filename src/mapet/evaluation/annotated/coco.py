"""Images with COCO annotations (instances JSON): boxes, and the classes that an image shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mapet.data.image_list import ImageList
from mapet.errors import MapetError
from mapet.evaluation.annotated.masks import listed_images
from mapet.evaluation.features import held_out, unlabelled
from mapet.files import read_json


@dataclass
class CocoSet:
    """Images and what is in them. Crowds (`iscrowd`) are left out of boxes, not of classes.

    Attributes:
        image_ids: the file's number of each image.
        classes: names, in the order of `category_ids`.
        boxes: of each image, (m, 4) left, top, right, bottom in pixels of the image; none is empty.
        labels: of each image, (m,) class index of each box.
        shown: (n, K) whether an image shows a class.
        record: the file's own content for these images, for the official evaluation.
    """

    images: ImageList
    image_ids: list[int]
    classes: list[str]
    category_ids: list[int]
    boxes: list[Float[np.ndarray, "m 4"]]
    labels: list[Int[np.ndarray, " m"]]
    shown: Int[np.ndarray, "n K"]
    record: dict[str, Any]

    def subset(self, indices: Int[np.ndarray, " m"]) -> "CocoSet":
        chosen = indices.tolist()
        ids = [self.image_ids[i] for i in chosen]
        kept = set(ids)
        record = self.record | {
            "images": [image for image in self.record["images"] if image["id"] in kept],
            "annotations": [one for one in self.record["annotations"] if one["image_id"] in kept],
        }
        return CocoSet(
            self.images.subset(chosen), ids, self.classes, self.category_ids, [self.boxes[i] for i in chosen],
            [self.labels[i] for i in chosen], self.shown[indices], record,
        )  # fmt: skip


def coco_sets(
    images: Path, annotations: Path | None, test_images: Path | None, test_annotations: Path | None
) -> tuple[CocoSet, CocoSet] | None:
    """Training and test images; None where there are no annotations. Without test annotations a fifth is tested on.

    Raises:
        MapetError: not such files, images that aren't there, other categories in the two.
    """
    if annotations is None:
        return None
    train = read_coco(annotations, images)
    if test_annotations is None:
        held = held_out(unlabelled(train.images))
        return train.subset(np.flatnonzero(~held)), train.subset(np.flatnonzero(held))
    test = read_coco(test_annotations, test_images or images)
    if test.category_ids != train.category_ids:
        raise MapetError(f"{annotations} and {test_annotations} have different categories")
    return train, test


def read_coco(annotations: Path, images: Path) -> CocoSet:
    """Read a file of COCO's `instances_*.json` layout; images are sorted by name."""
    record = read_json(annotations, "COCO annotations")
    try:
        categories = sorted(record["categories"], key=lambda category: category["id"])
        place = {category["id"]: number for number, category in enumerate(categories)}
        listed = sorted(record["images"], key=lambda image: image["file_name"])
        row = {image["id"]: number for number, image in enumerate(listed)}
        boxes: list[list[list[float]]] = [[] for _ in listed]
        labels: list[list[int]] = [[] for _ in listed]
        shown = np.zeros((len(listed), len(categories)), np.int64)
        for one in record["annotations"]:
            number, label = row[one["image_id"]], place[one["category_id"]]
            shown[number, label] = 1
            left, top, width, height = one["bbox"]
            if not one.get("iscrowd", 0) and width > 0 and height > 0:
                boxes[number].append([left, top, left + width, top + height])
                labels[number].append(label)
        names = [image["file_name"] for image in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise MapetError(f"{annotations}: not COCO annotations of instances ({error!r})") from None
    return CocoSet(
        listed_images(images, names, annotations), [image["id"] for image in listed],
        [str(category["name"]) for category in categories], [category["id"] for category in categories],
        [np.array(part, np.float64).reshape(-1, 4) for part in boxes], [np.array(part, np.int64) for part in labels],
        shown, record,
    )  # fmt: skip
