"""What a run says: lines where there is no terminal, a bar on one, nothing where nothing is
wanted.
"""

from __future__ import annotations

import logging
import sys

import pytest

from jaxpeft.train import progress


def steps(kind: str) -> None:
    shown = progress.StepProgress(kind, "lora", total=4, done=2)
    for step in (3, 4):
        shown.update(step, f"loss {step}.0")
    shown.close()


def test_without_a_terminal_a_line_a_step(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO):
        steps("auto")
    assert [line.split("  ")[:2] for line in caplog.messages] == [
        ["lora step 3/4", "loss 3.0"],
        ["lora step 4/4", "loss 4.0"],
    ]
    assert caplog.messages[-1].endswith("0:00 left")


def test_a_bar_shows_the_steps_and_logs_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        steps("bar")
    assert caplog.messages == []
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "loss 4.0" in shown


def test_off_says_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        steps("off")
    assert (caplog.messages, capsys.readouterr().err) == ([], "")


def test_rows_are_shown_only_by_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.row_progress("plain", "tokenizing") as shown:
        assert shown is None
    with progress.row_progress("bar", "tokenizing") as shown:
        assert shown is not None
        shown(5, 10)
    capsys.readouterr()


def test_memory_is_known() -> None:
    assert 0.05 < progress.memory_gb() < 1000
