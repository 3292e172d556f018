"""Classifiers and labelled sets."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mapet.data.sources import scan
from mapet.errors import MapetError
from mapet.evaluation.classifiers import knn_accuracy, linear_accuracy
from mapet.evaluation.features import labelled, split, train_and_test
from mapet.evaluation.splits import few_labels


def two_clouds(distance, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(400) % 2
    features = torch.randn(400, 6, generator=generator) + distance * labels[:, None]
    return features[:300], labels[:300], features[300:], labels[300:]


def test_knn_equals_scikit_learn_with_the_same_weights():
    data = two_clouds(1.0)
    unit = [torch.nn.functional.normalize(x, dim=1).double().numpy() for x in (data[0], data[2])]
    reference = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine").fit(
        unit[0], data[1]
    )
    assert knn_accuracy(*data) == pytest.approx(reference.score(unit[1], data[3]))


def test_linear_probe_is_perfect_on_separable_and_chance_on_noise():
    assert linear_accuracy(*two_clouds(8.0)) == 1.0
    assert 0.3 < linear_accuracy(*two_clouds(0.0)) < 0.7


def test_split_is_fixed_and_stratified(digits):
    data = labelled(scan(digits / "train"))
    train, test = split(data)
    assert len(train.labels) + len(test.labels) == 1437
    assert np.abs(np.bincount(test.labels) / np.bincount(data.labels) - 0.2).max() < 0.01
    assert not {train.images.id(i) for i in range(50)} & {test.images.id(i) for i in range(len(test.labels))}
    assert split(data)[1].images.hash == test.images.hash


def test_few_labels(digits):
    data = labelled(scan(digits / "train"))
    ten, other = (few_labels(data, 10, seed) for seed in (0, 1))
    assert np.bincount(data.subset(ten).labels).tolist() == [10] * 10
    assert ten.tolist() != other.tolist()
    assert len(few_labels(data, 0.01, 0)) == 10 * 1  # at least one of each class
    with pytest.raises(MapetError, match="fewer than the 1,000 asked for"):
        few_labels(data, 1000, 0)


def test_different_classes_are_named(digits, tmp_path, crops):
    (tmp_path / "other" / "a").mkdir(parents=True)
    (tmp_path / "other" / "b").mkdir()
    crops.rename(tmp_path / "other" / "a" / "x")
    (tmp_path / "other" / "b" / "y.png").write_bytes(next((tmp_path / "other").rglob("*.png")).read_bytes())
    with pytest.raises(MapetError, match="different classes: 0, 1"):
        train_and_test(digits / "train", tmp_path / "other")
