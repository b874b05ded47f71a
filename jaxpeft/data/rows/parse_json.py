"""Parse JSON and JSON Lines files; one error reports all problems of a file.

Values are parsed by `json`. Positions are computed here, because `json` does not report where a row
starts, and stops at the first problem (as does Arrow).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from jaxpeft.data.problems import Problems, Record, RowError, excerpt
from jaxpeft.data.rows.file_options import FileOptions, Parsed
from jaxpeft.data.rows.json_rows import rows_in
from jaxpeft.data.rows.utf8 import decode, decode_line
from jaxpeft.errors import DataError

# Strings are matched first, so that a NaN inside a string is not matched as a literal.
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN)')
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_LINES = re.compile(rb"\s*\{[^\n]*\}[ \t\r]*\n\s*\{")
_MAX_DEPTH, _MAX_DIGITS = 100, 1000
_TRUNCATED = "the file does not end in a newline and may be truncated: write or download it again"


def parse_jsonl(body: bytes, name: str, _: FileOptions) -> Parsed:
    """Parse one JSON object per line.

    Args:
        body: the contents in UTF-8.
        name: the name of the file in messages.

    Raises:
        DataError: a line is not a JSON object in UTF-8.
    """
    lines = list(enumerate(body.rstrip().split(b"\n"), 1))
    cut = len(lines) if not body.endswith(b"\n") else None
    return Parsed(parse_lines(lines, name, cut=cut), tuple(n for n, _ in lines))


def parse_lines(
    lines: Sequence[tuple[int, bytes]], name: str, cut: int | None = None
) -> list[Record]:
    """Parse lines with one JSON object each.

    Args:
        lines: `(1-based number, bytes)` pairs.
        name: the name of the file in messages.
        cut: the number of the last line if it has no newline, and so may be truncated.

    Raises:
        DataError: a line is not a JSON object in UTF-8.
    """
    problems, records = Problems(), list[Record]()
    for number, raw in lines:
        try:
            records.append(_json_row(raw))
        except RowError as fault:
            is_truncated = number == cut and fault.fault.startswith("not JSON")
            where = f"{name}:{number}:{fault.column}"
            text = excerpt(raw.decode("utf-8", "replace"), fault.column)
            problems.add(where, fault.fault, text, _TRUNCATED if is_truncated else fault.fix)
    problems.raise_if_any()
    return records


def parse_json(body: bytes, name: str, file_options: FileOptions) -> Parsed:
    """Parse one JSON value that contains rows, or one object per line.

    Args:
        body: the contents in UTF-8.
        name: the name of the file in messages.
        file_options: the user's file options, with the location of the rows.

    Raises:
        DataError: the file is not JSON in UTF-8, or its rows cannot be located.
    """
    if _LINES.match(body) and not file_options.field:
        with suppress(DataError):
            return replace(parse_jsonl(body, name, file_options), note="one object per line")
    text = decode(body, name)
    try:
        rows, note = rows_in(_load(text), file_options.field, name)
    except RowError as fault:
        before = text[: fault.column - 1]
        line, column = before.count("\n") + 1, fault.column - before.rfind("\n") - 1
        full_line = text.split("\n")[line - 1]
        raise DataError(
            f"{name}:{line}:{column}: {fault.fault}: {excerpt(full_line, column)!r}; {fault.fix}"
        ) from None
    return Parsed(_records(rows, name), note=note)


def _json_row(raw: bytes) -> Record:
    text = decode_line(raw)
    if not text.strip():
        raise RowError("blank line", "remove it")
    rename = "name the file .json if it contains a single value"
    try:
        row = _load(text)
    except RowError as fault:
        if text.strip() not in ("[", "{"):
            raise
        raise RowError(fault.fault, rename, fault.column) from None
    if not isinstance(row, dict):
        fix = f'write {{"column": value, ...}}, or {rename}'
        raise RowError(f"a row must be a JSON object, not a {type(row).__name__}", fix)
    return row


def _load(text: str) -> Any:
    """Parse JSON; the column of an error counts from the start of `text`, across lines."""
    _check_depth(text)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        fix = (
            "name the file .jsonl if each line is a separate object"
            if lines
            else "write valid JSON"
        )
        raise RowError(f"not JSON ({error.msg})", fix, error.pos + 1) from None
    except _LongNumberError as error:
        raise RowError(str(error), "write it as a string", text.find(error.digits) + 1) from None
    except ValueError as error:
        raise RowError(
            str(error), "write a finite number, or null", _constant_column(text)
        ) from None


def _check_depth(text: str) -> None:
    """Refuse values that are nested too deeply for Python's recursion limit."""
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return
    depth = 0
    for match in _BRACKET.finditer(text):
        bracket = match[0]
        depth += (bracket in "[{") - (bracket in "]}")
        if depth > _MAX_DEPTH:
            fault = f"not supported JSON (nested too deeply, over {_MAX_DEPTH} levels)"
            raise RowError(fault, "flatten it", match.start() + 1)


class _LongNumberError(Exception):
    """An integer with too many digits.

    Args:
        digits: the digits.
    """

    def __init__(self, digits: str) -> None:
        super().__init__(f"an integer with {len(digits.removeprefix('-'))} digits")
        self.digits = digits


def _parse_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _LongNumberError(digits)
    return int(digits)


def _constant_column(text: str) -> int:
    return next((m.start(1) + 1 for m in _CONSTANT.finditer(text) if m.group(1)), 1)


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        duplicates = sorted({key for key in keys if keys.count(key) > 1})
        raise RowError(f"an object has the key {duplicates[0]!r} twice", "keep one of them")
    return record


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=_parse_integer, object_pairs_hook=_unique_keys
)


def _records(rows: list[Any], name: str) -> list[Record]:
    problems = Problems()
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fault = f"a row must be a JSON object, not a {type(row).__name__}"
            problems.add(
                f"{name}: row {i}", fault, excerpt(str(row)), 'write {"column": value, ...}'
            )
    problems.raise_if_any()
    return rows
