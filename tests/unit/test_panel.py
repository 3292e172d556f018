"""What a run shows while it goes on: a few lines that stay in place on a terminal, log lines elsewhere."""

import io

from mapet.training.panel import Panel

METRICS = {
    "loss": 2.5, "token_entropy": 3.5, "token_accuracy": 0.31, "commonest_token": 0.29, "images_per_second": 386.0,
    "data_wait": 0.04, "epoch": 3.0,
}  # fmt: skip
LEARNING = "loss 2.500 (by frequency 3.500), accuracy 31.0% (commonest 29.0%)"
SPEED = "386 img/s, data wait 4%"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal(caplog, monkeypatch):
    screen = Terminal()
    with caplog.at_level("INFO", "mapet"):
        with Panel(10, 4, screen) as panel:
            panel.advance()
            monkeypatch.setattr("mapet.training.panel.time.monotonic", lambda: panel._started + 10)
            panel.probed(3, {"probe/linear": 0.5, "probe/knn": 0.25})
            panel.show(METRICS, epoch_ended=True)
            shown = [line.desc for line in panel.lines]
        assert shown == [f"  {LEARNING}", f"  {SPEED}; epoch 3: linear probe 0.500, k-NN 0.250"]
        assert all(len(line) < 80 for line in shown)
        assert "5/10" in screen.getvalue() and all(line in screen.getvalue() for line in shown)
    assert caplog.messages == [
        "epoch 3: linear probe 0.500, k-NN 0.250, on images held out of the training images",
        f"epoch 3: {LEARNING}, {SPEED}, 50 s left",
    ]


def test_elsewhere(caplog, monkeypatch):
    plain = io.StringIO()
    with caplog.at_level("INFO", "mapet"), Panel(1000, 0, plain) as panel:
        monkeypatch.setattr("mapet.training.panel.time.monotonic", lambda: panel._started + 60)
        for _ in range(100):
            panel.advance()
        panel.show(METRICS, epoch_ended=False)
        panel.show(METRICS, epoch_ended=True)
    assert caplog.messages == [f"epoch 3: {LEARNING}, {SPEED}, 9 min left"]
    assert plain.getvalue() == ""


def test_nothing_is_left_at_the_end(caplog):
    with caplog.at_level("INFO", "mapet"), Panel(1, 0, io.StringIO()) as panel:
        panel.advance()
        panel.show(METRICS, epoch_ended=True)
    assert caplog.messages == [f"epoch 3: {LEARNING}, {SPEED}"]
