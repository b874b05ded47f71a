"""What `make test` tries is there to be tried."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conformance.rows import ROWS
from tests.representatives import METHODS, mark_others


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_row_of_the_conformance_table_and_for_that_model(name: str) -> None:
    assert METHODS[name] in ROWS[name].models


def items(*ids: str, patterns: tuple[str, ...]) -> list[Any]:
    marker = pytest.mark.representatives(*patterns).mark
    return [
        SimpleNamespace(
            nodeid=f"test_it[{each}]", get_closest_marker=lambda _: marker, add_marker=slow.append
        )
        for each in ids
        for slow in [list[Any]()]
    ]


def test_others_than_the_representatives_are_slow() -> None:
    made = items("bert-1", "bert-2", "llama[0]-1", patterns=("bert-*", "*-1"))
    mark_others(made)
    assert [item.add_marker.__self__ for item in made] == [[], [], []]
    made = items("bert-1", "bert-2", patterns=("bert-2",))
    mark_others(made)
    assert [item.add_marker.__self__ for item in made] == [[pytest.mark.slow], []]


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(
        pytest.UsageError, match=r"representatives name no parameters of\n  test_it: 'roberta'"
    ):
        mark_others(items("bert", patterns=("bert", "roberta")))
