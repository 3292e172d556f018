"""Controls of probes against their definitions in loops, what is planned for which backbones, and the verdict."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans as SklearnKMeans

import mapet
from mapet.config.base import build_config
from mapet.config.evaluation import EvaluateConfig
from mapet.data.sources import list_images
from mapet.device import ComputeContext
from mapet.evaluation import controls
from mapet.evaluation.controls import HOGFeatures, KMeansPatches, RawPixels, compare_with_controls, plan_controls
from mapet.evaluation.datasets import LabeledSet
from mapet.evaluation.eval_context import ProtocolResult, paired_interval
from mapet.evaluation.features import BackboneWrapper
from mapet.models.pooling import pooled_features
from mapet.run_state import RunState
from mapet.tokenizers.tokenizer import load_tokenizer
from tests.refused import refused

CPU = ComputeContext(torch.device("cpu"), torch.float32)


pytestmark = pytest.mark.usefixtures("one_thread")


def random_images(*shape, seed=0):
    """Pixels k / 255, as controls get them from uint8 images."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape)).float() / 255


def test_raw_pixels_are_shrunk_and_stay_at_any_pooling():
    small, large = random_images(2, 3, 8, 6), random_images(1, 1, 64, 32)
    for pool in ("mean", "2x2"):
        assert torch.equal(pooled_features(RawPixels(), small, pool), small.flatten(1))
    assert RawPixels()(large).shape == (1, 32 * 16, 1, 1)
    assert RawPixels()(torch.full((1, 1, 64, 32), 0.25)).unique().tolist() == pytest.approx([0.25])


def plain_hog(image, cell):
    """MaskFeat's definition, pixel by pixel, of one channel in float64: (rows, columns, 9)."""
    height, width = image.shape
    grid = np.zeros((height // cell, width // cell, 9))
    for y in range(height // cell * cell):
        for x in range(width // cell * cell):
            dx = image[y, min(x + 1, width - 1)] - image[y, max(x - 1, 0)]
            dy = image[min(y + 1, height - 1), x] - image[max(y - 1, 0), x]
            degrees = math.degrees(math.atan2(dy, dx)) % 180
            grid[y // cell, x // cell, int(degrees // 20) % 9] += math.hypot(dx, dy)
    return grid / np.maximum(np.linalg.norm(grid, axis=2, keepdims=True), 1e-12)


@pytest.mark.parametrize(("size", "cell"), [((8, 8), 2), ((34, 40), 8), ((16, 30), 4)])
def test_hog(size, cell):
    images = random_images(2, 2, *size)
    result = HOGFeatures()(images)
    for image, features in zip(images.double().numpy(), result, strict=True):
        expected = np.concatenate([plain_hog(channel, cell) for channel in image], 2).transpose(2, 0, 1)
        assert features.shape == expected.shape and np.abs(features.numpy() - expected).max() < 1e-5


def plain_patches(image, size):
    """All patches of an image of pixels 0..255 in float64, rows of (C, size, size), normalized in brightness and contrast."""
    _, height, width = image.shape
    rows = []
    for y in range(height - size + 1):
        for x in range(width - size + 1):
            patch = image[:, y : y + size, x : x + size].ravel()
            rows.append((patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + 10))
    return np.array(rows)


@pytest.mark.parametrize(("shape", "size"), [((3, 12, 13), 6), ((1, 8, 8), 3)])
def test_kmeans_patches(shape, size, monkeypatch):
    """Whitening is that of the drawn patches, here of all; features are those of the definition with the same centroids."""
    monkeypatch.setattr(controls, "NUM_CENTROIDS", 20)
    images = random_images(30, *shape)
    model = KMeansPatches([images[:10], images[10:]], 10_000)
    patches = [plain_patches(255 * image, size) for image in images.double().numpy()]
    points = np.concatenate(patches)
    mean = points.mean(0)
    values, vectors = np.linalg.eigh(np.cov(points.T))
    whitening = vectors @ np.diag(1 / np.sqrt(values + 0.1)) @ vectors.T
    assert np.abs(model.whitening.numpy() - whitening).max() < 1e-3 * np.abs(whitening).max()
    centroids = model.centroids.double().numpy()
    result = model(images[:2])
    for part, features in zip(patches, result, strict=False):
        z = np.linalg.norm(((part - mean) @ whitening)[:, None] - centroids, axis=2)
        expected = np.maximum(0, z.mean(1, keepdims=True) - z).T.reshape(features.shape)
        assert np.abs(features.numpy() - expected).max() < 2e-2
    # the centroids are as good as another implementation's
    white = (points - mean) @ whitening
    error = (np.linalg.norm(white[:, None] - centroids, axis=2).min(1) ** 2).sum()
    assert error < 1.1 * SklearnKMeans(20, n_init=1, init="random", max_iter=20, random_state=0).fit(white).inertia_


def save_images(folder, count, size=(8, 8)):
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(random_images(count, *size, seed=ord(name))):
            Image.fromarray((255 * image).byte().numpy()).save(folder / name / f"{number}.png")
    return folder


def test_teacher_and_tokens_are_those_of_the_run(run_dir, tokenizer_dir, few_digits):
    """The bag of tokens, pooled, is the histogram of the tokenizer's own ids, and the teacher's features are its own."""
    config = EvaluateConfig(backbone=[str(run_dir)], images=few_digits, controls=("teacher", "tokens"))
    backbone = BackboneWrapper.load(str(run_dir), CPU)
    train = LabeledSet.without_labels(list_images(few_digits))
    loaders = plan_controls(config, ["knn"], train, [backbone, backbone])
    assert list(loaders) == [f"teacher of {run_dir}", f"tokens of {run_dir}"]
    tokenizer = load_tokenizer(tokenizer_dir)
    pixels = torch.stack([train.images.open(row, 1).read() for row in range(4)])
    teacher, tokens = (load() for load in loaders.values())
    assert teacher.image_size == tuple(tokenizer.teacher.image_size)
    assert torch.equal(teacher.last_layer(pixels), tokenizer.teacher(pixels))
    counts = torch.stack([torch.bincount(ids.flatten(), minlength=tokenizer.vocab_size) for ids in tokenizer(pixels)])
    result = tokens.pooled_features(pixels, [-1], "mean")[0]
    torch.testing.assert_close(result, counts / math.prod(tokenizer.grid))


def test_what_is_planned(run_dir, few_digits, caplog):
    """Untrained networks once per architecture; no control without its protocol; named controls must exist."""
    train = LabeledSet.without_labels(list_images(few_digits))
    backbones = [BackboneWrapper.load(source, CPU) for source in (str(run_dir), str(run_dir / "backbone"))]

    def plan(protocols=("logistic",), backbones=backbones, **options):
        names = [backbone.name for backbone in backbones]
        config = EvaluateConfig(backbone=names, images=few_digits, **options)
        return list(plan_controls(config, protocols, train, backbones))

    image_controls = ["k-means patch features", "HOG features", "raw pixels"]
    assert plan() == [*image_controls, f"random:{run_dir}", f"teacher of {run_dir}", f"tokens of {run_dir}"]
    assert plan(controls="none") == plan(("feature-rank",)) == []
    assert plan(("few-shot",)) == plan(("linear-sgd",)) == plan()
    assert plan(("attentive",)) == [f"random:{run_dir}"]  # the others have no patch tokens
    assert plan(controls=("untrained", "hog")) == ["HOG features", f"random:{run_dir}"]
    untrained = BackboneWrapper.load(f"random:{run_dir}", CPU)
    assert plan(backbones=[untrained, *backbones], controls="untrained") == []
    assert plan(backbones=[*backbones, untrained], controls="untrained") == []
    with refused(field="controls", value=("hog",)):
        plan(("attentive",), controls="hog")
    with refused("tokens", field="controls", value=("tokens",)):
        plan(backbones=[untrained], controls="tokens")
    with refused("none", "hog"):
        build_config(EvaluateConfig, {"backbone": "a", "images": "b", "controls": ["none", "hog"]})


def test_paired_interval_is_bonett_and_prices():
    """Of 100 images 8 are classified by the first alone, 3 by the second alone: the formula, by hand."""
    differences = np.array([1.0] * 8 + [-1.0] * 3 + [0.0] * 89)
    p12, p21 = 9 / 102, 4 / 102
    margin = 1.959964 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert paired_interval(differences) == pytest.approx((p12 - p21 - margin, p12 - p21 + margin), rel=1e-6)
    low, high = paired_interval(np.zeros(100))
    assert low < 0 < high


@pytest.mark.parametrize("balanced", [False, True])
def test_paired_interval_covers(balanced):
    """95 % of intervals of simulated pairs hold the true difference, of the balanced accuracy that of two classes of unequal size."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        labels = (np.arange(300) < 60).astype(int)
        gains = np.where(labels == 1, 0.3, 0.1) if balanced else np.full(300, 0.2)
        uniform = rng.random(300)
        differences = (uniform < gains).astype(float) - (uniform > 0.9)
        low, high = paired_interval(differences, labels if balanced else None)
        hits += low <= 0.1 <= high
    assert 0.9 < hits / 200 < 0.99


def results_of(labels=None, **counts):
    """Results of backbones and controls by a single protocol, from the number of the 100 images that each classifies correctly."""
    labels = torch.arange(100) % 2 if labels is None else labels
    return {
        name: {"knn": ProtocolResult(correct={"knn": (torch.arange(100) < count, labels)})}
        for name, count in counts.items()
    }


def test_verdict():
    config = EvaluateConfig(backbone=["a", "b", "random:a"], images="x")
    results = results_of(a=90, b=72, hog=70, pixels=20) | {"random:a": results_of(x=40)["x"]}
    ahead, not_ahead = compare_with_controls(results, config)
    assert (ahead.backbone, ahead.control, ahead.is_ahead) == ("a", "hog", True)
    assert (not_ahead.backbone, not_ahead.control, not_ahead.is_ahead) == ("b", "hog", False)
    assert not_ahead.difference == pytest.approx(0.02) and not_ahead.ci_low < 0 < not_ahead.ci_high
    assert "b is not clearly ahead of the best control by knn, hog: 0.720 against 0.700" in str(not_ahead)
    assert compare_with_controls(results_of(a=90), config) == []


def test_verdict_on_imbalanced_images_is_of_the_balanced_accuracy():
    """Of the first 80 images, of one class, a misses none and the control none; of the 20 of the other class it has 10 against 0."""
    config = EvaluateConfig(backbone=["a"], images="x")
    [verdict] = compare_with_controls(results_of((torch.arange(100) >= 80).long(), a=90, hog=80), config)
    assert (verdict.metric, verdict.value, verdict.control_value) == ("knn_balanced_accuracy", 0.75, 0.5)
    assert verdict.difference == 0.25 and 0 < verdict.ci_low < 0.25 < verdict.ci_high and verdict.is_ahead


def test_controls_are_in_table_and_run_json(run_dir, tmp_path, caplog):
    """The verdict agrees with the numbers of run.json."""
    caplog.set_level(logging.INFO, "mapet")
    images, test_images = save_images(tmp_path / "train", 12), save_images(tmp_path / "test", 10)
    out = tmp_path / "out"
    result = mapet.evaluate(
        backbone=str(run_dir), images=images, test_images=test_images, out=out, device="cpu", protocols=["knn", "feature-rank"],
    )  # fmt: skip
    names = [
        "k-means patch features",
        "HOG features",
        "raw pixels",
        f"random:{run_dir}",
        f"teacher of {run_dir}",
        f"tokens of {run_dir}",
    ]
    assert list(result) == [str(run_dir), *names]
    assert set(result["raw pixels"]) == {"knn"} and "rankme" in result[str(run_dir)]
    results = RunState.read(out).results
    assert list(results["controls"]) == names and list(results["backbones"]) == [str(run_dir)]
    [verdict] = results["verdicts"]
    best = max(names, key=lambda name: result[name]["knn"])
    assert verdict["control_value"] == result[best]["knn"] and verdict["value"] == result[str(run_dir)]["knn"]
    assert verdict["difference"] == pytest.approx(verdict["value"] - verdict["control_value"])
    page = (out / "evaluation.md").read_text()
    assert "| raw pixels (control) |" in page and f"random:{run_dir} (control)" in page.replace("\\", "")
    assert "ahead of the best control by knn" in page and "ahead of the best control by knn" in caplog.text
    assert (
        json.loads((out / "run.json").read_text())["results"]["controls"]["raw pixels"]["knn"]["metrics"]["knn"][
            "ci_low"
        ]
        is not None
    )


def test_the_untrained_network_has_the_layers_and_the_pooling_of_the_backbone(run_dir, tmp_path):
    images, test_images = save_images(tmp_path / "train", 12), save_images(tmp_path / "test", 10)
    options = {
        "images": images,
        "test_images": test_images,
        "device": "cpu",
        "protocols": ["knn"],
        "pool": "cls",
        "layers": (0, -1),
    }
    untrained = f"random:{run_dir}"
    result = mapet.evaluate(backbone=str(run_dir), controls=["untrained"], **options)
    named = mapet.evaluate(backbone=[str(run_dir), untrained], controls=["none"], out=tmp_path / "out", **options)
    assert result == named
