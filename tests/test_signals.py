"""Stop signals: a request first, an interruption later."""

import os
import signal
import threading

import pytest

from mapet import signals


def test_the_first_asks_a_repeated_one_is_ignored_a_later_one_interrupts(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with signals.stop_signals() as stop:
        assert not stop.signal_name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)  # as torchrun repeats it
        assert stop.signal_name == "SIGTERM"
        monkeypatch.setattr(signals, "REPEAT_GRACE_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.signal_name
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_the_caller_handles_them():
    names = []

    def work():
        with signals.stop_signals() as stop:
            names.append(stop.signal_name)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == [""]
