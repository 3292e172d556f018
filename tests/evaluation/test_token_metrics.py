"""Metrics of visual tokens against cases whose answer is known, and the warnings they give rise to."""

from math import log2, sqrt
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mapet.data.sources import list_images
from mapet.device import ComputeContext
from mapet.evaluation.inspection import TokenSampler
from mapet.evaluation.token_metrics import (
    agreement,
    bag_of_tokens_probe,
    bags_of_tokens,
    code_usage,
    compute_token_metrics,
    label_information,
    nearest_codes,
    neighbor_information,
    neighbor_pairs,
    position_information,
    token_warnings,
)
from mapet.reports.evaluation import format_token_metrics, render_tokenizer_report
from mapet.tokenizers.tokenizer import load_tokenizer
from tests.refused import refused


def draw_tokens(*shape, below, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def checkerboard(images=50, size=6):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((rows + columns) % 2).expand(images, -1, -1)


def textures(images=400, size=4, classes=4, seed=0):
    """Good tokens: 16 per class, mostly of the image's class, equal in neighboring rows."""
    labels = draw_tokens(images, below=classes, seed=seed)
    tokens = draw_tokens(images, 1, size, below=16, seed=seed + 1).expand(-1, size, -1)
    noise = draw_tokens(images, size, size, below=16 * classes, seed=seed + 2)
    odd = draw_tokens(images, size, size, below=10, seed=seed + 3) < 3
    return torch.where(odd, noise, tokens + 16 * labels[:, None, None]), labels, torch.arange(images) % 5 == 0


def test_usage_of_even_tokens_and_of_one_token():
    even = code_usage(torch.arange(64).repeat(25).view(100, 4, 4), 64)
    assert (even.used_codes, even.dead_codes, even.patches) == (64, 0, 1600)
    assert even.perplexity == pytest.approx(64) and even.entropy == pytest.approx(6)
    assert even.top_code_fraction == 1 / 64 and even.codes_for_half == 0.5
    assert even.codes_for_most == 58 / 64  # the first number of tokens with 9/10 of the patches
    one = code_usage(torch.full((10, 4, 4), 3), 64)
    assert (one.used_codes, one.dead_codes, one.top_code_fraction) == (1, 63, 1.0)
    assert one.perplexity == 1 and one.codes_for_half == one.codes_for_most == 1 / 64
    assert code_usage(torch.tensor([0, 0, 1, 2]), 4).entropy == pytest.approx(1.5)


def test_codes_that_a_small_sample_can_reach():
    """The expectation of used codes is what evenly drawn tokens show."""
    seen = [code_usage(draw_tokens(500, below=300, seed=seed), 300) for seed in range(50)]
    mean = sum(one.used_codes for one in seen) / 50
    assert mean == pytest.approx(seen[0].reachable_codes, abs=3 * 7 / 50**0.5)  # one draw spreads by about 7


def test_agreement_and_chance():
    same = agreement(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 2]))
    assert (same.fraction, same.chance, same.kappa) == (1.0, 0.375, 1.0)
    assert agreement(torch.tensor([0, 1]), torch.tensor([1, 0])).kappa == -1
    assert agreement(torch.tensor([4, 4]), torch.tensor([4, 4])).kappa == 1
    random = agreement(draw_tokens(20_000, below=8), draw_tokens(20_000, below=8, seed=1))
    assert abs(random.fraction - random.chance) < 3 * (1 / 8 * 7 / 8 / 20_000) ** 0.5


def test_coherence_of_checkerboards_and_stripes():
    board = {name: agreement(*pair) for name, pair in neighbor_pairs(checkerboard()).items()}
    assert all(pair.fraction == 0 and pair.chance == pytest.approx(0.5) for pair in board.values())
    assert neighbor_information(checkerboard()).bits == pytest.approx(1, abs=0.01)
    stripes = torch.arange(6).view(6, 1).expand(50, 6, 6)
    assert agreement(*neighbor_pairs(stripes)["horizontal"]).fraction == 1
    assert agreement(*neighbor_pairs(stripes)["vertical"]).fraction == 0
    assert set(neighbor_pairs(torch.zeros(2, 1, 4, dtype=torch.int64))) == {"horizontal"}
    assert neighbor_information(torch.zeros(2, 1, 1, dtype=torch.int64)) is None


def test_position():
    assert position_information(torch.arange(16).view(1, 4, 4).expand(200, -1, -1)).fraction == pytest.approx(
        1, abs=0.03
    )
    nothing = position_information(draw_tokens(200, 4, 4, below=32))
    assert abs(nothing.bits) < 3 * nothing.error


def test_tokens_that_are_the_class_say_all_of_it():
    labels = draw_tokens(500, below=5)
    result = label_information(labels[:, None, None].expand(-1, 4, 4), labels)
    p = torch.bincount(labels) / 500
    assert result.bits + result.chance == pytest.approx(float(-(p * p.log2()).sum()))
    assert result.fraction == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("vocab_size", [4, 64, 4096])
@pytest.mark.parametrize("alike", [False, True], ids=["patches differ", "an image has one token"])
def test_tokens_independent_of_the_class_say_nothing(vocab_size, alike):
    """Also where the patches of an image are alike, which the usual correction (Miller and Madow's) does not allow for."""
    labels, tokens = draw_tokens(400, below=10), draw_tokens(400, 4, 4, below=vocab_size, seed=1)
    result = label_information(tokens[:, :1, :1].expand(-1, 4, 4) if alike else tokens, labels)
    assert abs(result.bits) < 3 * result.error
    if not alike and vocab_size == 64:
        assert result.chance == pytest.approx(63 * 9 / (2 * 6400) / 0.6931, rel=0.1)  # Miller 1955


def test_half_a_bit():
    """A token that gives one of two classes in half of the patches and is independent otherwise."""
    labels = torch.arange(1000) % 2
    blank = draw_tokens(1000, 4, 4, below=2).bool()
    result = label_information(torch.where(blank, 2, labels[:, None, None]), labels)
    assert result.bits == pytest.approx(float(1 - blank.double().mean()), abs=0.01)


def test_bags():
    bags = bags_of_tokens(torch.tensor([[[0, 0], [0, 2]]]), 4)
    assert torch.allclose(bags, torch.tensor([[0.75, 0, 0.25, 0]]).sqrt())
    tokens, labels, test = textures()
    good = bag_of_tokens_probe(tokens, labels, test, 64)
    assert good.accuracy > 0.9 and good.test_images == 80
    poor_tokens = bag_of_tokens_probe(tokens[torch.randperm(400)], labels, test, 64)
    assert abs(poor_tokens.accuracy - 0.25) < 0.2
    # Tokens of their own in each image leave nothing to train on; tokens new in the test set are omitted.
    own = bag_of_tokens_probe(torch.arange(400 * 16).view(400, 4, 4), labels, test, 400 * 16)
    assert own.balanced_accuracy == own.chance  # the test images are imbalanced
    new = torch.where(test[:, None, None] & (tokens == 5), 64, tokens)
    assert bag_of_tokens_probe(new, labels, test, 65).accuracy > 0.85


def test_the_bag_of_imbalanced_images_has_the_balanced_accuracy():
    """Tokens independent of two classes of unequal size: the accuracy is high, the balanced accuracy at chance."""
    tokens, labels, test = textures()
    assert bag_of_tokens_probe(tokens, torch.arange(400) % 4, torch.arange(400) < 80, 64).balanced_accuracy is None
    rare = (labels == 0) & (torch.arange(400) % 5 < 2)
    good = bag_of_tokens_probe(tokens, rare.long(), test, 64)
    poor_tokens = bag_of_tokens_probe(
        tokens[torch.randperm(400, generator=torch.Generator().manual_seed(0))], rare.long(), test, 64
    )
    assert good.chance == poor_tokens.chance == 0.5 and good.balanced_accuracy <= good.accuracy
    counts = [int((test & (rare == value)).sum()) for value in (False, True)]
    assert poor_tokens.error == pytest.approx(sqrt(sum(0.25 / count for count in counts)) / 2)
    assert poor_tokens.accuracy > 0.7 and abs(poor_tokens.balanced_accuracy - 0.5) < 3 * poor_tokens.error
    metrics = compute_token_metrics(tokens[torch.randperm(400)], 64, {}, rare.long(), test)
    assert any(
        "balanced accuracy" in warning and "no better than chance" in warning for warning in token_warnings(metrics)
    )
    assert "balanced accuracy" in format_token_metrics(metrics)["bag-of-tokens probe"]


def test_nearest_codes():
    distances, result = nearest_codes(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([2, 0]), 2)
    assert result.tolist() == [[1, 0], [1, 2]] and distances.tolist() == [[2, 3], [1, 3]]
    assert nearest_codes(torch.zeros(3, 2), torch.tensor([0]), 9)[1].shape == (1, 2)


@given(seed=st.integers(0, 2**20), vocab_size=st.integers(1, 40), size=st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_numbers_of_the_codes_do_not_matter(seed, vocab_size, size):
    tokens, labels = draw_tokens(30, size, size, below=vocab_size, seed=seed), draw_tokens(30, below=3, seed=seed)
    renamed = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[tokens]
    for function in (
        lambda ids: code_usage(ids, vocab_size),
        lambda ids: agreement(ids, ids.flip(-1)),
        lambda ids: label_information(ids, labels),
        lambda ids: position_information(ids),
        lambda ids: neighbor_information(ids),
    ):
        assert vars(function(tokens)) == pytest.approx(vars(function(renamed)), abs=1e-9)


def stable_views(tokens):
    return dict.fromkeys(("flip", "shift", "jitter", "noise", "jpeg"), (tokens, tokens))


def test_no_warning_for_good_tokens():
    tokens, labels, test = textures()
    result = compute_token_metrics(tokens, 64, stable_views(tokens), labels, test)
    assert list(token_warnings(result)) == []
    description = {"teacher": {"teacher": "pixels"}, "label_free": True}
    assert "No warnings" in render_tokenizer_report(result, [], "t", description) and result.label.fraction > 0.2


def poor_tokens():
    """name -> (tokens, vocabulary size, views, labels, test), and the warning it must get."""
    tokens, labels, test = textures()
    other = tokens[draw_tokens(400, below=400, seed=9)]
    mixed = tokens.flatten()[torch.randperm(tokens.numel(), generator=torch.Generator().manual_seed(3))].view_as(tokens)
    board = torch.arange(16).view(1, 4, 4).expand(400, -1, -1)
    rare = torch.where(draw_tokens(400, 4, 4, below=100) < 85, 0, tokens)
    return {
        "dead": ((tokens, 1024), "960 of 1,024 codes are dead"),
        "small sample": ((tokens, 2048), "only 6,400 patches for 2,048 codes"),
        "one token": ((torch.zeros_like(tokens), 64), "one token takes 100%"),
        "one token of one": ((torch.zeros_like(tokens), 1), "one token takes 100%"),
        "uneven": ((rare, 64), "a few tokens take most patches"),
        "most frequent token": ((rare, 64), "one token takes 8"),
        "jitter": ((tokens, 64, {"jitter": (tokens, other)}), "of the tokens change under a slight change of colors"),
        "shift": ((tokens, 64, {"shift": (tokens, other)}), "they tell the position"),
        "wrong store": ((tokens, 64, {"stored": (tokens, other)}), "the store belongs to other images"),
        "wrong images": ((tokens, 64, {}, labels.roll(1), test), "check that labels fit the images"),
        "no class from the bag": ((tokens, 64, {}, labels.roll(1), test), "no better than chance"),
        "mixed up": ((mixed, 64), "check the order of tokens"),
        "place": ((board, 16), "position alone tells"),
        "copying": ((labels[:, None, None].expand(-1, 4, 4), 4), "copying nearly solves the task"),
    }


@pytest.mark.parametrize("name", poor_tokens())
def test_poor_tokens_are_called_so(name):
    (tokens, vocab_size, *more), sentence = poor_tokens()[name]
    lines = list(token_warnings(compute_token_metrics(tokens, vocab_size, *more)))
    assert any(sentence in line for line in lines), lines


class MeanColor(nn.Module):
    """Tokens are the patch's mean gray, in 8 steps: they commute with flips, and depend on the patch alone."""

    def __init__(self, size, grid):
        super().__init__()
        self.grid, self.student_size, self.vocab_size = grid, size, 8
        self.teacher = SimpleNamespace(image_size=size)
        self.description = {"teacher": {"channels": 3}}

    def forward(self, images):
        means = nn.functional.adaptive_avg_pool2d(images.double().mean(1), self.grid)
        return (means.round(decimals=6) / 32).long()


@pytest.mark.parametrize(("size", "grid"), [((32, 48), (4, 6)), ((36, 36), (8, 8))], ids=str)
def test_views_show_the_same_content(size, grid, crops, monkeypatch):
    """Only noise, jitter and JPEG change tokens that depend on the patch alone."""
    monkeypatch.setattr("mapet.evaluation.inspection.inference_batch_size", lambda _: 5)
    sampler = TokenSampler(MeanColor(size, grid), ComputeContext.from_options("cpu", "float32"))
    images = list_images(crops)
    result = {name: agreement(*pair) for name, pair in sampler.sample_perturbed(images, range(12)).items()}
    assert set(result) == {"flip", "shift", "jitter", "noise", "jpeg"}
    assert result["shift"].fraction == 1 and result["flip"].fraction == 1
    assert all(result[name].fraction > 0.6 for name in result)
    assert result["jitter"].fraction < 1
    tokens = sampler.sample(images, range(12), num_pixels=7)
    assert tokens.images.shape == (7, 3, *size) and tokens.ids.shape == (12, *grid)
    in_fives = sampler.sample_perturbed(images, range(12))
    monkeypatch.setattr("mapet.evaluation.inspection.inference_batch_size", lambda _: 12)
    assert all(
        torch.equal(in_fives[name][1], pair[1]) for name, pair in sampler.sample_perturbed(images, range(12)).items()
    )


def test_a_sample_without_a_readable_image(crops):
    """Few enough of the whole list that the limit for unreadable images does not apply."""
    (crops / "a.png").write_bytes(b"no image")
    images = list_images(crops)
    sampler = TokenSampler(MeanColor((32, 48), (4, 6)), ComputeContext.from_options("cpu", "float32"))
    with refused("none of the 1 ", "not an image"):
        sampler.sample(images, [0], num_pixels=1)
    with refused("mapet check"):
        sampler.sample_perturbed(images, [0])


def test_a_grid_that_cannot_be_shifted_by_whole_patches(crops):
    sampler = TokenSampler(MeanColor((33, 33), (5, 5)), ComputeContext.from_options("cpu", "float32"))
    assert set(sampler.sample_perturbed(list_images(crops), range(12))) == {"flip", "jitter", "noise", "jpeg"}


def test_pixel_tokens_of_digits_survive_a_shift(tokenizer_dir, digits):
    sampler = TokenSampler(load_tokenizer(tokenizer_dir), ComputeContext.from_options("cpu", "float32"))
    result = sampler.sample_perturbed(list_images(digits / "test"), range(0, 360, 4))
    assert torch.equal(*result["shift"])
    assert 0.5 < agreement(*result["jitter"]).fraction < 1
    assert log2(16) > code_usage(result["flip"][0], 16).entropy > 2
