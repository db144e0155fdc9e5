"""Which signals stop a run, and which are left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pretrain.train.signals import STOP_SIGNALS, Stopped, StopSignals


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {name: signal.getsignal(signal.Signals[name]) for name in STOP_SIGNALS}
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_a_signal_is_noted_until_the_step_has_ended(name: str) -> None:
    """SIGHUP: a connection that is lost; SIGUSR2: LSF and HTCondor; SIGXCPU: `ulimit -t`. (pycbc
    issue 2596 (2019), GaNDLF issue 432 (2023), ldmx-sw issue 1918 (2026))"""
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert stop.received == number
        assert stop.exit_code == 128 + number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_a_second_signal_stops_at_once_unless_the_system_repeats_it(name: str) -> None:
    """A shell sends SIGHUP again after the terminal has; the kernel sends SIGXCPU each second of
    CPU time after the limit (Linux, getrlimit(2))."""
    number = signal.Signals[name]
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        if name in ("SIGHUP", "SIGXCPU"):
            os.kill(os.getpid(), number)
            assert stop.exit_code == 128 + number
            number = signal.SIGTERM
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), number)
        assert stopped.value.exit_code == 128 + number


def test_a_hangup_that_nohup_has_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
