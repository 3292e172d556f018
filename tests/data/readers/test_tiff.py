"""TIFF of any bands, layout, type and pages: the values are those of rasterio and tifffile, or the file is refused by name."""

import warnings

import numpy as np
import pytest
import rasterio
import tifffile

from mapet.config.shared import ReadOptions
from mapet.data.readers.image import ImageDecodeError, map_to_uint8
from mapet.data.readers.open import open_image
from mapet.data.sources import list_images
from tests.refused import refused

RANGES = {
    "uint8": None,
    "uint16": (0, 4095),
    "int16": (-1000, 400),
    "int8": (-128, 127),
    "float32": (0, 1),
    "uint32": (0, 9e4),
}


def values(dtype: str, bands: int, height: int = 12, width: int = 16) -> np.ndarray:
    """Return (bands, height, width) random values over the range of a type."""
    low, high = RANGES.get(dtype) or (0, 255)
    return np.random.default_rng(bands).uniform(low, high, (bands, height, width)).astype(dtype)


def write_raster(path, array, **profile) -> np.ndarray:
    """Write (bands, height, width) by rasterio, and return what rasterio reads."""
    bands, height, width = array.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        profile = {"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": array.dtype} | profile
        with rasterio.open(path, "w", **profile) as raster:
            raster.write(array)
        with rasterio.open(path) as raster:
            return raster.read()


def read(path, channels: int, page: int | None = None, **options) -> np.ndarray:
    return open_image(path, channels, ReadOptions(**options), page).read().numpy()


def decode_error(path, channels: int, **options) -> str:
    with pytest.raises(ImageDecodeError) as caught:
        read(path, channels, **options)
    return str(caught.value)


def map_to_8_bits(array: np.ndarray, value_range) -> np.ndarray:
    """Map (bands, height, width) to 8 bits by the definition, in float64."""
    if value_range is None:
        return array
    low, high = value_range
    return np.rint((array.astype(np.float64) - low).clip(0, high - low) * 255 / (high - low))


@pytest.mark.parametrize(
    "compress", [{}, {"compress": "deflate", "predictor": 2}, {"compress": "lzw"}, {"compress": "zstd"}]
)
@pytest.mark.parametrize("interleave", ["band", "pixel"])
@pytest.mark.parametrize(("dtype", "bands"), [
    ("uint8", 2), ("uint8", 5), ("uint16", 4), ("uint16", 13), ("int16", 4), ("float32", 5), ("uint32", 1), ("int8", 1),
])  # fmt: skip
def test_bands_are_those_of_rasterio(tmp_path, dtype, bands, interleave, compress):
    if dtype == "float32" and compress.get("predictor") == 2:
        compress = compress | {"predictor": 3}
    stored = write_raster(tmp_path / "a.tif", values(dtype, bands), interleave=interleave, **compress)
    expected = map_to_8_bits(stored, RANGES[dtype])
    assert np.abs(read(tmp_path / "a.tif", bands, value_range=RANGES[dtype]) - expected).max() <= 1
    assert np.abs(read((tmp_path / "a.tif").read_bytes(), bands, value_range=RANGES[dtype]) - expected).max() <= 1
    if bands not in (1, 3):
        text = decode_error(tmp_path / "a.tif", 3, value_range=RANGES[dtype])
        assert f"{bands} bands" in text and f"--channels {bands}" in text
    if bands > 3:
        chosen = read(tmp_path / "a.tif", 3, value_range=RANGES[dtype], bands=(4, 3, 1))
        assert np.array_equal(chosen, read(tmp_path / "a.tif", bands, value_range=RANGES[dtype])[[3, 2, 0]])
        assert f"{bands} bands" in decode_error(tmp_path / "a.tif", 1, bands=(bands + 1,))


@pytest.mark.parametrize("options", [
    {"planarconfig": "contig"}, {"planarconfig": "separate"}, {"tile": (16, 16), "compression": "deflate", "predictor": True}, {"bigtiff": True},
    {"byteorder": ">"}, {"compression": "jpeg2000"},
])  # fmt: skip
@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
def test_sixteen_bit_colors_keep_all_bits(tmp_path, options, photometric):
    array = values("uint16", 3)
    options = {"planarconfig": "contig"} | options
    stored = array if options["planarconfig"] == "separate" else array.transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric, **options)
    assert np.abs(read(tmp_path / "a.tif", 3, value_range=(0, 4095)) - map_to_8_bits(array, (0, 4095))).max() <= 1
    assert np.array_equal(read(tmp_path / "a.tif", 3), array >> 8)


def test_a_range_for_each_band(tmp_path):
    array = values("uint16", 2)
    write_raster(tmp_path / "a.tif", array)
    result = read(tmp_path / "a.tif", 2, value_range=(0, 4095, 1000, 2000))
    expected = np.stack([map_to_8_bits(array[0], (0, 4095)), map_to_8_bits(array[1], (1000, 2000))])
    assert np.abs(result - expected).max() <= 1
    images = list_images(tmp_path, ReadOptions(value_range=(0, 1, 0, 2)))
    with refused(4, field="value_range"):
        images.open(0, 4)
    with refused(3, field="bands"):
        list_images(tmp_path, ReadOptions(bands=(1, 2))).open(0, 3)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "float16", "float32", "float64"])
def test_types_that_need_a_range_are_refused_without_one(tmp_path, dtype):
    array = values("int8", 1)[0].astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
    assert dtype in (text := decode_error(tmp_path / "a.tif", 1)) and "--value-range" in text
    assert np.abs(read(tmp_path / "a.tif", 1, value_range=(-128, 127)) - map_to_8_bits(array, (-128, 127))).max() <= 1


def test_complex_numbers_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", values("float32", 1)[0].astype(np.complex64), photometric="minisblack")
    assert "complex64" in decode_error(tmp_path / "a.tif", 1, value_range=(0, 1))


def test_nodata_becomes_black_and_no_range_counts_it(tmp_path):
    array = values("float32", 1)
    array[0, :2], array[0, 5, 5:8] = -9999, np.nan
    write_raster(tmp_path / "a.tif", array, nodata=-9999)
    result = read(tmp_path / "a.tif", 1, value_range=(0, 1))
    assert not result[0, :2].any() and not result[0, 5, 5:8].any()
    assert np.abs(result - map_to_8_bits(array, (0, 1)))[0, 6:].max() <= 1
    assert "-9999" not in decode_error(tmp_path / "a.tif", 1)
    write_raster(tmp_path / "b.tif", values("uint16", 1), nodata=0)  # where uint16 has none below 0
    assert np.array_equal(read(tmp_path / "b.tif", 1), values("uint16", 1) >> 8)


@pytest.mark.parametrize(("bits", "dtype"), [(1, bool), (8, np.uint8), (12, np.uint16), (16, np.uint16)])
def test_white_is_zero_at_every_depth(tmp_path, bits, dtype):
    array = np.random.default_rng(0).integers(2**bits, size=(12, 16)).astype(dtype)
    value_range = (0, 4095) if bits == 12 else None
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
    expected = (
        map_to_8_bits(array, value_range)
        if value_range
        else array.astype(int) * 255
        if bits == 1
        else array >> (bits - 8)
    )
    assert np.abs(read(tmp_path / "a.tif", 1, value_range=value_range) - (255.0 - expected)).max() <= 1
    assert read(tmp_path / "a.tif", 3, value_range=value_range).shape == (3, 12, 16)


def test_a_fourth_band_is_laid_on_white_only_if_it_is_a_transparency(tmp_path):
    colors, alpha = values("uint8", 3), np.zeros((1, 12, 16), np.uint8)
    alpha[:, :, :8] = 255
    for name, dtype, shift in (("a.tif", np.uint8, 0), ("b.tif", np.uint16, 8)):
        array = (np.concatenate([colors, alpha]).astype(dtype) * (257 if shift else 1)).transpose(1, 2, 0)
        tifffile.imwrite(tmp_path / name, array, photometric="rgb", extrasamples=["unassalpha"])
        expected = np.where(alpha == 255, colors, 255)
        assert np.array_equal(read(tmp_path / name, 3), expected)
        assert np.array_equal(read(tmp_path / name, 4), np.concatenate([colors, alpha]))
    write_raster(tmp_path / "c.tif", values("uint8", 4))  # GDAL marks near infrared as alpha
    assert "4 bands" in decode_error(tmp_path / "c.tif", 3)
    assert np.array_equal(read(tmp_path / "c.tif", 4), values("uint8", 4))


def test_pages_are_never_dropped_silently(tmp_path):
    array = values("uint16", 5)
    (tmp_path / "one").mkdir()
    for name, options in {
        "ome.ome.tif": {"metadata": {"axes": "ZYX"}}, "imagej.tif": {"imagej": True, "metadata": {"axes": "TYX"}},
        "plain.tif": {"metadata": None}, "shaped.tif": {}, "one_ifd.tif": {"contiguous": True, "truncate": True},
    }.items():  # fmt: skip
        path = tmp_path / "one" / name
        tifffile.imwrite(path, array, photometric="minisblack", **options)
        assert "5 pages" in (text := decode_error(path, 1, value_range=(0, 4095))) and "--pages first" in text
        expected = map_to_8_bits(array, (0, 4095))
        assert np.abs(read(path, 1, value_range=(0, 4095), pages="first") - expected[:1]).max() <= 1
        assert np.abs(read(path, 5, value_range=(0, 4095), pages="bands") - expected).max() <= 1
    tifffile.imwrite(tmp_path / "one" / "single.tif", array[0])
    images = list_images(tmp_path / "one", ReadOptions(value_range=(0, 4095), pages="each"))
    assert len(images) == 26 and [images.id(i) for i in (0, 4, 25)] == ["imagej.tif#1", "imagej.tif#5", "single.tif"]
    assert np.abs(images.open(3, 1).read().numpy() - expected[3]).max() <= 1
    assert np.array_equal(images.subset([25, 3]).open(1, 1).read(), images.open(3, 1).read())
    assert images.subset([3]).data(0) == (tmp_path / "one" / "imagej.tif").read_bytes()


def test_pages_of_two_sizes_and_reduced_copies(tmp_path):
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        file.write(values("uint16", 1)[0], photometric="minisblack")
        file.write(values("uint16", 1, 6, 8)[0], photometric="minisblack")
    assert "2 pages" in decode_error(tmp_path / "two.tif", 1)
    with tifffile.TiffWriter(tmp_path / "reduced.tif") as file:
        file.write(values("uint16", 1)[0], photometric="minisblack")
        file.write(values("uint16", 1, 6, 8)[0], photometric="minisblack", subfiletype=1)
    assert read(tmp_path / "reduced.tif", 1).shape == (1, 12, 16)


def test_orientation_palette_and_inks(tmp_path):
    array = values("uint16", 1)
    tifffile.imwrite(tmp_path / "a.tif", array[0], photometric="minisblack", extratags=[(274, "H", 1, 6, True)])
    assert np.array_equal(read(tmp_path / "a.tif", 1), np.rot90(array >> 8, -1, (1, 2)))
    colors, indices = values("uint8", 256, 1, 3)[:, 0], values("uint8", 1)[0]
    colormap = (colors.T.astype(np.uint16)) * 257
    tifffile.imwrite(tmp_path / "b.tif", indices, photometric="palette", colormap=colormap)
    assert np.array_equal(read(tmp_path / "b.tif", 3), colors[indices].transpose(2, 0, 1))
    lab = values("uint8", 3).transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "c.tif", lab, photometric="cielab")
    assert "CIELAB" in decode_error(tmp_path / "c.tif", 3)


def test_the_definition_of_a_range():
    array = np.array([-7, 0, 10, 25, 50, 51, 900], np.int16)[:, None, None]
    assert map_to_uint8(array, np.array([[0, 50]])).flatten().tolist() == [0, 0, 51, 128, 255, 255, 255]
    array = np.array([np.nan, -np.inf, -1000, -300, 400, np.inf], np.float32)[:, None, None]
    assert map_to_uint8(array, np.array([[-1000, 400]])).flatten().tolist() == [0, 0, 0, 128, 255, 255]
