"""How a table is written: its delimiter, whether quotes hold its fields together, and whether its
first line is a header.
"""

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
_SAMPLE, _LOOKED_AT, _HEAD = 200, 1000, 1 << 20
_LONG, _MANY_WORDS = 60, 8
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")
_SEP = re.compile(r"sep=(.)\r?\n")
_OPENS = re.compile(r'(?:^|[\t\r\n])"')
_BROKEN = (
    "close the quotes, and double a quote that stands inside them, or set data.quoting='none' where"
    " quotes are characters like others; a very long text belongs in JSONL"
)


@dataclass(frozen=True)
class Dialect:
    """How a table is written.

    Attributes:
        delimiter: between fields.
        quoted: whether quotes hold fields together, as in RFC 4180.
        header: whether the first line names the columns.
        before: lines before the table: Excel's `sep=;`.
        open: whether fields that begin with a quote have yet to be met, so that nothing is known of
            what they mean.
    """

    delimiter: str
    quoted: bool
    header: bool = True
    before: int = 0
    open: bool = False

    def __str__(self) -> str:
        """Say it in a few words."""
        quotes = "fields may be in quotes" if self.quoted else "quotes are characters like others"
        first = "the first line is the header" if self.header else "no header, columns by number"
        return f"delimiter {self.delimiter!r}, {quotes}, {first}"


def dialect_of(
    text: str, name: str, own: str, layout: FileOptions, *, whole: bool = True
) -> Dialect:
    """Tell how a table is written.

    Args:
        text: all of it, or its first lines, whole ones.
        name: of the file.
        own: the delimiter that the file's ending stands for.
        layout: what the user says.
        whole: whether it is all of it.

    Raises:
        DataError: it may be read in two ways, or its first line looks like data.
    """
    marked = _SEP.match(text)
    before, body = (1, text[marked.end() :]) if marked else (0, text)
    delimiter = (
        layout.delimiter
        if layout.delimiter != "auto"
        else marked[1]
        if marked
        else _delimiter(body, own, layout)
    )
    quoted, unknown = layout.quoting != "none", False
    if layout.quoting == "auto" and delimiter == "\t":
        unknown = not whole and not _OPENS.search(body)
        quoted = not unknown and _has_quoting(body, name, before, whole)
    header = layout.header
    if header is None:
        rows = [row for _, row in _first_rows(body, delimiter, quoted, _LOOKED_AT)]
        _check_header(rows, name, before, delimiter, layout)
        header = True
    return Dialect(delimiter, quoted, header, before, unknown)


def fields_of(text: Iterable[str], delimiter: str, quoted: bool) -> Iterator[tuple[int, Fields]]:
    """Yield the line at which each row begins, and its fields or what is wrong with it.

    Args:
        text: lines.
        delimiter: between fields.
        quoted: whether quotes hold fields together.
    """
    if not quoted:
        for number, line in enumerate(text, 1):
            bare = line.rstrip("\r\n")
            yield number, bare.split(delimiter) if bare else []
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


def is_usual(name: str, layout: FileOptions) -> bool:
    """Return whether a field of a first line is the name of a column that is looked for."""
    return name.strip().lower() in USUAL or name in layout.columns


def _delimiter(text: str, own: str, layout: FileOptions) -> str:
    """Return the delimiter that parts the first lines best; the ending's own unless another does
    better.
    """

    def fitness(delimiter: str) -> tuple[bool, bool, bool]:
        found = [_first_rows(text, delimiter, quoted, _SAMPLE) for quoted in (True, False)]
        sound = any(not _faults(rows) for rows in found)
        first = next((row for rows in found for _, row in rows[:1] if isinstance(row, list)), [])
        if len(first) < 2:
            return False, False, delimiter == own
        named = any(is_usual(field, layout) for field in first)
        return named or sound, named and sound, delimiter == own

    return max(DELIMITERS if own in DELIMITERS else (own, *DELIMITERS), key=fitness)


def _first_rows(text: str, delimiter: str, quoted: bool, most: int) -> list[tuple[int, Fields]]:
    """Return the first rows with their lines, without the one that the end of what is looked at may
    cut.
    """
    head = io.StringIO(text[:_HEAD], newline="")
    rows = list(islice(fields_of(head, delimiter, quoted), most))
    return rows[:-1] if len(text) > _HEAD and len(rows) < most else rows


def _faults(rows: Sequence[tuple[int, Fields]]) -> list[int]:
    """List the lines of rows that are broken or have not as many fields as the first; blank ones
    are told elsewhere.
    """
    width = len(rows[0][1]) if rows and isinstance(rows[0][1], list) else -1
    return [line for line, row in rows if not isinstance(row, list) or len(row) not in (0, width)]


def _has_quoting(text: str, name: str, before: int, whole: bool) -> bool:
    """Return whether quotes hold the fields of a table with tabs together, as Excel and pandas
    write them, or are characters.

    Where both ways give rows of as many fields, it is the first if each quote is one that such
    programs write.

    Raises:
        DataError: nothing tells which.
    """
    if not _OPENS.search(text):
        return False
    held, bare = (
        list(fields_of(io.StringIO(text, newline=""), "\t", quoted)) for quoted in (True, False)
    )
    if not whole:
        held = held[:-1]  # its end may be further on
    faults_held, faults_bare = (_faults(rows) for rows in (held, bare))
    if bool(faults_held) != bool(faults_bare):
        return not faults_held
    if faults_held:
        raise DataError(
            f"{name}:{faults_bare[0] + before}:1: some lines have not as many fields as the first:"
            " with quotes as characters of the texts this one, with quotes around fields line"
            f" {faults_held[0] + before}; write all rows in one way, and set data.quoting to 'none'"
            " or 'quoted'"
        )
    if len(held) == len(bare) and _quotes_are_consistent(
        text, [row for _, row in bare if isinstance(row, list)]
    ):
        return True
    line, row = next(
        (line, row)
        for line, row in bare
        if isinstance(row, list) and any(f.startswith('"') for f in row)
    )
    raise DataError(
        f"{name}:{line + before}:1: a field begins with a quote: {excerpt(chr(9).join(row))!r}; set"
        " data.quoting='none' if quotes are characters of the texts, or 'quoted' if they stand"
        " around fields, as Excel and pandas write them"
    )


def _quotes_are_consistent(text: str, rows: Sequence[list[str]]) -> bool:
    """Return whether all quoted fields hold doubled quotes, or columns are quoted from the header
    on or not at all.
    """
    quoted = [field for row in rows for field in row if field.startswith('"')]
    if all('""' in field[1:-1] for field in quoted):
        return True
    return all(
        len({field.startswith('"') for field in column}) == 1
        for column in zip(*filter(None, rows), strict=True)
    )


def _check_header(
    rows: Sequence[Fields], name: str, before: int, delimiter: str, layout: FileOptions
) -> None:
    """Refuse a first line that looks like data.

    Raises:
        DataError: it does.
    """
    first = rows[0] if rows else []
    if not isinstance(first, list) or not first or set(first) & set(layout.columns):
        return
    usual = [field for field in first if is_usual(field, layout)]
    if len(usual) > 1:
        return
    if [field for field in first if field] == [str(i) for i in range(sum(map(bool, first)))]:
        return  # as pandas numbers columns without names
    others = [row for row in rows[1:] if isinstance(row, list) and row != first]
    for i, field in enumerate(first):
        why = ""
        if usual and field not in usual:
            continue  # one usual name is enough, unless it is a value of its column
        if _NUMBER.fullmatch(field.strip()):
            why = f"{field.strip()!r} is a number"
        elif field.strip() and any(len(row) > i and row[i] == field for row in others):
            why = f"{excerpt(field)!r} stands below, too"
        elif len(field) > _LONG or len(field.split()) > _MANY_WORDS:
            why = f"{excerpt(field)!r} is long"
        if why:
            raise DataError(
                f"{name}:{1 + before}:1: the first line looks like data, not like a header ({why}):"
                f" {excerpt(delimiter.join(first))!r}; if it is a row, set data.header to False and"
                " name the columns by their number, such as data.columns.text=1 and"
                " data.columns.label=2; if it is the header, set data.header to True"
            )
