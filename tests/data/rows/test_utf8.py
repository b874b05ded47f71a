"""Text files in the encodings that people have: what is found, what must be said, and the place of
what does not fit.
"""

from __future__ import annotations

from typing import Any

import pytest

from jaxpeft.data.rows.file_options import FileOptions
from jaxpeft.data.rows.read import read_rows
from jaxpeft.data.rows.row_streams import RowStream
from jaxpeft.errors import DataError

TEXT = "“déjà vu” \u2013 fine"
FILES = {
    "x.csv": f"text,label\n{TEXT},x\nplain,y\n",
    "x.tsv": f"text\tlabel\r\n{TEXT}\tx\r\nplain\ty\r\n",
    "x.jsonl": f'{{"text": "{TEXT}", "label": "x"}}\n{{"text": "plain", "label": "y"}}\n',
    "x.json": f'[{{"text": "{TEXT}", "label": "x"}}, {{"text": "plain", "label": "y"}}]',
}
WANTED = [{"text": TEXT, "label": "x"}, {"text": "plain", "label": "y"}]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_unicode_is_told_from_the_bytes(write: Any, name: str, encoding: str) -> None:
    rows = read_rows(write(name, FILES[name].encode(encoding)))
    assert rows.records == WANTED
    if encoding not in ("utf-8", "utf-8-sig"):
        assert f"encoding {encoding}" in rows.notes[0]
    if name != "x.json":
        assert RowStream(rows.name, "train").rows(0, 9).records == WANTED


@pytest.mark.parametrize("name", FILES)
def test_one_byte_a_character_is_not_guessed_but_shown_as_excel_would_have_written_it(
    write: Any, name: str
) -> None:
    path = write(name, FILES[name].encode("cp1252"))
    with pytest.raises(DataError, match="not UTF-8 \\(byte 0x93\\)") as caught:
        read_rows(path)
    assert (
        "set data.encoding to the file's encoding: with 'cp1252', as of Excel on Windows, the line is"
        in str(caught.value)
    )
    assert TEXT in str(caught.value)
    assert read_rows(path, file_options=FileOptions(encoding="cp1252")).records == WANTED
    if name != "x.json":
        assert (
            RowStream(path, "train", file_options=FileOptions(encoding="cp1252")).rows(0, 9).records
            == WANTED
        )


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", "хороший"),
        ("mac_cyrillic", "хороший"),
        ("shift_jis", "映画"),
        ("gb18030", "映画"),
    ],
)
def test_other_encodings_are_read_by_their_names(write: Any, encoding: str, text: str) -> None:
    path = write("x.csv", f"text,label\n{text},x\n".encode(encoding))
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(path)
    assert read_rows(path, file_options=FileOptions(encoding=encoding)).records == [
        {"text": text, "label": "x"}
    ]


@pytest.mark.parametrize(
    "read",
    [
        read_rows,
        lambda path, file_options: RowStream(path, "train", file_options=file_options).rows(0, 9),
    ],
)
def test_a_byte_that_the_encoding_does_not_have_is_told_with_its_place(
    write: Any, read: Any
) -> None:
    path = write("x.csv", b"text,label\na,x\nb\x81c,y\n")
    with pytest.raises(DataError) as caught:
        read(path, file_options=FileOptions(encoding="cp1252"))
    assert str(caught.value) == f"{path}:3:2: not cp1252; set data.encoding to the file's encoding"
