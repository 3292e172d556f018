"""Groups of images that lie on one side of every split: by a folder, a pattern, or equal bytes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mapet.config.base import build_config
from mapet.config.evaluation import EvaluateConfig
from mapet.data.groups import find_groups
from mapet.data.sources import list_images
from mapet.evaluation.datasets import LabeledSet, load_train_test, split_train_test
from mapet.evaluation.eval_context import EvalData
from tests.refused import refused

PATIENTS = 12


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLASS/PATIENT/slice.png: two classes, and patients of one to six slices, of whom p00 has images of both classes."""
    root, rng = tmp_path_factory.mktemp("clinic"), np.random.default_rng(0)
    for name, patients in {"ill": range(0, PATIENTS, 2), "well": [0, *range(1, PATIENTS, 2)]}.items():
        for patient in patients:
            folder = root / name / f"p{patient:02d}"
            folder.mkdir(parents=True)
            for index in range(1 + patient % 6):
                Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / f"slice{index}.png")
    return root


def patients_of(data: LabeledSet) -> set[str]:
    return {data.images.id(index).split("/")[1] for index in range(len(data))}


@pytest.mark.parametrize("group_by", [2, r"(p\d+)/", r"p\d+"])
def test_no_patient_is_on_both_sides_of_a_split_and_each_class_is_on_both(clinic, group_by):
    data = LabeledSet.from_images(list_images(clinic))
    train, test = split_train_test(data, group_by)
    assert not patients_of(train) & patients_of(test)
    assert len(train) + len(test) == len(data) and 0.05 < len(test) / len(data) < 0.5
    assert set(train.labels) == set(test.labels) == {0, 1}
    ungrouped = split_train_test(data)
    assert patients_of(ungrouped[0]) & patients_of(ungrouped[1])


def test_without_groups_the_split_is_a_fifth_of_each_class_by_hashes_of_ids(digits):
    data = LabeledSet.from_images(list_images(digits / "train"))
    _, test = split_train_test(data)
    for label in range(len(data.classes)):
        own = np.flatnonzero(data.labels == label)
        own = own[np.argsort(data.images.keys()[own])]
        expected = {data.images.id(index) for index in own[: round(0.2 * len(own))]}
        assert {test.images.id(index) for index in np.flatnonzero(test.labels == label)} == expected


def test_equal_files_are_never_on_both_sides(clinic, tmp_path):
    """Copies under other names, in another folder of another class too."""
    shutil.copytree(clinic, tmp_path / "copied")
    for index, path in enumerate(sorted((tmp_path / "copied").rglob("*.png"))):
        shutil.copy(path, path.with_name(f"again-{index}.png"))
        if index % 3 == 0:
            shutil.copy(path, tmp_path / "copied" / "well" / f"other-{index}.png")
    data = LabeledSet.from_images(list_images(tmp_path / "copied"))
    train, test = split_train_test(data)
    contents = [{part.images.data(index) for index in range(len(part))} for part in (train, test)]
    assert contents[0] and contents[1] and not contents[0] & contents[1]


def test_training_images_that_are_test_images_too_are_dropped(clinic, tmp_path, caplog):
    shutil.copytree(clinic / "ill" / "p10", tmp_path / "ill" / "p90")
    shutil.copytree(clinic / "well" / "p11", tmp_path / "well" / "p91")
    Image.new("L", (8, 8), 7).save(tmp_path / "ill" / "p90" / "new.png")
    train, test = load_train_test(clinic, tmp_path)
    contents = [{part.images.data(index) for index in range(len(part))} for part in (train, test)]
    assert not contents[0] & contents[1] and len(contents[1]) == len(test) == 12
    assert patients_of(train) == {f"p{patient:02d}" for patient in range(PATIENTS)} - {"p10", "p11"}
    assert "11 of" in caplog.text
    caplog.clear()
    same = load_train_test(clinic, clinic)
    assert len(same[0]) == len(same[1]) == len(list_images(clinic)) and "training images" in caplog.text


def test_a_patient_of_the_test_images_is_dropped_from_the_training_images(clinic, tmp_path):
    for name, patient in {"ill": "p02", "well": "p03"}.items():
        (tmp_path / name / patient).mkdir(parents=True)
        Image.new("L", (8, 8), 3 + int(patient[1:])).save(tmp_path / name / patient / "new.png")
    config = build_config(
        EvaluateConfig, {"backbone": "random:vit", "images": clinic, "test_images": tmp_path, "group_by": 2}
    )
    assert patients_of(EvalData.load(config).train) == {f"p{patient:02d}" for patient in range(PATIENTS)} - {
        "p02",
        "p03",
    }


def test_groups_are_numbered_over_all_lists(clinic, tmp_path):
    shutil.copy(clinic / "ill" / "p00" / "slice0.png", tmp_path / "copy.png")
    first, second = find_groups([list_images(clinic), list_images(tmp_path)])
    assert len(set(first)) == len(first) and second.tolist() == [first[0]]


def test_group_by_is_refused_where_it_names_no_group(clinic):
    data = LabeledSet.from_images(list_images(clinic))
    with refused(field="group_by", value=3):
        split_train_test(data, 3)
    with refused("patient", field="group_by"):
        split_train_test(data, "patient")
    for value in (0, "(", "0"):
        with refused(field="group_by"):
            build_config(EvaluateConfig, {"backbone": "timm:vit", "images": clinic, "group_by": value})
    assert build_config(EvaluateConfig, {"backbone": "timm:vit", "images": clinic, "group_by": "2"}).group_by == 2
