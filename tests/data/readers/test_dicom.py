"""DICOM: physical values as the standard defines them, computed here by hand or by pydicom; what is not exact is refused."""

import shutil
import sys
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

import mapet
from mapet.config.shared import ReadOptions
from mapet.data.sources import list_images
from tests.data.readers.test_tiff import decode_error, map_to_8_bits, read

PATIENT = "Planted^Patient"
LOCAL = [  # of pydicom's own test files: 8 transfer syntaxes
    "CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "MR_small_implicit.dcm",
    "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPEG2000.dcm", "JPEG-LL.dcm", "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm",
    "SC_ybr_full_422_uncompressed.dcm", "examples_palette.dcm", "liver_1frame.dcm", "RG1_UNCI.dcm",
]  # fmt: skip


def write(
    path,
    array: np.ndarray,
    photometric: str = "MONOCHROME2",
    bits: int = 0,
    syntax=ExplicitVRLittleEndian,
    **attributes,
):
    """Write (H, W), (frames, H, W) or (H, W, 3) integers as a DICOM file with these further attributes."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.PatientName, dataset.InstitutionName, dataset.Modality = PATIENT, "Planted Hospital", "CT"
    is_rgb = photometric == "RGB"
    if array.ndim == 3 and not is_rgb:
        dataset.NumberOfFrames = len(array)
    dataset.Rows, dataset.Columns = array.shape[:2] if is_rgb else array.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3 if is_rgb else 1, photometric
    if is_rgb:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * array.itemsize
    dataset.BitsStored = bits or 8 * array.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(array.dtype.kind == "i")
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.PixelData = array.tobytes()
    if syntax is not ExplicitVRLittleEndian:
        dataset.compress(syntax)
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture
def twelve() -> np.ndarray:
    return np.random.default_rng(0).integers(4096, size=(12, 16), dtype=np.uint16)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_twelve_bits_slope_and_intercept(tmp_path, twelve, photometric):
    def seen(pixels: np.ndarray) -> np.ndarray:
        return 255 - pixels if photometric == "MONOCHROME1" else pixels

    write(tmp_path / "a.dcm", twelve, photometric, 12)
    assert np.array_equal(
        read(tmp_path / "a.dcm", 1)[0], seen((twelve >> 4).astype(np.uint8))
    )  # of 12 bits the upper 8
    for syntax in (ExplicitVRLittleEndian, RLELossless):
        write(tmp_path / "b.dcm", twelve, photometric, 12, syntax, RescaleSlope=0.5, RescaleIntercept=-1024)
        expected = seen(map_to_8_bits(twelve * 0.5 - 1024, (-1000, 400)))
        assert np.abs(read(tmp_path / "b.dcm", 1, value_range=(-1000, 400)) - expected).max() <= 1
        assert np.abs(read((tmp_path / "b.dcm").read_bytes(), 3, value_range=(-1000, 400)) - expected).max() <= 1
    assert "--value-range" in decode_error(tmp_path / "b.dcm", 1)


def test_signed_values_padding_and_the_window_of_the_file(tmp_path):
    array = np.random.default_rng(0).integers(-1024, 3072, size=(12, 16), dtype=np.int16)
    array[0] = -2000
    window = {"WindowCenter": [40, -600], "WindowWidth": [400, 1500]}
    for attributes in ({}, {"RescaleSlope": 2, "RescaleIntercept": 10}):
        write(tmp_path / "a.dcm", array, PixelPaddingValue=-2000, **window, **attributes)
        result = read(tmp_path / "a.dcm", 1, value_range=(-3000, 4000))[0]
        physical = array * 2 + 10 if attributes else array
        assert not result[0].any() and np.abs(result - map_to_8_bits(physical, (-3000, 4000)))[1:].max() <= 1
        assert "--value-range -160 240" in (text := decode_error(tmp_path / "a.dcm", 1)) and "-2000" not in text


def test_frames_colors_and_files_without_a_suffix(tmp_path, twelve):
    frames = np.stack([twelve, twelve[::-1], twelve // 2])
    (tmp_path / "scans").mkdir()
    write(tmp_path / "scans" / "IM0001", frames, bits=12)
    (tmp_path / "scans" / "README").write_text("no image")
    assert "3 frames" in (text := decode_error(tmp_path / "scans" / "IM0001", 1)) and "--pages first" in text
    assert np.array_equal(read(tmp_path / "scans" / "IM0001", 3, pages="bands"), frames >> 4)
    images = list_images(tmp_path / "scans", ReadOptions(pages="each"))
    assert [images.id(i) for i in range(len(images))] == ["IM0001#1", "IM0001#2", "IM0001#3"] and images.ignored == 1
    assert np.array_equal(images.open(1, 1).read()[0], frames[1] >> 4)
    colors = np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8)
    write(tmp_path / "b.dcm", colors, "RGB")
    assert np.array_equal(read(tmp_path / "b.dcm", 3), colors.transpose(2, 0, 1))


@pytest.mark.parametrize("name", LOCAL)
def test_files_of_pydicom_have_its_values(name):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("not among the files that pydicom brings along")
    with warnings.catch_warnings(action="ignore"):
        dataset = pydicom.dcmread(path)
        expected = pydicom.pixels.pixel_array(dataset)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            expected = pydicom.pixels.apply_color_lut(expected, dataset) >> 8
        elif dataset.SamplesPerPixel == 1:
            expected = pydicom.pixels.apply_modality_lut(expected, dataset).astype(np.float64)[..., None]
    low, high = float(expected.min()), float(expected.max())
    value_range = (low, high) if dataset.SamplesPerPixel == 1 and expected.shape[-1] == 1 else None
    expected = map_to_8_bits(expected, value_range).transpose(2, 0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        expected = 255 - expected
    channels = len(expected)
    if dataset.BitsStored <= 8 and channels == 1:
        pytest.skip("8 bits stay as they are")
    assert np.abs(read(path, channels, value_range=value_range) - expected).max() <= 1


def test_without_pydicom_the_refusal_names_the_command(tmp_path, twelve, monkeypatch):
    write(tmp_path / "a.dcm", twelve, bits=12)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install '.[medical]'" in decode_error(tmp_path / "a.dcm", 1) and "DICOM" in decode_error(
        tmp_path / "a.dcm", 1
    )


def test_no_attribute_of_a_patient_is_kept(tmp_path, twelve):
    write(tmp_path / "a.dcm", twelve, bits=12)
    (tmp_path / "in").mkdir()
    for index in range(3):
        shutil.copy(tmp_path / "a.dcm", tmp_path / "in" / f"{index}.dcm")
    write(tmp_path / "in" / "8bit.dcm", (twelve >> 4).astype(np.uint8))  # which no range changes
    made = list_images(mapet.prepare(images=tmp_path / "in", out=tmp_path / "out", channels=1, value_range=(0, 4095)))
    assert np.array_equal(made.open(3, 1).read()[0], twelve >> 4)
    mapet.fit_tokenizer(
        images=tmp_path / "in",
        out=tmp_path / "t",
        channels=1,
        vocab_size=4,
        image_size=8,
        patch_size=4,
        value_range=(0, 9),
    )
    written = [path for folder in ("out", "t") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(written) > 4 and not any(b"Planted" in path.read_bytes() for path in written)
