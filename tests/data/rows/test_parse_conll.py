"""Column files of tagged words."""

from __future__ import annotations

from typing import Any

import pytest

from jaxpeft.data.rows.read import read_rows
from jaxpeft.errors import DataError


@pytest.mark.parametrize(
    "content",
    [
        "EU\tB-ORG\nrejects\tO\n\nPeter\tB-PER\n",
        "\nEU B-ORG\r\nrejects O \r\n\r\n\r\nPeter B-PER",
        "-DOCSTART- O\n\nEU B-ORG\nrejects O\n\nPeter B-PER\n\n",
        "# sent_id = 1\n# text = EU rejects\nEU B-ORG\nrejects O\n\n# id 7\nPeter B-PER\n",
    ],
    ids=["tabs", "spaces, CRLF", "DOCSTART", "comments"],
)
@pytest.mark.parametrize("name", ["x.conll", "x.bio", "x.IOB2", "x.iob"])
def test_words_and_tags_are_read(write: Any, name: str, content: str) -> None:
    rows = read_rows(write(name, content))
    assert rows.records == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter"], "tags": ["B-PER"]},
    ]
    lines = [line.split()[:1] for line in content.split("\n")]
    assert rows.lines == (lines.index(["EU"]) + 1, lines.index(["Peter"]) + 1)


def test_other_columns_are_there_by_number(write: Any) -> None:
    rows = read_rows(write("x.conll", "EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n"))
    assert rows.records[0]["tags"] == ["B-ORG", "O"]
    assert rows.records[0]["2"] == ["NNP", "VBZ"]
    assert rows.notes == (f"{rows.name}: 4 columns, one word per line, encoding utf-8",)


def test_a_number_sign_is_a_word(write: Any) -> None:
    rows = read_rows(write("x.conll", "# O\n5 O\n\n#one B-X\n# O\n"))
    assert [row["tokens"] for row in rows.records] == [["#", "5"], ["#one", "#"]]


def test_each_line_without_its_columns_is_told(write: Any) -> None:
    path = write("x.conll", "EU B-ORG\nrejects\n\nPeter X B-PER\n")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).splitlines() == [
        (
            f"{path}:2:1: a word without a tag: 'rejects'; write the word, a tab or a space, and"
            " its tag"
        ),
        (
            f"{path}:4:1: 3 columns, but the first word has 2: 'Peter X B-PER'; give each word"
            " the same number of columns"
        ),
    ]
