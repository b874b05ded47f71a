"""How data files are written: what the user has said of it, what a file was found to be, and how
much of it may be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxpeft.data.problems import Record
from jaxpeft.errors import DataError

Quoting = Literal["auto", "quoted", "none"]
GIB = 1 << 30


@dataclass(frozen=True)
class FileOptions:
    """What is told of files, and not to be found in them.

    Attributes:
        encoding: of text files, by Python's name; `auto` for UTF-8 or what a byte order mark says.
        delimiter: between the fields of a table; `auto` to find it in the first lines.
        quoting: `quoted` as in RFC 4180, `none` where a quote is a character like any other; `auto`
            for the first, of fields between tabs what the whole file shows.
        header: whether the first line of a table names its columns; None to refuse one that looks
            like data.
        field: where the rows of a JSON file are, such as `data` or `result.rows`; empty to find
            them.
        columns: the columns that are asked for: those with a dot may be values of nested objects.
        most: bytes that the files of a source may hold once they are unpacked.
    """

    encoding: str = "auto"
    delimiter: str = "auto"
    quoting: Quoting = "auto"
    header: bool | None = None
    field: str = ""
    columns: tuple[str, ...] = ()
    most: int = GIB


AS_FOUND = FileOptions()
"""Nothing is told: all is found."""


@dataclass(frozen=True)
class Parsed:
    """The rows of one file.

    Attributes:
        records: one dict a row.
        lines: the 1-based line at which each begins; empty where the format has none.
        note: how the file was read, in a few words; empty where there is nothing to say.
    """

    records: list[Record]
    lines: tuple[int, ...] = ()
    note: str = ""


class Allowance:
    """Counts the bytes that are read of a source, and refuses more than may be.

    Args:
        most: bytes in all.
    """

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def take(self, size: int, name: str) -> None:
        """Count bytes of a file.

        Raises:
            DataError: they are more than are left.
        """
        self.left -= size
        if self.left < 0:
            raise DataError(
                f"{name}: with it the rows of this source hold more than {self.most / GIB:.3g} GiB,"
                " unpacked; set data.streaming to read training rows piece by piece, or raise"
                " data.most_gib if the memory allows"
            )


Take = Callable[[int, str], None]


def flatten_nested(records: list[Record], columns: tuple[str, ...]) -> list[Record]:
    """Return the records with the values of nested objects as columns of their dotted names.

    Args:
        records: rows.
        columns: the names that are asked for; a part that is a number picks an item of a list.
    """
    paths = {name: name.split(".") for name in columns if "." in name}
    if not paths:
        return records
    return [_with_values(record, paths) for record in records]


def _with_values(record: Record, paths: dict[str, list[str]]) -> Record:
    found = {name: _value(record, path) for name, path in paths.items() if name not in record}
    return record | {name: value for name, value in found.items() if value is not _ABSENT}


_ABSENT = object()


def _value(value: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value
