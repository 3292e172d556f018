"""Formats other than TIFF: all bits and bands of PNG, JPEG 2000 and arrays, or a refusal that says why."""

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from tests.data.readers.test_tiff import decode_error, map_to_8_bits, read, values


@pytest.mark.parametrize("suffix", ["png", "jp2"])
def test_colors_of_sixteen_bits_keep_all_of_them(tmp_path, suffix):
    encode = {
        "png": imagecodecs.png_encode,
        "jp2": lambda array: imagecodecs.jpeg2k_encode(array, level=0, codecformat="jp2"),
    }[suffix]
    for bands in (1, 3):
        array = values("uint16", bands)
        stored = np.ascontiguousarray(array.transpose(1, 2, 0)).squeeze()
        (tmp_path / f"a.{suffix}").write_bytes(encode(stored))
        result = read(tmp_path / f"a.{suffix}", bands, value_range=(0, 4095))
        assert np.abs(result - map_to_8_bits(array, (0, 4095))).max() <= 1
        assert np.array_equal(read(tmp_path / f"a.{suffix}", bands), array >> 8)
    alpha = np.full((12, 16, 1), 65535, np.uint16)
    alpha[:, 8:] = 0
    (tmp_path / "b.png").write_bytes(imagecodecs.png_encode(np.concatenate([stored, alpha], 2)))
    result = read(tmp_path / "b.png", 3, value_range=(0, 4095))
    assert np.abs(result - map_to_8_bits(array, (0, 4095)))[..., :8].max() <= 1 and (result[..., 8:] == 255).all()


def test_orientation_of_a_deep_png(tmp_path):
    Image.fromarray(values("uint16", 1)[0]).save(tmp_path / "a.png", exif=_rotated())
    assert np.array_equal(read(tmp_path / "a.png", 1), np.rot90(values("uint16", 1) >> 8, -1, (1, 2)))


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_a_fourth_channel_of_a_png_is_read_as_stored_if_four_are_asked_for(tmp_path):
    array = values("uint8", 4)
    Image.fromarray(array.transpose(1, 2, 0), "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", 4), array)
    assert np.array_equal(read(tmp_path / "a.png", 3, bands=(4, 2, 1)), array[[3, 1, 0]])
    Image.fromarray(array[:3].transpose(1, 2, 0)).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    assert np.array_equal(read(tmp_path / "a.jpg", 2, bands=(3, 1)), read(tmp_path / "a.jpg", 3)[[2, 0]])
    assert "--channels 3" in decode_error(tmp_path / "a.jpg", 13)


def test_a_deep_ppm_is_refused(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(12))
    assert "16 bits" in decode_error(tmp_path / "a.ppm", 3)


def test_arrays(tmp_path):
    array = values("uint16", 13)
    np.save(tmp_path / "a.npy", array)
    assert "13 x 12 x 16" in (text := decode_error(tmp_path / "a.npy", 13)) and "moveaxis" in text
    np.save(tmp_path / "a.npy", np.asfortranarray(array.transpose(1, 2, 0)))
    assert np.abs(read(tmp_path / "a.npy", 13, value_range=(0, 4095)) - map_to_8_bits(array, (0, 4095))).max() <= 1
    chosen = read(tmp_path / "a.npy", 2, value_range=(0, 4095), bands=(9, 2))
    assert np.array_equal(chosen, read(tmp_path / "a.npy", 13, value_range=(0, 4095))[[8, 1]])
    np.save(tmp_path / "b.npy", array[0] > 2000)
    assert np.array_equal(read(tmp_path / "b.npy", 1), 255 * (array[:1] > 2000))
    np.savez(tmp_path / "c.npz", image=values("uint8", 3).transpose(1, 2, 0))
    assert np.array_equal(read(tmp_path / "c.npz", 3), values("uint8", 3))
    np.savez(tmp_path / "d.npz", train_images=array, train_labels=array)
    assert "train_labels" in decode_error(tmp_path / "d.npz", 1) and ".npz" in decode_error(tmp_path / "d.npz", 1)
