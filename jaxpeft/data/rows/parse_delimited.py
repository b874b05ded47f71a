"""CSV and TSV: text to records, with every problem of a file in one error.

The fields are read by `csv`; positions are our own, since it knows the line that a row ends on
alone, and stops at the first problem, as Arrow does.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from jaxpeft.data.problems import Problems, Record, RowError, excerpt
from jaxpeft.data.rows.dialect import Dialect, Fields, dialect_of, fields_of
from jaxpeft.data.rows.file_options import FileOptions, Parsed
from jaxpeft.data.rows.utf8 import decode
from jaxpeft.errors import DataError


def parse_delimited(body: bytes, name: str, layout: FileOptions, delimiter: str) -> Parsed:
    """Read a header and rows of as many fields; every value is a string.

    Args:
        body: the file in UTF-8.
        name: of the file.
        layout: what the user says of it.
        delimiter: that the file's ending stands for.

    Raises:
        DataError: the file is not UTF-8, its header or some row is broken, or it may be read in two
            ways.
    """
    text = decode(body, name).rstrip("\r\n")
    dialect = dialect_of(text, name, delimiter, layout)
    rows = rows_of(io.StringIO(text, newline=""), dialect)
    header, start = header_of(rows[0] if rows else (1, []), name, dialect)
    found = rows[start:]
    return Parsed(
        parse_fields(found, header, name, dialect),
        tuple(number for number, _ in found),
        str(dialect),
    )


def rows_of(text: io.StringIO, dialect: Dialect) -> list[tuple[int, Fields]]:
    """Return the 1-based line at which each row begins, and its fields; the header is the first,
    where there is one.
    """
    for _ in range(dialect.before):
        text.readline()
    return [
        (n + dialect.before, row) for n, row in fields_of(text, dialect.delimiter, dialect.quoted)
    ]


def parse_fields(
    rows: Sequence[tuple[int, Fields]], header: list[str], name: str, dialect: Dialect
) -> list[Record]:
    """Give the fields of rows their names.

    Args:
        rows: `(line, fields)`, as `fields_of` yields them.
        header: the names.
        name: of the file.
        dialect: of the file.

    Raises:
        DataError: some row is broken, is the header again, or has more or fewer fields.
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
    """Return the names of the columns, and how many rows they take.

    A column without a name, such as pandas' index, is called as pandas calls it, `Unnamed: 0` for
    the first; columns without a header are numbered from 1.

    Args:
        first: the line of the first row, and its fields.
        name: of the file.
        dialect: of the file.

    Raises:
        DataError: no name is there, or one stands twice.
    """
    number, row = first
    if isinstance(row, RowError):
        raise DataError(f"{name}:{number}:1: {row.fault}; {row.fix}")
    if not any(field.strip() for field in row):
        raise DataError(f"{name}:{number}:1: the first line is blank; begin with the header")
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
        fix = "quote a field that holds the delimiter"
        if not dialect.quoted:
            fix = (
                "write one line a row, or set data.quoting='quoted' where quotes hold fields"
                " together"
            )
        said = (
            f"{len(row)} fields where the {'header names' if dialect.header else 'first row has'}"
            f" {len(header)} ({names})"
        )
        raise RowError(said, f"{fix}; a file that ends here may be cut off")
    if dialect.header and row == header:
        fix = "remove it; if the first line is a row too, set data.header to False"
        raise RowError("the header again", fix)
    if dialect.open and any(field.startswith('"') for field in row):
        fix = (
            "set data.quoting to 'none' if quotes are characters of the texts, or to 'quoted' if"
            " they stand around fields"
        )
        raise RowError("a field begins with a quote, where none before it did", fix)
    return dict(zip(header, row, strict=True))
