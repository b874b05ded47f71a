from __future__ import annotations

import pytest

from jaxpeft.errors import nearest, printable, show


@pytest.mark.parametrize("value", [None, True, 3, 1e-5, "x" * 78, ["a", 1]])
def test_a_short_value_is_shown_as_python_writes_it(value):
    assert show(value) == repr(value)


def test_a_long_value_is_cut_and_its_length_told():
    assert show("x" * 1_400_000) == "'" + "x" * 79 + "... (1,400,002 characters)"
    assert show(list(range(1000))).startswith("[0, 1, 2,") and len(show(list(range(1000)))) < 110
    assert show("\ud800") == "'\\ud800'"


def test_what_python_cannot_write_is_named_by_its_type():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert show(10**5000) == "int that is too large to be shown"
    assert show(deep) == "list that is too large to be shown"
    while deep:
        deep = deep[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31m\x9b1m\x00\r", "a\\u001b[31m\\u009b1m\\u0000\\u000d"),
        ("\u202egnp.exe\u2028\ud800", "\\u202egnp.exe\\u2028\\ud800"),
        ("two\tlines\n", "two\tlines\n"),
        ("\u00e9\u00a0\U0001f468\u200d\U0001f469", "\u00e9\u00a0\U0001f468\u200d\U0001f469"),
    ],
    ids=["escapes", "order", "kept", "letters"],
)
def test_text_for_a_terminal_has_no_control_characters(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable("a\nb", keep="") == "a\\u000ab"


def test_no_name_is_near_to_a_long_text():
    assert nearest("rnak", ["rank"]) == "; did you mean 'rank'?"
    assert nearest("rank" * 100_000, ["rank"]) == ""
