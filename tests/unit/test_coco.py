"""COCO's instances JSON: multi-label mAP, and boxes by COCO's own evaluation."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mapet
from mapet.errors import MapetError
from mapet.evaluation.annotated.coco import coco_sets, read_coco
from mapet.evaluation.tasks.detection import coco_figures
from mapet.model.backbone import create_vit, save_backbone
from tests.conftest import TINY

QUICK = {"workers": 0, "device": "cpu", "precision": "float32"}


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """60 pictures, 32 px, with a red block, a green one, both or none; ids and categories out of order, one crowd."""
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    record = {"images": [], "annotations": [], "categories": [{"id": 44, "name": "red"}, {"id": 7, "name": "green"}]}
    for number in range(60):
        image = rng.integers(0, 60, (32, 32, 3)).astype(np.uint8)
        for channel, category in ((0, 44), (1, 7)):
            if (number >> channel) & 1:
                top, left = rng.integers(0, 5, 2) * 4
                image[top : top + 16, left : left + 16, channel] = 250
                record["annotations"].append(
                    {
                        "id": len(record["annotations"]) + 1, "image_id": 900 - number, "category_id": category, "iscrowd": 0,
                        "bbox": [int(left), int(top), 16, 16], "area": 256,
                    }
                )  # fmt: skip
        Image.fromarray(image).save(root / "images" / f"{number:012d}.jpg", quality=95)
        record["images"].append({"id": 900 - number, "file_name": f"{number:012d}.jpg", "height": 32, "width": 32})
    record["annotations"].append(
        {
            "id": 999,
            "image_id": 900,
            "category_id": 7,
            "iscrowd": 1,
            "bbox": [0, 0, 32, 32],
            "area": 1024,
            "segmentation": {},
        }
    )
    (root / "instances.json").write_text(json.dumps(record))
    return root


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit") / "vit"
    torch.manual_seed(0)
    save_backbone(create_vit("vit_tiny_patch16_224", (32, 32), 4, 3, TINY), folder)
    return folder


def test_annotations_are_read(coco):
    found = read_coco(coco / "instances.json", coco / "images")
    assert found.classes == ["green", "red"] and found.category_ids == [7, 44]
    assert found.image_ids[:3] == [900, 899, 898]
    assert found.shown[:4].tolist() == [[1, 0], [0, 1], [1, 0], [1, 1]]  # the first is a crowd: shown, without a box
    assert [len(boxes) for boxes in found.boxes[:4]] == [0, 1, 1, 2]
    assert (found.boxes[3][:, 2:] - found.boxes[3][:, :2] == 16).all() and sorted(found.labels[3]) == [0, 1]
    train, test = coco_sets(coco / "images", coco / "instances.json", None, None)
    assert (len(train.image_ids), len(test.image_ids)) == (48, 12)
    assert {one["image_id"] for one in test.record["annotations"]} <= set(test.image_ids)
    assert not set(train.image_ids) & set(test.image_ids)


def test_wrong_annotations_are_told(coco, tmp_path):
    (tmp_path / "a.json").write_text('{"images": [{"id": 1}], "annotations": [], "categories": []}')
    with pytest.raises(MapetError, match="not COCO annotations of instances"):
        read_coco(tmp_path / "a.json", coco / "images")
    with pytest.raises(MapetError, match=r"names 0+\.jpg, which is not in"):
        read_coco(coco / "instances.json", tmp_path)


def test_multi_label(coco, vit, tmp_path):
    found = mapet.evaluate(
        backbone=[str(vit)], images=coco / "images", annotations=coco / "instances.json", out=tmp_path / "out", epochs=60,
        protocols=["multi-label", "rank"], **QUICK,
    )[str(vit)]  # fmt: skip
    assert found["multi-label, linear, batch norm: mAP"] > 0.8, found  # by chance: about a half
    details = json.loads((tmp_path / "out" / "evaluation.json").read_text())["backbones"][str(vit)]["multi-label"]
    figure = details["figures"]["multi-label, linear, batch norm: mAP"]
    assert figure["low"] <= figure["value"] <= figure["high"] and set(details["details"]["linear"]) == {"green", "red"}


def test_detection_without_its_library(coco, vit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(MapetError, match=r"pip install '.\[detection\]'"):
        mapet.evaluate(
            backbone=[str(vit)], images=coco / "images", annotations=coco / "instances.json", out=tmp_path / "out",
            protocols=["detection"], **QUICK,
        )  # fmt: skip


def test_coco_s_own_figures(coco):
    """The truth scores 1; shifted to overlap by a half of the union it counts at 0.5 and no higher."""
    cocotools = pytest.importorskip("pycocotools")
    pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    data = read_coco(coco / "instances.json", coco / "images")
    boxes = [one for one in data.record["annotations"] if not one["iscrowd"]]
    truth = [{key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for one in boxes]
    assert coco_figures(cocotools, data.record, truth)["mAP"] == pytest.approx(1)
    moved = [one | {"bbox": [one["bbox"][0] + 5, *one["bbox"][1:]]} for one in truth]  # IoU 11 / 21 = 0.52
    figures = coco_figures(cocotools, data.record, moved)
    assert figures["mAP 50"] == pytest.approx(1) and figures["mAP 75"] == pytest.approx(0)
    assert figures["mAP"] == pytest.approx(0.1) and "mAP large" not in figures
    assert coco_figures(cocotools, data.record, []) == {"mAP": 0, "mAP 50": 0, "mAP 75": 0}


def of_detection(coco, vit, out, **options):
    pytest.importorskip("pycocotools")
    return mapet.evaluate(
        backbone=[str(vit)], images=coco / "images", annotations=coco / "instances.json", out=out, protocols=["detection"],
        **QUICK, **options,
    )[str(vit)]  # fmt: skip


@pytest.mark.parametrize("train_backbone", [False, True])
def test_detection_from_annotations_to_figures(train_backbone, coco, vit, tmp_path):
    """Six pictures, one pass, whether the backbone is trained or not."""
    record = json.loads((coco / "instances.json").read_text())
    kept = {image["id"] for image in record["images"][1:7]}
    part = {
        key: [one for one in record[key] if one[name] in kept]
        for key, name in (("images", "id"), ("annotations", "image_id"))
    }
    (tmp_path / "coco" / "images").mkdir(parents=True)
    (tmp_path / "coco" / "instances.json").write_text(json.dumps(record | part))
    for image in part["images"]:
        (tmp_path / "coco" / "images" / image["file_name"]).symlink_to(coco / "images" / image["file_name"])
    found = of_detection(
        tmp_path / "coco", vit, tmp_path / "out", detection_epochs=1, detection_train_backbone=train_backbone
    )
    assert {"detection, mAP", "detection, mAP 50"} <= set(found) and all(0 <= value <= 1 for value in found.values())


@pytest.mark.slow
def test_detector_learns_blocks(coco, vit, tmp_path):
    found = of_detection(coco, vit, tmp_path / "out", detection_epochs=12)
    assert found["detection, mAP 50"] > 0.3, found
