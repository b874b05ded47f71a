"""Columns that nothing reads: what they may have been meant for, and rows that say more than would
be learned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jaxpeft.data.rows.columns import REQUIRED, Columns, Kind
from jaxpeft.data.rows.read import Rows
from jaxpeft.data.rows.roles import AN_OPTION, ROLES, roles
from jaxpeft.errors import DataError

_MEANT: Mapping[str, frozenset[str]] = {
    "text": frozenset(
        {
            "an image or a sound",
            "a thought before the answer",
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
    ),  # a prompt there is the instruction, written out
    "messages": frozenset(
        {
            "an image or a sound",
            "earlier turns",
            "tools",
            "a weight of the row",
            "how good the answer is",
        }
    ),
}
"""The columns that rows of a format are not learned without, unless that is said to be meant."""

_CLASSIFIED = {
    AN_OPTION: "a second text",
    "the answer": "the label",
    "how good the answer is": "the label",
    "a part of the question": "a second text",
    "the prompt": "a second text",
    "earlier turns": "a second text",
}
_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "text": {"how good the answer is": "a class or a score"},
    "classification": _CLASSIFIED,
    "token_classification": _CLASSIFIED,
}
"""What roles are in rows without answers."""


def filled_columns(rows: Rows) -> dict[str, type]:
    """Return the columns in which some row holds something, each with the type of a value: of one
    that is no text, if any.
    """
    held: dict[str, type] = {}
    for record in rows.records:
        for name, value in record.items():
            if value not in (None, "", [], {}) and held.get(name, str) is str:
                held[name] = type(value)
    return {name: held[name] for name in rows.columns() if name in held}


def plain_texts(rows: Rows, held: Mapping[str, type]) -> list[str]:
    """Return the columns that hold texts alone, none of which looks like JSON.

    Args:
        rows: of one source.
        held: the type of what each column holds.
    """
    return [
        column
        for column, kind in held.items()
        if kind is str
        and not any(
            (record.get(column) or "").lstrip()[:1] in ("[", "{") for record in rows.records
        )
    ]


def refuse_partial(
    present: Mapping[str, type], asked: Columns, columns: Columns, kind: Kind, name: str
) -> None:
    """Refuse rows of which the likely answer, or what it depends on, would not be read.

    Args:
        present: the columns that hold something, each with the type of a value.
        asked: the columns that the user named; a field named that the format must have says what is
            meant.
        columns: the columns that would be read.
        kind: the format that was told from the columns.
        name: what to call the rows in messages.

    Raises:
        DataError: names the columns, and the options that say what is meant.
    """
    if asked.named_fields().keys() & REQUIRED.get(kind, ({},))[0].keys():
        return
    found = roles(present, _unread_columns(present, columns))
    missed = {column: role for column, role in found.items() if role in _MEANT.get(kind, ())}
    if missed:
        read = ", ".join(map(repr, columns.named_fields().values()))
        raise DataError(
            f"{name}: rows of format {kind} would be learned from {read} alone, without"
            f" {_describe(missed, kind)}; {_fix(present, columns, missed)}if that is meant, set"
            f" data.format={kind!r}. Columns present: {', '.join(present)}"
        )


def find_unread(present: Mapping[str, type], columns: Columns, kind: str) -> tuple[str, bool]:
    """Return one line that names the columns that nothing reads, empty where all are read; and
    whether one may be missed.

    Args:
        present: the columns that hold something, each with the type of a value.
        columns: the columns that are read.
        kind: the format of the rows.
    """
    found = roles(present, _unread_columns(present, columns))
    if not found:
        return "", False
    read = ", ".join(f"{column!r} ({field})" for field, column in columns.named_fields().items())
    return f"read: {read}; not read: {_describe(found, kind)}", any(
        role != "" for role in found.values()
    )


def _unread_columns(present: Collection[str], columns: Columns) -> list[str]:
    """Return the columns that are not read, neither whole nor a value in them (`answers.text`)."""
    read = columns.named_fields().values()
    parts = {
        ".".join(parts[:i])
        for parts in (column.split(".") for column in read)
        for i in range(1, len(parts))
    }
    return [column for column in present if column not in read and column not in parts]


def _describe(found: Mapping[str, str | None], kind: str) -> str:
    def one(column: str, role: str) -> str:
        meant = _ELSEWHERE.get(kind, {}).get(role, role)
        return f"{column!r} (perhaps {meant})" if meant else repr(column)

    return ", ".join(one(column, role or "") for column, role in found.items())


def _fix(present: Mapping[str, type], columns: Columns, missed: Mapping[str, str | None]) -> str:
    """Return the columns to name instead, where they are plain to see."""
    first = {role: column for column, role in reversed(list(missed.items()))}
    asked, answer = (
        first.get("the prompt") or first.get("a part of the question"),
        first.get("the answer"),
    )
    parts = [
        column for column, role in missed.items() if role in (AN_OPTION, "a part of the question")
    ]
    if columns.text is None and len(parts) > 1:
        return (
            "write all parts of the question into the text of"
            f" {next(iter(columns.named_fields().values()))!r}; "
        )
    if columns.text and (answer or asked):
        named = {"prompt": asked or columns.text, "completion": answer or columns.text}
    elif columns.prompt and columns.completion and asked:
        named = {"instruction": columns.prompt, "input": asked, "output": columns.completion}
    elif "how good the answer is" in first:
        return "leave out the rows whose answers are not to be learned, and this column; "
    else:
        return ""
    others = [column for column in named.values() if present.get(column, str) is not str]
    before = f"write {' and '.join(map(repr, others))} as texts, and " if others else ""
    return f"{before}set data.columns, such as {named}; "
