"""The teacher 'whitened' against its definition, several teachers together, and runs as teachers."""

import json

import numpy as np
import pytest
import torch

import mapet
from mapet.config.tokenizers import WhitenedOptions
from mapet.data.sources import list_images
from mapet.data.token_store import TokenStore
from mapet.models.backbone import load_backbone
from mapet.run_state import RunState
from mapet.tokenizers.teachers import whitened
from mapet.tokenizers.tokenizer import load_tokenizer
from tests.conftest import PRETRAIN, all_rows, teacher_of
from tests.refused import refused

SHAPES = {"image_size": 8, "patch_size": 2, "channels": 1, "vocab_size": 16, "kmeans_iters": 5}


def plain_windows(image, patch_size, window):
    """The normalized pixels of the window around each patch, (patches, F), of an image (C, H, W) of pixels 0..255, in float64."""
    before, result = (window - patch_size) // 2, []
    padded = np.pad(image.astype(float), ((0, 0), (window, window), (window, window)), mode="edge")
    for top in range(0, image.shape[1], patch_size):
        for left in range(0, image.shape[2], patch_size):
            y, x = top + window - before, left + window - before
            pixels = padded[:, y : y + window, x : x + window].ravel()
            result.append((pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 10))
    return np.array(result)


@pytest.mark.parametrize(("channels", "patch_size", "window"), [(3, 4, None), (2, 4, 5), (1, 6, 4)])
def test_whitened_is_zca_of_normalized_windows(channels, patch_size, window):
    """With so few images all windows are drawn: mean and covariance are those of all."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, channels, 12, 24), dtype=np.uint8))
    teacher = teacher_of("whitened", (12, 24), patch_size, channels=channels, whitened=WhitenedOptions(window=window))
    teacher.fit(lambda: images.split(16), len(images))
    windows = [plain_windows(image, patch_size, window or 2 * patch_size) for image in images.numpy()]
    points = np.concatenate(windows)
    values, vectors = np.linalg.eigh(np.cov(points.T))
    matrix = vectors @ np.diag(1 / np.sqrt(values + 0.1)) @ vectors.T
    expected = np.stack([(own - points.mean(0)) @ matrix for own in windows])
    result = teacher(images).flatten(2).transpose(1, 2).numpy()
    assert result.shape == expected.shape and np.abs(result - expected).max() < 1e-3
    assert teacher.label_free and teacher.weights_hash != teacher_of("whitened", (12, 24), patch_size).weights_hash


def test_large_windows_are_shrunk():
    teacher = teacher_of("whitened", (64, 64), 16)
    assert teacher(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 3 * whitened.MAX_SIDE**2, 4, 4)


def test_several_teachers_are_balanced(monkeypatch):
    """Features side by side, each teacher's of total variance 1 over the images it was fitted to."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), dtype=np.uint8))
    together = teacher_of(("hog", "pixels"), (8, 8), 4)
    together.fit(lambda: images.split(7), len(images))
    parts = [teacher_of(name, (8, 8), 4)(images) for name in ("hog", "pixels")]
    totals = [part.movedim(1, -1).flatten(0, 2).double().var(0, correction=0).sum() for part in parts]
    expected = torch.cat([part / total.sqrt() for part, total in zip(parts, totals, strict=True)], 1)
    torch.testing.assert_close(together(images), expected.float(), rtol=1e-4, atol=1e-5)
    assert together.name == "hog + pixels" and together.label_free
    custom = "tests.tokenizers.teachers.test_whitened:brightness"
    monkeypatch.setenv("MAPET_TRUSTED_TEACHERS", custom)
    assert not teacher_of(("hog", custom), (8, 8), 4).label_free
    with refused("hog + pixels", "teacher_layer"):
        teacher_of(("hog", "pixels"), (8, 8), 4, teacher_layer=2)


def brightness(checkpoint):
    return lambda images: torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)


def test_whitening_is_kept_with_the_tokenizer(few_digits, tmp_path):
    """Loaded without the images, it gives the stored tokens; the hash includes the whitening."""
    options = SHAPES | {"teacher": ["hog", "whitened"], "whitened": {"window": 4}}
    fitted = mapet.fit_tokenizer(images=few_digits, out=tmp_path / "t", **options)
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.hash == fitted.hash and tokenizer.description["label_free"] is True
    assert tokenizer.description["teacher"]["teacher"] == ["hog", "whitened"]
    images = list_images(few_digits)
    pixels = torch.stack([images.open(row, 1).read() for row in range(len(images))])
    assert torch.equal(tokenizer(pixels), fitted.cpu()(pixels))
    mapet.tokenize(images=few_digits, tokenizer=tmp_path / "t", out=tmp_path / "tokens")
    stored = all_rows(TokenStore.open(tmp_path / "tokens", images, tokenizer.hash))[:, 0]
    assert (tokenizer(pixels).flatten(1).numpy() == stored).all()
    file = tmp_path / "t/teacher1/whitening.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with refused("hog + whitened", "sha256"):
        load_tokenizer(tmp_path / "t")
    file.write_bytes(content[:-9])
    with refused(str(file)):
        load_tokenizer(tmp_path / "t")


def test_a_run_as_teacher(run_dir, few_digits, tmp_path):
    """Its backbone is kept: the tokenizer moves without the run. Whether the run was label-free is inherited."""
    run = tmp_path / "first"
    run.symlink_to(run_dir)
    options = SHAPES | {"teacher": str(run), "teacher_layer": 0, "precision": "float32"}
    fitted = mapet.fit_tokenizer(images=few_digits, out=tmp_path / "t", **options).cpu()
    run.unlink()
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.description["label_free"] is True
    assert tokenizer.description["teacher_metadata"]["learned_from"]["teacher"]["teacher"] == "pixels"
    pixels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    vit = load_backbone(run_dir).eval()
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed((pixels / 255 - mean) / std)))
        expected = vit.blocks[0](x)[:, 1:]
    torch.testing.assert_close(tokenizer.teacher(pixels).flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(tokenizer(pixels), fitted(pixels))
    second = tmp_path / "second"
    mapet.pretrain(images=few_digits, tokenizer=tmp_path / "t", out=second, **PRETRAIN | {"epochs": 1})
    assert RunState.read(second).results["tokenizer"]["label_free"] is True
    state = json.loads((run_dir / "run.json").read_text())
    assert state["results"]["tokenizer"]["hash"] == tokenizer.description["teacher_metadata"]["learned_from"]["hash"]
    with refused(str(tmp_path), field="teacher"):
        mapet.fit_tokenizer(images=few_digits, out=tmp_path / "u", **SHAPES | {"teacher": str(tmp_path)})
