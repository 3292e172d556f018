"""The teacher 'hog' against scikit-image, and through the commands."""

import numpy as np
import pytest
import torch
from skimage.feature import hog as skimage_hog

import mapet
from mapet.config.tokenizers import HOGOptions
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.run_state import RunState
from mapet.tokenizers.tokenizer import load_tokenizer
from tests.conftest import PRETRAIN, all_rows, teacher_of
from tests.refused import refused


def plain_hog(image, patch_size, window, cells, bins):
    """scikit-image's descriptor of the window around each patch, (F, rows, columns); the image is (C, H, W), in [0, 1]."""
    before = (window - patch_size) // 2
    pad = (
        max(before, window - patch_size - before) + 2
    )  # the gradients of scikit-image are 0 in the outermost rows and columns
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    rows, columns = (side // patch_size for side in image.shape[1:])
    result = np.empty((cells**2 * bins, rows, columns))
    for row in range(rows):
        for column in range(columns):
            top, left = (pad - before + index * patch_size for index in (row, column))
            # One pixel more on each side gives the window's outermost pixels their gradients.
            crop = padded[:, top - 1 : top + window + 1, left - 1 : left + window + 1]
            result[:, row, column] = descriptor(crop, window // cells, cells, bins)
    return result


def descriptor(crop, cell, cells, bins):
    """Return scikit-image's descriptor of a crop without its outermost pixels: the middle one of 3 x 3 blocks."""
    grown = np.pad(crop, ((0, 0), (cell - 1, cell - 1), (cell - 1, cell - 1)), mode="edge")
    blocks = skimage_hog(
        grown, bins, (cell, cell), (cells, cells), block_norm="L1-sqrt", feature_vector=False, channel_axis=0
    )
    assert blocks.shape[:2] == (3, 3)
    return blocks[1, 1].transpose(2, 0, 1).ravel()  # the orientation varies slowest


@pytest.mark.parametrize(
    ("size", "channels", "patch_size", "window", "cells", "bins"),
    [
        ((32, 32), 3, 4, 12, 3, 9),  # the default: cells as large as patches
        ((24, 40), 1, 8, 12, 3, 9),  # cells of half a patch
        ((15, 20), 4, 5, 14, 2, 6),  # windows half a pixel off the center
        ((12, 12), 2, 6, 4, 1, 5),  # smaller than a patch
    ],
)
def test_hog_is_scikit_image_s(size, channels, patch_size, window, cells, bins):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, channels, *size), dtype=np.uint8))
    options = HOGOptions(window=window, cells=cells, bins=bins, color=2)
    result = teacher_of("hog", size, patch_size, channels=channels, hog=options)(images)
    assert result.shape[1] == cells**2 * bins + channels
    for image, features in zip(images.double().numpy() / 255, result.numpy(), strict=True):
        expected = plain_hog(image, patch_size, window, cells, bins)
        assert np.abs(features[:-channels] - expected).max() < 1e-4
        rows, columns = expected.shape[1:]
        means = image.reshape(channels, rows, patch_size, columns, patch_size).mean((2, 4))
        assert np.abs(features[-channels:] - 2 * means).max() < 1e-6


def test_defaults_and_options_of_other_teachers():
    images = torch.randint(0, 256, (2, 3, 12, 18), dtype=torch.uint8)
    default = teacher_of("hog", (12, 18), 3)
    assert torch.equal(default(images), teacher_of("hog", (12, 18), 3, hog=HOGOptions(window=9))(images))
    assert default(images).shape == (2, 84, 4, 6) and default.label_free
    assert teacher_of("hog", (12, 18), 3, hog=HOGOptions(color=0))(images).shape == (2, 81, 4, 6)
    with refused("window", 10, 3, field=None):
        mapet.fit_tokenizer(images="x", out="y", teacher="hog", hog={"window": 10})
    with refused("pixels", "hog"):
        teacher_of("pixels", (12, 18), 3, hog=HOGOptions(bins=8))


def test_hog_tokens_through_the_commands(few_digits, tmp_path):
    """Stored tokens are those of the loaded tokenizer, an option of a config file included; all files say that no labels were used."""
    options = {"image_size": 8, "patch_size": 2, "channels": 1, "vocab_size": 16, "kmeans_iters": 5, "hog": {"bins": 6}}
    mapet.fit_tokenizer(images=few_digits, out=tmp_path / "t", teacher="hog", **options)
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.description["label_free"] is True and tokenizer.description["feature_size"] == 55
    assert tokenizer.description["teacher"]["hog"]["bins"] == 6
    mapet.tokenize(images=few_digits, tokenizer=tmp_path / "t", out=tmp_path / "tokens")
    images = list_images(few_digits)
    pixels = torch.stack([images.open(row, 1).read() for row in range(len(images))])
    stored = all_rows(TokenStore.open(tmp_path / "tokens", images, tokenizer.hash))[:, 0]
    assert (tokenizer(pixels).flatten(1).numpy() == stored).all()
    run = tmp_path / "run"
    mapet.pretrain(images=few_digits, tokenizer=tmp_path / "t", out=run, **PRETRAIN | {"epochs": 1})
    assert RunState.read(run).results["tokenizer"]["label_free"] is True
    assert "<dd>hog (label-free)</dd>" in (run / "report.html").read_text()
    mapet.inspect_tokenizer(tokenizer=tmp_path / "t", images=few_digits, out=tmp_path / "inspected", sample=10)
    assert "`hog` (label-free)" in (tmp_path / "inspected/tokenizer_report.md").read_text()
