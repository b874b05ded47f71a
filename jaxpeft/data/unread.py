"""Columns that nothing reads: what they may have been meant for, and rows that say more than would be learned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jaxpeft.data.columns import REQUIRED, Columns, Kind
from jaxpeft.data.rows import Rows
from jaxpeft.errors import DataError

_WORD = re.compile(r"[^\W_]+")
_HUMP = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")  # of a name written asCamel
_ROLES: Mapping[str, frozenset[str]] = {
    role: frozenset(words.split())
    for role, words in {
        "": (
            "id ids idx index unnamed uuid guid pid url uri link links hash md5 sha path file filename date time "
            "timestamp year created updated split fold subset source sources origin original raw seed lang language "
            "license author meta metadata version count num number len length type kind domain "
            "difficulty level model task config dataset name user annotator worker"
        ),
        "an image or a sound": "image images img pixel pixels audio audios video videos speech",
        "a thought before the answer": (
            "reasoning rationale rationales explanation explanations thought thoughts thinking think cot scratchpad "
            "justification"
        ),
        "the answer": (
            "answer answers output outputs response responses completion completions target targets solution solutions "
            "code program summary summaries highlights abstract translation translations chosen rejected reply replies "
            "gold truth expected result results sql rewrite rewritten paraphrase correction corrected generation "
            "generations generated continuation caption captions"
        ),
        "a system turn": "system persona",
        "earlier turns": "history",
        "tools": "tools tool functions function",
        "tests of the answer": "test tests",
        "a part of the question": (
            "context contexts passage passages choice choices option options ending endings document documents article "
            "input inputs question questions query queries evidence evidences instruction instructions table schema "
            "knowledge problem"
        ),
        "the prompt": "prompt prompts",
        "a weight of the row": "weight weights",
        "how good the answer is": (
            "label labels score scores rating ratings reward rewards rank ranking quality correct correctness accepted "
            "desirable helpfulness preference preferred winner vote votes upvotes feedback"
        ),
        "a class": "category categories topic topics class classes intent intents sentiment emotion",
        "a second text": "text texts title sentence sentence1 sentence2 body content headline premise hypothesis aspect description",
    }.items()
}
"""What a column may be meant for, told from a word of its name; the first that fits. Nothing is missed without those of ""."""
_MEANT: Mapping[str, frozenset[str]] = {
    "text": frozenset(
        {"an image or a sound", "a thought before the answer", "the answer", "a part of the question", "the prompt"}
    ),
    "prompt_completion": frozenset(_ROLES) - {"", "a class", "a second text"},
    "instruction": frozenset(_ROLES)
    - {"", "a class", "a second text", "the prompt"},  # a prompt there is the instruction, written out
    "messages": frozenset(
        {"an image or a sound", "earlier turns", "tools", "a weight of the row", "how good the answer is"}
    ),
}
"""The columns that rows of a format are not learned without, unless that is said to be meant."""

_CLASSIFIED = {
    "the answer": "the label", "how good the answer is": "the label", "a part of the question": "a second text",
    "the prompt": "a second text", "earlier turns": "a second text",
}  # fmt: skip
_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "text": {"how good the answer is": "a class or a score"},
    "classification": _CLASSIFIED,
    "token_classification": _CLASSIFIED,
}
"""What roles are in rows without answers."""


def filled(rows: Rows) -> list[str]:
    """Return the columns in which some row holds something."""
    return [
        name for name in rows.columns() if any(record.get(name) not in (None, "", [], {}) for record in rows.records)
    ]


def role(column: str) -> str | None:
    """Return what a column may be meant for: empty where nothing is missed without it, None where its name does not say."""
    words = {word.lower() for word in [*_WORD.findall(column), *_HUMP.findall(column)]}
    return next((role for role, known in _ROLES.items() if words & known), None if words else "")


def refuse_partial(present: Sequence[str], asked: Columns, columns: Columns, kind: Kind, name: str) -> None:
    """Refuse rows of which the likely answer, or what it depends on, would not be read.

    Args:
        present: the columns that hold something.
        asked: the columns that the user named; a field named that the format must have says what is meant.
        columns: the columns that would be read.
        kind: the format that was told from the columns.
        name: what to call the rows in messages.

    Raises:
        DataError: names the columns, and the options that say what is meant.
    """
    if asked.given().keys() & REQUIRED.get(kind, ({},))[0].keys():
        return
    left = _left(present, columns)
    missed = [column for column in left if role(column) in _MEANT.get(kind, ())]
    if missed:
        read = ", ".join(map(repr, columns.given().values()))
        raise DataError(
            f"{name}: rows of format {kind} would be learned from {read} alone, without {_told(missed, kind)}; "
            f"{_fix(columns, missed)}if that is meant, set data.format={kind!r}. Columns present: {', '.join(present)}"
        )


def unread(present: Sequence[str], columns: Columns, kind: str) -> tuple[str, bool]:
    """Return one line that names the columns that nothing reads, empty where all are read; and whether one may be missed.

    Args:
        present: the columns that hold something.
        columns: the columns that are read.
        kind: the format of the rows.
    """
    left = _left(present, columns)
    if not left:
        return "", False
    read = ", ".join(f"{column!r} ({field})" for field, column in columns.given().items())
    return f"read: {read}; not read: {_told(left, kind)}", any(role(column) != "" for column in left)


def _left(present: Sequence[str], columns: Columns) -> list[str]:
    """Return the columns that are not read, neither whole nor a value in them (`answers.text`)."""
    read = columns.given().values()
    parts = {".".join(parts[:i]) for parts in (column.split(".") for column in read) for i in range(1, len(parts))}
    return [column for column in present if column not in read and column not in parts]


def _told(columns: Sequence[str], kind: str) -> str:
    def one(column: str) -> str:
        meant = role(column) or ""
        meant = _ELSEWHERE.get(kind, {}).get(meant, meant)
        return f"{column!r} (perhaps {meant})" if meant else repr(column)

    return ", ".join(map(one, columns))


def _fix(columns: Columns, missed: Sequence[str]) -> str:
    """Return the columns to name instead, where they are plain to see."""
    roles = {role(column): column for column in reversed(missed)}
    asked, answer = roles.get("the prompt") or roles.get("a part of the question"), roles.get("the answer")
    if columns.text and (answer or asked):
        named = {"prompt": asked or columns.text, "completion": answer or columns.text}
    elif columns.prompt and asked:
        named = {"instruction": columns.prompt, "input": asked, "output": columns.completion}
    elif "how good the answer is" in roles:
        return "leave out the rows whose answers are not to be learned, and this column; "
    else:
        return ""
    return f"set data.columns, such as {named}; "
