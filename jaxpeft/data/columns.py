"""Which columns hold the text, the second text and the label: named by the user or found by their usual names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpeft.errors import DataError, nearest

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


@dataclass(frozen=True)
class Columns:
    """Column names; None where they are to be found, or, for `text_pair` beside a given `text`, where there is none."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


def find_columns(present: Sequence[str], asked: Columns, kind: str, name: str) -> Columns:
    """Gives the columns to use, all the names of `present`.

    Args:
        present: the columns of the rows.
        asked: the columns that the user named.
        kind: `classification`, `token_classification` or `text`.
        name: what to call the rows in messages.

    Raises:
        DataError: a named column is absent, or none or several could be meant; lists the columns present.
    """
    problems: list[str] = []
    given = _check_given(present, asked, name, problems)
    text, pair = _find_texts(present, given, kind, name, problems)
    label = given.label
    if kind != "text" and label is None:
        usual = TAGS if kind == "token_classification" else LABELS
        label = _find("label", [u for u in usual if u not in (text, pair)], present, name, problems)
    if problems:
        raise DataError(problems)
    return Columns(text, pair, label)


def _check_given(present: Sequence[str], asked: Columns, name: str, problems: list[str]) -> Columns:
    for role in ("text", "text_pair", "label"):
        column = getattr(asked, role)
        if column is not None and column not in present:
            hint = nearest(column, present)
            problems.append(f"{name}: no column {column!r} (for {role}){hint} Columns present: {', '.join(present)}")
    return asked


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
    usual = {"classification": TEXTS, "token_classification": WORDS, "text": DOCUMENTS}[kind]
    candidates = [column for column in usual if column != asked.text_pair]
    return _find("text", candidates, present, name, problems), asked.text_pair


def _find(role: str, usual: Sequence[str], present: Sequence[str], name: str, problems: list[str]) -> str | None:
    found = [column for column in usual if column in present]
    if len(found) == 1:
        return found[0]
    said = f"could be {' or '.join(found)}" if found else f"is none of the usual names ({', '.join(usual)})"
    problems.append(f"{name}: the {role} column {said}; name it. Columns present: {', '.join(present)}")
    return None
