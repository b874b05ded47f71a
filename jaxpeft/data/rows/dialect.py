"""Detect the dialect of a table: its delimiter, whether quotes enclose fields, and its header."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from jaxpeft.data.problems import RowError, excerpt
from jaxpeft.data.rows.columns import USUAL
from jaxpeft.data.rows.file_options import FileOptions
from jaxpeft.errors import DataError

Fields = list[str] | RowError
DELIMITERS = (",", "\t", ";", "|")
_DELIMITER_ROWS, _HEADER_ROWS, _HEAD = 200, 1000, 1 << 20
_LONG, _MANY_WORDS = 60, 8
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")
_SEP = re.compile(r"sep=(.)\r?\n")
_OPENS = re.compile(r'(?:^|[\t\r\n])"')
_BROKEN = (
    "close the quotes and double quotes inside a field, or set data.quoting='none' if quotes are"
    " ordinary characters; store very long texts in JSONL"
)


@dataclass(frozen=True)
class Dialect:
    """The format of a table.

    Attributes:
        delimiter: the separator between fields.
        quoted: whether quotes enclose fields, as in RFC 4180.
        header: whether the first line names the columns.
        skipped: number of lines before the table: 1 for Excel's `sep=;`.
        undecided: whether the meaning of quotes is unknown, because no field so far starts with
            one.
    """

    delimiter: str
    quoted: bool
    header: bool = True
    skipped: int = 0
    undecided: bool = False

    def __str__(self) -> str:
        """Describe the dialect for the log."""
        quotes = "fields may be quoted" if self.quoted else "quotes are ordinary characters"
        first = "the first line is the header" if self.header else "no header, numbered columns"
        return f"delimiter {self.delimiter!r}, {quotes}, {first}"


def dialect_of(
    text: str, name: str, default: str, file_options: FileOptions, *, is_complete: bool = True
) -> Dialect:
    """Detect the dialect of a table.

    Args:
        text: the contents, or the first lines.
        name: the name of the file in messages.
        default: the delimiter for the file extension.
        file_options: the user's file options.
        is_complete: whether `text` is the complete file.

    Raises:
        DataError: the table is ambiguous, or its first line looks like data.
    """
    marked = _SEP.match(text)
    skipped, body = (1, text[marked.end() :]) if marked else (0, text)
    delimiter = (
        file_options.delimiter
        if file_options.delimiter != "auto"
        else marked[1]
        if marked
        else _delimiter(body, default, file_options)
    )
    quoted, undecided = file_options.quoting != "none", False
    if file_options.quoting == "auto" and delimiter == "\t":
        undecided = not is_complete and not _OPENS.search(body)
        quoted = not undecided and _has_quoting(body, name, skipped, is_complete)
    header = file_options.header
    if header is None:
        rows = [row for _, row in _first_rows(body, delimiter, quoted, _HEADER_ROWS)]
        _check_header(rows, name, skipped, delimiter, file_options)
        header = True
    return Dialect(delimiter, quoted, header, skipped, undecided)


def fields_of(text: Iterable[str], delimiter: str, quoted: bool) -> Iterator[tuple[int, Fields]]:
    """Yield the 1-based first line of each row, and its fields or its error.

    Args:
        text: the lines.
        delimiter: the separator between fields.
        quoted: whether quotes enclose fields.
    """
    if not quoted:
        for number, line in enumerate(text, 1):
            text_line = line.rstrip("\r\n")
            yield number, text_line.split(delimiter) if text_line else []
        return
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, RowError(f"broken quoting ({error})", _BROKEN)


def is_usual(name: str, file_options: FileOptions) -> bool:
    """Return whether a field in the first line is a usual or requested column name."""
    return name.strip().lower() in USUAL or name in file_options.columns


def _delimiter(text: str, default: str, file_options: FileOptions) -> str:
    """Return the delimiter that splits the first lines best, or the default in a tie."""

    def fitness(delimiter: str) -> tuple[bool, bool, bool]:
        parses = [_first_rows(text, delimiter, quoted, _DELIMITER_ROWS) for quoted in (True, False)]
        is_regular = any(not _faults(rows) for rows in parses)
        first = next((row for rows in parses for _, row in rows[:1] if isinstance(row, list)), [])
        if len(first) < 2:
            return False, False, delimiter == default
        is_named = any(is_usual(field, file_options) for field in first)
        return is_named or is_regular, is_named and is_regular, delimiter == default

    return max(DELIMITERS if default in DELIMITERS else (default, *DELIMITERS), key=fitness)


def _first_rows(text: str, delimiter: str, quoted: bool, count: int) -> list[tuple[int, Fields]]:
    """Return the first rows with their lines, without a last one that may be cut off."""
    head = io.StringIO(text[:_HEAD], newline="")
    rows = list(islice(fields_of(head, delimiter, quoted), count))
    return rows[:-1] if len(text) > _HEAD and len(rows) < count else rows


def _faults(rows: Sequence[tuple[int, Fields]]) -> list[int]:
    """Return the lines of rows that are broken or differ from the first in the number of fields.

    Blank rows are reported elsewhere.
    """
    width = len(rows[0][1]) if rows and isinstance(rows[0][1], list) else -1
    return [line for line, row in rows if not isinstance(row, list) or len(row) not in (0, width)]


def _has_quoting(text: str, name: str, skipped: int, is_complete: bool) -> bool:
    """Return whether quotes in a tab-separated table enclose fields, as in files of Excel and
    pandas, or are ordinary characters.

    If both readings give regular rows, quotes enclose fields if all of them could have been written
    by such a program.

    Raises:
        DataError: the table is ambiguous.
    """
    if not _OPENS.search(text):
        return False
    quoted_rows, plain_rows = (
        list(fields_of(io.StringIO(text, newline=""), "\t", quoted)) for quoted in (True, False)
    )
    if not is_complete:
        quoted_rows = quoted_rows[:-1]  # the last row may be incomplete
    quoted_faults, plain_faults = (_faults(rows) for rows in (quoted_rows, plain_rows))
    if bool(quoted_faults) != bool(plain_faults):
        return not quoted_faults
    if quoted_faults:
        raise DataError(
            f"{name}:{plain_faults[0] + skipped}:1: the number of fields differs from the first"
            " line: here if quotes are ordinary characters, in line"
            f" {quoted_faults[0] + skipped} if quotes enclose fields; write all rows in one way,"
            " and set data.quoting to 'none' or 'quoted'"
        )
    if len(quoted_rows) == len(plain_rows) and _quotes_are_consistent(
        text, [row for _, row in plain_rows if isinstance(row, list)]
    ):
        return True
    line, row = next(
        (line, row)
        for line, row in plain_rows
        if isinstance(row, list) and any(f.startswith('"') for f in row)
    )
    raise DataError(
        f"{name}:{line + skipped}:1: a field starts with a quote: {excerpt(chr(9).join(row))!r};"
        " set data.quoting='none' if quotes are ordinary characters, or 'quoted' if they enclose"
        " fields, as in files of Excel and pandas"
    )


def _quotes_are_consistent(text: str, rows: Sequence[list[str]]) -> bool:
    """Return whether all quoted fields contain doubled quotes, or each column is quoted in every
    row or in none.
    """
    quoted = [field for row in rows for field in row if field.startswith('"')]
    if all('""' in field[1:-1] for field in quoted):
        return True
    return all(
        len({field.startswith('"') for field in column}) == 1
        for column in zip(*filter(None, rows), strict=True)
    )


def _check_header(
    rows: Sequence[Fields], name: str, skipped: int, delimiter: str, file_options: FileOptions
) -> None:
    """Refuse a first line that looks like data.

    Raises:
        DataError: the first line looks like data.
    """
    first = rows[0] if rows else []
    if not isinstance(first, list) or not first or set(first) & set(file_options.columns):
        return
    usual = [field for field in first if is_usual(field, file_options)]
    if len(usual) > 1:
        return
    if [field for field in first if field] == [str(i) for i in range(sum(map(bool, first)))]:
        return  # pandas numbers unnamed columns this way
    others = [row for row in rows[1:] if isinstance(row, list) and row != first]
    for i, field in enumerate(first):
        why = ""
        if usual and field not in usual:
            continue  # one usual name is enough, unless it also occurs as a value
        if _NUMBER.fullmatch(field.strip()):
            why = f"{field.strip()!r} is a number"
        elif field.strip() and any(len(row) > i and row[i] == field for row in others):
            why = f"{excerpt(field)!r} is also a value below"
        elif len(field) > _LONG or len(field.split()) > _MANY_WORDS:
            why = f"{excerpt(field)!r} is long"
        if why:
            raise DataError(
                f"{name}:{1 + skipped}:1: the first line looks like data, not a header ({why}):"
                f" {excerpt(delimiter.join(first))!r}; if it is a row, set data.header to False and"
                " name the columns by number, such as data.columns.text=1 and"
                " data.columns.label=2; if it is the header, set data.header to True"
            )
