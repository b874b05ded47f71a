"""CSV and TSV: what is read, and the text of every refusal."""

from __future__ import annotations

import pytest

from jaxpeft.data.rows.read import read_rows
from jaxpeft.errors import DataError


def message(path: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return [line.replace(path, "F") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize(
    "content",
    ["text,label\na,x\nb,y\n", "text,label\r\na,x\r\nb,y", "\ufefftext,label\na,x\nb,y\n\n\n"],
    ids=["plain", "CRLF, no newline at the end", "BOM, blank lines at the end"],
)
def test_csv_is_read(write, content):
    rows = read_rows(write("a.csv", content))
    assert rows.records == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    assert rows.lines == (2, 3)


def test_quoted_fields_keep_their_newlines_and_the_line_numbers_stay_right(write):
    rows = read_rows(write("a.csv", 'text,label\n"a, ""b""\nc",x\nd,y\n'))
    assert [r["text"] for r in rows.records] == ['a, "b"\nc', "d"]
    assert rows.lines == (2, 4)


def test_tsv_is_read(write):
    assert read_rows(write("a.tsv", "text\tlabel\na, b\tx\n")).records == [
        {"text": "a, b", "label": "x"}
    ]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            "text,text\na,b\n",
            "F:1:6: the header names 'text' twice: 'text,text'; rename one of them",
        ),
        ('"text,label\na,b\n', "F:1:1: broken quoting (unexpected end of data); close the quotes"),
        ("\ntext,label\n", "F:1:1: the first line is blank; start with the header"),
        (",\na,b\n", "F:1:1: the first line is blank; start with the header"),
        (
            "text,label\na,b,c\n",
            "F:2:1: 3 fields, but the header has 2 (text, label): 'a,b,c'; quote fields",
        ),
        (
            "text,label\na,b\nc",
            "F:3:1: 1 fields, but the header has 2 (text, label): 'c'; quote fields",
        ),
        ("text,label\n\na,b\n", "F:2:1: blank line; remove it"),
        (
            'text,label\na,b\n"c,d\n',
            "F:3:1: broken quoting (unexpected end of data); close the quotes",
        ),
        (
            'text,label\n"a"b,c\n',
            "F:2:1: broken quoting (',' expected after '\"'); close the quotes",
        ),
        (
            b"text,label\ncaf\xe9,x\n",
            "F:2:4: not UTF-8 (byte 0xe9): 'caf\ufffd,x'; set data.encoding",
        ),
        ("text,label\n", "F:1:1: the file has no rows"),
    ],
)
def test_csv_is_refused(write, content, fault):
    (said,) = message(write("a.csv", content))
    assert said.startswith(fault)


def test_all_problems_are_listed_at_once(write):
    said = message(write("a.csv", "text,label\na\nb,y\n\nc,d,e\n"))
    assert [line.split(":")[1] for line in said] == ["2", "4", "5"]
