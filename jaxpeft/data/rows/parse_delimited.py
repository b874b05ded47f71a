"""Parse CSV and TSV files; one error reports all problems of a file.

Fields are parsed by `csv`. Positions are computed here, because `csv` only knows the line on which
a row ends, and stops at the first problem (as does Arrow).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from jaxpeft.data.problems import Problems, Record, RowError, excerpt
from jaxpeft.data.rows.dialect import Dialect, Fields, dialect_of, fields_of
from jaxpeft.data.rows.file_options import FileOptions, Parsed
from jaxpeft.data.rows.utf8 import decode
from jaxpeft.errors import DataError


def parse_delimited(body: bytes, name: str, file_options: FileOptions, delimiter: str) -> Parsed:
    """Parse a header and rows with the same number of fields; all values are strings.

    Args:
        body: the contents in UTF-8.
        name: the name of the file in messages.
        file_options: the user's file options.
        delimiter: the delimiter for the file extension.

    Raises:
        DataError: the file is not UTF-8, has a broken header or row, or is ambiguous.
    """
    text = decode(body, name).rstrip("\r\n")
    dialect = dialect_of(text, name, delimiter, file_options)
    rows = rows_of(io.StringIO(text, newline=""), dialect)
    header, start = header_of(rows[0] if rows else (1, []), name, dialect)
    body_rows = rows[start:]
    return Parsed(
        parse_fields(body_rows, header, name, dialect),
        tuple(number for number, _ in body_rows),
        str(dialect),
    )


def rows_of(text: io.StringIO, dialect: Dialect) -> list[tuple[int, Fields]]:
    """Return the 1-based first line and the fields of each row, including the header."""
    for _ in range(dialect.skipped):
        text.readline()
    return [
        (n + dialect.skipped, row) for n, row in fields_of(text, dialect.delimiter, dialect.quoted)
    ]


def parse_fields(
    rows: Sequence[tuple[int, Fields]], header: list[str], name: str, dialect: Dialect
) -> list[Record]:
    """Convert rows of fields to records.

    Args:
        rows: `(line, fields)` pairs of `fields_of`.
        header: the column names.
        name: the name of the file in messages.
        dialect: the dialect of the file.

    Raises:
        DataError: a row is broken, repeats the header, or has the wrong number of fields.
    """
    problems, records = Problems(), list[Record]()
    for number, row in rows:
        try:
            records.append(_record(row, header, dialect))
        except RowError as fault:
            text = "" if isinstance(row, RowError) else excerpt(dialect.delimiter.join(row))
            problems.add(f"{name}:{number}:{fault.column}", fault.fault, text, fault.fix)
    problems.raise_if_any()
    return records


def header_of(first: tuple[int, Fields], name: str, dialect: Dialect) -> tuple[list[str], int]:
    """Return the column names, and the number of header rows.

    A column without a name, such as pandas' index, is named as pandas does: `Unnamed: 0` if it is
    the first. Without a header, columns are numbered from 1.

    Args:
        first: the line and the fields of the first row.
        name: the name of the file in messages.
        dialect: the dialect of the file.

    Raises:
        DataError: the header is blank, or has a name twice.
    """
    number, row = first
    if isinstance(row, RowError):
        raise DataError(f"{name}:{number}:1: {row.fault}; {row.fix}")
    if not any(field.strip() for field in row):
        raise DataError(f"{name}:{number}:1: the first line is blank; start with the header")
    if not dialect.header:
        return [str(i) for i in range(1, len(row) + 1)], 0
    names = [field if field.strip() else f"Unnamed: {i}" for i, field in enumerate(row)]
    problems, line = Problems(), excerpt(dialect.delimiter.join(row))
    for i, column in enumerate(names):
        if column in names[:i]:
            at = f"{name}:{number}:{sum(len(c) + 1 for c in row[:i]) + 1}"
            problems.add(at, f"the header names {column!r} twice", line, "rename one of them")
    problems.raise_if_any()
    return names, 1


def _record(row: Fields, header: list[str], dialect: Dialect) -> Record:
    if isinstance(row, RowError):
        raise row
    if not row:
        raise RowError("blank line", "remove it")
    if len(row) != len(header):
        names = ", ".join(header)
        fix = "quote fields that contain the delimiter"
        if not dialect.quoted:
            fix = "write one line per row, or set data.quoting='quoted' if quotes enclose fields"
        fault = (
            f"{len(row)} fields, but the {'header' if dialect.header else 'first row'} has"
            f" {len(header)} ({names})"
        )
        raise RowError(fault, f"{fix}; if the file ends here, it may be truncated")
    if dialect.header and row == header:
        fix = "remove it; if the first line is a row too, set data.header to False"
        raise RowError("the header is repeated", fix)
    if dialect.undecided and any(field.startswith('"') for field in row):
        fix = (
            "set data.quoting to 'none' if quotes are ordinary characters, or to 'quoted' if they"
            " enclose fields"
        )
        raise RowError("a field starts with a quote for the first time", fix)
    return dict(zip(header, row, strict=True))
