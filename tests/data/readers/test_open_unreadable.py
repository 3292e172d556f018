"""Odd and broken image files: read correctly, or refused with a reason."""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mapet
from mapet.data.dataset import UnreadableImages
from mapet.data.readers.image import ImageDecodeError
from mapet.data.readers.open import open_image
from mapet.data.sources import list_images
from mapet.models.backbone import load_backbone
from tests.refused import refused


@pytest.fixture
def photo(photos) -> Image.Image:
    return Image.fromarray(photos[0][100:160, 200:280])  # 80 x 60


def decode_error(path: Path, channels: int = 3) -> str:
    with pytest.raises(ImageDecodeError) as caught:
        open_image(path, channels).read()
    return str(caught.value)


def test_truncated_corrupt_and_empty(photo, tmp_path):
    photo.save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "noise.png").write_bytes(os.urandom(500))
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert "truncated" in decode_error(tmp_path / "cut.jpg")
    assert "not an image" in decode_error(tmp_path / "noise.png")
    assert decode_error(tmp_path / "empty.jpg") == "zero bytes"
    assert "No such file" in decode_error(tmp_path / "absent.jpg")


def test_mutated_bytes_never_escape_as_another_error(photo, tmp_path):
    rng = np.random.default_rng(0)
    for format in ("jpg", "png", "gif", "webp", "tif", "bmp"):
        photo.save(tmp_path / f"x.{format}")
        data = np.frombuffer((tmp_path / f"x.{format}").read_bytes(), np.uint8)
        for _ in range(40):
            mutated = data.copy()
            mutated[rng.integers(len(data), size=8)] = rng.integers(256, size=8)
            (tmp_path / f"y.{format}").write_bytes(mutated.tobytes())
            with contextlib.suppress(ImageDecodeError):
                assert open_image(tmp_path / f"y.{format}").read().shape[0] == 3


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_are_accepted_as_pillow_does(photo, tmp_path, progressive):
    """For any truncation or bit flip, the fast decoder refuses what Pillow refuses."""
    rng = np.random.default_rng(1)
    path = tmp_path / "x.jpg"
    photo.save(path, progressive=progressive, exif=photo.getexif())
    data = path.read_bytes()
    flips = [
        data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i + 1 :]
        for i in rng.integers(len(data), size=150)
    ]
    for broken in [data[:end] for end in range(1, len(data), 23)] + [data[:-1], data[:-2]] + flips:
        path.write_bytes(broken)
        try:
            with Image.open(path) as image:
                expected = np.asarray(image.convert("RGB"))
        except Exception:
            assert decode_error(path)
        else:
            assert np.array_equal(open_image(path).read().permute(1, 2, 0), expected)


def test_animated_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").read()[:, 0, 0].tolist() == [255, 0, 0]


def test_sixteen_bit_png_keeps_the_upper_bits(tmp_path):
    values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", 1).read().flatten().tolist() == [0, 0, 1, 255]
    assert open_image(tmp_path / "a.png", 3).read().shape == (3, 1, 4)


def test_cmyk_palette_alpha_gray_and_bilevel(photo, tmp_path):
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    difference = open_image(tmp_path / "cmyk.jpg").read().float() - torch.from_numpy(np.asarray(photo).copy()).permute(
        2, 0, 1
    )
    assert difference.abs().mean() < 6
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((1, 1), (0, 0, 255, 255))
    rgba.convert("P").save(tmp_path / "flat.png")
    rgba.quantize(4).save(tmp_path / "palette.png")
    image = open_image(tmp_path / "palette.png").read()
    assert image[:, 0, 0].tolist() == [255, 255, 255]  # transparent shows white
    assert image[:, 1, 1].tolist() == [0, 0, 255]
    for mode in ("L", "1", "LA", "RGBA", "P"):
        photo.convert(mode).save(tmp_path / f"{mode}.png")
        assert open_image(tmp_path / f"{mode}.png").read().shape == (3, 60, 80)
        assert open_image(tmp_path / f"{mode}.png", 1).read().shape == (1, 60, 80)


def test_exif_rotation_is_applied(photo, tmp_path):
    exif = photo.getexif()
    exif[0x0112] = 6  # the camera lay on its side
    photo.save(tmp_path / "a.png", exif=exif)
    expected = np.asarray(photo.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(open_image(tmp_path / "a.png").read(), torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_enormous_dimensions_are_refused_before_decoding(tmp_path):
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(png + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    assert "10000000000 pixels" in decode_error(tmp_path / "bomb.png") or "100000 x 100000" in decode_error(
        tmp_path / "bomb.png"
    )


def test_float_and_32_bit_images_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "i.tif")
    assert decode_error(tmp_path / "f.tif").startswith("float32 pixels (1 to 1)")
    assert decode_error(tmp_path / "i.tif").startswith("int32 pixels (70000 to 70000)")


def test_arrays_of_many_channels(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4 * 5 * 7, dtype=np.uint8).reshape(4, 5, 7))
    np.save(tmp_path / "b.npy", np.full((4, 5, 7), 513, dtype=np.uint16))
    np.save(tmp_path / "c.npy", np.ones((4, 5, 7)))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert open_image(tmp_path / "a.npy", 7).read().shape == (7, 4, 5)
    assert open_image(tmp_path / "b.npy", 7).read().unique().tolist() == [2]
    assert "expected (H, W, 3)" in decode_error(tmp_path / "a.npy", 3)
    assert "float64" in decode_error(tmp_path / "c.npy", 7)
    assert "damaged" in decode_error(tmp_path / "pickled.npy", 7)


def test_no_permission(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    os.chmod(tmp_path / "a.png", 0)
    if os.geteuid() == 0:  # root may read anything: become another user for a moment
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == 0 and str(folder).startswith("/tmp/"):
                folder.chmod(0o755)
        os.seteuid(65534)
    try:
        assert decode_error(tmp_path / "a.png") in ("no permission to read it",)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def test_odd_names_and_link_loops(photo, tmp_path):
    root = tmp_path / "root"
    (root / "nested dir").mkdir(parents=True)
    names = ["plain.png", "with space.png", "new\nline.png", "ünïcødé 图.png", "UPPER.PNG", "nested dir/x.png"]
    for name in names:
        photo.save(root / name)
    with open(os.path.join(os.fsencode(root), b"latin-\xe9.png"), "wb") as file:
        photo.save(file, "png")
    (root / ".hidden.png").write_bytes(b"not listed")
    (root / "notes.txt").write_text("ignored")
    (root / "loop").symlink_to(root)
    (root / "nested dir" / "up").symlink_to("..")
    (root / "dangling.png").symlink_to("nowhere.png")
    images = list_images(root)
    assert sorted(images.id(i) for i in range(len(images))) == sorted(
        [*names, "dangling.png", os.fsdecode(b"latin-\xe9.png")]
    )
    assert images.ignored == 1
    readable = [i for i in range(len(images)) if images.id(i) != "dangling.png"]
    assert all(open_image(images[i]).read().shape == (3, 60, 80) for i in readable)
    store = mapet.tokenize(
        images=root, out=tmp_path / "tokens",
        tokenizer=_fit(root, tmp_path / "tokenizer"),
    )  # fmt: skip
    assert list(store.unreadable.values()) == ["No such file or directory"]


def _fit(images: Path, out: Path) -> Path:
    mapet.fit_tokenizer(images=images, out=out, image_size=16, patch_size=4, vocab_size=4, max_unreadable=0.5)
    return out


def test_unreadable_images_are_excluded_until_they_are_too_many(crops, tmp_path, caplog):
    for name in ("a.png", "b.png", "c.png"):
        (crops / name).write_bytes(b"broken")
    tokenizer = _fit(crops, tmp_path / "tokenizer")
    with refused("2 of 15", "'a.png'", "max_unreadable"):
        mapet.tokenize(images=crops, tokenizer=tokenizer, out=tmp_path / "tokens")
    store = mapet.tokenize(images=crops, tokenizer=tokenizer, out=tmp_path / "tokens2", max_unreadable=0.3)
    images = list_images(crops)
    with refused("15 of 15", "mapet check") as error:  # `evaluate` has no such option
        UnreadableImages(images, 1.0, is_option=False).add(
            [(index, "broken") for index in range(len(images))], quiet=True
        )
    assert "max_unreadable" not in str(error.value)
    assert {images.id(row) for row in store.unreadable} == {"a.png", "b.png", "c.png"}
    assert "unreadable image 'a.png': not an image" in caplog.text
    mapet.pretrain(
        images=crops, tokenizer=tokenizer, tokens=tmp_path / "tokens2", out=tmp_path / "run", epochs=1, probe_every=0,
        model_args={"embed_dim": 16, "depth": 1, "num_heads": 1}, max_unreadable=0.3,
    )  # fmt: skip
    assert (tmp_path / "run" / "backbone" / "model.safetensors").exists()


def test_one_image(photo, tmp_path):
    (tmp_path / "one").mkdir()
    photo.save(tmp_path / "one" / "a.png")
    mapet.run(
        images=tmp_path / "one", out=tmp_path / "run",
        fit_tokenizer={"image_size": 16, "patch_size": 4},
        pretrain={"epochs": 2, "model_args": {"embed_dim": 16, "depth": 1, "num_heads": 1}},
    )  # fmt: skip
    assert load_backbone(tmp_path / "run").embed_dim == 16


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with refused("1 other"):
        mapet.check(images=tmp_path)
    with refused("absent"):
        mapet.check(images=tmp_path / "absent")


def test_check_reports_all_of_it(crops, tmp_path, caplog):
    caplog.set_level("INFO", "mapet")
    (crops / "bad.jpg").write_bytes(b"\xff\xd8 broken")
    tiny = {"model_args": {"embed_dim": 16, "depth": 1, "num_heads": 1}}
    stats = mapet.check(images=crops, image_size=32, patch_size=8, pretrain=tiny, out=tmp_path / "out", time="10h")
    assert list(stats.unreadable) == ["bad.jpg"] and not (tmp_path / "out").exists()
    for text in (
        "13 images",
        "labels: none (they are taken from class folders",
        "smallest 48 x 64",
        "PNG RGB 12",
        "unreadable: 1",
        "  'bad.jpg': ",
        "plan for 13 images of about 48 px, 600 minutes",
        "patch_size    8: as given",
        "pretrain",
        "tokenize",
    ):
        assert text in caplog.text
    assert "12 images are very few" in caplog.text
    assert "other commands refuse" not in caplog.text  # one is always allowed
    assert "enlarged" not in caplog.text
    (crops / "only").mkdir()
    (crops / "bad.jpg").rename(crops / "only" / "bad.jpg")
    caplog.clear()
    mapet.check(images=crops / "only")
    assert "unreadable: 1" in caplog.text and "modes" not in caplog.text


def test_check_warns_about_what_later_commands_will_refuse_or_enlarge(crops, caplog):
    (crops / "bad.jpg").write_bytes(b"\xff\xd8 broken")
    (crops / "worse.jpg").write_bytes(b"no image")
    tiny = {"model_args": {"embed_dim": 16, "depth": 1, "num_heads": 1}}
    mapet.check(images=crops, image_size=224, patch_size=112, pretrain=tiny, time="10h")
    assert (
        "2 of 14 are unreadable: other commands refuse more than 5%; remove them or raise max_unreadable" in caplog.text
    )
    assert "100% are smaller than the input, 224 x 224 px, and would be enlarged" in caplog.text


def test_a_postscript_file_named_jpg_starts_no_ghostscript(tmp_path, monkeypatch):
    """Pillow detects 40 formats by content; only the documented ones are opened, whatever the name."""

    def ghostscript(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript)
    for name in ("a.jpg", "b.png", "c.webp"):
        (tmp_path / name).write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
        )
        with pytest.raises(ImageDecodeError):
            open_image(tmp_path / name).read()
        with pytest.raises(ImageDecodeError):
            open_image((tmp_path / name).read_bytes()).read()
