from __future__ import annotations

import pytest

from jaxpeft.errors import nearest, show


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


def test_no_name_is_near_to_a_long_text():
    assert nearest("rnak", ["rank"]) == "; did you mean 'rank'?"
    assert nearest("rank" * 100_000, ["rank"]) == ""
