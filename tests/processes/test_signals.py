"""Requests to stop: noted once, however often the sender repeats them at once; a later one acts as
usual.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator

import pytest

from jaxpeft.processes import signals
from jaxpeft.processes.signals import Stopped, StopRequest


def test_a_request_that_comes_twice_at_once_is_one_request() -> None:
    with StopRequest() as stop:
        assert not stop.requested
        for _ in range(2):  # as coreutils' timeout sends it: to the process, and to its group
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped:
            stop.raise_if_requested()
    assert stopped.value.exit_code == 143


@pytest.fixture
def interruptible() -> Generator[None]:
    """A shell that starts a program in the background has it ignore SIGINT: here it is as in the
    foreground.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_request_later_acts_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_REPEATED", 1e-9)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_was_set_before_is_set_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def told(seconds: float, wait: float, signum: int | None = None) -> list[object]:
    """Wait for a while, with a signal or without, and return what was called meanwhile and a little
    later.
    """
    calls: list[object] = []
    with StopRequest():
        with signals.listen_while_waiting(seconds, lambda: calls.append("late"), calls.append):
            if signum is not None:
                os.kill(os.getpid(), signum)
            time.sleep(wait)
        time.sleep(0.05)
    return calls


def test_a_signal_is_heard_of_by_a_thread_while_this_one_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "_JUST_OVER", 0.05)
    assert told(10, 0.5, signal.SIGTERM) == [signal.SIGTERM]
    assert told(10, 0.5, signal.SIGINT) == [signal.SIGINT]


def test_one_that_comes_as_the_waiting_ends_is_left_to_the_handlers() -> None:
    assert told(10, 0.0, signal.SIGTERM) == []


def test_what_takes_too_long_is_told_once() -> None:
    assert told(0.1, 0.4) == ["late"]
    assert told(10, 0.1) == []


def test_nothing_else_listens_once_the_waiting_is_over() -> None:
    told(10, 0.0)
    assert signal.set_wakeup_fd(-1) == -1
