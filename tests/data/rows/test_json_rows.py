"""Where the rows of a JSON file are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxpeft.data.rows.file_options import FileOptions
from jaxpeft.data.rows.read import read_rows
from jaxpeft.errors import DataError

ROWS = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


@pytest.mark.parametrize(
    ("value", "note"),
    [
        ({"data": ROWS}, "rows under 'data'"),
        ({"version": "1.1", "note": {"by": "me"}, "data": ROWS}, "rows under 'data'"),
        ({"result": {"rows": ROWS, "n": 2}}, "rows under 'result.rows'"),
        ({"17": ROWS[0], "18": ROWS[1]}, "each value of the object is a row, the keys are dropped"),
        ({"text": ["a", "b"], "label": ["x", "y"]}, "column by column"),
        (
            {"columns": ["text", "label"], "index": [0, 1], "data": [["a", "x"], ["b", "y"]]},
            "under 'data', named by 'columns'",
        ),
        ({"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}, "column by column"),
    ],
)
def test_rows_are_found_and_told(write: Any, value: Any, note: str) -> None:
    rows = read_rows(write("x.json", json.dumps(value)))
    assert rows.records == ROWS
    assert rows.notes == (f"{rows.name}: {note}, encoding utf-8",)


def test_one_object_a_line_is_read_whatever_it_is_called(write: Any) -> None:
    for name in ("x.json", "x.ndjson"):
        rows = read_rows(write(name, "".join(json.dumps(row) + "\n" for row in ROWS)))
        assert (rows.records, rows.lines) == (ROWS, (1, 2))


def test_where_several_could_be_meant_an_option_says_which(write: Any) -> None:
    path = write("x.json", json.dumps({"train": ROWS, "test": ROWS[:1], "other": {"deep": ROWS}}))
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert (
        str(caught.value)
        == f"{path}: rows could be under train, test, other.deep; choose one with data.field, such as"
        " data.field='train'"
    )
    assert read_rows(path, file_options=FileOptions(field="test")).records == ROWS[:1]
    assert read_rows(path, file_options=FileOptions(field="other.deep")).records == ROWS
    with pytest.raises(
        DataError, match=r"data\.field 'other\.dep': no 'dep' under 'other'; did you mean 'deep'"
    ):
        read_rows(path, file_options=FileOptions(field="other.dep"))


@pytest.mark.parametrize(
    ("value", "likely"),
    [
        ({"schema": {"fields": [{"name": "text", "type": "string"}] * 3}, "data": ROWS}, "data"),
        ({"meta": [{"by": "me"}], "items": {"rows": [{"Text": "a"}]}}, "items.rows"),
        ({"few": [{"a": 1}], "many": [{"a": 1}, {"a": 2}]}, "many"),
    ],
)
def test_the_list_that_likely_holds_the_rows_is_suggested(
    write: Any, value: Any, likely: str
) -> None:
    with pytest.raises(DataError, match=f"such as data.field='{likely}'"):
        read_rows(write("x.json", json.dumps(value)))


def test_names_of_columns_beside_rows_of_another_length_are_no_table(write: Any) -> None:
    with pytest.raises(DataError, match="not a JSON list"):
        read_rows(
            write("x.json", json.dumps({"columns": ["text", "label"], "data": [["a", "x"], ["b"]]}))
        )


@pytest.mark.parametrize(("value", "indent"), [(ROWS, None), (ROWS, 1), ({"data": ROWS}, 2)])
def test_one_value_in_a_file_of_lines_is_told(write: Any, value: Any, indent: int | None) -> None:
    path = write("x.jsonl", json.dumps(value, indent=indent) + "\n")
    with pytest.raises(DataError, match=r"name the file \.json if it contains a single value"):
        read_rows(path)
    assert read_rows(write("x.json", json.dumps(value, indent=indent))).records == ROWS


def test_values_inside_of_objects_are_columns_by_their_dotted_names(write: Any) -> None:
    row = {"review": {"body": "a", "stars": [{"n": 4}, {"n": 5}]}, "a.b": 1, "a": {"b": 2}}
    for name in ("x.json", "x.jsonl"):
        path = write(name, json.dumps([row]) if name == "x.json" else json.dumps(row) + "\n")
        rows = read_rows(
            path,
            file_options=FileOptions(
                columns=("review.body", "review.stars.1.n", "a.b", "review.no", "label")
            ),
        )
        assert rows.records == [row | {"review.body": "a", "review.stars.1.n": 5}]


@pytest.mark.parametrize(
    ("inside", "column", "said"),
    [
        ("9" * 5000, 11, "an integer with 5000 digits"),
        ("-" + "9" * 5000, 11, "an integer with 5000 digits"),
        (
            "[" * 1000 + "]" * 1000,
            10 + 100,
            "not supported JSON (nested too deeply, over 100 levels)",
        ),
        (
            '{"a":' * 1000 + "1" + "}" * 1000,
            11 + 5 * 99,
            "not supported JSON (nested too deeply",
        ),
    ],
)
def test_numbers_and_nesting_without_end_are_refused_with_their_place(
    write: Any, inside: str, column: int, said: str
) -> None:
    line = '{"label": ' + inside + ', "text": "[[{{"}'
    path = write("x.jsonl", f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2:{column}: {said}")
    assert len(str(caught.value)) < 500
    with pytest.raises(
        DataError, match=r"x\.json:2:"
    ) as caught:  # whose list is a level of its own
        read_rows(write("x.json", f"[\n{line}\n]"))
    assert said in str(caught.value)


def test_brackets_in_texts_are_no_nesting(write: Any) -> None:
    text = '[{"' * 500
    assert read_rows(write("x.jsonl", json.dumps({"text": text}) + "\n")).records == [
        {"text": text}
    ]
