"""Options for reading data files, the result of parsing one, and the limit on their size."""

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
    """The user's options for data files.

    Attributes:
        encoding: Python's name of the encoding of text files; `auto` for UTF-8, or the encoding of
            the byte order mark.
        delimiter: the separator between the fields of a table; `auto` to detect it.
        quoting: `quoted` as in RFC 4180; `none` if quotes are ordinary characters; `auto` for
            `quoted`, or for tab-separated files to detect it.
        header: whether the first line of a table names its columns; None to refuse one that looks
            like data.
        field: the path of the rows in a JSON file, such as `data` or `result.rows`; empty to find
            them.
        columns: the requested columns; a name with a dot may be the path of a nested value.
        most: maximum size of the files of a source in bytes, unpacked.
    """

    encoding: str = "auto"
    delimiter: str = "auto"
    quoting: Quoting = "auto"
    header: bool | None = None
    field: str = ""
    columns: tuple[str, ...] = ()
    most: int = GIB


AS_FOUND = FileOptions()
"""Defaults: everything is detected."""


@dataclass(frozen=True)
class Parsed:
    """The rows of one file.

    Attributes:
        records: one dict per row.
        lines: the 1-based first line of each row; empty if the format has no lines.
        note: short description of how the file was read, or empty.
    """

    records: list[Record]
    lines: tuple[int, ...] = ()
    note: str = ""


class Allowance:
    """Counts the bytes read from a source, and refuses more than the maximum.

    Args:
        most: the maximum in bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def take(self, size: int, name: str) -> None:
        """Count bytes of a file.

        Raises:
            DataError: the maximum is exceeded.
        """
        self.left -= size
        if self.left < 0:
            raise DataError(
                f"{name}: this source is larger than {self.most / GIB:.3g} GiB unpacked; set"
                " data.streaming to stream the training rows, or increase data.most_gib if memory"
                " allows"
            )


Take = Callable[[int, str], None]


def flatten_nested(records: list[Record], columns: tuple[str, ...]) -> list[Record]:
    """Return the records with nested values added as columns named by their dotted paths.

    Args:
        records: the rows.
        columns: the requested paths; a number in a path selects an item of a list.
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
