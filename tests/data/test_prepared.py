"""Prepared data sets stand for the folders they were made of."""

import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

import mapet
from mapet.cli import main
from mapet.config.shared import ReadOptions
from mapet.data import prepared
from mapet.data.dataset import ViewDataset, position_batches
from mapet.data.loader import load
from mapet.data.readers.image import ImageDecodeError
from mapet.data.readers.open import open_image
from mapet.data.sources import list_images
from mapet.data.views import ViewSpec
from mapet.errors import Interrupted
from tests.refused import fails, refused


@pytest.fixture
def folder(photos, tmp_path, monkeypatch):
    """Two classes: 5 photographs larger than 64 px, one small PNG, one broken file. Three images a shard."""
    monkeypatch.setattr(prepared, "SHARD_SIZE", 3)
    for number in range(5):
        (tmp_path / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(photos[number % 2]).crop((40 * number, 0, 40 * number + 333, 251))
        image.save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg", quality=95)
    Image.fromarray(photos[0][:48, :64]).save(tmp_path / "photos" / "a" / "small.png")
    (tmp_path / "photos" / "b" / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    return tmp_path / "photos"


def test_it_has_the_same_ids_classes_and_images(folder, tmp_path):
    images, made = list_images(folder), list_images(mapet.prepare(images=folder, out=tmp_path / "made", short_side=64))
    assert [made.id(i) for i in range(7)] == [images.id(i) for i in range(7)]
    assert np.array_equal(made.keys(), images.keys())
    assert made.classes()[0] == ["a", "b"] and np.array_equal(made.classes()[1], images.classes()[1])
    assert made.hash != images.hash  # other pixels: the originals' tokens are not theirs
    for index in range(len(images)):
        if images.id(index) == "b/broken.jpg":
            with pytest.raises(ImageDecodeError):
                made.open(index, 3)
            continue
        pixels = made.open(index, 3).read()
        if images.id(index) == "a/small.png":  # kept as it was
            assert torch.equal(pixels, open_image(images[index]).read())
            continue
        assert pixels.shape == (3, 64, 85)
        full = torch.nn.functional.interpolate(
            open_image(images[index]).read()[None].float(), (64, 85), mode="bicubic", antialias=True
        )[0]
        assert (pixels - full.clamp(0, 255)).abs().mean() < 6  # JPEG, of very detailed 64 x 85 px
    part = made.subset([4, 2])
    assert torch.equal(pickle.loads(pickle.dumps(part)).open(1, 3).read(), made.open(2, 3).read())


def test_loader_and_commands_take_it(folder, tmp_path, monkeypatch):
    made = mapet.prepare(images=folder, out=tmp_path / "made", short_side=64)
    dataset = ViewDataset(
        list_images(made), ViewSpec(kind="random-crop", image_size=(32, 32)), image_size=(32, 32), jitter=0.4
    )
    a = [batch.images for batch in load(dataset.batch, position_batches(range(7), 4))]
    with monkeypatch.context() as patch:
        patch.setenv("MAPET_WORKERS", "2")
        b = [batch.images for batch in load(dataset.batch, position_batches(range(7), 4))]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    mapet.fit_tokenizer(images=made, out=tmp_path / "t", image_size=32, patch_size=8, vocab_size=4, max_unreadable=0.5)
    assert list(mapet.tokenize(images=made, tokenizer=tmp_path / "t", out=tmp_path / "s").unreadable) == [6]


def test_an_interrupted_one_is_refused_and_resumes(folder, tmp_path, monkeypatch):
    whole = mapet.prepare(images=folder, out=tmp_path / "whole", short_side=64)
    resize_and_encode, calls = prepared.resize_and_encode, []

    def stops(*image):
        calls.append(image)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return resize_and_encode(*image)

    monkeypatch.setattr(prepared, "resize_and_encode", stops)
    with refused("resume=True", kind=Interrupted):
        mapet.prepare(images=folder, out=tmp_path / "made", short_side=64)
    with refused("3 of 7", "--resume"):
        list_images(tmp_path / "made")
    with refused("short_side", 64, 32):
        mapet.prepare(images=folder, out=tmp_path / "made", short_side=32, resume=True)
    mapet.prepare(images=folder, out=tmp_path / "made", short_side=64, resume=True)
    assert len(calls) <= 6 + 3  # the first shard was kept; the broken image is found before
    files = [{f.name: f.read_bytes() for f in made.iterdir()} for made in (whole, tmp_path / "made")]
    assert len({made.pop("run.json") for made in files}) == 2 and files[0] == files[1]
    with (tmp_path / "made" / "images-00001.bin").open("ab") as file:
        file.write(b"x")
    with refused("damaged"):
        list_images(tmp_path / "made")


def test_arrays_of_many_channels(tmp_path):
    (tmp_path / "arrays").mkdir()
    for name, side in (("a", 40), ("b", 12)):
        np.save(
            tmp_path / "arrays" / f"{name}.npy",
            np.random.default_rng(0).integers(256, size=(side, side, 5), dtype=np.uint8),
        )
    made = list_images(mapet.prepare(images=tmp_path / "arrays", out=tmp_path / "made", short_side=16, channels=5))
    assert made.open(0, 5).read().shape == (5, 16, 16)
    assert torch.equal(made.open(1, 5).read(), open_image(tmp_path / "arrays" / "b.npy", 5).read())


@pytest.fixture
def scans(photos, tmp_path):
    """A photograph of 300 x 320 px as 12 bits in files of 16, and as a CT keeps it."""
    gray = photos[0][:300, :320].mean(-1)
    twelve = (gray * 4095 / 255).astype(np.uint16)
    (tmp_path / "scans").mkdir()
    Image.fromarray(twelve).save(tmp_path / "scans" / "large.png")
    Image.fromarray(twelve[:40, :48]).save(tmp_path / "scans" / "small.tif")
    np.save(tmp_path / "scans" / "swapped.npy", twelve[:40, :48].astype(">u2"))
    (tmp_path / "ct").mkdir()
    hounsfield = gray * 8 - 1000
    hounsfield[0, :3] = np.nan, np.inf, -np.inf
    np.save(tmp_path / "ct" / "a.npy", hounsfield.astype(np.float32))
    Image.fromarray(np.where(np.isfinite(hounsfield), hounsfield, 0).astype(np.int32)).save(tmp_path / "ct" / "b.tif")
    return tmp_path


def test_of_twelve_bits_all_levels_are_kept(scans, photos):
    """Without a range an image of 12 bits has 16 levels of gray: its upper 8 bits are nearly all dark."""
    plain = list_images(mapet.prepare(images=scans / "scans", out=scans / "plain", short_side=400, channels=1))
    made = list_images(
        mapet.prepare(images=scans / "scans", out=scans / "made", short_side=400, channels=1, value_range=(0, 4095))
    )
    gray = torch.from_numpy(photos[0][:300, :320].mean(-1)).float()
    assert [made.id(i) for i in range(3)] == ["large.png", "small.tif", "swapped.npy"]
    for index, rows in enumerate((slice(None), slice(40), slice(40))):
        expected = gray if index == 0 else gray[rows, :48]
        result = made.open(index, 1).read()[0].float()
        assert result.shape == expected.shape and (result - expected).abs().mean() < 3  # JPEG's loss
        assert plain.open(index, 1).read().max() <= 15
    assert (
        open_image(scans / "scans" / "large.png", 3, ReadOptions(value_range=(0, 4095))).read().unique().numel() > 200
    )
    small = list_images(
        mapet.prepare(images=scans / "scans", out=scans / "small", short_side=30, channels=1, value_range=(0, 4095))
    )
    result, expected = (
        small.open(0, 1).read()[0].float(),
        torch.nn.functional.adaptive_avg_pool2d(gray[None], (30, 32))[0],
    )
    assert result.shape == (30, 32) and (result - expected).abs().mean() < 8


def test_negative_and_floating_point_values_need_a_range(scans, photos, capsys):
    with refused("int32", -1000, 1040, "--value-range"):
        mapet.prepare(images=scans / "ct", out=scans / "bad", channels=1)
    argv = [
        "prepare",
        "--images",
        str(scans / "ct"),
        "--out",
        str(scans / "made"),
        "--channels",
        "1",
        "--short-side",
        "400",
    ]
    assert main([*argv, "--value-range", "-1000", "1040"]) == 0
    made, gray = list_images(scans / "made"), torch.from_numpy(photos[0][:300, :320].mean(-1)).float()
    for index in range(2):
        assert (made.open(index, 1).read()[0].float() - gray).abs().mean() < 3
    fails(capsys, *argv, "--value-range", "5", "5", "--resume", named=["--value-range"], field="value_range")
    change = "value_range: [-1000.0, 1040.0] -> [-1000.0, 400.0]"
    fails(capsys, *argv, "--value-range", "-1000", "400", "--resume", named=[change])


def test_eight_bits_stay_as_they_are(folder, tmp_path):
    plain = mapet.prepare(images=folder, out=tmp_path / "plain", short_side=64)
    made = mapet.prepare(images=folder, out=tmp_path / "made", short_side=64, value_range=(0, 4095))
    assert all(
        (plain / f"images-{i:05d}.bin").read_bytes() == (made / f"images-{i:05d}.bin").read_bytes() for i in range(3)
    )


def test_a_sample_is_enough_to_warn_about_dark_images(scans, photos, caplog):
    options = {"image_size": 32, "patch_size": 8, "vocab_size": 4, "channels": 1}
    mapet.fit_tokenizer(images=scans / "scans", out=scans / "dark", **options)
    assert "16-bit images hold values of about" in caplog.text and "16 of 256 levels" in caplog.text
    caplog.clear()
    wide = (photos[0].mean(-1) * 257).astype(np.uint16)
    (scans / "wide").mkdir()
    Image.fromarray(wide).save(scans / "wide" / "a.png")
    mapet.fit_tokenizer(images=scans / "wide", out=scans / "light", **options)
    made = mapet.prepare(images=scans / "scans", out=scans / "made", channels=1, value_range=(0, 4095))
    mapet.fit_tokenizer(images=made, out=scans / "eight", **options)
    assert "16-bit" not in caplog.text and "gray" not in caplog.text


def test_small_and_unreadable_images_are_reported(folder, photos, tmp_path, caplog):
    caplog.set_level("INFO", "mapet")
    mapet.prepare(images=folder, out=tmp_path / "made", short_side=64, max_unreadable=0.5)
    assert "6 images in" in caplog.text and "1 unreadable" in caplog.text
    options = {"patch_size": 8, "vocab_size": 4, "max_unreadable": 0.5}
    mapet.fit_tokenizer(images=tmp_path / "made", out=tmp_path / "fits", image_size=32, **options)
    assert "would be enlarged" not in caplog.text
    mapet.fit_tokenizer(images=tmp_path / "made", out=tmp_path / "small", image_size=96, **options)
    assert "100% of 6 images looked at are smaller than the input, 96 x 96 px, and would be enlarged" in caplog.text


def test_gray_images_read_as_color_are_reported(photos, tmp_path, caplog):
    """Where all are; one in color among them, and three channels are for something."""
    options = {"image_size": 32, "patch_size": 8, "vocab_size": 4}
    note = "gray, and read as three equal channels: 1 channel would do"
    for i in range(4):
        Image.fromarray(photos[0][32 * i :, :, 1]).save(tmp_path / f"{i}.png")
    assert f"note: all are {note}" in mapet.check(images=tmp_path, image_size=32).lines()
    mapet.fit_tokenizer(images=tmp_path, out=tmp_path.parent / "gray-tokenizer", **options)
    assert f"all 4 images looked at are {note}" in caplog.text
    caplog.clear()
    Image.fromarray(photos[0]).save(tmp_path / "4.png")
    assert note not in "".join(mapet.check(images=tmp_path, image_size=32).lines())
    caplog.clear()
    mapet.fit_tokenizer(images=tmp_path, out=tmp_path.parent / "color-tokenizer", **options)
    assert "gray" not in caplog.text.replace(str(tmp_path), "")


def test_check_reports_the_range(scans):
    lines = "\n".join(mapet.check(images=scans / "scans", image_size=64, fit_tokenizer={"channels": 1}).lines())
    command = re.search(r"16 of 256 levels. --value-range (\d+) (\d+) makes use of all", lines)
    assert command and int(command[1]) < 200 and 3900 < int(command[2]) <= 4095
