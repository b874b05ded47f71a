"""Tables as people have them: delimiters, quotes, headers; what is found, what is told, and what is
refused.
"""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from jaxpeft.data.rows.file_options import FileOptions
from jaxpeft.data.rows.read import Rows, read_rows
from jaxpeft.data.rows.row_streams import RowStream
from jaxpeft.errors import DataError

GOOD = [("a fine, good film", "pos"), ("awful; really", "neg"), ("plain", "pos")]


def table(delimiter: str, rows: Any = GOOD, **options: Any) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator="\n", **options).writerows(
        [("text", "label"), *rows]
    )
    return out.getvalue()


def read(path: str, **file_options: Any) -> Rows:
    """Read a file whole and as a stream, which are the same."""
    rows = read_rows(path, file_options=FileOptions(**file_options))
    stream = RowStream(path, "train", file_options=FileOptions(**file_options)).rows(0, 99)
    assert (stream.records, stream.lines) == (rows.records, rows.lines)
    return rows


def refusal(path: str, **file_options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, file_options=FileOptions(**file_options))
    with pytest.raises(DataError) as streamed:
        RowStream(path, "train", file_options=FileOptions(**file_options)).rows(0, 99)
    assert str(streamed.value) == str(caught.value)
    return str(caught.value).removeprefix(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_the_delimiter_is_found_and_told(write: Any, name: str, delimiter: str) -> None:
    rows = read(write(name, table(delimiter)))
    assert [tuple(record.values()) for record in rows.records] == GOOD
    assert f"delimiter {delimiter!r}" in rows.notes[0]


def test_a_delimiter_is_found_where_texts_hold_others_and_unusual_names(write: Any) -> None:
    rows = read(write("x.csv", 'tekst;razred\n"a, b, c";x\nd, e, f;y\n"g\n, h";x\n'))
    assert rows.records[1] == {"tekst": "d, e, f", "razred": "y"}
    assert read(write("x.csv", "text;score\nfine;0,5\nbad;0,25\n")).records[0] == {
        "text": "fine",
        "score": "0,5",
    }
    assert read(write("x.csv", "sep=|\ntext|label\na|x\n")).records == [{"text": "a", "label": "x"}]
    assert read(write("x.csv", "text:label\na, b:x\n"), delimiter=":").records == [
        {"text": "a, b", "label": "x"}
    ]


def test_a_single_column_has_no_delimiter(write: Any) -> None:
    assert [r["text"] for r in read(write("x.csv", 'text\n"a; b"\nc; d\n')).records] == [
        "a; b",
        "c; d",
    ]
    assert ":2:1: 2 fields, but the header has 1 (text)" in refusal(
        write("x.csv", "text\na, b\nc\n")
    )
    assert ":3:1: 3 fields, but the header has 2 (text, label)" in refusal(
        write("x.csv", "text;label\na;x\nb;c;y\n")
    )


BARE = 'text\tlabel\n"Good" he said\tpos\n"Hi\tneg\nsay "hi"\tpos\nend"\tneg\n'


def test_a_quote_in_a_tsv_joins_no_rows(write: Any) -> None:
    rows = read(write("x.tsv", BARE))
    assert [r["text"] for r in rows.records] == ['"Good" he said', '"Hi', 'say "hi"', 'end"']
    assert rows.lines == (2, 3, 4, 5)
    assert "quotes are ordinary characters" in rows.notes[0]


WRITTEN = [("a\tb", "pos"), ('say "hi"', "neg"), ("two\nlines", "pos"), ("plain", "neg")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_tsv_that_a_program_has_quoted_is_read_as_it_was_written(
    write: Any, quoting: int
) -> None:
    rows = read(write("x.tsv", table("\t", WRITTEN, quoting=quoting)))
    assert [tuple(record.values()) for record in rows.records] == WRITTEN
    assert rows.lines == (2, 3, 4, 6)
    assert "fields may be quoted" in rows.notes[0]


@pytest.mark.parametrize(
    "rows", [[('say "hi"', "neg"), ("plain", "pos")], [("a\tb", "x")], [("a", "x"), ("b", "y")]]
)
def test_each_reason_to_quote_is_seen_alone(write: Any, rows: list[tuple[str, str]]) -> None:
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        found = read(write("x.tsv", table("\t", rows, quoting=quoting)))
        assert [tuple(record.values()) for record in found.records] == rows


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('text\tlabel\n"good food\tp\nbad food"\tn\nfine\tp\n', 2),
        ('text\tlabel\nfine\tp\n"good food"\tp\nbad\tn\n', 3),
        ('text\n"one\ntwo"\n', 2),
    ],
    ids=["rows that would be joined", "one field in quotes", "one column"],
)
def test_quotes_that_may_mean_either_are_refused_and_an_option_says_which(
    write: Any, content: str, line: int
) -> None:
    path = write("x.tsv", content)
    assert refusal(path).startswith(f":{line}:1: a field starts with a quote: ")
    assert "set data.quoting='none' if quotes are ordinary characters, or 'quoted'" in refusal(path)
    assert len(read(path, quoting="none")) == content.count("\n") - 1
    assert any('"' in record["text"] for record in read(path, quoting="none").records)
    assert not any('"' in record["text"] for record in read(path, quoting="quoted").records)


def test_a_tsv_that_mixes_both_ways_is_refused_with_the_line(write: Any) -> None:
    said = refusal(write("x.tsv", 'text\tlabel\n"a\tb"\tpos\n"Good" he said\tneg\nc\tpos\n'))
    assert (
        said
        == ":2:1: the number of fields differs from the first line: here if quotes are ordinary"
        " characters, in line 3 if quotes enclose fields; write all rows in one way, and set"
        " data.quoting to 'none' or 'quoted'"
    )


def test_a_csv_without_quoting_is_read_where_that_is_said(write: Any) -> None:
    path = write("x.csv", 'text,label\n"Good" he said,x\nfine,y\n')
    assert "or set data.quoting='none' if quotes are ordinary characters" in refusal(path)
    assert read(path, quoting="none").records[0] == {"text": '"Good" he said', "label": "x"}


def test_a_quote_far_on_in_a_streamed_tsv_is_refused_not_guessed(write: Any) -> None:
    path = write("x.tsv", "text\tlabel\n" + "plain\tx\n" * 140_000 + '"a ""b"""\ty\n')
    with pytest.raises(DataError, match="140002:1: a field starts with a quote for the first time"):
        RowStream(path, "train").rows(139_990, 99)
    assert read_rows(path).records[-1]["text"] == 'a "b"'


# ------------------------------------------------------------------------------------------ headers


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a fine film\t1\na bad film\t0\n", "'1' is a number"),
        ("good\tpos\nbad\tneg\nso so\tpos\n", "'pos' is also a value below"),
        ("one two three four five six seven eight nine\tpos\nbad\tneg\n", "is long"),
        ("gj04\t1\t\tour friends\ngj05\t0\t*\tone more\n", "'1' is a number"),
        ("4.25\ta plane\tan airplane\n", "'4.25' is a number"),
        (
            "question\twhat is it\nanswer\tso it is\nquestion\twhy\n",
            "'question' is also a value below",
        ),
    ],
)
def test_a_first_line_that_looks_like_data_is_refused_and_read_where_that_is_said(
    write: Any, content: str, why: str
) -> None:
    path = write("x.tsv", content)
    said = refusal(path)
    assert said.startswith(":1:1: the first line looks like data, not a header (")
    assert why in said
    assert (
        "set data.header to False and name the columns by number, such as data.columns.text=1"
        in said
    )
    rows = read(path, header=False)
    assert [list(record.values()) for record in rows.records] == [
        line.split("\t") for line in content.splitlines()
    ]
    assert list(rows.records[0]) == [
        str(i + 1) for i in range(content.splitlines()[0].count("\t") + 1)
    ]
    assert rows.lines[0] == 1
    assert "no header, numbered columns" in rows.notes[0]
    if len(content.splitlines()) > 1:
        assert len(read(path, header=True)) == len(rows) - 1


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("text,2019\na,1\n", ["text", "2019"]),
        ("text,label\ntext,x\n", ["text", "label"]),
        (",text,label\n0,a,x\n", ["Unnamed: 0", "text", "label"]),
        ("Unnamed: 0,text,label\n0,a,x\n", ["Unnamed: 0", "text", "label"]),
        (",0,1\n0,a,x\n", ["Unnamed: 0", "0", "1"]),
        ("0,1\na,x\n", ["0", "1"]),
        ("text,label,\na,x,\n", ["text", "label", "Unnamed: 2"]),
        ("Sentence,Sentiment\na,x\n", ["Sentence", "Sentiment"]),
    ],
)
def test_headers_of_pandas_and_others_are_headers(
    write: Any, content: str, columns: list[str]
) -> None:
    assert read(write("x.csv", content)).columns() == columns


def test_a_column_that_is_asked_for_makes_a_header(write: Any) -> None:
    path = write(
        "x.csv", "answer to all of the questions that were asked in the second part,note\na,b\n"
    )
    assert "is long" in refusal(path)
    assert len(read(path, columns=("note",))) == 1


def test_the_header_again_is_no_row(write: Any) -> None:
    said = refusal(write("x.csv", "text,label\na,x\ntext,label\nb,y\n"))
    assert (
        said
        == ":3:1: the header is repeated: 'text,label'; remove it; if the first line is a row too, set"
        " data.header to False"
    )
