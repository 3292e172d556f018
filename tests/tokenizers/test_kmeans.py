"""K-means in all its forms against plain float64 loops; several processes; resume."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, multiprocessing

import mapet
from mapet.errors import Interrupted, MapetError
from mapet.files import write_tensors
from mapet.tokenizers import kmeans
from mapet.tokenizers.feature_store import DistributedPoints, FeatureStore, stratified_sample
from mapet.tokenizers.kmeans import DEAD_AFTER, KMeans, assign, kmeans_plusplus_init, random_init
from tests.refused import refused

MODES = [
    {"init": start, "batch_size": batch, "metric": metric}
    for start in ("random", "k-means++")
    for batch in (None, 90)
    for metric in ("l2", "cosine")
]


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    """One thread: two are slower for so few points."""
    torch.set_num_threads(1)


def blobs(centers=30, each=60, width=6, spread=12.0, seed=0):
    """DistributedPoints that float16 holds exactly, so that a plain loop clusters the very same."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(centers, width)).repeat(each, 0) * spread + rng.normal(size=(centers * each, width))
    return torch.tensor(rng.permutation(points), dtype=torch.float16).float()


def points_of(points, metric="l2"):
    return DistributedPoints(FeatureStore.from_tensor(points), metric)


def plainly(points, vocab_size, iterations, seed=0, init="random", batch_size=None, metric="l2"):
    """K-means as the papers have it, a point at a time where that is what they say, in float64."""
    choose = {"random": random_init, "k-means++": kmeans_plusplus_init}[init]
    chosen = choose(points_of(points, metric), vocab_size, seed).numpy()

    def allowed(x):
        return x if metric == "l2" else x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    x = allowed(points.double().numpy())
    c, visits, idle = x[chosen], np.zeros(vocab_size), np.zeros(vocab_size)
    for number in range(iterations):
        full = batch_size is None or batch_size >= len(x) or number == iterations - 1
        random = np.random.default_rng([seed, 0, number])
        seen = x if full else x[stratified_sample(len(x), batch_size, random).numpy()]
        table = np.square(seen[:, None] - c).sum(2)
        ids, served = table.argmin(1), table.min(1)
        if full:
            new = np.stack([seen[ids == k].mean(0) if (ids == k).any() else c[k] for k in range(vocab_size)])
            dead = [k for k in range(vocab_size) if not (ids == k).any()]
        else:
            new = c.copy()
            for point, k in zip(seen, ids, strict=True):
                visits[k] += 1
                new[k] += (point - new[k]) / visits[k]
            idle = np.where(np.isin(np.arange(vocab_size), ids), 0, idle + len(seen))
            dead = list(np.flatnonzero(idle >= DEAD_AFTER * vocab_size))
        c = allowed(new)
        for k, worst in zip(dead, np.argsort(-served, kind="stable"), strict=False):
            c[k], visits[k], idle[k] = seen[worst], 0, 0
    table = np.square(x[:, None] - c).sum(2)
    return c, np.bincount(table.argmin(1), minlength=vocab_size), table.min(1).mean(), x.var(0).sum()


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("vocab_size", [7, 50])
def test_as_a_plain_loop(mode, vocab_size):
    points = blobs()
    expected = plainly(points, vocab_size, 10, **mode)
    result = KMeans(vocab_size, 10, **mode).fit(points)
    assert torch.allclose(result.centroids.double(), torch.from_numpy(expected[0]), atol=1e-4)
    assert result.counts.tolist() == expected[1].tolist()
    assert result.mean_sq_dist == pytest.approx(expected[2], rel=1e-4)
    assert result.total_variance == pytest.approx(expected[3], rel=1e-4)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    size=st.integers(20, 300), width=st.integers(1, 9), vocab_size=st.integers(1, 20), iterations=st.integers(1, 9),
    seed=st.integers(0, 1000), batch_size=st.none() | st.integers(1, 400), metric=st.sampled_from(["l2", "cosine"]),
    init=st.sampled_from(["random", "k-means++"]),
)  # fmt: skip
def test_any_setting_as_a_plain_loop(size, width, seed, vocab_size, iterations, **mode):
    points = torch.tensor(np.random.default_rng(seed).normal(size=(size, width)) + 1, dtype=torch.float16).float()
    if width == 1 and mode["metric"] == "cosine":
        return  # two points
    expected = plainly(points, vocab_size, iterations, seed, **mode)
    result = KMeans(vocab_size, iterations, seed=seed, **mode).fit(points)
    assert torch.allclose(result.centroids.double(), torch.from_numpy(expected[0]), atol=1e-4)
    assert result.mean_sq_dist == pytest.approx(expected[2], rel=1e-3, abs=1e-5)


def test_dead_centroids_of_mini_batches_start_again():
    """Nine of ten points are one: nearly all centroids start there, and only one can win anything."""
    points = torch.cat([torch.zeros(1800, 6), blobs(20, 10)])
    points = points[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    mode = {"batch_size": 200}
    expected = plainly(points, 16, 25, **mode)
    result = KMeans(16, 25, **mode).fit(points)
    assert (result.counts > 0).all()
    assert result.mean_sq_dist == pytest.approx(expected[2], rel=1e-3)
    assert result.mean_sq_dist <= 1.3 * KMeans(16, 25, n_init=3).fit(points).mean_sq_dist


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_mini_batches_are_nearly_as_good_as_all_points(metric):
    points = blobs(40, 200)
    options = {"n_init": 2, "metric": metric, "init": "k-means++"}
    whole = KMeans(40, 20, **options).fit(points).mean_sq_dist
    assert KMeans(40, 20, batch_size=800, **options).fit(points).mean_sq_dist <= 1.03 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [None, 500])
def test_spherical(dtype, batch_size):
    """Centroids of length 1; how long points are changes nothing; nearest by L2 of the points as they are is nearest by angle."""
    points = blobs(seed=3)
    lengths = 2.0 ** torch.randint(-2, 3, (len(points), 1), generator=torch.Generator().manual_seed(0))
    first, again = (
        KMeans(20, 10, dtype=dtype, metric="cosine", batch_size=batch_size).fit(x) for x in (points, points * lengths)
    )
    assert torch.allclose(first.centroids.norm(dim=1), torch.ones(20))
    assert torch.allclose(first.centroids, again.centroids, atol=1e-5)
    cosine = torch.nn.functional.normalize(points.double()) @ first.centroids.double().T
    assert torch.equal(assign(points, first.centroids)[0], cosine.argmax(1))
    assert first.mean_sq_dist == pytest.approx(float(2 - 2 * cosine.max(1).values.mean()), rel=1e-4)


def test_points_that_are_zero_have_no_angle():
    result = KMeans(20, metric="cosine").fit(torch.cat([blobs(), torch.zeros(50, 6)]))
    assert result.centroids.isfinite().all() and result.counts.sum() == 1850


def test_plus_plus_chooses_as_the_paper_says():
    """How often each set of 3 of 6 points is chosen, against the product of D^2 fractions over all orders."""
    places = np.array([0.0, 1.0, 1.5, 4.0, 4.0, 9.0])
    expected = Counter()
    for order in itertools.permutations(range(6), 3):
        share = 1 / 6
        for taken in (1, 2):
            squared = np.square(places[:, None] - places[list(order[:taken])]).min(1)
            share *= squared[order[taken]] / squared.sum()
        expected[frozenset(order)] += share
    points = points_of(torch.tensor(places[:, None], dtype=torch.float32))
    draws = 1000
    result = Counter(frozenset(kmeans_plusplus_init(points, 3, seed).tolist()) for seed in range(draws))
    assert set(result) <= {chosen for chosen, share in expected.items() if share > 0}
    for chosen, share in expected.items():
        assert abs(result[chosen] / draws - share) <= 4 * (share * (1 - share) / draws) ** 0.5


def test_plus_plus_spreads():
    """The theorem: on average at most 8 (ln K + 2) times the best; random points miss blobs, which costs far more."""
    centers, width = 64, 6
    points = blobs(centers, 50, width, spread=1000.0)
    ideal = width  # each blob's own variance

    def potential(choose, seed):
        return float(assign(points, points[choose(points_of(points), centers, seed)])[1].mean())

    spread = np.mean([potential(kmeans_plusplus_init, seed) for seed in range(10)])
    luck = np.mean([potential(random_init, seed) for seed in range(10)])
    assert spread <= 8 * (np.log(centers) + 2) * ideal
    assert luck > 100 * spread


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_plus_plus_of_a_sample(memory, tmp_path):
    """More than 16 points a centroid: a sample of them, wherever they are; different points; the same each time."""
    points = blobs(30, 400)
    with FeatureStore(len(points), memory, tmp_path) as store:
        store.append(points)
        chosen = kmeans_plusplus_init(DistributedPoints(store), 30, seed=1)
        assert torch.equal(chosen, kmeans_plusplus_init(DistributedPoints(store), 30, seed=1))
    assert torch.equal(chosen, kmeans_plusplus_init(points_of(points), 30, seed=1))
    assert len(chosen.unique()) == 30
    assert len(kmeans_plusplus_init(points_of(points), 30, seed=2).unique()) == 30


def test_plus_plus_of_fewer_different_points_than_centroids():
    points = torch.tensor([[1.0], [2.0], [5.0]]).repeat(40, 1)
    chosen = kmeans_plusplus_init(points_of(points), 10)
    assert len(chosen.unique()) == 10 and len(points[chosen[:3]].unique()) == 3


@given(st.integers(1, 10**7), st.integers(1, 3000), st.integers(0, 100))
def test_even_sample(num_points, size, seed):
    numbers = stratified_sample(num_points, size, np.random.default_rng(seed))
    assert len(numbers) == min(size, num_points)
    assert numbers[0] >= 0 and numbers[-1] < num_points and (numbers.diff() > 0).all()


def points_for(mode):
    """With all points many points are equal, so that clusters are empty; mini-batch centroids go idle in any case.

    There, two equal initial centroids would differ by rounding alone.
    """
    return blobs() if mode["batch_size"] else torch.cat([blobs(), blobs()[:1].repeat(700, 1)])


def run_rank(rank, folder, world):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    result = {}
    for index, mode in enumerate(MODES):
        shard = points_for(mode).tensor_split([500])[rank]  # uneven
        result[index] = tuple(KMeans(50, 8, 2, **mode).fit(shard))
    shard = points_for(MODES[0]).tensor_split([500])[rank]
    checkpoint = folder / "state.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        after_each_round(patch, Stop(11))
        with refused("k-means", kind=Interrupted):
            KMeans(50, 8, 2).fit(shard, checkpoint)
    result["resumed"] = tuple(KMeans(50, 8, 2).fit(shard, checkpoint))
    for case, actual in (("empty", shard[: 5 * rank]), ("few", shard[:5])):
        with pytest.raises(MapetError) as error:
            KMeans(11).fit(actual)
        result[case] = str(error.value)
    with pytest.raises(MapetError) as error:
        KMeans(50, 8, 2).fit(shard, folder / f"{rank}" / ("absent" if rank else "../state.safetensors"))
    result["elsewhere"] = str(error.value)
    torch.save(result, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_processes_agree_and_equal_one(tmp_path):
    (tmp_path / "0").mkdir()
    multiprocessing.spawn(run_rank, (tmp_path, 2), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for index, mode in enumerate(MODES):
        single = KMeans(50, 8, 2, **mode).fit(points_for(mode))
        for actual, reference, alone in zip(one[index], other[index], single, strict=True):
            assert torch.equal(torch.as_tensor(actual), torch.as_tensor(reference))
            assert torch.allclose(torch.as_tensor(actual), torch.as_tensor(alone), rtol=1e-4, atol=1e-4), mode
    for actual, reference, whole in zip(one["resumed"], other["resumed"], one[0], strict=True):
        assert torch.equal(torch.as_tensor(actual), torch.as_tensor(reference))
        assert torch.equal(torch.as_tensor(actual), torch.as_tensor(whole))
    assert one["empty"] == other["empty"] and "rank 0 has none" in one["empty"]
    assert "11" in one["few"] and "10 patches" in other["few"]
    assert "state.safetensors" in one["elsewhere"] and "absent" in other["elsewhere"]


def after_each_round(monkeypatch, action):
    """Run `action`, once the round is counted and perhaps saved."""
    monkeypatch.setattr(kmeans.tqdm, "update", lambda bar, n=1: action(bar))


class Stop:
    """Ctrl-C in a round."""

    def __init__(self, rounds, error=KeyboardInterrupt):
        self.left, self.error = rounds, error

    def __call__(self, _):
        self.left -= 1
        if not self.left:
            raise self.error


def is_same_state(one, other):
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("mode", [MODES[0], MODES[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(mode, dtype, tmp_path, monkeypatch):
    """Stopped in each round, between restarts and after the last; saved on Ctrl-C or, after a crash, by the round before."""
    points = torch.cat([blobs(), torch.zeros(300, 6)])
    whole = KMeans(40, 4, 3, 5, dtype, **mode).fit(points)
    for rounds in range(1, 13):
        checkpoint = tmp_path / f"{rounds}.safetensors"
        error, raised, every = (KeyboardInterrupt, Interrupted, 60) if rounds % 2 else (ZeroDivisionError,) * 2 + (0,)
        monkeypatch.setattr(kmeans, "SAVE_EVERY_S", every)
        after_each_round(monkeypatch, Stop(rounds, error))
        with pytest.raises(raised):
            KMeans(40, 4, 3, 5, dtype, **mode).fit(points, checkpoint)
        done = []
        after_each_round(monkeypatch, done.append)
        again = KMeans(40, 4, 3, 5, dtype, **mode).fit(points, checkpoint)
        assert is_same_state(again, whole) and len(done) == 12 - rounds
    assert not list(tmp_path.glob(".*"))


def test_checkpoints_of_other_calls_are_refused(tmp_path, monkeypatch):
    points, checkpoint = blobs(), tmp_path / "state.safetensors"
    with monkeypatch.context() as patch:
        after_each_round(patch, Stop(2))
        with refused("k-means", kind=Interrupted):
            KMeans(40, 4).fit(points, checkpoint)
    content = checkpoint.read_bytes()
    for setting in (
        {"seed": 1}, {"max_iter": 5}, {"n_init": 2}, {"metric": "cosine"}, {"init": "k-means++"}, {"batch_size": 100},
    ):  # fmt: skip
        name, value = next(iter(setting.items()))
        with refused(name, value):
            KMeans(40, **{"max_iter": 4} | setting).fit(points, checkpoint)
    with refused("vocab_size", 40, 41):
        KMeans(41, 4).fit(points, checkpoint)
    for other in (points.flip(0), points * 1.001, points[:-1]):
        with refused("points"):
            KMeans(40, 4).fit(other, checkpoint)
    assert checkpoint.read_bytes() == content
    for damaged in (content[:-100], b"", b"{}" * 50):
        checkpoint.write_bytes(damaged)
        with refused("k-means checkpoint"):
            KMeans(40, 4).fit(points, checkpoint)
    write_tensors(checkpoint, {"centroids": points})
    with refused("k-means checkpoint"):
        KMeans(40, 4).fit(points, checkpoint)


def test_fit_tokenizer_resumes(crops, tmp_path, monkeypatch):
    options = {
        "images": crops, "image_size": 32, "patch_size": 8, "vocab_size": 10, "kmeans_metric": "cosine",
        "kmeans_init": "k-means++", "kmeans_batch_size": 50, "kmeans_iters": 6,
    }  # fmt: skip
    whole = mapet.fit_tokenizer(out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        plain, stop = KMeans._next_round, Stop(4)
        patch.setattr(KMeans, "_next_round", lambda *given: (plain(*given), stop(None))[0])
        with refused("k-means", kind=Interrupted):
            mapet.fit_tokenizer(out=tmp_path / "t", **options)
    checkpoint = tmp_path / "t" / ".kmeans.safetensors"
    assert checkpoint.exists() and not (tmp_path / "t" / "visual_tokenizer.json").exists()
    with refused("resume=True"):
        mapet.fit_tokenizer(out=tmp_path / "t", **options)
    with refused("seed", 0, 1):
        mapet.fit_tokenizer(out=tmp_path / "t", **options, seed=1, resume=True)
    again = mapet.fit_tokenizer(out=tmp_path / "t", **options, resume=True)
    assert again.hash == whole.hash and not checkpoint.exists()
    assert mapet.fit_tokenizer(out=tmp_path / "t", **options, resume=True).hash == whole.hash  # finished: loaded
    for other in ({"seed": 1}, {"patch_size": 4}, {"kmeans_metric": "l2"}):
        with refused(tmp_path / "t", *other):
            mapet.fit_tokenizer(out=tmp_path / "t", **options | other, resume=True)
    assert whole.description["fit_config"]["kmeans_metric"] == "cosine"
