"""The page of methods has what the report wrote, of every method."""

from __future__ import annotations

from jaxpeft.methods import METHODS
from tests.conformance.report import OUT, Earlier, Results, tables
from tests.conformance.rows import ROWS


def test_every_method_has_a_row_in_each_table_of_the_page() -> None:
    text = OUT.read_text()
    assert Earlier.of(text).missing() == []
    assert [name for name in METHODS if f"| `{name}` |" not in text] == []


def test_every_method_has_a_row_of_the_report() -> None:
    assert METHODS.keys() - {name.partition(" ")[0] for name in ROWS} == set()


def test_what_the_page_says_of_earlier_rows_is_kept() -> None:
    text = OUT.read_text()
    kept = tables(Results(), Earlier.of(text))
    assert [line for line in kept if line not in text.splitlines()] == []
