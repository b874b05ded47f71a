"""The report as text."""

from __future__ import annotations

import pytest

from jaxpeft.evaluate.report import table


def test_a_table_is_aligned():
    assert table(["name", "x"], [["a", "12"], ["longer", "3"]]) == [
        "name     x",
        "a       12",
        "longer   3",
    ]


def test_a_label_cannot_break_a_line_or_control_the_terminal():
    assert table(["class"], [["a\n\x1b[31mred"]]) == ["class", "a\\u000a\\u001b[31mred"]


@pytest.mark.slow
def test_rows_are_shown_on_demand(trained, evaluate):
    run = trained("answers")
    common = ("--adapter", run.folder, "--data", run.rows, "--against=base")
    common = (*common, "--metrics=exact_match", "--max-new-tokens=4")
    _, shown = evaluate(*common, "--show=2")
    assert shown.count("test.jsonl:") == 2 + 2 and "    base: " in shown
    _, none = evaluate(*common, "--show=0")
    assert "worst rows" not in none and "test.jsonl:" not in none
    assert "(sign test p" in none and "(McNemar p" in none
