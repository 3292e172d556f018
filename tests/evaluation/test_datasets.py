"""Classifiers and labeled sets."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mapet.data.sources import list_images
from mapet.evaluation.datasets import LabeledSet, few_shot_split, load_train_test, split_train_test
from mapet.evaluation.features import FeatureCache
from mapet.evaluation.logistic_regression import fit_logistic
from mapet.evaluation.probes import probe_accuracy
from mapet.tokenizers.feature_store import FeatureStore
from tests.refused import refused


def two_clouds(distance, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(400) % 2
    features = torch.randn(400, 6, generator=generator) + distance * labels[:, None]
    return features[:300], labels[:300], features[300:], labels[300:]


def accuracy(train, train_labels, test, test_labels):
    parts = ((train, train_labels), (test, test_labels))
    columns = {"0": slice(0, train.shape[1])}
    return probe_accuracy(
        *(FeatureCache(FeatureStore.from_tensor(x), torch.arange(len(x)), y, columns) for x, y in parts)
    )


def test_knn_equals_scikit_learn_with_the_same_weights():
    data = two_clouds(1.0)
    neighbors = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine")
    reference = make_pipeline(StandardScaler(), neighbors).fit(data[0].double().numpy(), data[1])
    assert accuracy(*data)["knn"] == pytest.approx(reference.score(data[2].double().numpy(), data[3]))


def test_linear_probe_is_perfect_on_separable_and_chance_on_noise():
    assert accuracy(*two_clouds(8.0))["logistic"] == 1.0
    assert 0.3 < accuracy(*two_clouds(0.0))["logistic"] < 0.7


@pytest.mark.parametrize("present", [[0, 1, 2, 3], [1, 3], [2]])
def test_linear_probe_is_scikit_learns_logistic_regression(present):
    """Of classes without training images the logit is -inf; of one class alone nothing is fitted."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(present)[torch.arange(120) % len(present)]
    features = 3 * torch.randn(120, 5, generator=generator) + labels[:, None] + 7
    result = fit_logistic(features, labels, 4, C=0.5)(features).softmax(1)
    assert result.argmax(1).unique().tolist() == present and set(range(4)) - set(present) == set(
        np.flatnonzero(result.sum(0) == 0)
    )
    if len(present) > 1:
        scaled = StandardScaler().fit_transform(features)
        model = LogisticRegression(C=0.5, max_iter=300).fit(scaled, labels)
        np.testing.assert_allclose(result[:, present], model.predict_proba(scaled), atol=2e-3)


def test_split_is_fixed_and_stratified(digits):
    data = LabeledSet.from_images(list_images(digits / "train"))
    train, test = split_train_test(data)
    assert len(train.labels) + len(test.labels) == 1437
    assert np.abs(np.bincount(test.labels) / np.bincount(data.labels) - 0.2).max() < 0.01
    assert not {train.images.id(i) for i in range(50)} & {test.images.id(i) for i in range(len(test.labels))}
    assert split_train_test(data)[1].images.hash == test.images.hash


def test_few_labels(digits):
    data = LabeledSet.from_images(list_images(digits / "train"))
    ten, other = (few_shot_split(data, 10, seed) for seed in (0, 1))
    assert np.bincount(data.subset(ten).labels).tolist() == [10] * 10
    assert ten.tolist() != other.tolist()
    assert len(few_shot_split(data, 0.01, 0)) == 10 * 1  # at least one of each class
    with refused("1,000"):
        few_shot_split(data, 1000, 0)


def test_different_classes_are_named(digits, tmp_path, crops):
    (tmp_path / "other" / "a").mkdir(parents=True)
    (tmp_path / "other" / "b").mkdir()
    crops.rename(tmp_path / "other" / "a" / "x")
    (tmp_path / "other" / "b" / "y.png").write_bytes(next((tmp_path / "other").rglob("*.png")).read_bytes())
    with refused("0, 1"):
        load_train_test(digits / "train", tmp_path / "other")
