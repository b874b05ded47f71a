"""Which columns hold what: named by the user, or found by their usual names; and with them the
format of the rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxpeft.data.rows.roles import role
from jaxpeft.errors import DataError, nearest

Kind = Literal[
    "classification",
    "token_classification",
    "text",
    "prompt_completion",
    "instruction",
    "messages",
    "preference",
]
GENERATIVE: tuple[Kind, ...] = (
    "text",
    "prompt_completion",
    "instruction",
    "messages",
    "preference",
)
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "document"),
)
TEXTS = (
    "text",
    "sentence",
    "question",
    "query",
    "content",
    "review",
    "utterance",
    "document",
    "tweet",
    "input",
)
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
    """Column names; None where they are to be found, or, for `text_pair` beside a given `text`,
    where there is none.
    """

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

    def named_fields(self) -> dict[str, str]:
        """Return the fields that have a column."""
        return {
            field: column
            for field, column in dataclasses.asdict(self).items()
            if column is not None
        }


FIELDS = tuple(field.name for field in dataclasses.fields(Columns))
USUAL = frozenset({*TEXTS, *DOCUMENTS, *WORDS, *LABELS, *TAGS, *MESSAGES, *FIELDS}) | {
    name for pair in (*PAIRS, *COMPLETIONS) for name in pair
}
"""All names of columns that are looked for."""
_TABLE = re.compile(r"\.(csv|tsv)\b")


def find_format(
    present: Sequence[str], asked: Columns, name: str, texts: Sequence[str] = ()
) -> Kind:
    """Tell the format of a language model's rows by their columns.

    Args:
        present: the columns of the rows.
        asked: the columns that the user named.
        name: what to call the rows in messages.
        texts: the columns that hold plain texts, and so no chats.

    Raises:
        DataError: the columns fit no format, or several.
    """
    _raise_if_absent(present, asked, name)
    fitting: list[Kind] = [kind for kind in GENERATIVE if _alternatives(present, asked, kind)]
    if asked.messages is None and any(
        of["messages"] in texts for of in _alternatives(present, asked, "messages")
    ):
        fitting.remove("messages")
    if "preference" in fitting:
        return "preference"
    if "instruction" in fitting and "prompt_completion" in fitting:
        fitting.remove(
            "prompt_completion"
        )  # alpaca's `input` and `output` are fields of the instruction
    if len(fitting) == 1:
        return fitting[0]
    said = f"could be {' or '.join(fitting)}" if fitting else f"is none of {', '.join(GENERATIVE)}"
    unnamed = _header_hint(present, asked, name)
    fix = (
        "set data.format to one of them"
        if fitting
        else f"set data.format, or data.columns such as {_likely(texts or present)}"
    )
    raise DataError(
        f"{name}: the format {said}; {fix}. Columns present:"
        f" {', '.join(present)}{unnamed and '; ' + unnamed}"
    )


def _header_hint(present: Sequence[str], asked: Columns, name: str) -> str:
    """Return what to do where the first line of a table is a row, empty where it surely names the
    columns.
    """
    if (
        asked.named_fields()
        or _columns_present(sorted(USUAL), present)
        or all(map(str.isdigit, present))
        or not _TABLE.search(name)
    ):
        return ""
    return (
        "if the first line is a row, set data.header to False and name the columns by their number"
    )


def _likely(texts: Sequence[str]) -> str:
    """Return what to name a prompt and its completion, told from the words of the names."""
    found = {role(column): column for column in reversed(texts)}
    asked, answer = (
        found.get("the prompt") or found.get("a part of the question"),
        found.get("the answer"),
    )
    if not asked or not answer:
        return "{'prompt': ..., 'completion': ...}"
    first, last = (
        ("instruction", "output") if "a system turn" in found else ("prompt", "completion")
    )
    return str({first: asked, last: answer})


def find_columns(present: Sequence[str], asked: Columns, kind: str, name: str) -> Columns:
    """Return the columns to use, all the names of `present`.

    Args:
        present: the columns of the rows.
        asked: the columns that the user named.
        kind: one of `Kind`.
        name: what to call the rows in messages.

    Raises:
        DataError: a named column is absent, or none or several could be meant; lists the columns
            present.
    """
    if kind in GENERATIVE:
        return _find_fields(present, asked, kind, name)
    _refuse_foreign(
        asked,
        {"text", "label"} | ({"text_pair"} if kind == "classification" else set()),
        kind,
        name,
    )
    problems = _absent(present, asked, name)
    text, pair = _find_texts(present, asked, kind, name, problems)
    label = asked.label
    if label is None:
        usual = TAGS if kind == "token_classification" else LABELS
        label = _find("label", usual, present, name, problems, (text, pair))
    if problems and (unnamed := _header_hint(present, asked, name)):
        problems.append(f"{name}: {unnamed}")
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
    said = (
        f"could be {' or '.join(usual)}"
        if found
        else f"is none of the usual names ({', '.join(usual)})"
    )
    needed = " and ".join(REQUIRED[kind][0])
    raise DataError(
        f"{name}: the {needed} column {said}; name it. Columns present: {', '.join(present)}"
    )


def _refuse_foreign(asked: Columns, fields: set[str], kind: str, name: str) -> None:
    if foreign := [field for field in asked.named_fields() if field not in fields]:
        raise DataError(
            f"{name}: data.columns names {', '.join(foreign)}, which rows of format {kind} do not"
            " have; remove it"
        )


def _alternatives(present: Sequence[str], asked: Columns, kind: str) -> list[dict[str, str]]:
    """List the ways in which the columns are rows of a format."""
    given, optional = asked.named_fields(), OPTIONAL.get(kind, {})
    if not given.keys() <= {*REQUIRED[kind][0], *optional}:
        return []
    found: list[dict[str, str]] = []
    for known in _names(present):
        for usual in [] if found else REQUIRED[kind]:
            wanted = {
                field: given.get(field) or known.get(column) for field, column in usual.items()
            }
            fields = {
                field: column
                for field, column in wanted.items()
                if column is not None and column in present
            }
            if len(fields) == len(usual) and fields not in found:
                found.append(fields)
    for fields in found:
        for field, names in optional.items():
            there = [given[field]] if field in given else _columns_present(names, present)
            if there and there[0] not in fields.values():
                fields[field] = there[0]
    return found


def _names(present: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """Yield the columns by their names as they are, then by what they are but for case and outer
    spaces, where that is one.
    """
    yield {name: name for name in present}
    folded = [name.strip().lower() for name in present]
    yield {
        plain: name for plain, name in zip(folded, present, strict=True) if folded.count(plain) == 1
    }


def _columns_present(usual: Sequence[str], present: Sequence[str]) -> list[str]:
    """List the columns of usual names: those so written, else those that are but for case and outer
    spaces.
    """
    return next(
        filter(
            None, ([known[name] for name in usual if name in known] for known in _names(present))
        ),
        [],
    )


def _absent(present: Sequence[str], asked: Columns, name: str) -> list[str]:
    return [
        f"{name}: no column {column!r} (for {field}){nearest(column, present)} Columns present:"
        f" {', '.join(present)}"
        for field, column in asked.named_fields().items()
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
        there = (
            [(known[a], known[b]) for a, b in PAIRS if {a, b} <= known.keys()]
            for known in _names(present)
        )
        pairs = [
            pair for pair in next(filter(None, there), []) if asked.text_pair in (None, pair[1])
        ]
        if len(pairs) == 1:
            return pairs[0]
        if len(pairs) > 1:
            fix = f"name the columns text and text_pair. Columns present: {', '.join(present)}"
            problems.append(f"{name}: the texts could be {' or '.join(map(str, pairs))}; {fix}")
            return None, None
    usual = {"classification": TEXTS, "token_classification": WORDS}[kind]
    return _find("text", usual, present, name, problems, (asked.text_pair,)), asked.text_pair


def _find(
    field: str,
    usual: Sequence[str],
    present: Sequence[str],
    name: str,
    problems: list[str],
    taken: Sequence[str | None],
) -> str | None:
    usual = [column for column in usual if column not in taken]
    found = _columns_present(usual, [column for column in present if column not in taken])
    if len(found) == 1:
        return found[0]
    said = (
        f"could be {' or '.join(found)}"
        if found
        else f"is none of the usual names ({', '.join(usual)})"
    )
    problems.append(
        f"{name}: the {field} column {said}; name it. Columns present: {', '.join(present)}"
    )
    return None
