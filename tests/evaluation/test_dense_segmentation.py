"""Masks in their real file formats; IoU by hand; heads that learn what patches show."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import mapet
from mapet.evaluation.datasets import IGNORE_INDEX, load_segmentation_sets
from mapet.evaluation.dense import mean_iou, pixel_accuracy, pixel_counts
from mapet.models.backbone import create_vit, save_backbone
from tests.conftest import TINY
from tests.refused import fails, refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scenes():
    """40 images, 48 x 32 px, of a bright block on a dark ground, and where the block is."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(40):
        image = rng.integers(0, 60, (32, 48, 3)).astype(np.uint8)
        where = np.zeros((32, 48), np.uint8)
        top, left = rng.integers(0, 3) * 8, rng.integers(0, 4) * 8
        where[top : top + 16, left : left + 24] = 1
        image[where == 1] += 150
        result.append((image, where))
    return result


def write_folders(scenes, root, images="images", masks="masks", ids=(3, 7), void=255):
    """Masks of the ids given; a stripe at the top is void."""
    for folder in (images, masks):
        (root / folder).mkdir(parents=True)
    for number, (image, where) in enumerate(scenes):
        mask = np.array(ids, np.uint8)[where]
        mask[0] = void
        Image.fromarray(image).save(root / images / f"{number:02d}.jpg", quality=95)
        Image.fromarray(mask).save(root / masks / f"{number:02d}.png")
    return root


def write_panoptic(scenes, root):
    """COCO's layout: panoptic.json, panoptic/*.png with segment ids in base 256, and the images elsewhere."""
    (root / "panoptic").mkdir(parents=True)
    (root / "images").mkdir()
    record = {
        "categories": [{"id": 92, "name": "ground", "isthing": 0}, {"id": 18, "name": "block", "isthing": 1}],
        "images": [], "annotations": [],
    }  # fmt: skip
    for number, (image, where) in enumerate(scenes):
        ground, block = 1_000_000 + number, 300 + number
        segments = np.where(where == 1, block, ground)
        segments[0] = 0  # void
        rgb = np.stack([segments % 256, segments // 256 % 256, segments // 65536], -1).astype(np.uint8)
        Image.fromarray(rgb).save(root / "panoptic" / f"{number:02d}.png")
        Image.fromarray(image).save(root / "images" / f"{number:02d}.jpg", quality=95)
        record["images"].append({"id": 50 - number, "file_name": f"{number:02d}.jpg", "height": 32, "width": 48})
        info = [{"id": ground, "category_id": 92}, {"id": block, "category_id": 18}]
        record["annotations"].append({"image_id": 50 - number, "file_name": f"{number:02d}.png", "segments_info": info})
    (root / "panoptic.json").write_text(json.dumps(record))
    return root


def expected(where, order=(0, 1)):
    truth = np.array(order)[where].astype(np.int64)
    truth[0] = IGNORE_INDEX
    return truth


def test_folders_are_read_and_split(scenes, tmp_path):
    write_folders(scenes, tmp_path)
    train, test = load_segmentation_sets(tmp_path, None, None, None)
    assert (len(train), len(test)) == (32, 8) and train.classes == ["3", "7"]
    assert not {train.images.id(i) for i in range(32)} & {test.images.id(i) for i in range(8)}
    number = int(train.images.id(5)[:2])
    assert np.array_equal(train.class_map(5), expected(scenes[number][1]))
    beside, _ = load_segmentation_sets(tmp_path / "images", tmp_path / "masks", None, None)
    assert beside.images.hash == train.images.hash
    with refused("3, 255"):
        load_segmentation_sets(tmp_path, None, None, None, ignore=[3])
    with refused("00.png"):
        load_segmentation_sets(tmp_path / "images", tmp_path, None, None)


def test_ade20k_s_layout(scenes, tmp_path):
    """Zero is void, training and validation are as they are."""
    write_folders(scenes[:30], tmp_path, "images/training", "annotations/training", ids=(1, 2), void=0)
    write_folders(scenes[30:], tmp_path, "images/validation", "annotations/validation", ids=(1, 2), void=0)
    train, test = load_segmentation_sets(tmp_path, None, None, None)
    assert (len(train), len(test), train.classes) == (30, 10, ["1", "2"])
    assert np.array_equal(test.class_map(0), expected(scenes[30][1]))


def test_panoptic_layout(scenes, tmp_path):
    """Categories come by id, images by file name, whatever their order in the file."""
    write_panoptic(scenes, tmp_path)
    train, test = load_segmentation_sets(tmp_path / "images", tmp_path / "panoptic.json", None, None)
    assert train.classes == ["block", "ground"] and len(train) + len(test) == 40
    for index in (0, 17):
        number = int(train.images.id(index)[:2])
        assert np.array_equal(train.class_map(index), expected(scenes[number][1], order=(1, 0)))
    (tmp_path / "images" / "07.jpg").unlink()
    with refused("07.jpg"):
        load_segmentation_sets(tmp_path / "images", tmp_path / "panoptic.json", None, None)


def test_rgb_masks_are_refused(scenes, tmp_path):
    write_folders(scenes[:2], tmp_path)
    Image.fromarray(scenes[0][0]).save(tmp_path / "masks" / "00.png")
    with refused("RGB"):
        load_segmentation_sets(tmp_path, None, None, None)


def test_intersection_over_union_by_hand():
    truth = torch.tensor([[0, 0, 1, IGNORE_INDEX], [0, 0, 1, 1]])
    guess = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 1]])
    counts = pixel_counts(guess, truth, 4)
    assert counts.tolist() == [[3, 2, 0, 0], [5, 4, 0, 0], [4, 3, 0, 0]]
    assert mean_iou(counts[None], np.ones(1)) == pytest.approx((3 / 5 + 2 / 4) / 2)  # classes in no image don't count
    assert pixel_accuracy(counts[None], np.ones(1)) == pytest.approx(5 / 7)
    perfect = pixel_counts(truth.clamp_min(0), truth, 4)
    both = np.stack([counts, perfect])
    assert mean_iou(both, np.ones(2)) == pytest.approx(
        ((3 + 4) / (5 + 4) + (2 + 3) / (4 + 3)) / 2
    )  # summed over images first
    assert mean_iou(both, np.array([0.0, 2.0])) == 1


@pytest.mark.parametrize("layout", ["folders", "panoptic"])
def test_heads_find_bright_blocks(layout, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("mapet.evaluation.dense.SegmentationImages.max_batch_size", 8)
    torch.manual_seed(0)
    save_backbone(create_vit("vit_tiny_patch16_224", (32, 48), 8, 3, TINY), tmp_path / "vit")
    data = {"images": write_folders(scenes, tmp_path / "data")}
    if layout == "panoptic":
        root = write_panoptic(scenes, tmp_path / "coco")
        data = {"images": root / "images", "seg_masks": root / "panoptic.json"}
    result = mapet.evaluate(
        backbone=[str(tmp_path / "vit")], **data, out=tmp_path / "out", protocols=["segmentation"], dense_epochs=12,
        device="cpu", precision="float32",
    )[str(tmp_path / "vit")]  # fmt: skip
    assert result["segmentation_linear_miou"] > 0.8, result
    assert result["segmentation_decoder_pixel_accuracy"] > 0.9, result
    with (tmp_path / "out" / "per_class.csv").open() as file:
        ious = [float(row["fraction"]) for row in csv.DictReader(file) if row["metric"] == "segmentation_linear"]
    assert sum(ious) / 2 == pytest.approx(result["segmentation_linear_miou"], abs=1e-6)


def test_test_masks_alone_are_refused(crops, tmp_path):
    with refused("test_seg_masks", "give seg_masks", crops):
        mapet.evaluate(images=crops, backbone="random:vit_tiny_patch16_224", test_seg_masks=tmp_path)


def test_masks_are_asked_for(crops, tmp_path, capsys):
    argv = [
        "evaluate",
        "--backbone",
        "random:vit_tiny_patch16_224",
        "--images",
        str(crops),
        "--out",
        str(tmp_path / "o"),
    ]
    fails(
        capsys, *argv, "--protocols", "segmentation", named=["'segmentation'"], field="protocols", value="segmentation"
    )
