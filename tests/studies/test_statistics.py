"""The statistics of a study against scipy, hand-worked numbers and simulation; its report against its reader."""

import csv
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mapet.evaluation.eval_context import mean_and_margin
from mapet.reports.study import describe_difference, describe_findings, write_report
from mapet.studies.statistics import (
    Study,
    Trial,
    holm,
    paired_differences,
    paired_t_test,
)
from tests.refused import refused


def make_trial(objective, seed, score, *, status="finished", budgets=("equal epochs",), curve=(), **others):
    factors = {"objective": objective, **others}
    scores = {} if score is None else {"logistic": score}
    came = {"scores": scores, "epochs": 10, "flops": 3e15, "seconds": 90.0, "curve": list(curve)}
    return Trial(factors, seed, "", {"epochs": 10}, budgets, status=status, reason="out, of <memory>", **came)


def study(trial_list, **changed):
    known = {"title": "A study", "baselines": {}, "notes": [], "command": "mapet study x.yaml"}
    return Study(compared_factor="objective", trials=trial_list, **(known | changed))


def simulated(count, seeds=3, effect=0.0, *, rng):
    """Seeds that shift all their runs alike, settings that differ, runs with noise of their own."""
    luck = rng.normal(0, 0.02, seeds)
    return study(
        [
            make_trial(
                name, seed, 0.5 + 0.05 * i + luck[seed] + gain + rng.normal(0, 0.01), ratio=f"0.{i}", curve=CURVE
            )
            for i, (name, gain), seed in product(range(count), (("mapet", effect), ("pim", 0)), range(seeds))
        ]
    )


CURVE = [{"epoch": e, "flops": e * 1e15, "loss": 3 / e, "logistic": 0.1 * e} for e in (1.0, 2.0, 3.0)]


def report_texts(study, folder):
    write_report(study, folder)
    return [(folder / f"report.{kind}").read_text("utf-8-sig") for kind in ("md", "html", "csv")]


class Reader(HTMLParser):
    """Fails on tags that do not match; keeps the text and the ids."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.ids = [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        assert tag not in ("script", "img", "link")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_interval_is_students(values):
    mean, half_width = mean_and_margin(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-12)
    if np.std(values) > 1e-6:
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (mean - half_width, mean + half_width) == pytest.approx((low, high), abs=1e-9)


def test_interval_and_p_by_hand():
    # 0.1, 0.2, 0.3: standard error 0.1 / sqrt 3, t(0.975; 2) = 4.30265; t = 3.4641, p = 1 - t / sqrt(t^2 + 2)
    assert mean_and_margin([0.1, 0.2, 0.3]) == pytest.approx((0.2, 0.248414), abs=1e-6)
    assert paired_t_test([0.1, 0.2, 0.3]) == pytest.approx(1 - 3.464102 / 14**0.5, abs=1e-6)
    assert mean_and_margin([0.4]) == (0.4, None)
    assert paired_t_test([0.4]) is None and paired_t_test([0.3 - 0.2, 0.4 - 0.3]) is None


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_corrects_upwards_and_keeps_the_order(p):
    corrected = holm(p)
    assert all(raw <= new <= 1 for raw, new in zip(p, corrected, strict=True))
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)


def test_pairs_are_of_shared_seeds_and_pooled_by_seed():
    a, b = {"x": [0.50, 0.53, 0.58, 0.6], "y": [0.40, 0.45, 0.48]}, {"x": [0.48, 0.50, 0.54], "y": [0.4, 0.41, 0.42]}
    trial_list = [make_trial(n, i, s, t=t) for n, of in (("a", a), ("b", b)) for t in of for i, s in enumerate(of[t])]
    trial_list.append(make_trial("b", 3, 0.1, t="x", status="failed"))
    pooled, x, y = paired_differences(study(trial_list))
    assert x.p == pytest.approx(stats.ttest_rel(a["x"][:3], b["x"]).pvalue) and x.seeds == 3
    means = [np.mean([a["x"][:3], a["y"]], axis=0), np.mean([b["x"], b["y"]], axis=0)]
    assert pooled.p == pytest.approx(stats.ttest_rel(*means).pvalue)
    assert pooled.seeds == 3 and len(pooled.conditions) == 2 and pooled.is_primary and not x.is_primary
    assert [pooled.p_holm, x.p_holm, y.p_holm] == pytest.approx([pooled.p, *holm([x.p, y.p])])


def test_sentences():
    def sentences(a, b, **others):
        trial_list = [make_trial(n, i, s, **others) for n, of in (("mapet", a), ("pim", b)) for i, s in enumerate(of)]
        return [describe_difference(row) for row in paired_differences(study(trial_list))]

    start = "At equal epochs, logistic: "
    apart = "mapet is 2.0 points below pim with ratio 0.75 (95 % interval 1.5 to 2.5, 3 seeds, corrected p = 0.003)."
    assert sentences([0.482, 0.50, 0.518], [0.5, 0.52, 0.54], ratio="0.75") == [start + apart]
    assert (
        "mapet and pim do not differ significantly (mapet is 1.0 points above pim; 95"
        in sentences([0.5, 0.6], [0.5, 0.58])[0]
    )
    assert sentences([0.5], [0.48]) == [start + "mapet is 2.0 points above pim. One seed: no interval and no test."]
    same = "mapet is level with pim. The same in all 2 seeds: no spread and no test."
    assert sentences([0.5, 0.6], [0.5, 0.6]) == [start + same]


def test_best_value_of_a_factor_is_over_what_all_its_values_share():
    scores = {("0.5", 0): 0.40, ("0.5", 1): 0.42, ("0.75", 0): 0.45, ("0.75", 1): 0.43, ("0.5", 2): 0.99}
    compared = study([make_trial("mapet", seed, s, ratio=r) for (r, seed), s in scores.items()])
    _, sentences = describe_findings(compared, paired_differences(compared))
    assert sentences == (
        "At equal epochs, logistic: the ratio of highest mean is 0.75 (0.440; intervals overlap) for mapet."
    )


@pytest.mark.parametrize("count", [1, 4])
def test_false_verdicts_are_as_rare_as_promised(count):
    """In each family: the pooled rows, and those of single settings."""
    rng = np.random.default_rng(5)
    wrong = {True: 0, False: 0}
    for _ in range(400):
        rows = paired_differences(simulated(count, rng=rng))
        for headline in wrong:
            wrong[headline] += any(r.verdict in ("higher", "lower") for r in rows if r.is_primary == headline)
    assert max(wrong.values()) / 400 <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    assert paired_differences(simulated(count, 8, effect=0.05, rng=rng))[0].verdict == "higher"


def test_report_says_the_same_in_all_three(tmp_path):
    nasty = "größe,\n<b>$x$|*&\"'"
    trial_list = [
        make_trial(n, s, 0.5 + 0.01 * s * len(n), tokenizer=nasty, curve=CURVE)
        for n in ("_a_", "pïm 木")
        for s in range(3)
    ]
    trial_list += [
        make_trial("_a_", s, None, tokenizer="pixels", status="failed", budgets=("equal compute",)) for s in range(2)
    ]
    notes = ["Leans on <labels>."]
    markdown, html, table = report_texts(
        study(trial_list, notes=notes, baselines={"untrained": {"knn": 0.34}, "x": {"knn": float("nan")}}), tmp_path
    )
    page = Reader(html)
    assert len(set(page.ids)) == len(page.ids) > 0 and html.count("<figure>") == 4
    for text in (page.text.replace("\n", " "), markdown.replace("\\", "")):
        for piece in (nasty.replace("\n", " "), "_a_", "pïm 木", "untrained", "0.340", "out, of <memory>", *notes):
            assert piece in text
        assert "nan" not in text.lower()
    assert "<labels>" not in html and "<b>$x" not in html and "url(http" not in html
    rows = list(csv.DictReader(table.splitlines(keepends=True)))
    assert [(row["tokenizer"], int(row["seed"])) for row in rows] == [
        (c.factors["tokenizer"], c.seed) for c in trial_list
    ]
    assert [float(row["logistic"]) for row in rows[:6]] == [c.scores["logistic"] for c in trial_list[:6]]
    assert (rows[-1]["logistic"], rows[-1]["reason"]) == ("", "out, of <memory>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.html", "report.md"]


@pytest.mark.parametrize(
    ("trial_list", "expected"),
    [
        ([], "No run has finished"),
        ([make_trial("mapet", 0, None, status="not run")], "No run has finished"),
        ([make_trial("mapet", seed, 0.5) for seed in range(3)], "there are no pairs to test"),
        (
            [make_trial(name, 0, 0.5) for name in ("mapet", "pim")],
            "One seed: no interval and no test, so no difference between",
        ),
        ([make_trial(name, seed, 0.5) for name in ("mapet", "pim") for seed in (0, 1)], "no spread and no test"),
        ([make_trial(name, seed, float("nan")) for name in ("mapet", "pim") for seed in (0, 1)], "no pairs to test"),
    ],
)
def test_report_of_little(trial_list, expected, tmp_path):
    for text in report_texts(study(trial_list), tmp_path)[:2]:
        assert expected in text and "nan" not in text.lower()


def test_an_ambiguous_study_is_refused():
    with refused("mapet"):
        study([make_trial("mapet", 0, 0.5), make_trial("mapet", 0, 0.6)])
