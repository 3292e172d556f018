"""Probes, splits, intervals and diagnostics against numbers worked out by hand or by other means."""

import hashlib
from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from mapet.data.image_list import ImageFiles
from mapet.data.sources import list_images
from mapet.data.views import normalize
from mapet.device import ComputeContext
from mapet.evaluation.datasets import LabeledSet, few_shot_split
from mapet.evaluation.eval_context import bootstrap_ci, mean_over_seeds, wilson_interval
from mapet.evaluation.features import BackboneWrapper, CacheConfig, FeatureCache
from mapet.evaluation.probes import (
    SGD_LEARNING_RATES,
    AttentivePool,
    choose_rate,
    fit_linear_sgd,
    hold_out,
    nearest_neighbors,
)
from mapet.evaluation.protocols import (
    average_precisions,
    cluster_features,
    clustering_scores,
    entropy_rank,
    feature_stats,
    measure_alignment,
)
from mapet.models.backbone import create_vit, save_backbone
from mapet.tokenizers.feature_store import FeatureStore
from tests.conftest import TINY

CPU = ComputeContext(torch.device("cpu"), torch.float32)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_wilson_interval_of_published_numbers():
    """Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_interval_over_seeds_is_students():
    figure = mean_over_seeds([0.1, 0.2, 0.3])
    assert (figure.value, figure.ci_high) == pytest.approx((0.2, 0.2 + 4.302653 * 0.1 / 3**0.5))
    assert mean_over_seeds([0.1]).ci_low is None


def test_intervals_of_shares_are_shares():
    assert mean_over_seeds([0.0, 0.5, 0.2])[1:3] == (0.0, pytest.approx(0.2333 + 0.6252, abs=1e-3))
    assert mean_over_seeds([1.0, 0.9])[1:3] == (pytest.approx(0.95 - 0.6353, abs=1e-3), 1.0)
    assert mean_over_seeds([-0.1, 0.1], minimum=-0.5).ci_low == -0.5  # the adjusted Rand index can be below 0


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    figure = bootstrap_ci(lambda w: float((w * values).sum() / w.sum()), 400, draws=1000)
    assert figure.value == pytest.approx(values.mean())
    assert figure.ci_high - figure.ci_low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.12)


def test_few_label_splits_are_the_documented_function():
    """Written out as docs/evaluation.md says it; nested; another image moves none."""
    ids = [f"{c}/{i:02d}.jpg" for c in "ab" for i in range(20)]

    def labeled_set(names: list[str]) -> LabeledSet:
        return LabeledSet.from_images(ImageFiles(Path("x"), [n.encode() for n in names], [0] * len(names)))

    def number(name: str, seed: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")

    for seed in (0, 7):
        for amount, count in ((0.1, 2), (3, 3), (0.001, 1)):
            expected = {
                n for c in "ab" for n in sorted((n for n in ids if n[0] == c), key=lambda n: number(n, seed))[:count]
            }
            assert {ids[i] for i in few_shot_split(labeled_set(ids), amount, seed)} == expected
    assert set(few_shot_split(labeled_set(ids), 3, 0)) < set(few_shot_split(labeled_set(ids), 0.5, 0))
    more = [*ids, "b/99.jpg"]
    before, after = (
        {n for n in names if n != "b/99.jpg"}
        for names in (
            [ids[i] for i in few_shot_split(labeled_set(ids), 5, 0)],
            [more[i] for i in few_shot_split(labeled_set(more), 6, 0)],
        )
    )
    assert before < after


def test_neighbors_over_blocks_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    bank, queries = (
        4 * torch.rand(8, generator=generator) * torch.randn(n, 8, generator=generator) + 5 for n in (500, 30)
    )
    scaler = StandardScaler().fit(bank.numpy())
    similarity, rows = nearest_neighbors(((s, bank[s : s + 7]) for s in range(0, 500, 7)), queries, 20, scaler)
    result = NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute").fit(scaler.transform(bank.numpy()))
    distances, expected = result.kneighbors(scaler.transform(queries.numpy()))
    assert np.array_equal(rows, expected)
    assert similarity.numpy() == pytest.approx(1 - distances, abs=1e-5)


def cache_of(features, labels, columns, memory=1 << 30, scratch=Path()):
    store = FeatureStore(len(features), memory, scratch)
    store.append(features)
    return FeatureCache(store, torch.arange(len(features)), labels, columns)


def test_linear_probe_finds_the_layer_that_knows():
    """Of three layers one separates the classes: it is chosen, with and without batch norm, whatever its scale."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    noise = torch.randn(600, 12, generator=generator)
    noise[:, 4:8] += 4 * torch.nn.functional.one_hot(labels, 4)
    columns = {"0": slice(0, 4), "1": slice(4, 8), "2": slice(8, 12), "0+1+2": slice(0, 12)}
    fit, check = cache_of(noise[:400], labels[:400], columns), cache_of(noise[400:], labels[400:], columns)
    for name, (probe, val_accuracy) in fit_linear_sgd(fit, 3, CPU, epochs=15).items():
        assert probe.layer in ("1", "0+1+2"), name
        logits = probe.predict(check)
        assert float((logits.argmax(1) == check.labels).float().mean()) > 0.9
        assert val_accuracy["1"] > 0.9 > 0.6 > val_accuracy["0"]


def test_sgd_holds_out_a_fifth_of_each_class_and_takes_the_smallest_rate_of_equally_good_ones(caplog):
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)[
        torch.randperm(80, generator=torch.Generator().manual_seed(0))
    ]
    assert labels[hold_out(labels)].bincount().tolist() == [10, 4, 2]
    # one standard error of 0.9 on 100 images is 0.03
    assert choose_rate([0.5, 0.86, 0.875, 0.9, 0.89, -torch.inf], 100) == 2
    assert choose_rate([0.5, 0.86, 0.875, 0.9, 0.89, -torch.inf], 10_000) == 3
    assert choose_rate([1.0, 1.0], 10) == 0 and choose_rate([-torch.inf, 0.2], 10) == 1
    assert all(high / low <= 10 for low, high in pairwise(SGD_LEARNING_RATES))
    generator = torch.Generator().manual_seed(0)
    easy = torch.nn.functional.one_hot(labels, 4) + 0.1 * torch.randn(80, 4, generator=generator)
    (plain, _), _ = fit_linear_sgd(cache_of(1e3 * easy, labels, {"0": slice(0, 4)}), 3, CPU, epochs=15).values()
    assert plain.selected == "layer 0, lr 0.001 (edge of the grid)"
    assert "probe linear_sgd, 0.001 is the smallest of its candidates" in caplog.text


def test_features_in_a_scratch_file_give_the_same_probe(tmp_path):
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(300, 6, generator=generator), torch.randint(2, (300,), generator=generator)
    banks = [cache_of(features, labels, {"0": slice(0, 6)}, memory, tmp_path) for memory in (1 << 30, 100)]
    assert [bank.store.scratch_file is None for bank in banks] == [True, False]
    logits = [fit_linear_sgd(bank, 2, CPU, epochs=2)["linear_sgd"][0].predict(bank) for bank in banks]
    assert torch.equal(*logits)
    banks[1].close()


def test_attentive_pool_equals_attention_with_keys_and_values():
    """The cheap form is attention of one query with key and value maps, written out."""
    torch.manual_seed(0)
    probe = AttentivePool(128, 5).eval()
    assert probe.query.shape == (2, 128)
    key = torch.randn(2, 64, 128)  # any key map K and query q of a head with K'q = the probe's own
    query = torch.stack([torch.linalg.lstsq(key[h].T, probe.query[h][:, None]).solution[:, 0] for h in range(2)])
    with torch.no_grad():
        probe.query.copy_(torch.einsum("hed,he->hd", key, query))
    tokens = torch.randn(3, 9, 128)
    x = tokens / (1 + 1e-6) ** 0.5  # running statistics are still 0 and 1
    heads = []
    for h in range(2):
        weights = ((x @ key[h].T) @ query[h]).softmax(1)
        heads.append((weights[..., None] * (x @ probe.value[h])).sum(1))
    torch.testing.assert_close(probe(tokens), probe.head(torch.cat(heads, 1)), atol=1e-4, rtol=1e-4)


def test_average_precision_by_hand():
    """Ranks of the positives 1, 3, 4 of five: (1/1 + 2/3 + 3/4) / 3."""
    scores = torch.tensor([[5.0, 1, 0], [4, 2, 0], [3, 3, 0], [2, 4, 0], [1, 5, 0]])
    targets = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0]])
    result = average_precisions(scores, targets, np.ones(5))
    assert result[0] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert np.isnan(result[1])
    assert result[2] == pytest.approx(1 / 5)  # all equal: one rank, whatever the order
    twice = average_precisions(scores, targets, np.array([0, 1, 1, 1, 2.0]))
    assert twice[0] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_agreement_of_known_partitions():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert clustering_scores(1 - labels, labels) == pytest.approx({"accuracy": 1.0, "nmi": 1.0, "ari": 1.0})
    half = clustering_scores(np.array([0, 0, 0, 1, 0, 1, 1, 1]), labels)
    information = 0.75 * log(2 * 0.75) + 0.25 * log(2 * 0.25)  # cells 3/8 and 1/8 of margins 1/2
    assert half["accuracy"] == 0.75
    assert half["nmi"] == pytest.approx(information / log(2))
    assert clustering_scores(np.array([0, 1] * 4), labels)["nmi"] == pytest.approx(0, abs=1e-12)


def test_clusters_of_imbalanced_images_have_the_balanced_accuracy_first():
    """Nine images of a class, one of another: one cluster has 5 and 0, the other 4 and 1."""
    labels = np.array([0] * 9 + [1])
    scores = clustering_scores(np.array([0] * 5 + [1] * 5), labels)
    assert list(scores)[:2] == ["balanced_accuracy", "accuracy"]
    assert scores["balanced_accuracy"] == pytest.approx((5 / 9 + 1) / 2) and scores["accuracy"] == pytest.approx(0.6)


def test_clusters_of_two_clouds():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.randn(200, 5, generator=generator) + 6 * (2 * labels[:, None] - 1)
    assert clustering_scores(cluster_features(features, 2, 0), labels.numpy())["accuracy"] == 1.0


def test_rank_and_collapse_of_known_features():
    eye = torch.eye(8).repeat(4, 1)
    assert entropy_rank(eye) == pytest.approx(8)
    assert entropy_rank(torch.ones(10, 4)) == pytest.approx(1, abs=1e-3)
    collapsed = feature_stats(torch.tensor([[3.0, 4.0, 0.0]]).repeat(50, 1) + torch.randn(50, 3) * 1e-6)
    assert collapsed["mean_cosine"] == pytest.approx(1)
    assert collapsed["uniformity"] == pytest.approx(0, abs=1e-5)
    assert collapsed["spread"] < 1e-4
    even = feature_stats(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)))
    assert even["spread"] == pytest.approx(1, abs=0.02) and abs(even["mean_cosine"]) < 0.01
    assert even["effective_rank"] > 15.9
    dead = feature_stats(torch.cat([torch.randn(50, 3), torch.ones(50, 1)], 1))
    assert dead["dead_dimensions"] == 0.25
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert measure_alignment(two, two.flip(0)) == pytest.approx(2)  # |e1 - e2|^2
    assert feature_stats(two)["uniformity"] == pytest.approx(-4)  # log exp(-2 * 2)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_cache_holds_the_features_of_the_plain_vit(digits, tmp_path, pool):
    """Rows are in another order; the deepest layer is the ViT's output; other layers are other features."""
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", (8, 8), 2, 1, TINY)
    save_backbone(vit, tmp_path / "vit")
    data = LabeledSet.from_images(list_images(digits / "test"))
    data = data.subset(few_shot_split(data, 3, 0))
    ((index, images),) = BackboneWrapper.from_vit(vit, CPU).batches(data.images, CacheConfig())
    images = images[index.argsort()]
    with torch.inference_mode():
        tokens = vit.eval().forward_features(normalize(images, 1))
    expected = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
    backbone = BackboneWrapper.load(str(tmp_path / "vit"), CPU)
    assert backbone.image_size == (8, 8)
    cache = FeatureCache.extract(backbone, data, CacheConfig(1 << 20, tmp_path, batch_size=7), [-2, 1], pool)
    assert cache.index.tolist() != sorted(cache.index.tolist()) and cache.index.sort().values.tolist() == list(
        range(30)
    )
    first, last = (cache.store.take(torch.arange(30))[:, cache.columns[layer]] for layer in ("0", "1"))
    torch.testing.assert_close(last, expected[cache.index], atol=2e-3, rtol=2e-3)
    assert cache.labels.tolist() == data.labels[cache.index].tolist()
    assert cache.layer_features().equal(torch.cat([first, last], 1)) and not torch.allclose(first, last, atol=0.005)
    assert cache.columns["0+1"] == slice(0, 2 * first.shape[1])
    of_vit = FeatureCache.extract(
        BackboneWrapper.from_vit(vit.train(), CPU), data, CacheConfig(progress=False), pool=pool
    )
    torch.testing.assert_close(of_vit.layer_features(), last, atol=1e-3, rtol=1e-3)
    assert vit.training


def test_other_networks_are_encoders_too():
    encoder = BackboneWrapper.load("random:resnet10t", CPU)
    first, last = encoder.pooled_features(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [0, -1], "mean")
    assert first.shape[0] == last.shape[0] == 2 and last.shape[1] == 512
