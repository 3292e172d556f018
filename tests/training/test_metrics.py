"""Progress that a run shows: a few lines that stay in place on a terminal, log lines elsewhere."""

import io
from itertools import pairwise

import pytest

from mapet.training.metrics import ProgressDisplay
from mapet.training.tasks.pretraining import PretrainingTask
from mapet.training.trainer import is_log_step

METRICS = {
    "loss": 2.5, "unigram_entropy": 3.5, "token_accuracy": 0.31, "majority_token_accuracy": 0.29, "images_per_second": 386.0,
    "data_time_fraction": 0.04, "epoch": 3.0,
}  # fmt: skip
LEARNING = "loss 2.500 (unigram 3.500), accuracy 31.0% (majority 29.0%)"
SPEED = "386 img/s, data wait 4%"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal(caplog, monkeypatch):
    screen = Terminal()
    with caplog.at_level("INFO", "mapet"):
        with ProgressDisplay(PretrainingTask(), 10, 4, screen) as panel:
            panel.update()
            monkeypatch.setattr("mapet.training.metrics.time.monotonic", lambda: panel._started + 10)
            panel.log_scores(3, {"probe/logistic": 0.5, "probe/knn": 0.25})
            panel.log_metrics(METRICS, epoch_ended=True)
            shown = [line.desc for line in panel.lines]
        assert shown == [f"  {LEARNING}", f"  {SPEED}; epoch 3: linear probe 0.500, k-NN 0.250"]
        assert all(len(line) < 80 for line in shown)
        assert "5/10" in screen.getvalue() and all(line in screen.getvalue() for line in shown)
    assert caplog.messages == [
        "epoch 3: linear probe 0.500, k-NN 0.250",
        f"epoch 3 (1 of 2 steps): {LEARNING}, {SPEED}, 50 s left",  # it was resumed within the epoch
    ]


def test_elsewhere(caplog, monkeypatch):
    plain = io.StringIO()
    with caplog.at_level("INFO", "mapet"), ProgressDisplay(PretrainingTask(), 1000, 0, plain) as panel:
        monkeypatch.setattr("mapet.training.metrics.time.monotonic", lambda: panel._started + 60)
        for _ in range(100):
            panel.update()
        panel.log_metrics(METRICS, epoch_ended=False)
        panel.log_metrics(METRICS, epoch_ended=True)
    assert caplog.messages == [f"epoch 3: {LEARNING}, {SPEED}, 9 min left"]
    assert plain.getvalue() == ""


def test_nothing_is_left_at_the_end(caplog):
    with caplog.at_level("INFO", "mapet"), ProgressDisplay(PretrainingTask(), 1, 0, io.StringIO()) as panel:
        panel.update()
        panel.log_metrics(METRICS, epoch_ended=True)
    assert caplog.messages == [f"epoch 3: {LEARNING}, {SPEED}"]


def test_an_epoch_s_line_has_the_means_of_its_steps(caplog):
    """2 steps, 1 step, and 1 non-finite; the next epoch starts from zero."""
    epoch = (((2, 4.0, 0.1), (1, 1.0, 0.4), (1, float("nan"), float("nan"))), ((4, 0.5, 0.5),))
    with caplog.at_level("INFO", "mapet"), ProgressDisplay(PretrainingTask(), 8, 0, io.StringIO()) as panel:
        for windows in epoch:
            for steps, loss, accuracy in windows:
                for _ in range(steps):
                    panel.update()
                window = METRICS | {"loss": loss, "token_accuracy": accuracy}
                panel.log_metrics(window, epoch_ended=loss is windows[-1][1])
    assert ["loss 3.000" in line and "accuracy 20.0%" in line for line in caplog.messages] == [True, False]
    assert "loss 0.500" in caplog.messages[1] and "accuracy 50.0%" in caplog.messages[1]


@pytest.mark.parametrize(("steps", "most", "lengths"), [(13, 3, {2, 3}), (12, 3, {3}), (3, 5, {3}), (7, 1, {1})])
def test_figures_are_of_even_parts_of_an_epoch(steps, most, lengths):
    ends = [step for step in range(1, 2 * steps + 1) if is_log_step(step, steps, most)]
    assert steps in ends and 2 * steps in ends
    assert {b - a for a, b in pairwise([0, *ends])} == lengths
