"""The signals of terminals and clusters end a run in the same way; ignored signals stay ignored."""

from __future__ import annotations

import os
import signal

import pytest

from vlmlab.contracts.stops import STOPS, handled_signals
from vlmlab.train.signals import Interrupted, Signals


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_each_ends_a_run_with_its_own_code(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as found, Signals() as signals:
        os.kill(os.getpid(), number)
        signals.check()
    assert found.value.code == 128 + number and signal.getsignal(number) == before


def test_one_waits_for_the_end_of_a_step() -> None:
    with Signals() as signals:
        signals.deferred = True
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signal.SIGUSR1
        with pytest.raises(Interrupted, match="138"):
            signals.check()


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in handled_signals() and signal.SIGTERM in handled_signals()
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
    finally:
        signal.signal(signal.SIGHUP, before)
