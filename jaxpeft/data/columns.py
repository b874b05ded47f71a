"""Which columns hold what: named by the user, or found by their usual names; and with them the format of the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxpeft.errors import DataError, nearest

Kind = Literal[
    "classification", "token_classification", "text", "prompt_completion", "instruction", "messages", "preference"
]
GENERATIVE: tuple[Kind, ...] = ("text", "prompt_completion", "instruction", "messages", "preference")
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "document"),
)
TEXTS = ("text", "sentence", "question", "query", "content", "review", "utterance", "document", "tweet", "input")
DOCUMENTS = ("text", "content", "document", "story", "body")
WORDS = ("tokens", "words")
LABELS = ("label", "labels", "category", "intent", "class", "target", "topic", "sentiment", "score")
TAGS = ("tags", "ner_tags", "pos_tags", "labels", "label")
COMPLETIONS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("question", "response"),
    ("input", "output"),
    ("source", "target"),
)
OUTPUTS = ("output", "response", "completion", "answer")
INPUTS = ("input", "context")
MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue")
PROMPTS = ("prompt", "question", "instruction")
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORIES = ("history",)
TOOLS = ("tools",)
REQUIRED: Mapping[str, Sequence[Mapping[str, str]]] = {
    "text": [{"text": name} for name in DOCUMENTS],
    "prompt_completion": [{"prompt": p, "completion": c} for p, c in COMPLETIONS],
    "instruction": [{"instruction": "instruction", "output": name} for name in OUTPUTS],
    "messages": [{"messages": name} for name in MESSAGES],
    "preference": [{"chosen": "chosen", "rejected": "rejected"}],
}
"""For each format of a language model's rows, the usual columns of the fields that it must have."""
_CHAT = {"system": SYSTEMS, "tools": TOOLS}
OPTIONAL: Mapping[str, Mapping[str, Sequence[str]]] = {
    "prompt_completion": _CHAT,
    "instruction": {"input": INPUTS, "history": HISTORIES, **_CHAT},
    "messages": _CHAT,
    "preference": {"prompt": PROMPTS, **_CHAT},
}
"""Fields that a format may have."""


@dataclass(frozen=True)
class Columns:
    """Column names; None where they are to be found, or, for `text_pair` beside a given `text`, where there is none."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    messages: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None

    def given(self) -> dict[str, str]:
        """Gives the fields that have a column."""
        return {field: column for field, column in dataclasses.asdict(self).items() if column is not None}


FIELDS = tuple(field.name for field in dataclasses.fields(Columns))


def find_format(present: Sequence[str], asked: Columns, name: str) -> Kind:
    """Tells the format of a language model's rows by their columns.

    Args:
        present: the columns of the rows.
        asked: the columns that the user named.
        name: what to call the rows in messages.

    Raises:
        DataError: the columns fit no format, or several.
    """
    _raise_if_absent(present, asked, name)
    fitting: list[Kind] = [kind for kind in GENERATIVE if _alternatives(present, asked, kind)]
    if "preference" in fitting:
        return "preference"
    if "instruction" in fitting and "prompt_completion" in fitting:
        fitting.remove("prompt_completion")  # alpaca's `input` and `output` are fields of the instruction
    if len(fitting) == 1:
        return fitting[0]
    said = f"could be {' or '.join(fitting)}" if fitting else f"is none of {', '.join(GENERATIVE)}"
    raise DataError(
        f"{name}: the format {said}; set data.format, or data.columns such as "
        f"{{'prompt': ..., 'completion': ...}}. Columns present: {', '.join(present)}"
    )


def find_columns(present: Sequence[str], asked: Columns, kind: str, name: str) -> Columns:
    """Gives the columns to use, all the names of `present`.

    Args:
        present: the columns of the rows.
        asked: the columns that the user named.
        kind: one of `Kind`.
        name: what to call the rows in messages.

    Raises:
        DataError: a named column is absent, or none or several could be meant; lists the columns present.
    """
    if kind in GENERATIVE:
        return _find_fields(present, asked, kind, name)
    _refuse_foreign(asked, {"text", "label"} | ({"text_pair"} if kind == "classification" else set()), kind, name)
    problems = _absent(present, asked, name)
    text, pair = _find_texts(present, asked, kind, name, problems)
    label = asked.label
    if label is None:
        usual = TAGS if kind == "token_classification" else LABELS
        label = _find("label", [u for u in usual if u not in (text, pair)], present, name, problems)
    if problems:
        raise DataError(problems)
    return Columns(text, pair, label)


def _find_fields(present: Sequence[str], asked: Columns, kind: str, name: str) -> Columns:
    _raise_if_absent(present, asked, name)
    found = _alternatives(present, asked, kind)
    if len(found) == 1:
        return Columns(**found[0])
    _refuse_foreign(asked, {*REQUIRED[kind][0], *OPTIONAL.get(kind, ())}, kind, name)
    usual = [" with ".join(columns.values()) for columns in found or REQUIRED[kind]]
    said = f"could be {' or '.join(usual)}" if found else f"is none of the usual names ({', '.join(usual)})"
    needed = " and ".join(REQUIRED[kind][0])
    raise DataError(f"{name}: the {needed} column {said}; name it. Columns present: {', '.join(present)}")


def _refuse_foreign(asked: Columns, fields: set[str], kind: str, name: str) -> None:
    if foreign := [field for field in asked.given() if field not in fields]:
        raise DataError(
            f"{name}: data.columns names {', '.join(foreign)}, which rows of format {kind} do not have; remove it"
        )


def _alternatives(present: Sequence[str], asked: Columns, kind: str) -> list[dict[str, str]]:
    """Lists the ways in which the columns are rows of a format."""
    given, optional = asked.given(), OPTIONAL.get(kind, {})
    if not given.keys() <= {*REQUIRED[kind][0], *optional}:
        return []
    found: list[dict[str, str]] = []
    for usual in REQUIRED[kind]:
        fields = {**usual, **{field: column for field, column in given.items() if field in usual}}
        if fields not in found and set(fields.values()) <= set(present):
            found.append(fields)
    for fields in found:
        for field, names in optional.items():
            there = [given[field]] if field in given else [n for n in names if n in present]
            if there and there[0] not in fields.values():
                fields[field] = there[0]
    return found


def _absent(present: Sequence[str], asked: Columns, name: str) -> list[str]:
    return [
        f"{name}: no column {column!r} (for {field}){nearest(column, present)} Columns present: {', '.join(present)}"
        for field, column in asked.given().items()
        if column not in present
    ]


def _raise_if_absent(present: Sequence[str], asked: Columns, name: str) -> None:
    if problems := _absent(present, asked, name):
        raise DataError(problems)


def _find_texts(
    present: Sequence[str], asked: Columns, kind: str, name: str, problems: list[str]
) -> tuple[str | None, str | None]:
    if asked.text is not None:
        return asked.text, asked.text_pair
    if kind == "classification":
        pairs = [pair for pair in PAIRS if set(pair) <= set(present) and asked.text_pair in (None, pair[1])]
        if len(pairs) == 1:
            return pairs[0]
        if len(pairs) > 1:
            fix = f"name the columns text and text_pair. Columns present: {', '.join(present)}"
            problems.append(f"{name}: the texts could be {' or '.join(map(str, pairs))}; {fix}")
            return None, None
    usual = {"classification": TEXTS, "token_classification": WORDS}[kind]
    candidates = [column for column in usual if column != asked.text_pair]
    return _find("text", candidates, present, name, problems), asked.text_pair


def _find(role: str, usual: Sequence[str], present: Sequence[str], name: str, problems: list[str]) -> str | None:
    found = [column for column in usual if column in present]
    if len(found) == 1:
        return found[0]
    said = f"could be {' or '.join(found)}" if found else f"is none of the usual names ({', '.join(usual)})"
    problems.append(f"{name}: the {role} column {said}; name it. Columns present: {', '.join(present)}")
    return None
