"""Protocols on features that are colors, of images of one color each: the results are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from mapet.config.evaluation import EvaluateConfig
from mapet.data.sources import list_images
from mapet.device import ComputeContext
from mapet.evaluation import logistic_regression, probes, protocols
from mapet.evaluation.datasets import LabeledSet, few_shot_split
from mapet.evaluation.eval_context import EvalContext, EvalData
from mapet.evaluation.features import BackboneWrapper, CacheConfig
from mapet.evaluation.protocols import PROTOCOLS

CPU = ComputeContext(torch.device("cpu"), torch.float32)
COLORS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
LABELS = ("logistic", "knn", "linear-sgd", "attentive", "few-shot")
QUICK = {"linear_epochs": 30, "num_seeds": 2, "few_shot": (1, 0.25)}


pytestmark = pytest.mark.usefixtures("one_thread")


class Colors(nn.Module):
    """Two layers: the brightness, equal in all classes, and the color of each cell of 4 px. At sizes other than 8 px colors rotate."""

    def __init__(self):
        super().__init__()
        self.feature_info = [{}, {}]
        self.patch_embed = SimpleNamespace(patch_size=(4, 4))
        self.turned = 0

    def set_input_size(self, img_size):
        self.turned = int(img_size != (8, 8))

    def forward_intermediates(self, images, indices, norm, intermediates_only):
        cells = F.avg_pool2d(images, 4).roll(self.turned, 1)
        layers = [cells.mean(1, keepdim=True).expand_as(cells), cells]
        return [layers[i] for i in indices]

    def forward(self, images):
        return images


def save(folder, colors, count, seed=0, spread=15):
    """`count` images of each class, 8 x 8 px, each of one color near the class's."""
    rng = np.random.default_rng(seed)
    for name, color in colors.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixel = np.clip(np.array(color) + rng.integers(-spread, spread + 1, 3), 0, 255).astype(np.uint8)
            Image.fromarray(np.tile(pixel, (8, 8, 1))).save(folder / name / f"{seed}-{number:03d}.png")
    return folder


def colors_of(data):
    """(n, 3) in [0, 1], read by other means."""
    return np.stack([np.asarray(Image.open(path))[0, 0] / 255 for path in data.images])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """12 training and 6 test images of each color."""
    root = tmp_path_factory.mktemp("colors")
    return EvalData(
        *(
            LabeledSet.from_images(list_images(save(root / part, COLORS, n, seed)))
            for seed, (part, n) in enumerate(PARTS.items())
        )
    )


PARTS = {"train": 12, "test": 6}


def context_of(sets, folder, **options):
    encoder = BackboneWrapper("colors", Colors(), CPU, (8, 8), 3, (0.0,) * 3, (1.0,) * 3)
    config = EvaluateConfig(backbone=["colors"], images=folder, out=folder, **(QUICK | options))
    return EvalContext(encoder, sets, CacheConfig(1 << 24, folder, 8), config)


def values(outcome):
    return {name: figure.value for name, figure in outcome.metrics.items()}


@pytest.mark.parametrize("name", LABELS)
def test_separable_classes_are_separated(name, sets, tmp_path):
    """Test labels shifted by one class give 0."""
    result = values(PROTOCOLS[name].run(context_of(sets, tmp_path)))
    assert result and set(result.values()) == {1.0}, result
    wrong = LabeledSet(sets.test.images, sets.test.classes, (sets.test.labels + 1) % 3)
    result = values(PROTOCOLS[name].run(context_of(EvalData(sets.train, wrong), tmp_path)))
    assert result and set(result.values()) == {0.0}, result


def test_clusters_are_the_classes_whatever_they_are_called(sets, tmp_path):
    expected = {"cluster_accuracy": 1.0, "cluster_nmi": 1.0, "cluster_ari": 1.0}
    turned = LabeledSet(sets.test.images, sets.test.classes, (sets.test.labels + 1) % 3)
    for test in (sets.test, turned):
        assert values(PROTOCOLS["cluster"].run(context_of(EvalData(sets.train, test), tmp_path))) == pytest.approx(
            expected
        )
    mixed = LabeledSet(sets.test.images, sets.test.classes, np.arange(18) % 3)
    result = values(PROTOCOLS["cluster"].run(context_of(EvalData(sets.train, mixed), tmp_path)))
    assert result["cluster_accuracy"] == pytest.approx(1 / 3) and result["cluster_nmi"] == pytest.approx(0, abs=1e-6)


def test_views_of_one_image_are_alike(sets, tmp_path):
    """Random crops of one color have that color: the alignment is 0 up to float16."""
    result = values(PROTOCOLS["feature-rank"].run(context_of(sets, tmp_path)))
    assert result["alignment"] < 1e-5 and result["dimensions"] == 3 and 1 < result["rankme"] < 3
    cosines = F.normalize(torch.from_numpy(colors_of(sets.train)), dim=1)
    others = ~torch.eye(36, dtype=torch.bool)
    assert result["mean_cosine"] == pytest.approx(float((cosines @ cosines.T)[others].mean()), abs=1e-3)


def test_neighbors_are_the_nearest_colors(sets, tmp_path):
    details = PROTOCOLS["nearest-neighbors"].run(context_of(sets, tmp_path)).details
    scaler = StandardScaler().fit(colors_of(sets.train))
    scaled = (scaler.transform(colors_of(part)) for part in (sets.train, sets.test))
    train, test = (F.normalize(torch.from_numpy(part).float(), dim=1) for part in scaled)
    assert len(set(details["queries"])) == 10
    for query, nearest, similarity in zip(*(details[k] for k in ("queries", "nearest", "similarity")), strict=True):
        expected = (train @ test[query]).topk(8).values.tolist()
        assert similarity == pytest.approx(expected, abs=1e-3)
        assert (train[nearest] @ test[query]).tolist() == pytest.approx(expected, abs=1e-3)


def test_few_labels_are_a_logistic_regression_on_all_images_scale(tmp_path):
    """C = 0.1 below 20 images a class; standardized by all training images, of which only the split's labels are read."""
    close = {"a": (150, 110, 110), "b": (110, 150, 110), "c": (110, 110, 150)}
    parts = [
        LabeledSet.from_images(list_images(save(tmp_path / part, close, 40, seed, spread=60)))
        for seed, part in enumerate(PARTS)
    ]
    result = PROTOCOLS["few-shot"].run(context_of(EvalData(*parts), tmp_path, few_shot=(2,), num_seeds=5))
    train, test = map(colors_of, parts)
    mean, deviation = train.mean(0), train.std(0)
    scores = []
    for seed in range(5):
        rows = few_shot_split(parts[0], 2, seed)
        model = LogisticRegression(C=0.1, max_iter=300).fit((train[rows] - mean) / deviation, parts[0].labels[rows])
        scores.append((model.predict((test - mean) / deviation) == parts[1].labels).mean())
    assert result.details["few_shot_2"] == pytest.approx(scores, abs=0.009)  # one image, for float16
    assert 0.4 < np.mean(scores) < 0.95 and result.metrics["few_shot_2"].value == pytest.approx(
        np.mean(result.details["few_shot_2"])
    )


def test_another_folder_is_evaluated_on_shared_classes(sets, tmp_path):
    """Its blues and greens score highest as red, a class that it lacks: among blue and green they are correct."""
    reddish = {"blue": (150, 10, 110), "green": (150, 110, 10), "violet": (150, 10, 150)}
    other = LabeledSet.from_images(list_images(save(tmp_path / "other", reddish, 5, spread=5)))
    outcome = PROTOCOLS["ood"].run(context_of(EvalData(sets.train, sets.test, {"dusk": other}), tmp_path))
    assert values(outcome) == {"ood_dusk_logistic": 1.0, "ood_dusk_knn": 1.0}
    assert outcome.details["dusk"] == {"classes": 2, "images": 10}
    assert set(map(tuple, outcome.per_class["ood_dusk_logistic"].items())) == {
        ("blue", (5, 5)),
        ("green", (5, 5)),
        ("red", (0, 0)),
    }
    reds = LabeledSet.from_images(
        list_images(save(tmp_path / "reds", {"red": (150, 110, 10), "x": (0, 0, 0)}, 5, spread=5))
    )
    assert (
        values(PROTOCOLS["ood"].run(context_of(EvalData(sets.train, sets.test, {"one": reds}), tmp_path)))[
            "ood_one_logistic"
        ]
        == 1
    )


def test_other_sizes_are_seen_by_the_network_of_that_size(sets, tmp_path):
    """At 12 px all colors are one class further, so accuracy is 0; the network itself is unchanged."""
    context = context_of(sets, tmp_path, eval_image_sizes=[12, 8])
    assert values(PROTOCOLS["resolution"].run(context)) == {"resolution_12": 0.0, "resolution_8": 1.0}
    assert context.backbone.image_size == (8, 8) and context.backbone.model.turned == 0
    assert list(values(PROTOCOLS["resolution"].run(context_of(sets, tmp_path)))) == [
        f"resolution_{n}" for n in (4, 8, 12, 16)
    ]


def test_corrupted_images_are_those_evaluated(tmp_path, monkeypatch):
    """Three grays, 70 apart: brightness adds 0.05 of white at severity 1, which changes no class, and 0.3 at 5, which makes
    each the next one."""
    grays = {"dark": (40,) * 3, "medium": (110,) * 3, "light": (180,) * 3}
    parts = [
        LabeledSet.from_images(list_images(save(tmp_path / part, grays, n, seed, spread=5)))
        for seed, (part, n) in enumerate(PARTS.items())
    ]
    monkeypatch.setattr(protocols, "CORRUPTIONS", {"brightness": protocols.CORRUPTIONS["brightness"]})
    monkeypatch.setattr(protocols, "SEVERITIES", (1, 5))
    monkeypatch.setattr(logistic_regression, "C_CANDIDATES", (1e3,))  # boundaries in the middle between grays
    context = context_of(EvalData(*parts), tmp_path)
    outcome = PROTOCOLS["corruptions"].run(context)
    assert outcome.details["errors"] == {"brightness": pytest.approx([0, 2 / 3])}
    assert values(outcome) == pytest.approx({"corruption_clean": 1.0, "corruption_mean": 2 / 3})


def test_attentive_probe_s_learning_rates_fall_as_a_cosine(sets, tmp_path, monkeypatch):
    """Three side by side, then the best again: 2 passes of 5 batches each."""
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *rest):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(probes, "ATTENTIVE_EPOCHS", 2)
    PROTOCOLS["attentive"].run(context_of(sets, tmp_path))
    shares = [0.5 * (1 + np.cos(np.pi * t / 10)) for t in range(10)]
    assert rates[:10] == [pytest.approx([3e-4 * share, 1e-3 * share, 3e-3 * share]) for share in shares]
    assert [len(each) for each in rates[10:]] == [1] * 10
    assert [each[0] / rates[10][0] for each in rates[10:]] == pytest.approx(shares)
