"""The range that a tokenizer was fitted with is kept and applied by everything that takes images afterwards."""

import json
import logging

import numpy as np
import pytest
import tifffile
import torch

import mapet
from mapet.commands.pipeline import _list_stages
from mapet.config.pipeline import RunConfig
from mapet.config.shared import ReadOptions
from mapet.data.dataset_stats import find_value_range
from mapet.data.sources import list_images
from mapet.models.backbone import get_read_options, load_backbone
from mapet.tokenizers.tokenizer import load_tokenizer
from tests.refused import refused

SIZES = {"image_size": 16, "patch_size": 4}
TINY = {"embed_dim": 16, "depth": 1, "num_heads": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with 12-bit `scans` of two classes, the same values as 8-bit `arrays`, and `run`, trained on the former by a range."""
    root, rng = tmp_path_factory.mktemp("ranges"), np.random.default_rng(0)
    for name in ("scans", "arrays"):
        for label in ("a", "b"):
            (root / name / label).mkdir(parents=True)
    for index in range(24):
        low = 200 if index % 2 else 800
        values = rng.integers(low, low + 1500, (16, 16)).astype(np.uint16)
        path = f"{'ab'[index % 2]}/{index:02d}"
        tifffile.imwrite(root / "scans" / f"{path}.tif", values, photometric="minisblack")
        eight = np.rint((values.astype(np.float64) - 100).clip(0, 2300) * 255 / 2300).astype(np.uint8)
        with (root / "arrays" / f"{path}.tif").open("wb") as file:  # of the same id, which seeds draws
            np.save(file, eight[:, :, None])
    mapet.fit_tokenizer(
        images=root / "scans", out=root / "tokenizer", value_range=(100, 2400), channels=1, vocab_size=8, **SIZES
    )
    mapet.pretrain(
        images=root / "scans",
        out=root / "run",
        tokenizer=root / "tokenizer",
        probe_every=0,
        epochs=1,
        model_args=TINY,
        batch_size=8,
    )
    return root


def features(root, name, **options) -> np.ndarray:
    out = root / f"features-{name}"
    mapet.embed(images=root / name, backbone=root / "run", out=out, precision="float32", **options)
    return np.load(out / "features.npy")


def test_raw_files_give_the_features_of_training_time(trained, tmp_path):
    """Bit-exact features of the 8-bit values that the range defines; without the range they differ."""
    stored = features(trained, "scans")
    assert np.array_equal(stored, features(trained, "arrays"))
    mapet.embed(
        images=trained / "scans",
        backbone=trained / "run",
        out=tmp_path / "other",
        value_range=(0, 65535),
        precision="float32",
    )
    assert not np.allclose(stored, np.load(tmp_path / "other" / "features.npy"))
    model, transform = mapet.load(trained / "run")
    pixels = transform([trained / "scans" / "a" / "00.tif", trained / "arrays" / "a" / "00.tif"])
    assert torch.equal(pixels[0], pixels[1])
    rows = mapet.evaluate(images=trained / "scans", backbone=trained / "run", protocols=["knn"], controls=["none"])
    assert rows == mapet.evaluate(
        images=trained / "arrays", backbone=trained / "run", protocols=["knn"], controls=["none"]
    )
    same = {
        name: mapet.finetune(images=trained / name, backbone=trained / "run", epochs=1, out=tmp_path / name)
        for name in ("scans", "arrays")
    }
    weights = [load_backbone(tmp_path / name).state_dict() for name in same]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert get_read_options(load_backbone(tmp_path / "scans")).value_range == (100, 2400)


def test_the_range_is_in_the_metadata_of_onnx(trained, tmp_path):
    onnx = pytest.importorskip("onnx")
    exported = mapet.export(backbone=trained / "run", out=tmp_path / "export", format=["onnx"])
    properties = {entry.key: entry.value for entry in onnx.load(exported / "onnx" / "model.onnx").metadata_props}
    assert json.loads(properties["read_options"])["value_range"] == [100, 2400]


def test_the_range_is_in_tokenizer_hash_backbone_and_card(trained, tmp_path):
    tokenizer = load_tokenizer(trained / "tokenizer")
    assert tokenizer.read_options == ReadOptions(value_range=(100, 2400))
    plain = mapet.fit_tokenizer(images=trained / "arrays", out=tmp_path / "plain", channels=1, vocab_size=8, **SIZES)
    assert plain.quantizer.settings == tokenizer.quantizer.settings and plain.hash != tokenizer.hash
    config = json.loads((trained / "run" / "backbone" / "config.json").read_text())
    assert config["read_options"]["value_range"] == [100, 2400]
    exported = mapet.export(backbone=trained / "run", out=tmp_path / "export")
    assert "--value-range 100 2400" in (exported / "README.md").read_text()
    assert json.loads((exported / "config.json").read_text())["read_options"]["value_range"] == [100, 2400]
    assert get_read_options(load_backbone(exported)) == tokenizer.read_options


def test_another_declared_range_is_refused_unless_given_again(trained, tmp_path):
    options = {"backbone": trained / "run", "precision": "float32"}
    for name, value_range in {"other": (0, 4095), "none": None, "same": (100, 2400)}.items():
        prepared = mapet.prepare(images=trained / "scans", out=tmp_path / name, channels=1, value_range=value_range)
        if name == "same":
            mapet.embed(images=prepared, out=tmp_path / "out", **options)
            assert np.array_equal(np.load(tmp_path / "out" / "features.npy"), features(trained, "scans", resume=True))
            continue
        with refused("100 2400", "0 4095" if value_range else "none", field="value_range"):
            mapet.embed(images=prepared, out=tmp_path / f"out-{name}", **options)
        mapet.embed(images=prepared, out=tmp_path / f"out-{name}", value_range=(100, 2400), **options)


def test_values_outside_the_range_are_warned_of_with_both_ranges(trained, tmp_path, caplog):
    (tmp_path / "bright").mkdir()
    for index in range(3):
        tifffile.imwrite(
            tmp_path / "bright" / f"{index}.tif", np.full((16, 16), 5000 + index, np.uint16), photometric="minisblack"
        )
    with caplog.at_level(logging.WARNING, "mapet"):
        features(trained, "scans", resume=True)
        assert "outside the range" not in caplog.text
        mapet.embed(images=tmp_path / "bright", backbone=trained / "run", out=tmp_path / "out")
    assert "3 of 3 images" in caplog.text and "100 2400" in caplog.text and "5000" in caplog.text


def test_a_range_is_found_from_percentiles_without_nodata(trained, tmp_path):
    (tmp_path / "geo").mkdir()
    values = np.arange(10_000, dtype=np.float32).reshape(100, 100)
    values[50:] = -9999
    for index in range(2):
        extra = [(42113, "s", 0, "-9999", True)]
        tifffile.imwrite(tmp_path / "geo" / f"{index}.tif", values, photometric="minisblack", extratags=extra)
    images = find_value_range(list_images(tmp_path / "geo", ReadOptions(value_range="percentiles")), 1)
    assert images.read_options.value_range == pytest.approx(np.percentile(np.arange(5000), (0.1, 99.9)), abs=2)
    tokenizer = mapet.fit_tokenizer(
        images=trained / "scans",
        out=tmp_path / "tokenizer",
        channels=1,
        vocab_size=8,
        value_range="percentiles",
        **SIZES,
    )
    low, high = tokenizer.read_options.value_range
    assert 200 <= low < 300 and 2200 < high <= 2300
    assert (
        find_value_range(list_images(trained / "arrays", ReadOptions(value_range=())), 1).read_options.value_range
        is None
    )


def test_run_hands_the_range_to_the_first_stage_and_the_others_take_it_from_the_tokenizer(trained, tmp_path):
    config = RunConfig(images=trained / "scans", out=tmp_path, value_range=(100, 2400))
    stages = _list_stages(config)
    assert [getattr(stage.config, "value_range", None) for stage in stages[:4]] == [(100, 2400), None, None, None]
