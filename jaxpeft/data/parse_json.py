"""JSON and JSON lines: bytes to records, with every problem of a file in one error."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxpeft.data.problems import Parsed, Problems, Record, RowError, excerpt
from jaxpeft.data.utf8 import body_of, decode, decode_line
from jaxpeft.errors import DataError

# A string is matched first so that a NaN inside one is not taken for a literal.
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN)')
_CUT_OFF = "the file does not end in a newline, so it looks cut off: write or download it again"


def parse_jsonl(data: bytes, name: str) -> Parsed:
    """Reads one JSON object a line.

    Raises:
        DataError: the file is empty or some line is not a JSON object in UTF-8.
    """
    body = body_of(data, name)
    lines = list(enumerate(body.rstrip().split(b"\n"), 1))
    return parse_lines(lines, name, cut=len(lines) if not body.endswith(b"\n") else None), tuple(n for n, _ in lines)


def parse_lines(lines: Sequence[tuple[int, bytes]], name: str, cut: int | None = None) -> list[Record]:
    """Reads lines of one JSON object each.

    Args:
        lines: `(1-based number, bytes)`.
        name: of the file.
        cut: the number of a last line without a newline, which may be cut off.

    Raises:
        DataError: some line is not a JSON object in UTF-8.
    """
    problems, records = Problems(), list[Record]()
    for number, raw in lines:
        try:
            records.append(_json_row(raw))
        except RowError as fault:
            off = number == cut and fault.fault.startswith("not JSON")
            where = f"{name}:{number}:{fault.column}"
            text = excerpt(raw.decode("utf-8", "replace"), fault.column)
            problems.add(where, fault.fault, text, _CUT_OFF if off else fault.fix)
    problems.raise_if_any()
    return records


def parse_json(data: bytes, name: str) -> Parsed:
    """Reads one JSON list of objects.

    Raises:
        DataError: the file is empty, not JSON in UTF-8, or not a list of objects.
    """
    text = decode(body_of(data, name), name)
    try:
        rows = _load(text)
    except RowError as fault:
        before = text[: fault.column - 1]
        line, column = before.count("\n") + 1, fault.column - before.rfind("\n") - 1
        whole = text.split("\n")[line - 1]
        raise DataError(f"{name}:{line}:{column}: {fault.fault}: {excerpt(whole, column)!r}; {fault.fix}") from None
    if not isinstance(rows, list):
        fix = "write a list of objects, or name the file .jsonl if it holds one object a line"
        raise DataError(f"{name}:1:1: not a JSON list: {excerpt(text)!r}; {fix}")
    return _records(rows, name), ()


def _json_row(raw: bytes) -> Record:
    text = decode_line(raw)
    if not text.strip():
        raise RowError("blank line", "remove it")
    row = _load(text)
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, this is a {type(row).__name__}", 'write {"column": value, ...}')
    return row


def _load(text: str) -> Any:
    """Parses JSON; the column of a fault counts from the beginning of `text`, over lines."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        fix = "name the file .jsonl if each line is an object of its own" if lines else "write valid JSON"
        raise RowError(f"not JSON ({error.msg})", fix, error.pos + 1) from None
    except RecursionError:
        raise RowError("not JSON that can be read (nested too deeply)", "flatten it") from None
    except ValueError as error:
        raise RowError(str(error), "write a finite number, or null", _constant_column(text)) from None


def _constant_column(text: str) -> int:
    return next((m.start(1) + 1 for m in _CONSTANT.finditer(text) if m.group(1)), 1)


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise RowError(f"an object has the key {twice[0]!r} twice", "keep one of them")
    return record


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _records(rows: list[Any], name: str) -> list[Record]:
    problems = Problems()
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fault = f"a row must be a JSON object, this is a {type(row).__name__}"
            problems.add(f"{name}: row {i}", fault, excerpt(str(row)), 'write {"column": value, ...}')
    problems.raise_if_any()
    return rows
