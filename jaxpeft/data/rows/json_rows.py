"""Find the rows in a JSON value: a list, under a key, the values of an object, or by column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from jaxpeft.data.problems import EXCERPT
from jaxpeft.data.rows.columns import USUAL
from jaxpeft.errors import DataError, nearest

_FIX = "write a list of objects, or name the file .jsonl if it contains one object per line"


def rows_in(value: Any, field: str, name: str) -> tuple[list[Any], str]:
    """Return the rows in a JSON value, not yet checked to be objects, and where they were found.

    Args:
        value: the parsed value.
        field: the dotted path of the rows; empty to find them.
        name: the name of the file in messages.

    Raises:
        DataError: there are no rows, or several candidates.
    """
    value, at = (_value_at(value, field, name), f"rows under {field!r}") if field else (value, "")
    if isinstance(value, list):
        return cast(list[Any], value), at
    if not isinstance(value, dict):
        raise DataError(f"{name}:1:1: not a JSON list: {str(value)[:EXCERPT]!r}; {_FIX}")
    return _of_object(cast(dict[str, Any], value), at, name)


def _of_object(value: dict[str, Any], at: str, name: str) -> tuple[list[Any], str]:
    by_column = _columns(value)
    if by_column is not None:
        return by_column, f"{at} column by column".strip()
    split = _split(value)
    if split is not None:
        return split, f"{at} under 'data', named by 'columns'".strip()
    rows = list(value.values())
    if len(rows) > 1 and all(_is_row(row) for row in rows):
        return rows, "each value of the object is a row, the keys are dropped"
    lists = list(_lists(value))
    if len(lists) == 1:
        return lists[0][1], f"rows under {lists[0][0]!r}"
    if len(lists) > 1:
        keys = ", ".join(key for key, _ in lists)
        likely = max(lists, key=lambda found: (_are_usual(found[1]), len(found[1])))[0]
        raise DataError(
            f"{name}: rows could be under {keys}; choose one with data.field, such as"
            f" data.field={likely!r}"
        )
    raise DataError(f"{name}:1:1: not a JSON list: {_describe(value)!r}; {_FIX}")


def _are_usual(rows: Sequence[Any]) -> bool:
    return any(key.strip().lower() in USUAL for key in rows[0])


def _split(value: dict[str, Any]) -> list[Any] | None:
    """Return the rows of an object with `columns` and `data`, the `split` orientation of pandas; or
    None.
    """
    columns, data = value.get("columns"), value.get("data")
    if not isinstance(columns, list) or not isinstance(data, list) or not data:
        return None
    names, rows = cast(list[Any], columns), cast(list[Any], data)
    if not all(isinstance(name, str) for name in names):
        return None
    if not all(isinstance(row, list) and len(cast(list[Any], row)) == len(names) for row in rows):
        return None
    return [dict(zip(names, row, strict=True)) for row in rows]


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and any(
        key in USUAL or isinstance(inner, str | int | float)
        for key, inner in cast(dict[str, Any], value).items()
    )


def _describe(value: dict[str, Any]) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)[:EXCERPT]


def _columns(value: dict[str, Any]) -> list[Any] | None:
    """Return the rows of an object that maps columns to values, as lists or, in pandas' format, as
    objects; or None.
    """
    if not any(key.strip().lower() in USUAL for key in value):
        return None
    keys = [_keys(column) for column in value.values()]
    if any(one is None or one != keys[0] for one in keys) or not keys[0]:
        return None
    columns = [
        list(column.values()) if isinstance(column, dict) else column for column in value.values()
    ]
    if any(isinstance(item, dict) for column in columns for item in column[:1]) and len(value) == 1:
        return None  # `{"text": [{...}]}` is a list of rows, not a column
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _keys(column: Any) -> list[str] | range | None:
    if isinstance(column, dict):
        return list(cast(dict[str, Any], column))
    return range(len(cast(Sequence[Any], column))) if isinstance(column, list) else None


def _lists(value: dict[str, Any]) -> Iterable[tuple[str, list[Any]]]:
    """Yield the lists of objects, also nested ones, with their dotted paths."""
    for key, inner in value.items():
        if (
            isinstance(inner, list)
            and inner
            and all(isinstance(row, dict) for row in cast(list[Any], inner))
        ):
            yield key, cast(list[Any], inner)
        elif isinstance(inner, dict) and "." not in key:
            yield from (
                (f"{key}.{deeper}", rows) for deeper, rows in _lists(cast(dict[str, Any], inner))
            )


def _value_at(value: Any, field: str, name: str) -> Any:
    for i, part in enumerate(field.split(".")):
        if not isinstance(value, dict) or part not in value:
            keys = list(cast(dict[str, Any], value)) if isinstance(value, dict) else []
            below = f" under {'.'.join(field.split('.')[:i])!r}" if i else ""
            known = f"; the keys are {', '.join(keys)[:EXCERPT]}" if keys else ""
            raise DataError(
                f"{name}: data.field {field!r}: no {part!r}{below}{nearest(part, keys) or known}"
            )
        value = cast(dict[str, Any], value)[part]
    return value
