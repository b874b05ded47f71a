"""Unused columns: guess their roles, and refuse rows whose unused columns may be needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jaxpeft.data.rows.columns import REQUIRED, Columns, Kind
from jaxpeft.data.rows.read import Rows
from jaxpeft.data.rows.roles import AN_OPTION, ROLES, roles
from jaxpeft.errors import DataError

_NEEDED_ROLES: Mapping[str, frozenset[str]] = {
    "text": frozenset(
        {
            "an image or audio",
            "the reasoning before the answer",
            "the answer",
            "a part of the question",
            "the prompt",
        }
    ),
    "prompt_completion": frozenset({*ROLES, AN_OPTION}) - {"", "a class", "a second text"},
    "instruction": (
        frozenset({*ROLES, AN_OPTION})
        - {
            "",
            "a class",
            "a second text",
            "the prompt",
        }
    ),  # in these rows, a prompt is the rendered instruction
    "messages": frozenset(
        {
            "an image or audio",
            "earlier turns",
            "tools",
            "a weight of the row",
            "a rating of the answer",
        }
    ),
}
"""Roles of columns that rows of a format may not leave unused, unless `data.format` is set."""

_CLASSIFICATION_ROLES = {
    AN_OPTION: "a second text",
    "the answer": "the label",
    "a rating of the answer": "the label",
    "a part of the question": "a second text",
    "the prompt": "a second text",
    "earlier turns": "a second text",
}
_ROLE_NAMES: Mapping[str, Mapping[str, str]] = {
    "text": {"a rating of the answer": "a class or a score"},
    "classification": _CLASSIFICATION_ROLES,
    "token_classification": _CLASSIFICATION_ROLES,
}
"""Names of roles in messages about rows without answers."""


def filled_columns(rows: Rows) -> dict[str, type]:
    """Return the non-empty columns with the type of a value, not `str` if there is another type."""
    types: dict[str, type] = {}
    for record in rows.records:
        for name, value in record.items():
            if value not in (None, "", [], {}) and types.get(name, str) is str:
                types[name] = type(value)
    return {name: types[name] for name in rows.columns() if name in types}


def plain_texts(rows: Rows, filled: Mapping[str, type]) -> list[str]:
    """Return the columns that contain only texts, none of which looks like JSON.

    Args:
        rows: the rows of one source.
        filled: the non-empty columns, each with the type of a value.
    """
    return [
        column
        for column, kind in filled.items()
        if kind is str
        and not any(
            (record.get(column) or "").lstrip()[:1] in ("[", "{") for record in rows.records
        )
    ]


def refuse_partial(
    present: Mapping[str, type], requested: Columns, columns: Columns, kind: Kind, name: str
) -> None:
    """Refuse rows if the likely answer, or something it depends on, is in an unused column.

    Args:
        present: the non-empty columns, each with the type of a value.
        requested: the columns that the user named; naming a required field disables the check.
        columns: the columns that would be used.
        kind: the format of the rows.
        name: the name of the rows in messages.

    Raises:
        DataError: an unused column may be needed; the error names the options that resolve it.
    """
    if requested.named_fields().keys() & REQUIRED.get(kind, ({},))[0].keys():
        return
    found = roles(present, _unread_columns(present, columns))
    needed = {column: role for column, role in found.items() if role in _NEEDED_ROLES.get(kind, ())}
    if needed:
        used = ", ".join(map(repr, columns.named_fields().values()))
        raise DataError(
            f"{name}: rows of format {kind} would use only {used}, without"
            f" {_describe(needed, kind)}; {_fix(present, columns, needed)}if this is intended, set"
            f" data.format={kind!r}. Columns present: {', '.join(present)}"
        )


def find_unread(present: Mapping[str, type], columns: Columns, kind: str) -> tuple[str, bool]:
    """Return one line on the unused columns, empty if all are used; and whether one may be needed.

    Args:
        present: the non-empty columns, each with the type of a value.
        columns: the columns that are used.
        kind: the format of the rows.
    """
    found = roles(present, _unread_columns(present, columns))
    if not found:
        return "", False
    used = ", ".join(f"{column!r} ({field})" for field, column in columns.named_fields().items())
    return f"columns used: {used}; unused: {_describe(found, kind)}", any(
        role != "" for role in found.values()
    )


def _unread_columns(present: Collection[str], columns: Columns) -> list[str]:
    """Return the columns of which neither the value nor a nested one (`answers.text`) is used."""
    used = columns.named_fields().values()
    parents = {
        ".".join(parts[:i])
        for parts in (column.split(".") for column in used)
        for i in range(1, len(parts))
    }
    return [column for column in present if column not in used and column not in parents]


def _describe(found: Mapping[str, str | None], kind: str) -> str:
    def describe(column: str, role: str) -> str:
        role = _ROLE_NAMES.get(kind, {}).get(role, role)
        return f"{column!r} (perhaps {role})" if role else repr(column)

    return ", ".join(describe(column, role or "") for column, role in found.items())


def _fix(present: Mapping[str, type], columns: Columns, needed: Mapping[str, str | None]) -> str:
    """Return the fix for needed columns, such as a value for `data.columns`, or an empty string."""
    first = {role: column for column, role in reversed(list(needed.items()))}
    prompt = first.get("the prompt") or first.get("a part of the question")
    answer = first.get("the answer")
    parts = [
        column for column, role in needed.items() if role in (AN_OPTION, "a part of the question")
    ]
    if columns.text is None and len(parts) > 1:
        return (
            "write all parts of the question into the text of"
            f" {next(iter(columns.named_fields().values()))!r}; "
        )
    if columns.text and (answer or prompt):
        named = {"prompt": prompt or columns.text, "completion": answer or columns.text}
    elif columns.prompt and columns.completion and prompt:
        named = {"instruction": columns.prompt, "input": prompt, "output": columns.completion}
    elif "a rating of the answer" in first:
        return "remove this column and the rows with bad answers; "
    else:
        return ""
    others = [column for column in named.values() if present.get(column, str) is not str]
    convert = f"write {' and '.join(map(repr, others))} as texts, and " if others else ""
    return f"{convert}set data.columns, such as {named}; "
