"""COCO's instances JSON: multi-label mAP, and boxes by COCO's own evaluation."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import mapet
from mapet.config.evaluation import EvaluateConfig
from mapet.device import ComputeContext
from mapet.evaluation.datasets import LabeledSet, load_detection_sets, read_instances
from mapet.evaluation.dense import DetectionImages, _detect, _train_detector, coco_metrics, make_detector
from mapet.evaluation.eval_context import EvalContext, EvalData
from mapet.evaluation.features import BackboneWrapper, CacheConfig
from mapet.evaluation.protocols import PROTOCOLS
from mapet.models.backbone import create_vit, save_backbone
from mapet.run_state import RunState
from tests.conftest import TINY
from tests.refused import refused

QUICK = {"device": "cpu", "precision": "float32"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """60 images, 32 px, with a red block, a green one, both or none; ids and categories out of order, one crowd."""
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
    actual = read_instances(coco / "instances.json", coco / "images")
    assert actual.classes == ["green", "red"] and actual.category_ids == [7, 44]
    assert actual.image_ids[:3] == [900, 899, 898]
    assert actual.image_labels[:4].tolist() == [
        [1, 0],
        [0, 1],
        [1, 0],
        [1, 1],
    ]  # the first is a crowd: shown, without a box
    assert [len(boxes) for boxes in actual.boxes[:4]] == [0, 1, 1, 2]
    assert (actual.boxes[3][:, 2:] - actual.boxes[3][:, :2] == 16).all() and sorted(actual.labels[3]) == [0, 1]
    train, test = load_detection_sets(coco / "images", coco / "instances.json", None, None)
    assert (len(train.image_ids), len(test.image_ids)) == (48, 12)
    assert not set(train.image_ids) & set(test.image_ids)


def test_wrong_annotations_are_refused(coco, tmp_path):
    (tmp_path / "a.json").write_text('{"images": [{"id": 1}], "annotations": [], "categories": []}')
    with refused("COCO"):
        read_instances(tmp_path / "a.json", coco / "images")
    with refused(".jpg"):
        read_instances(coco / "instances.json", tmp_path)


def test_multi_label(coco, vit, tmp_path):
    actual = mapet.evaluate(
        backbone=[str(vit)], images=coco / "images", annotations=coco / "instances.json", out=tmp_path / "out",
        protocols=["multi-label", "feature-rank"], **QUICK,
    )[str(vit)]  # fmt: skip
    assert actual["multi_label_map"] > 0.8, actual  # by chance: about a half
    result = RunState.read(tmp_path / "out").results["backbones"][str(vit)]["multi-label"]
    metric = result["metrics"]["multi_label_map"]
    assert metric["ci_low"] <= metric["value"] <= metric["ci_high"] and set(result["details"]["ap"]) == {"green", "red"}


def test_detection_without_its_library(coco, vit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with refused("[detection]"):
        mapet.evaluate(
            backbone=[str(vit)], images=coco / "images", annotations=coco / "instances.json", out=tmp_path / "out",
            protocols=["detection"], **QUICK,
        )  # fmt: skip


def test_coco_s_own_figures(coco):
    """Ground truth has AP 1; boxes with IoU 0.5 count at threshold 0.5 and no higher."""
    pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    data = read_instances(coco / "instances.json", coco / "images")
    boxes = [one for one in data.record["annotations"] if not one["iscrowd"]]
    truth = [{key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for one in boxes]
    assert coco_metrics(data, truth)["AP"] == pytest.approx(1)
    part = data.subset(np.arange(1, 20))
    own = [one for one in truth if one["image_id"] in part.image_ids]
    assert coco_metrics(part, own)["AP"] == pytest.approx(1)  # boxes of the file's other images are not missed
    moved = [one | {"bbox": [one["bbox"][0] + 5, *one["bbox"][1:]]} for one in truth]  # IoU 11 / 21 = 0.52
    figures = coco_metrics(data, moved)
    assert figures["AP50"] == pytest.approx(1) and figures["AP75"] == pytest.approx(0)
    assert figures["AP"] == pytest.approx(0.1) and "APl" not in figures
    assert coco_metrics(data, []) == {"AP": 0, "AP50": 0, "AP75": 0}


def detection_metrics(coco, vit, out, protocol="detection", **options):
    pytest.importorskip("pycocotools")
    return mapet.evaluate(
        backbone=[str(vit)], images=coco / "images", annotations=coco / "instances.json", out=out, protocols=[protocol],
        **QUICK, **options,
    )[str(vit)]  # fmt: skip


@pytest.mark.parametrize("protocol", ["detection", "detection-finetune"])
def test_detection_from_annotations_to_figures(protocol, coco, vit, tmp_path):
    """Six images, one pass, whether the backbone is trained or not."""
    record = json.loads((coco / "instances.json").read_text())
    retained = {image["id"] for image in record["images"][1:7]}
    part = {
        key: [one for one in record[key] if one[name] in retained]
        for key, name in (("images", "id"), ("annotations", "image_id"))
    }
    (tmp_path / "coco" / "images").mkdir(parents=True)
    (tmp_path / "coco" / "instances.json").write_text(json.dumps(record | part))
    for image in part["images"]:
        (tmp_path / "coco" / "images" / image["file_name"]).symlink_to(coco / "images" / image["file_name"])
    actual = detection_metrics(tmp_path / "coco", vit, tmp_path / "out", protocol, dense_epochs=1)
    prefix = protocol.replace("-", "_")
    assert {f"{prefix}_AP", f"{prefix}_AP50"} <= set(actual) and all(0 <= value <= 1 for value in actual.values())


class FixedDetector(torch.nn.Module):
    """A fake detector: in training it records targets, else it returns the second class and, below it, the first."""

    def __init__(self):
        super().__init__()
        self.weight, self.targets = torch.nn.Parameter(torch.ones(1)), []

    def forward(self, images, targets=None):
        if targets is not None:
            self.targets += list(zip(images, targets, strict=True))
            return {"loss": self.weight.sum()}
        boxes = torch.tensor([[1.0, 2, 11, 22], [0, 16, 32, 32]])
        return [{"boxes": boxes, "labels": torch.tensor([2, 1]), "scores": torch.tensor([0.9, 0.4])} for _ in images]


@pytest.fixture
def context(coco, vit, tmp_path):
    data = read_instances(coco / "instances.json", coco / "images").subset(np.arange(8))
    config = EvaluateConfig(backbone=[str(vit)], images=coco, out=tmp_path, dense_epochs=2)
    encoder = BackboneWrapper.load(str(vit), ComputeContext.from_options("cpu", "float32"))
    sets = EvalData(LabeledSet.without_labels(data.images), LabeledSet.without_labels(data.images), boxes=(data, data))
    return EvalContext(encoder, sets, CacheConfig(1 << 20, tmp_path, 3), config)


def test_boxes_are_written_with_the_file_s_own_ids_in_coco_s_layout(context):
    """Left, top, width, height; class 1 of the network is the first category, 7, and class 2 is 44."""
    data = context.data.boxes[1]
    actual = _detect(FixedDetector(), context.backbone, DetectionImages(context, context.backbone, data))
    assert [one["image_id"] for one in actual] == [i for i in range(900, 892, -1) for _ in range(2)]
    assert [one["category_id"] for one in actual] == [44, 7] * 8
    assert actual[0]["bbox"] == [1, 2, 10, 20] and actual[1]["bbox"] == [0, 16, 32, 16]
    assert [one["score"] for one in actual[:2]] == pytest.approx([0.9, 0.4])


def test_a_detector_is_trained_on_the_boxes_of_its_images(context):
    """Red blocks are class 2, green ones class 1 of the network, 0 being the ground; two passes in other orders."""
    detector, data = FixedDetector(), context.data.boxes[0]
    _train_detector(detector, context.backbone, DetectionImages(context, context.backbone, data))
    assert len(detector.targets) == 16 and detector.weight.item() < 1
    for image, target in detector.targets:
        for box, label in zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True):
            inside = image[:, box[1] : box[3], box[0] : box[2]].mean((1, 2))
            assert box[2] - box[0] == box[3] - box[1] == 16
            assert inside[{1: 1, 2: 0}[label]] > 0.8
    counts = [len(target["labels"]) for _, target in detector.targets]
    assert counts[:8] != counts[8:] and sorted(counts[:8]) == sorted(counts[8:]) == [0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("trained", [False, True])
def test_the_backbone_is_trained_only_where_asked(trained, context):
    """A copy is trained: other protocols use the frozen backbone."""
    before = {name: tensor.clone() for name, tensor in context.backbone.model.state_dict().items()}
    encoder = context.backbone.with_image_size((32, 32), copy_weights=True)
    detector = make_detector(encoder, 2, trained)
    own = {id(parameter) for parameter in encoder.model.parameters()}
    assert all(parameter.requires_grad == trained for parameter in encoder.model.parameters())
    assert all(parameter.requires_grad for parameter in detector.parameters() if id(parameter) not in own)
    data = context.data.boxes[0].subset(np.arange(4))
    weights = {name: parameter.detach().clone() for name, parameter in detector.named_parameters()}
    _train_detector(detector, encoder, DetectionImages(context, encoder, data))
    moved = {name for name, parameter in detector.named_parameters() if not torch.equal(parameter, weights[name])}
    assert {name for name in moved if "backbone.model" not in name} >= {
        "backbone.scales.2.0.weight",
        "roi_heads.box_predictor.cls_score.weight",
    }
    assert any("blocks.0.attn" in name for name in moved) == trained
    assert encoder.model.training == trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.backbone.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in context.backbone.model.parameters())


def test_multi_label_targets_are_those_of_the_rows(coco, tmp_path):
    """Features are the red and green of each cell: average precisions are 1, and at chance if labels move a row."""
    data = read_instances(coco / "instances.json", coco / "images")
    train, test = data.subset(np.arange(1, 40)), data.subset(np.arange(40, 60))  # without the crowd
    encoder = BackboneWrapper(
        "cells", Cells(), ComputeContext.from_options("cpu", "float32"), (32, 32), 3, (0.0,) * 3, (1.0,) * 3
    )
    config = EvaluateConfig(backbone=["cells"], images=coco, out=tmp_path)
    sets = EvalData(
        LabeledSet.without_labels(train.images), LabeledSet.without_labels(test.images), boxes=(train, test)
    )
    figures = PROTOCOLS["multi-label"].run(EvalContext(encoder, sets, CacheConfig(1 << 20, tmp_path), config)).metrics
    assert [figure.value for figure in figures.values()] == [pytest.approx(1.0)]
    moved = replace(test, image_labels=np.roll(test.image_labels, 1, axis=0))
    sets = EvalData(
        LabeledSet.without_labels(train.images), LabeledSet.without_labels(test.images), boxes=(train, moved)
    )
    figures = PROTOCOLS["multi-label"].run(EvalContext(encoder, sets, CacheConfig(1 << 20, tmp_path), config)).metrics
    assert all(figure.value < 0.8 for figure in figures.values())


class Cells(torch.nn.Module):
    feature_info = [{}]  # noqa: RUF012

    def forward_intermediates(self, images, indices, norm, intermediates_only):
        return [torch.nn.functional.avg_pool2d(images, 8)]


@pytest.mark.slow
def test_detector_learns_blocks(coco, vit, tmp_path):
    actual = detection_metrics(coco, vit, tmp_path / "out", dense_epochs=12)
    assert actual["detection_AP50"] > 0.3, actual
