"""What long steps say: what is being done, what came of it, and how long it took."""

from __future__ import annotations

import logging
import re

import pytest

from jaxpeft.logs import StderrHandler, log_time


def test_a_step_says_what_it_does_and_then_how_long_it_took(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), log_time("tokenizing") as note:
        assert caplog.messages == ["tokenizing ..."]
        note("7 rows")
    assert re.fullmatch(r"tokenizing: 7 rows, 0\.\d s", caplog.messages[1])


def test_a_step_that_fails_says_no_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(OSError, match="gone"), log_time("reading"):
        raise OSError("gone")
    assert caplog.messages == ["reading ..."]


def test_a_log_line_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord(
        "jaxpeft", logging.INFO, "", 1, "%s: 2 rows", ("a\x1b[2J.csv",), None
    )
    StderrHandler().emit(record)
    assert capsys.readouterr().err == "a\\u001b[2J.csv: 2 rows\n"
