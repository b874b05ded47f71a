"""CSV and TSV: bytes to records, with every problem of a file in one error."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from jaxpeft.data.problems import Parsed, Problems, Record, RowError, excerpt
from jaxpeft.data.utf8 import body_of, decode
from jaxpeft.errors import DataError

Fields = list[str] | RowError


def parse_delimited(data: bytes, name: str, delimiter: str) -> Parsed:
    """Reads a header and rows of as many fields, quoted as in RFC 4180; every value is a string.

    Raises:
        DataError: the file is empty, not UTF-8, or its header or some row is broken.
    """
    body = body_of(data, name)
    text = decode(body, name).rstrip("\r\n")
    rows = fields_of(io.StringIO(text, newline=""), delimiter)
    _, first = next(rows)
    found = list(rows)
    return parse_fields(found, header_of(first, name), name, delimiter), tuple(number for number, _ in found)


def parse_fields(rows: Sequence[tuple[int, Fields]], header: list[str], name: str, delimiter: str) -> list[Record]:
    """Gives the fields of rows their names.

    Args:
        rows: `(line, fields)`, as `fields_of` yields them.
        header: the names.
        name: of the file.
        delimiter: between fields.

    Raises:
        DataError: some row is broken, or has more or fewer fields.
    """
    problems, records = Problems(), list[Record]()
    for number, row in rows:
        try:
            records.append(_record(row, header))
        except RowError as fault:
            text = "" if isinstance(row, RowError) else excerpt(delimiter.join(row))
            problems.add(f"{name}:{number}:{fault.column}", fault.fault, text, fault.fix)
    problems.raise_if_any()
    return records


def fields_of(text: Iterable[str], delimiter: str) -> Iterator[tuple[int, Fields]]:
    """Yields the line at which each row begins, and its fields or what is wrong with it."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = "close the quotes, and double a quote that stands inside them; a very long text belongs in JSONL"
            yield number, RowError(f"broken quoting ({error})", fix)


def header_of(row: Fields, name: str) -> list[str]:
    """Gives the names of a file's first row.

    Raises:
        DataError: a name is missing or stands twice.
    """
    if isinstance(row, RowError):
        raise DataError(f"{name}:1:1: {row.fault}; {row.fix}")
    if not row:
        raise DataError(f"{name}:1:1: the first line is blank; begin with the header")
    problems, line = Problems(), excerpt(",".join(row))
    for i, column in enumerate(row):
        at = f"{name}:1:{sum(len(c) + 1 for c in row[:i]) + 1}"
        if not column.strip():
            problems.add(at, f"header field {i + 1} has no name", line, "name every column")
        elif column in row[:i]:
            problems.add(at, f"the header names {column!r} twice", line, "rename one of them")
    problems.raise_if_any()
    return row


def _record(row: Fields, header: list[str]) -> Record:
    if isinstance(row, RowError):
        raise row
    if not row:
        raise RowError("blank line", "remove it")
    if len(row) != len(header):
        names = ", ".join(header)
        fix = "quote a field that holds the delimiter; a file that ends here may be cut off"
        raise RowError(f"{len(row)} fields where the header names {len(header)} ({names})", fix)
    return dict(zip(header, row, strict=True))
