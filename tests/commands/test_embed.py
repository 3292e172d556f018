"""`embed`: features of a folder, the same in both formats, whole or interrupted."""

import json
import os
import signal

import numpy as np
import pytest
import torch

import mapet
from mapet.cli import main
from mapet.data.sources import list_images
from mapet.data.views import normalize
from mapet.errors import Interrupted
from mapet.evaluation import embeddings
from mapet.evaluation.datasets import LabeledSet
from mapet.evaluation.embeddings import read_embeddings
from mapet.evaluation.features import BackboneWrapper, CacheConfig, FeatureCache
from mapet.models.backbone import load_backbone, save_backbone
from tests.commands.test_export import mapet_view, save_vit
from tests.refused import refused

COMMON = {"device": "cpu", "precision": "float32"}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(embeddings, "inference_batch_size", lambda _: 5)


@pytest.fixture
def vit_folder(tmp_path):
    save_vit(tmp_path / "vit")
    return tmp_path / "vit"


def small_parts(monkeypatch, images_per_part=4, size=32 * 4):
    monkeypatch.setattr("mapet.evaluation.embeddings.SHARD_BYTES", images_per_part * size)


def read_features(folder):
    """Read features and ids as a user would, without mapet."""
    if (folder / "features.npy").exists():
        return json.loads((folder / "ids.json").read_text()), np.load(folder / "features.npy", allow_pickle=False)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(folder / "features.parquet", columns=["id", "features"])
    return table["id"].to_pylist(), np.array(table["features"].to_pylist(), np.float32)


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("pool", ["mean", "cls", "none"])
def test_features_are_the_backbone_s(format, pool, vit_folder, crops, tmp_path, monkeypatch):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    small_parts(monkeypatch)
    out = mapet.embed(backbone=vit_folder, images=crops, out=tmp_path / "out", format=format, pool=pool, **COMMON)
    ids, features = read_features(out)
    assert ids == [path.name for path in sorted(crops.iterdir())]
    vit = load_backbone(vit_folder).eval()
    images = list_images(crops)
    from PIL import Image

    view = mapet_view(Image.open(images[7]), (32, 32), tmp_path)
    with torch.no_grad():
        tokens = vit.forward_features(normalize(view[None], 3))[0]
    expected = {"mean": tokens[1:].mean(0), "cls": tokens[0], "none": tokens[1:]}[pool]
    assert features.shape == (12, *expected.shape)
    assert np.allclose(features[7], expected.numpy(), atol=1e-5)
    assert len(list(out.glob("features.parquet/part-*"))) == (0 if format == "npy" else 12 if pool == "none" else 3)
    again, same = read_embeddings(out)
    assert again == ids and np.array_equal(same, features)


@pytest.mark.parametrize(
    ("size", "tolerance"),
    [
        ((60, 60), 0.005),  # another resize implementation: rounding to bytes
        ((50, 40), 0.02),  # and at the crop's border, where timm's resize reads a pixel or two beyond
        ((200, 200), 0.05),  # a JPEG is decoded at half its size
        ((150, 128), 0.5),  # timm rounds the resized width down and crops at integer pixels: up to a pixel off
        ((131, 131), 0.5),  # sides become multiples of what a JPEG could be reduced by: 128
    ],
)
def test_features_are_those_of_timms_transform(size, tolerance, vit_folder, tmp_path):
    """Compare features of real photos with those of README's code, by a ViT of random weights; relative to the features' norm."""
    import timm
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = tmp_path / "photos"
    photos.mkdir()
    for name, pixels in zip("ab", load_sample_images().images, strict=True):
        photo = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        photo.save(photos / f"{name}.png")
        photo.save(photos / f"{name}.jpg", quality=90)
    out = mapet.embed(backbone=vit_folder, images=photos, out=tmp_path / "out", **COMMON)
    vit = load_backbone(vit_folder).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
    for name, result in zip(*read_features(out), strict=True):
        with torch.no_grad():
            tokens = vit.forward_features(transform(Image.open(photos / name))[None])[0]
        expected = tokens[1:].mean(0).numpy()
        limit = 0.005 if size == (200, 200) and name.endswith("png") else tolerance
        assert np.linalg.norm(result - expected) < limit * np.linalg.norm(expected), name


def test_as_the_probe_sees_them(run_dir, digits, tmp_path):
    mapet.embed(backbone=run_dir, images=digits / "test", out=tmp_path / "out", **COMMON)
    from mapet.device import ComputeContext

    backbone = BackboneWrapper.load(str(run_dir), ComputeContext.from_options("cpu", "float32"))
    cache = FeatureCache.extract(backbone, LabeledSet.from_images(list_images(digits / "test")), CacheConfig())
    expected = cache.layer_features().numpy()  # float16
    assert np.allclose(np.load(tmp_path / "out" / "features.npy")[cache.index], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_interrupted_and_resumed_is_the_same(format, vit_folder, crops, tmp_path, monkeypatch):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    small_parts(monkeypatch)
    options = {"backbone": vit_folder, "images": crops, "format": format, **COMMON}
    monkeypatch.setattr(embeddings, "inference_batch_size", lambda _: 3)
    whole = mapet.embed(out=tmp_path / "whole", **options)
    compute_features, calls = embeddings._compute_features, []

    def stop_within_the_second_part(*arguments):
        calls.append(len(arguments[-1]))
        if calls == [8, 1, 3, 1, 3]:  # the trial batch, one for the shape, and three of the 12 images
            os.kill(os.getpid(), signal.SIGINT)
        return compute_features(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "_compute_features", stop_within_the_second_part)
        with refused("SIGINT", "7 of 12", "resume=True", kind=Interrupted):
            mapet.embed(out=tmp_path / "parts", **options)
    assert json.loads((tmp_path / "parts" / "manifest.json").read_text())["num_done"] == 7
    with refused("unfinished"):
        read_embeddings(tmp_path / "parts")
    mapet.embed(out=tmp_path / "parts", resume=True, **options)
    (ids, features), (same_ids, same) = map(read_embeddings, (whole, tmp_path / "parts"))
    assert ids == same_ids and np.array_equal(features, same)


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_unreadable_images_are_listed_and_skipped(format, vit_folder, crops, tmp_path, monkeypatch):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    small_parts(monkeypatch)
    for number in (4, 5, 6, 7):  # all images of a shard
        (crops / f"crop{number:03d}.png").write_bytes(b"no image")
    out = mapet.embed(
        backbone=vit_folder, images=crops, out=tmp_path / "out", format=format, max_unreadable=0.5, **COMMON
    )
    ids, features = read_embeddings(out)
    assert ids == [f"crop{number:03d}.png" for number in (0, 1, 2, 3, 8, 9, 10, 11)] and np.isfinite(features).all()
    assert set(json.loads((out / "manifest.json").read_text())["unreadable"]) == {"4", "5", "6", "7"}
    if format == "npy":
        assert np.isnan(np.load(out / "features.npy")[4:8]).all()
    with refused("max_unreadable", 0.05):
        mapet.embed(backbone=vit_folder, images=crops, out=tmp_path / "strict", format=format, **COMMON)


def test_embed_refuses_what_it_cannot_resume(vit_folder, crops, tmp_path, monkeypatch):
    mapet.embed(backbone=vit_folder, images=crops, out=tmp_path / "out", **COMMON)
    options = {"backbone": vit_folder, "images": crops, "out": tmp_path / "out"} | COMMON
    with refused("resume=True", field="out"):
        mapet.embed(**options)
    with refused("pool", "mean", "cls"):
        mapet.embed(**(options | {"pool": "cls", "resume": True}))
    with refused("layers", "[1]", "[0]"):
        mapet.embed(**(options | {"layers": (0,), "resume": True}))
    save_vit(tmp_path / "other", depth=1)
    with refused("backbone"):
        mapet.embed(**(options | {"backbone": tmp_path / "other", "resume": True}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("pyarrow", "[export]"):
        mapet.embed(**(options | {"format": "parquet", "out": tmp_path / "new"}))


def test_resuming_keeps_the_files_of_a_folder_that_is_not_its_own(vit_folder, crops, tmp_path):
    for name in ("features.npy", "ids.json"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("mine")
    with refused(field="out"):
        mapet.embed(backbone=vit_folder, images=crops, out=tmp_path / "mine", format="npy", resume=True)
    assert (tmp_path / "mine" / "features.npy").read_text() == (tmp_path / "mine" / "ids.json").read_text() == "mine"


def test_numbers_that_are_none_are_not_written(vit_folder, crops, tmp_path):
    vit = load_backbone(vit_folder)
    options = {"images": crops, "out": tmp_path / "out", "dtype": "float16"} | COMMON
    for value, message in ((1e6, "dtype='float32'"), (torch.nan, "NaN")):
        with torch.no_grad():
            vit.norm.bias.fill_(value)
        save_backbone(vit, tmp_path / str(value))
        with refused(message):
            mapet.embed(backbone=tmp_path / str(value), **options)
    mapet.embed(backbone=tmp_path / "1000000.0", **(options | {"dtype": "float32", "out": tmp_path / "wide"}))


def test_command_line_and_half_precision(vit_folder, crops, tmp_path):
    argv = ["--backbone", str(vit_folder), "--images", str(crops), "--out", str(tmp_path / "out")]
    argv += ["--dtype", "float16", "--image-size", "24", "40", "--pool", "none", "--layers", "-1", "0"]
    assert main(["embed", *argv]) == 0
    features = np.load(tmp_path / "out" / "features.npy")
    assert features.dtype == np.float16 and features.shape == (12, 15, 64)
