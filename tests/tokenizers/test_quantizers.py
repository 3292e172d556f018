"""How features become tokens: centroids behind a projection, rounded components, logits; the same in any batch."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

import mapet
from mapet.tokenizers.feature_store import FeatureStore
from mapet.tokenizers.fitting import fit_fsq
from mapet.tokenizers.quantizers import LEVELS, Quantizer, levels_for, principal_components, project
from mapet.tokenizers.teachers.timm_model import TAKES_IMAGE_SIZE
from mapet.tokenizers.tokenizer import load_tokenizer
from tests.conftest import all_rows
from tests.refused import refused


def cloud(count=600, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixing + 5


@pytest.mark.parametrize("whiten", [False, True])
def test_principal_components_are_those_of_numpy(whiten):
    points = cloud()
    result = principal_components(FeatureStore.from_tensor(points), 4, whiten)
    stored = points.half().double().numpy()
    centered = stored - stored.mean(0)
    _, spread, directions = np.linalg.svd(centered, full_matrices=False)
    expected = centered @ directions[:4].T / (spread[:4] / len(points) ** 0.5 if whiten else 1)
    got = project(points.half().float(), **result).double().numpy()
    assert np.allclose(np.abs(got), np.abs(expected), atol=0.02 if whiten else 0.1)  # features are kept as float16
    signs = result["components"].gather(0, result["components"].abs().argmax(0, keepdim=True))
    assert (signs > 0).all()


def test_too_many_components_are_refused():
    with refused(13, 12):
        principal_components(FeatureStore.from_tensor(cloud()), 13, whiten=False)


def test_features_that_are_all_the_same_cannot_be_scaled():
    """As for black images: FSQ and LFQ divide by the standard deviation, which is zero."""
    for points in (torch.zeros(50, 6), torch.full((50, 6), 0.1)):
        with refused("same", 50):
            fit_fsq(FeatureStore.from_tensor(points), (2, 2))


@pytest.mark.parametrize("levels", [(8, 8), (2,) * 6, (3, 5, 2)])
def test_scalar_tokens_are_levels_of_a_normal_distribution(levels):
    points = cloud()
    fitted = fit_fsq(FeatureStore.from_tensor(points), levels)
    quantizer = fitted.quantizer
    ids = quantizer(points)
    coordinates = project(points, quantizer.mean, quantizer.components).double().numpy()
    for row, token in zip(coordinates, ids.tolist(), strict=True):
        digits = [min(int(norm.cdf(value) * count), count - 1) for value, count in zip(row, levels, strict=True)]
        expected = 0
        for digit, count in zip(digits, levels, strict=True):
            expected = expected * count + digit
        assert token == expected
    assert fitted.usage.sum() == len(points) and len(fitted.usage) == np.prod(levels) == quantizer.vocab_size
    if set(levels) == {2}:
        assert torch.equal(ids, torch.from_numpy((coordinates >= 0) @ (2 ** np.arange(len(levels))[::-1])))
    share = fitted.usage.double() / len(points)
    assert (-(share[share > 0] * share[share > 0].log()).sum()).exp() > 0.6 * len(
        share
    )  # normal features fill the levels


@pytest.mark.parametrize("kind", ["nearest l2", "nearest cosine", "projected", "projected cosine", "scalar", "argmax"])
@settings(deadline=None, max_examples=10)
@given(batch=st.integers(1, 60))
def test_a_token_does_not_depend_on_the_batch(kind, batch):
    points = cloud(200)
    projection = principal_components(FeatureStore.from_tensor(points), 3, whiten=False)
    if kind == "argmax":
        quantizer = Quantizer({"kind": "argmax", "vocab_size": 12}, {})
    elif kind == "scalar":
        quantizer = Quantizer({"kind": "scalar", "levels": [4, 4, 2]}, projection)
    else:
        used = projection if "projected" in kind else {}
        centroids = (project(points, **used) if used else points)[::10]
        metric = "cosine" if "cosine" in kind else "l2"
        centroids = torch.nn.functional.normalize(centroids, dim=1) if metric == "cosine" else centroids
        quantizer = Quantizer({"kind": "nearest", "metric": metric}, {"centroids": centroids, **used})
    whole = quantizer(points)
    assert torch.equal(torch.cat([quantizer(part) for part in points.split(batch)]), whole)


def test_nearest_by_cosine():
    points, centroids = cloud(100), torch.nn.functional.normalize(cloud(9, seed=1), dim=1)
    ids = Quantizer({"kind": "nearest", "metric": "cosine"}, {"centroids": centroids})(points)
    expected = (torch.nn.functional.normalize(points.double(), dim=1) @ centroids.double().T).argmax(1)
    assert torch.equal(ids, expected)


def test_levels_make_the_codes_they_promise():
    assert all(np.prod(levels) == number for number, levels in LEVELS.items())
    assert levels_for(8192, signs=True) == (2,) * 13 and levels_for(512, signs=False) == (8, 8, 8)
    assert np.prod(levels_for(700, signs=False)) == 512
    with refused("vocab_size", 100):
        levels_for(100, signs=True)
    with refused(64):
        levels_for(10, signs=False)


@pytest.mark.parametrize(
    ("options", "num_codes"),
    [
        ({"quantizer": "fsq", "vocab_size": 64}, 64),
        ({"quantizer": "fsq", "fsq_levels": [3, 4]}, 12),
        ({"quantizer": "lfq", "vocab_size": 16}, 16),
        ({"pca_dim": 2, "vocab_size": 16}, 16),
    ],
    ids=str,
)
def test_stored_and_online_tokens_are_the_same(options, num_codes, few_digits, tmp_path):
    """Fitted, saved, loaded, stored; and again from the images."""
    common = {"images": few_digits}
    mapet.fit_tokenizer(out=tmp_path / "t", image_size=8, patch_size=2, channels=1, **common, **options)
    store = mapet.tokenize(tokenizer=tmp_path / "t", out=tmp_path / "s", **common)
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.vocab_size == num_codes == store.vocab_size
    settings = tokenizer.description["quantizer"]
    assert settings["kind"] == ("nearest" if "pca_dim" in options else "scalar")
    from mapet.data.dataset import ViewDataset
    from mapet.data.sources import list_images

    dataset = ViewDataset(list_images(few_digits), store.view_spec, 1, teacher_size=(8, 8))
    batch = dataset.batch([(0, i) for i in range(7)])
    assert np.array_equal(tokenizer(batch.teacher_images).flatten(1).numpy(), all_rows(store)[:7, 0])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fsq_levels": [4, 4]}, ["fsq_levels", "fsq", "kmeans"]),
        ({"quantizer": "lfq", "pca_dim": 3}, ["pca_dim", "kmeans", "lfq"]),
        ({"quantizer": "fsq", "kmeans_metric": "cosine"}, ["kmeans_metric", "kmeans", "fsq"]),
        ({"quantizer": "lfq", "kmeans_n_init": 5}, ["kmeans_n_init", "lfq"]),
        ({"quantizer": "lfq", "kmeans_batch_size": 100}, ["kmeans_batch_size", "lfq"]),
        ({"teacher_image_size": 16}, ["'pixels'", "teacher_image_size"]),
        ({"teacher_layer": 3}, ["'pixels'", "teacher_layer"]),
        ({"teacher": "vqkd", "teacher_checkpoint": "x", "teacher_image_size": 64}, ["'vqkd'", "teacher_image_size"]),
        ({"teacher": "dalle", "teacher_checkpoint": "x", "teacher_output": "norm"}, ["'dalle'", "teacher_output"]),
        ({"teacher": "my:code", "teacher_layer": 2}, ["'my:code'", "teacher_layer"]),
        ({"teacher_checkpoint": "x"}, ["'pixels'", "teacher_checkpoint"]),
        ({"quantizer": "lfq", "vocab_size": 12}, ["'lfq'", "vocab_size", 12]),
        ({"quantizer": "fsq", "fsq_levels": [2] * 5}, ["width 4", "5 components", "fsq_levels"]),
        ({"pca_dim": 5}, ["width 4", "5 components", "pca_dim"]),
    ],
    ids=str,
)
def test_impossible_options(options, named, few_digits, tmp_path):
    with refused(*named):
        mapet.fit_tokenizer(images=few_digits, out=tmp_path / "t", image_size=8, patch_size=2, channels=1, **options)
    assert not (tmp_path / "t").exists()


def test_teachers_of_the_docs_have_the_grid_and_features_they_promise():
    """On the meta device: shapes alone."""
    text = (Path(__file__).parents[2] / "docs" / "tokenizers.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)`.* \| (\d+) \| (\d+) \|$", text, flags=re.M)
    assert len(rows) >= 8
    for name, size, features in rows:
        size = int(size)
        other = name.startswith(TAKES_IMAGE_SIZE) and timm.models.get_pretrained_cfg(name).input_size[-1] != size
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **({"img_size": (size, size)} if other else {})).eval()
            image = torch.empty(1, 3, size, size)
        last = [len(model.feature_info) - 1]
        (result,) = model.forward_intermediates(image, indices=last, intermediates_only=True, output_fmt="NCHW")
        assert result.shape == (1, int(features), 14, 14), name
