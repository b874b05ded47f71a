"""JSON and JSON lines: what is read, and the text of every refusal."""

from __future__ import annotations

import pytest

from jaxpeft.data.rows.read import read_rows
from jaxpeft.errors import DataError

GOOD = '{"text": "a", "label": "x"}\n'


def message(path: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return [line.replace(path, "F") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize(
    "content",
    [
        GOOD * 2,
        GOOD + GOOD.rstrip(),
        GOOD * 2 + "\n\n  \n",
        GOOD.replace("\n", "\r\n") * 2,
        "\ufeff" + GOOD * 2,
    ],
    ids=["plain", "no newline at the end", "blank lines at the end", "CRLF", "BOM"],
)
def test_jsonl_is_read(write, content):
    rows = read_rows(write("a.jsonl", content))
    assert rows.records == [{"text": "a", "label": "x"}] * 2
    assert rows.lines == (1, 2)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"\n", "F:2:1: blank line; remove it"),
        (
            b'{"text": "NaN", "label": NaN}\n',
            'F:2:26: NaN is not JSON: \'{"text": "NaN", "label": NaN}\'; write a finite',
        ),
        (b'{"label": -Infinity}\n', "F:2:11: -Infinity is not JSON"),
        (
            b'{"text": "caf\xe9"}\n',
            'F:2:14: not UTF-8 (byte 0xe9): \'{"text": "caf\ufffd"}\'; set data.encoding',
        ),
        (
            b'{"text": "a" "label": 1}\n',
            'F:2:14: not JSON (Expecting \',\' delimiter): \'{"text": "a" "label": 1}\'; write',
        ),
        (b"[1, 2]\n", "F:2:1: a row must be a JSON object, not a list: '[1, 2]'; write {"),
        (b'{"text": "a", "text": "b"}\n', "F:2:1: an object has the key 'text' twice"),
        (
            b'{"text": "a", "lab',
            (
                'F:2:15: not JSON (Unterminated string starting at): \'{"text": "a", "lab\'; the'
                " file does not"
            ),
        ),
        (
            b"[" * 100_000 + b"\n",
            "F:2:101: not supported JSON (nested too deeply, over 100 levels)",
        ),
    ],
)
def test_jsonl_is_refused(write, line, fault):
    path = write("a.jsonl", GOOD.encode() + line + (GOOD.encode() if line.endswith(b"\n") else b""))
    (said,) = message(path)
    assert said.startswith(fault)


def test_a_long_line_is_cut_around_the_fault(write):
    path = write("a.jsonl", '{"text": "' + "x" * 500 + '", "label": NaN}\n')
    (said,) = message(path)
    assert said.startswith("F:1:523: NaN is not JSON: ")
    assert "NaN}'" in said
    assert "x" * 20 in said
    assert "x" * 40 not in said


def test_the_first_twenty_problems_are_listed_and_the_rest_counted(write):
    said = message(write("a.jsonl", "{]\n" * 33))
    assert len(said) == 21
    assert said[19].startswith("F:20:2: not JSON")
    assert said[20] == "... and 13 more problems"


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_an_empty_file_is_refused(write, name, content):
    assert message(write(name, content)) == [
        "F:1:1: the file is empty; give a file with at least one row"
    ]


def test_a_lfs_pointer_is_refused(write):
    (said,) = message(
        write("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    )
    assert said == "F:1:1: a Git LFS pointer instead of the data; fetch it with `git lfs pull`"


def test_json_is_read(write):
    rows = read_rows(write("a.json", '\ufeff[\n {"text": "a"},\n {"text": "b"}\n]\n'))
    assert rows.records == [{"text": "a"}, {"text": "b"}]
    assert rows.where(1).endswith("a.json (row 2)")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            '[\n {"a": 1},\n {"a": }\n]',
            "F:3:8: not JSON (Expecting value): ' {\"a\": }'; write valid JSON",
        ),
        (
            '[\n {"a": NaN}]',
            "F:2:8: NaN is not JSON: ' {\"a\": NaN}]'; write a finite number, or null",
        ),
        (
            '{"a": 1}',
            (
                "F:1:1: not a JSON list: '{\"a\": 1}'; write a list of objects, or name the file"
                " .jsonl"
            ),
        ),
        ('[{"a": 1}, 7]', "F: row 2: a row must be a JSON object, not a int: '7'; write"),
        (b'[{"a":\n "\xff"}]', "F:2:3: not UTF-8 (byte 0xff)"),
        ("[]", "F:1:1: the file has no rows"),
    ],
)
def test_json_is_refused(write, content, fault):
    (said,) = message(write("a.json", content))
    assert said.startswith(fault)
