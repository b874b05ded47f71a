"""`hold_out` and `hold_out_text`."""

from __future__ import annotations

import pytest

from jaxpeft.data import Columns, Rows, hold_out, hold_out_text
from jaxpeft.errors import DataError


def rows_of(*texts: str) -> Rows:
    return Rows(
        [{"text": text} for text in texts], "rows.jsonl", "0" * 64, tuple(range(1, len(texts) + 1))
    )


def test_the_two_parts_are_the_whole_in_the_order_of_the_file() -> None:
    rows = rows_of(*(f"text {i}" for i in range(20)))
    train, held = hold_out(rows, 0.2, 3)
    assert (len(train), len(held)) == (16, 4)
    assert sorted(r["text"] for r in train.records + held.records) == sorted(
        r["text"] for r in rows.records
    )
    assert [r["text"] for r in held.records] == sorted(
        (r["text"] for r in held.records), key=lambda t: int(t[5:])
    )
    assert len({rows.sha256, train.sha256, held.sha256}) == 3


def test_the_seed_decides() -> None:
    rows = rows_of(*(f"text {i}" for i in range(40)))
    assert hold_out(rows, 0.2, 1)[1].records == hold_out(rows, 0.2, 1)[1].records
    assert hold_out(rows, 0.2, 1)[1].records != hold_out(rows, 0.2, 2)[1].records


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(
        DataError, match=r"rows.jsonl: 1 rows are too few to hold out 10% for validation"
    ):
        hold_out(rows_of("alone"), 0.1, 0)


def test_many_documents_are_drawn_like_rows() -> None:
    rows = rows_of(*(f"text {i}" for i in range(20)))
    assert hold_out_text(rows, 0.2, 3, Columns())[1].records == hold_out(rows, 0.2, 3)[1].records


def test_the_end_of_a_single_document_is_held_out_from_a_line_on() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    train, held = hold_out_text(rows_of(text), 0.1, 0, Columns())
    first, second = train.records[0]["text"], held.records[0]["text"]
    assert first + second == text
    assert second.startswith("line 9")
    assert 0.05 < len(second) / len(text) < 0.15
    assert train.name != held.name
    assert train.sha256 != held.sha256


def test_a_document_without_lines_is_cut_all_the_same() -> None:
    train, held = hold_out_text(rows_of("abcdefghij" * 10), 0.1, 0, Columns())
    assert (len(train.records[0]["text"]), len(held.records[0]["text"])) == (90, 10)


def test_a_document_too_short_is_named() -> None:
    with pytest.raises(
        DataError, match=r"rows.jsonl:2:1 \(row 2\): too short to hold out 10% of it"
    ):
        hold_out_text(rows_of("abcdefghij" * 10, "a"), 0.1, 0, Columns())
