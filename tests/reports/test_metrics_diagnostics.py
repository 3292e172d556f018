"""Warnings of a run: each fires on its own problem, and not on a good run."""

from pathlib import Path

import pytest

from mapet.reports.metrics import History, RunSummary, advise_to_evaluate, diagnose

STEPS = 40


def make_history(records):
    made = History(Path("metrics.jsonl"))
    for record in records:
        made.add(record)
    return made


def history(**metrics):
    return make_history(records_of(**metrics))


def records_of(**metrics):
    """A run of 40 records over 20 epochs that learns, with some metrics replaced: numbers or functions of the record's place, 0 to 1."""
    well = {
        "loss": lambda t: 3.0 - 1.5 * t,
        "unigram_entropy": 3.4,
        "token_accuracy": lambda t: 0.1 + 0.4 * t,
        "majority_token_accuracy": 0.1,
        "grad_norm": 1.0,
        "skipped_steps": 0,
        "images_per_second": 400,
        "data_time_fraction": 0.03,
    }
    records = []
    for i in range(STEPS):
        t = i / (STEPS - 1)
        record = {name: value(t) if callable(value) else value for name, value in (well | metrics).items()}
        records.append({"step": 10 * (i + 1), "epoch": (i + 1) / 2, **record})
    return records


def with_probes(*scores):
    probes = [{"step": 80.0 * (i + 1), "probe/logistic": score} for i, score in enumerate(scores)]
    return make_history(sorted([*records_of(), *probes], key=lambda record: record["step"]))


def evaluated(metric, value, ci_low):
    verdict = {
        "metric": metric,
        "control": "raw pixels",
        "value": value,
        "control_value": 0.247,
        "ci_low": ci_low,
        "ci_high": 0.1,
    }
    return {"verdicts": [verdict | {"is_ahead": ci_low > 0}]}


HEALTH = {"num_used_codes": 60, "num_dead_codes": 4, "top_code_fraction": 0.2}


def subject(records, health=HEALTH, probe={}):
    return RunSummary(records, {"clip_grad": 3.0, "epochs": 20}, health, probe)


FIRES = {
    "accuracy_at_baseline": (subject(history(token_accuracy=0.101)), "10.1%, and always predicting the most frequent token scores 10.0%"),
    "loss_at_baseline": (subject(history(loss=3.39)), "3.390 against 3.400 nats"),
    "loss_rises": (subject(history(loss=lambda t: 2.0 if t < 0.7 else 2.6)), "The loss rose again to 2.600 after a minimum of 2.000"),
    "skipped_steps": (subject(history(skipped_steps=lambda t: round(3 * t))), "3 of 400 steps were skipped"),
    "slow_data_loading": (subject(history(data_time_fraction=0.4)), "waits for images 40% of the time: try more data-loading workers"),
    "slowdown": (subject(history(images_per_second=lambda t: 400 if t < 0.7 else 100)), "from 400 to 100 images/s"),
    "mostly_clipped": (subject(history(grad_norm=9.0)), "larger than clip_grad 3 in 100% of the later records (median norm 9)"),
    "probe_falls": (subject(with_probes(0.4, 0.6, 0.5)), "fell from 0.600 at step 160 to 0.500"),
    "probe_stands_still": (subject(with_probes(0.4, 0.395, 0.4)), "does not improve: 0.400 at first, 0.400 at last"),
    "not_ahead_of_control": (subject(history(), probe=evaluated("knn", 0.26, -0.01)), "by knn, raw pixels: 0.260 against 0.247"),
    "too_easy": (subject(history(token_accuracy=0.97)), "97.0% of the tokens are predicted"),
    "dead_codes": (subject(history(), HEALTH | {"num_used_codes": 30, "num_dead_codes": 34}), "34 of 64 codes are dead"),
    "dominant_code": (subject(history(), HEALTH | {"top_code_fraction": 0.7}), "70% of the patches have the same token"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_fires(name):
    run, sentence = FIRES[name]
    assert any(sentence in result for result in diagnose(run))


def test_is_silent_on_a_run_that_goes_well():
    assert diagnose(subject(with_probes(0.4, 0.5, 0.6), probe=evaluated("logistic", 0.4, 0.1))) == []


def test_is_silent_where_nothing_is_known():
    empty = History(Path("metrics.jsonl"))
    assert diagnose(RunSummary(empty, {}, {})) == []
    pixels = records_of()  # where pixels are predicted there are no tokens
    token_metrics = ("unigram_entropy", "token_accuracy", "majority_token_accuracy")
    records = [{name: value for name, value in record.items() if name not in token_metrics} for record in pixels]
    assert diagnose(RunSummary(make_history(records), {"epochs": 20}, {})) == []


def test_too_few_steps_come_before_the_learning_rate():
    """And the command beside is one that can be typed."""
    at_baseline = records_of(token_accuracy=0.1, loss=3.5)
    many = [record | {"step": 10 * record["step"]} for record in at_baseline]
    recipe = {"epochs": 20, "tokenizer": "runs/a/tokenizer", "images": "my photos"}
    for records, message in (
        (at_baseline, "The run has only 400 steps so far: give it more epochs or"),
        (many, ". Try more epochs or"),
    ):
        result = diagnose(RunSummary(make_history(records), recipe, {}))[0]
        assert (
            message in result and "`mapet inspect-tokenizer runs/a/tokenizer --images 'my photos' --out NEW`" in result
        )


def test_without_labels_a_finished_run_is_not_evaluated():
    assert "There were no labels" in advise_to_evaluate(subject(history()))
    without_probes = RunSummary(history(), {"epochs": 20, "probe_every": 0}, {})
    assert "probe_every 0" in advise_to_evaluate(without_probes)
    epochs = 20 + 0.4 / history().steps_per_epoch  # no step more
    assert "There were no labels" in advise_to_evaluate(RunSummary(history(), {"epochs": epochs}, {}))
    for summary in (
        subject(with_probes(0.4)),
        subject(history(), probe=evaluated("logistic", 0.4, 0.1)),
        RunSummary(history(), {"epochs": 21}, {}),
    ):
        assert advise_to_evaluate(summary) == ""


def test_the_first_tenth_of_a_run_may_be_at_the_baseline():
    """A warm-up is no failure."""
    early = history(token_accuracy=0.1, loss=3.5)
    assert diagnose(RunSummary(early, {"epochs": 300}, {})) == []
    assert len(diagnose(RunSummary(early, {"epochs": 20}, {}))) == 2


def test_with_many_codes_the_majority_baseline_is_small():
    """The most frequent of 8,192 tokens has 0.5 % of the patches: 0.9 % accuracy is above it."""
    assert diagnose(subject(history(token_accuracy=0.009, majority_token_accuracy=0.005))) == []
