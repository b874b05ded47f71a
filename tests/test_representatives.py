"""What `make test` tries is there to be tried."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conformance.rows import ROWS
from tests.representatives import FULL, METHODS, left_out, mark_others


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


def alternative(parameters: str, *names: str, test: str = "test_it", slow: bool = True) -> Any:
    marks = {"alternatives": pytest.mark.alternatives(*names).mark}
    marks |= {"slow": pytest.mark.slow.mark} if slow else {}
    return SimpleNamespace(nodeid=f"{test}[{parameters}]", get_closest_marker=marks.get)


@pytest.mark.skipif(FULL, reason="JAXPEFT_TESTS=full leaves nothing out")
def test_of_alternatives_one_is_left_for_each_combination_of_the_rest() -> None:
    names = ("unrolled", "scanned")
    made = [alternative(f"{kind}-{name}", *names) for kind in "abcdefgh" for name in names]
    others = {item.nodeid for item in left_out(made)}
    kept = [item.nodeid for item in made if item.nodeid not in others]
    assert sorted(one[8] for one in kept) == list("abcdefgh")
    assert {one.split("-")[1] for one in kept} == {"unrolled]", "scanned]"}


@pytest.mark.skipif(FULL, reason="JAXPEFT_TESTS=full leaves nothing out")
def test_an_alternative_that_is_quick_or_alone_is_not_left_out() -> None:
    names = ("unrolled", "scanned")
    assert left_out([alternative("a-scanned", *names), alternative("b-unrolled", *names)]) == []
    both = [alternative(f"a-{name}", *names, slow=False) for name in names]
    assert left_out(both) == []
