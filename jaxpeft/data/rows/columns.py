"""Find the column of each field, by the user's names or the usual ones, and the format of rows."""

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
"""Usual columns of the required fields, for each format of a language model's rows."""
_CHAT = {"system": SYSTEMS, "tools": TOOLS}
OPTIONAL: Mapping[str, Mapping[str, Sequence[str]]] = {
    "prompt_completion": _CHAT,
    "instruction": {"input": INPUTS, "history": HISTORIES, **_CHAT},
    "messages": _CHAT,
    "preference": {"prompt": PROMPTS, **_CHAT},
}
"""Usual columns of the optional fields of each format."""


@dataclass(frozen=True)
class Columns:
    """Column names; None to find a column, or for `text_pair` with a set `text`, for no column."""

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
"""All usual column names."""
_TABLE = re.compile(r"\.(csv|tsv)\b")


def find_format(
    present: Sequence[str], requested: Columns, name: str, texts: Sequence[str] = ()
) -> Kind:
    """Infer the format of a language model's rows from their columns.

    Args:
        present: the columns of the rows.
        requested: the columns that the user named.
        name: the name of the rows in messages.
        texts: the columns with plain texts, which cannot be chats.

    Raises:
        DataError: the columns fit no format, or several.
    """
    _raise_if_absent(present, requested, name)
    fitting: list[Kind] = [kind for kind in GENERATIVE if _alternatives(present, requested, kind)]
    if requested.messages is None and any(
        fields["messages"] in texts for fields in _alternatives(present, requested, "messages")
    ):
        fitting.remove("messages")
    if "preference" in fitting:
        return "preference"
    if "instruction" in fitting and "prompt_completion" in fitting:
        fitting.remove("prompt_completion")  # Alpaca rows also have `input` and `output`
    if len(fitting) == 1:
        return fitting[0]
    fault = (
        f"could be {' or '.join(fitting)}" if fitting else f"is not one of {', '.join(GENERATIVE)}"
    )
    hint = _header_hint(present, requested, name)
    fix = (
        "set data.format to one of them"
        if fitting
        else f"set data.format, or data.columns such as {_suggest_columns(texts or present)}"
    )
    raise DataError(
        f"{name}: the format {fault}; {fix}. Columns present:"
        f" {', '.join(present)}{hint and '; ' + hint}"
    )


def _header_hint(present: Sequence[str], requested: Columns, name: str) -> str:
    """Return the hint that the first line of a table may be a row, or an empty string."""
    if (
        requested.named_fields()
        or _columns_present(sorted(USUAL), present)
        or all(map(str.isdigit, present))
        or not _TABLE.search(name)
    ):
        return ""
    return "if the first line is a row, set data.header to False and name the columns by number"


def _suggest_columns(texts: Sequence[str]) -> str:
    """Return a suggestion for `data.columns` with a prompt and a completion."""
    by_role = {role(column): column for column in reversed(texts)}
    prompt = by_role.get("the prompt") or by_role.get("a part of the question")
    answer = by_role.get("the answer")
    if not prompt or not answer:
        return "{'prompt': ..., 'completion': ...}"
    first, last = (
        ("instruction", "output") if "a system turn" in by_role else ("prompt", "completion")
    )
    return str({first: prompt, last: answer})


def find_prompt_columns(
    present: Sequence[str], requested: Columns, name: str, *, texts: bool = False
) -> Columns:
    """Return the columns from which a text is generated: messages, instruction or prompt.

    Args:
        present: the columns of a row.
        requested: the columns that the user named.
        name: the name of the row in messages.
        texts: whether a column of texts may be used, which contain their completions.

    Raises:
        DataError: there is no such column.
    """
    chosen = [field for field in ("messages", "instruction", "prompt") if getattr(requested, field)]
    if chosen:
        _raise_if_absent(present, requested, name)
        return requested
    usual = (
        *(("messages", column) for column in MESSAGES),
        ("instruction", "instruction"),
        *(("prompt", column) for column, _ in COMPLETIONS),
        *(("text", column) for column in DOCUMENTS if texts),
    )
    found = next(((field, column) for field, column in usual if column in present), None)
    if found is None:
        raise DataError(
            f"{name}: has no prompt, messages or instruction; name its column in data.columns,"
            f" such as prompt={present[0] if present else '...'}. Columns present:"
            f" {', '.join(present)}"
        )
    field, column = found
    if field == "text":
        return Columns(text=column)
    kind = "prompt_completion" if field == "prompt" else field
    optional = {
        other: next((name for name in names if name in present), None)
        for other, names in OPTIONAL[kind].items()
    }
    return Columns(**{field: column}, **optional)


def find_columns(present: Sequence[str], requested: Columns, kind: str, name: str) -> Columns:
    """Return the columns to use, all of them in `present`.

    Args:
        present: the columns of the rows.
        requested: the columns that the user named.
        kind: one of `Kind`.
        name: the name of the rows in messages.

    Raises:
        DataError: a named column is missing, or a field has no column or several candidates.
    """
    if kind in GENERATIVE:
        return _find_fields(present, requested, kind, name)
    return _find_classified(present, requested, kind, name, labeled=True)


def find_text_columns(present: Sequence[str], requested: Columns, kind: str, name: str) -> Columns:
    """Return the columns of texts to classify, without that of the label.

    Args:
        present: see `find_columns`.
        requested: see `find_columns`; its label is ignored.
        kind: `classification` or `token_classification`.
        name: see `find_columns`.

    Raises:
        DataError: a named column is missing, or the text has no column or several candidates.
    """
    unlabeled = dataclasses.replace(requested, label=None)
    return _find_classified(present, unlabeled, kind, name, labeled=False)


def _find_classified(
    present: Sequence[str], requested: Columns, kind: str, name: str, *, labeled: bool
) -> Columns:
    fields = {"text", "label"} | ({"text_pair"} if kind == "classification" else set())
    _refuse_foreign(requested, fields, kind, name)
    problems = _absent(present, requested, name)
    text, pair = _find_texts(present, requested, kind, name, problems)
    label = requested.label
    if label is None and labeled:
        usual = TAGS if kind == "token_classification" else LABELS
        label = _find("label", usual, present, name, problems, (text, pair))
    if problems and (hint := _header_hint(present, requested, name)):
        problems.append(f"{name}: {hint}")
    if problems:
        raise DataError(problems)
    return Columns(text, pair, label)


def _find_fields(present: Sequence[str], requested: Columns, kind: str, name: str) -> Columns:
    _raise_if_absent(present, requested, name)
    found = _alternatives(present, requested, kind)
    if len(found) == 1:
        return Columns(**found[0])
    _refuse_foreign(requested, {*REQUIRED[kind][0], *OPTIONAL.get(kind, ())}, kind, name)
    usual = [" with ".join(columns.values()) for columns in found or REQUIRED[kind]]
    fault = (
        f"could be {' or '.join(usual)}"
        if found
        else f"has none of the usual names ({', '.join(usual)})"
    )
    fields = " and ".join(REQUIRED[kind][0])
    raise DataError(
        f"{name}: the {fields} column {fault}; set it in data.columns. Columns present:"
        f" {', '.join(present)}"
    )


def _refuse_foreign(requested: Columns, fields: set[str], kind: str, name: str) -> None:
    if foreign := [field for field in requested.named_fields() if field not in fields]:
        raise DataError(
            f"{name}: data.columns sets {', '.join(foreign)}, which rows of format {kind} do not"
            " have; remove it"
        )


def _alternatives(present: Sequence[str], requested: Columns, kind: str) -> list[dict[str, str]]:
    """List all mappings from the fields of a format to the columns."""
    named, optional = requested.named_fields(), OPTIONAL.get(kind, {})
    if not named.keys() <= {*REQUIRED[kind][0], *optional}:
        return []
    found: list[dict[str, str]] = []
    for columns in _names(present):
        for usual in [] if found else REQUIRED[kind]:
            wanted = {
                field: named.get(field) or columns.get(column) for field, column in usual.items()
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
            candidates = [named[field]] if field in named else _columns_present(names, present)
            if candidates and candidates[0] not in fields.values():
                fields[field] = candidates[0]
    return found


def _names(present: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """Yield the columns by exact name, then by name without case and outer spaces, if unique."""
    yield {name: name for name in present}
    folded = [name.strip().lower() for name in present]
    yield {
        plain: name for plain, name in zip(folded, present, strict=True) if folded.count(plain) == 1
    }


def _columns_present(usual: Sequence[str], present: Sequence[str]) -> list[str]:
    """List the columns with usual names: exact, else without case and outer spaces."""
    matches = ([columns[name] for name in usual if name in columns] for columns in _names(present))
    return next(filter(None, matches), [])


def _absent(present: Sequence[str], requested: Columns, name: str) -> list[str]:
    there = ", ".join(present)
    return [
        f"{name}: no column {column!r} (for {field}){nearest(column, present) or '.'} Columns"
        f" present: {there}"
        for field, column in requested.named_fields().items()
        if column not in present
    ]


def _raise_if_absent(present: Sequence[str], requested: Columns, name: str) -> None:
    if problems := _absent(present, requested, name):
        raise DataError(problems)


def _find_texts(
    present: Sequence[str], requested: Columns, kind: str, name: str, problems: list[str]
) -> tuple[str | None, str | None]:
    if requested.text is not None:
        return requested.text, requested.text_pair
    if kind == "classification":
        matches = (
            [(columns[a], columns[b]) for a, b in PAIRS if {a, b} <= columns.keys()]
            for columns in _names(present)
        )
        pairs = [
            pair
            for pair in next(filter(None, matches), [])
            if requested.text_pair in (None, pair[1])
        ]
        if len(pairs) == 1:
            return pairs[0]
        if len(pairs) > 1:
            fix = f"set text and text_pair in data.columns. Columns present: {', '.join(present)}"
            problems.append(f"{name}: the texts could be {' or '.join(map(str, pairs))}; {fix}")
            return None, None
    usual = {"classification": TEXTS, "token_classification": WORDS}[kind]
    return _find(
        "text", usual, present, name, problems, (requested.text_pair,)
    ), requested.text_pair


def _find(
    field: str,
    usual: Sequence[str],
    present: Sequence[str],
    name: str,
    problems: list[str],
    used: Sequence[str | None],
) -> str | None:
    usual = [column for column in usual if column not in used]
    found = _columns_present(usual, [column for column in present if column not in used])
    if len(found) == 1:
        return found[0]
    fault = (
        f"could be {' or '.join(found)}"
        if found
        else f"has none of the usual names ({', '.join(usual)})"
    )
    problems.append(
        f"{name}: the {field} column {fault}; set it in data.columns. Columns present:"
        f" {', '.join(present)}"
    )
    return None
