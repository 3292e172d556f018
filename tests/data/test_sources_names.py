"""Names of files, folders and members as users have them, and annotations of images that EXIF turns."""

import io
import json
import os
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image

from mapet.data.dataset_stats import compute_dataset_stats, masks_warning
from mapet.data.readers.image import ORIENTATIONS
from mapet.data.sources import list_images
from mapet.evaluation.datasets import LabeledSet, load_segmentation_sets, read_instances, split_train_test
from tests.refused import refused


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_shard(path, members: dict[str, str]) -> None:
    """Write a shard of images (value '') and labels."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, text in members.items():
            data = text.encode() or stream.getvalue()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def labels_of(source) -> dict[str, str]:
    images = list_images(source)
    classes = images.classes()
    return {} if classes is None else {images.id(i): classes[0][classes[1][i]] for i in range(len(images))}


def test_a_label_is_lent_to_no_neighbor(tmp_path):
    write_shard(
        tmp_path / "a.tar", {"v1.0/a.1.jpg": "", "v1.0/a.1.cls": "cat\n", "v1.0/a.2.jpg": "", "v1.0/a.2.CLS": "dog"}
    )
    assert labels_of(tmp_path / "a.tar") == {"v1.0/a.1.jpg": "cat", "v1.0/a.2.jpg": "dog"}
    # WebDataset's own way: the views of a sample have the label of its key
    write_shard(tmp_path / "b.tar", {"1.left.jpg": "", "1.right.jpg": "", "1.cls": "cat", "2.jpg": "", "2.cls": "dog"})
    assert labels_of(tmp_path / "b.tar") == {"1.left.jpg": "cat", "1.right.jpg": "cat", "2.jpg": "dog"}
    write_shard(tmp_path / "c.tar", {"a.1.png": "", "a.1.cls": "cat", "a.2.png": "", "b.1.png": "", "b.1.cls": "dog"})
    images = list_images(tmp_path / "c.tar")
    assert images.classes() is None and "1 of 3 images" in images.label_note
    with refused("1 of 3", ".cls"):
        LabeledSet.from_images(images)


@pytest.mark.parametrize("name", ["[brackets] x", "a?b", "{0..1}", "a::b", "a b"])
def test_what_is_there_under_a_name_is_no_pattern(tmp_path, name):
    members = {"a/1.png": "", "b/2.png": ""}
    write_shard(tmp_path / name / "part-0.tar", members)
    write_shard(tmp_path / name / "part-1.tar", {"b/3.png": ""})
    assert len(list_images(tmp_path / name)) == 3
    assert len(list_images(tmp_path / name / "part-0.tar")) == 2
    assert len(list_images(tmp_path / name / "part-{0..1}.tar")) == len(list_images(tmp_path / name / "*.tar")) == 3
    assert list_images(tmp_path / name).open(2, 3).read().shape == (3, 8, 8)


def write_images(root, *names: bytes) -> None:
    for index, name in enumerate(names):
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            Image.new("RGB", (8, 8), (index, 0, 0)).save(file, "png")


def test_class_names_of_any_encoding_and_unicode_form(tmp_path):
    forms = [unicodedata.normalize(form, "café").encode() for form in ("NFC", "NFD")]
    write_images(tmp_path / "a", forms[0] + b"/1.png", forms[1] + b"/2.png", b"b/3.png")
    images = list_images(tmp_path / "a")
    names, labels = images.classes()
    assert names == ["b", "café"] and labels.tolist() == [1 - images.id(i).startswith("b") for i in range(3)]
    write_images(tmp_path / "c", b"caf\xe9/1.png", b"b/2.png")
    assert list_images(tmp_path / "c").classes()[0] == ["b", "caf\\xe9"]
    for folder, shown in (("a", "NFC, NFD"), ("c", "caf\\xe9")):
        text = "".join(compute_dataset_stats(list_images(tmp_path / folder), 3, 1).lines())
        assert shown in text and text.encode()


def test_splits_are_no_classes_and_masks_are_no_images(tmp_path):
    write_images(tmp_path / "data", b"train/a/1.png", b"train/b/2.png", b"test/a/3.png", b"test/b/4.png")
    images = list_images(tmp_path / "data")
    assert images.classes() is None
    with refused(f"--images {tmp_path}/data/train".replace("--images ", ""), "test_images"):
        LabeledSet.from_images(images)
    write_images(tmp_path / "masks", b"0.png", b"0_mask.png", b"1.png", b"1_mask.png")
    assert "2 names end in _mask" in masks_warning(list_images(tmp_path / "masks"))
    assert not masks_warning(list_images(tmp_path / "data"))


def test_the_only_image_of_a_class_is_trained_on(tmp_path, caplog):
    write_images(tmp_path, *(b"a/%d.png" % i for i in range(5)), b"b/1.png", b"c/2.png")
    data = LabeledSet.from_images(list_images(tmp_path))
    train, test = split_train_test(data)
    assert len(test) == 1 and test.classes[test.labels[0]] == "a" and {0, 1, 2} == set(train.labels.tolist())
    assert "2 of 3 classes" in caplog.text


def test_a_link_to_itself_is_passed_over(tmp_path):
    write_images(tmp_path / "a", b"1.png")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    images = list_images(tmp_path / "a")
    assert len(images) == 1 and images.ignored == 1


@pytest.mark.parametrize("drawn", ["stored", "upright"])
def test_masks_and_boxes_turn_with_the_image(tmp_path, drawn):
    """A scene of three classes, stored in every orientation of EXIF; annotations drawn on what is stored, or upright."""
    upright = np.full((24, 40), 2, np.uint8)
    upright[:6], upright[6:, :12] = 3, 1
    record = {"categories": [{"id": 1, "name": "left"}], "images": [], "annotations": []}
    for number in (1, *ORIENTATIONS):
        turn = ORIENTATIONS.get(number, ORIENTATIONS[2]._replace(flip_columns=False))
        inverse = upright[:: -1 if turn.flip_rows else 1, :: -1 if turn.flip_columns else 1]
        stored = np.ascontiguousarray(inverse.T if turn.transpose else inverse)
        assert np.array_equal(turn.apply(stored), upright)
        exif = Image.Exif()
        exif[0x0112] = number
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(stored * 60).save(tmp_path / "images" / f"{number}.jpg", exif=exif)
        mask = stored if drawn == "stored" else upright
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        rows, columns = np.nonzero(mask == 1)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        record["images"].append(
            {"id": number, "file_name": f"{number}.jpg", "height": mask.shape[0], "width": mask.shape[1]}
        )
        record["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [int(v) for v in box]}
        )
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    sets = load_segmentation_sets(tmp_path / "images", tmp_path / "masks", tmp_path / "images", tmp_path / "masks")
    for index in range(8):
        assert np.array_equal(sets[0].class_map(index), upright - 1)
    detection = read_instances(tmp_path / "boxes.json", tmp_path / "images")
    assert all(boxes.tolist() == [[0, 6, 12, 24]] for boxes in detection.boxes)
    assert all(entry["bbox"] == [0, 6, 12, 18] for entry in detection.record["annotations"])
