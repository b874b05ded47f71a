"""Convert rows to examples: validated texts or words, and labels as numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import numpy as np

from jaxpeft.data.chat.dialogs import (
    Completion,
    Dialog,
    Preference,
    read_completion,
    read_dialog,
    read_instruction,
    read_preference,
    read_text,
)
from jaxpeft.data.examples.labeling import BY_USER, Labeling, find_labels
from jaxpeft.data.examples.labels import DROP_UNLABELED, ProblemType, label_array, label_float
from jaxpeft.data.problems import Problems, Record, RowError, excerpt
from jaxpeft.data.rows.columns import Columns, Kind, find_columns, find_text_columns
from jaxpeft.data.rows.read import Rows
from jaxpeft.errors import ConfigError, DataError, nearest

Text = str | list[str] | Dialog | Completion | Preference
T = TypeVar("T")
_DIALOGS: Mapping[str, Callable[[Record, Columns], Text]] = {
    "prompt_completion": read_completion,
    "instruction": read_instruction,
    "messages": read_dialog,
    "preference": read_preference,
}
CHATS = frozenset({"prompt_completion", "instruction", "messages"})
"""Formats with answers; they can be mixed in one training set."""


@dataclass(frozen=True)
class Examples:
    """Examples of one format.

    Attributes:
        kind: the format of the rows.
        problem: the problem type of a classification, else None.
        texts: one entry per example: a string, a list of words (token classification), a dialog or
            a preference pair.
        pairs: the second text of each example; None for single texts.
        labels: single_label: int32 [n]; multi_label: float32 [n, labels]; regression: float32 [n];
            token classification: one int32 [words] per example; text: None.
        labeling: label names by id, from the training split, and how cells map to them.
        columns: the columns that were used.
        rows: the source rows.
    """

    kind: Kind
    problem: ProblemType | None
    texts: list[Any]
    pairs: list[str] | None
    labels: np.ndarray | list[np.ndarray] | None
    labeling: Labeling
    columns: Columns
    rows: Rows

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of each label id; empty for regression and text."""
        return self.labeling.names

    @property
    def num_labels(self) -> int:
        """Number of outputs that the head needs: 1 for regression, 0 for text."""
        return 1 if self.problem == "regression" else len(self.label_names)

    @property
    def sha256(self) -> str:
        """Hash of everything that determines the examples."""
        parts = [
            self.rows.sha256,
            self.kind,
            self.problem,
            self.columns.named_fields(),
            self.labeling.identity,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_examples(
    rows: Rows,
    *,
    kind: Kind,
    problem: ProblemType | None = None,
    columns: Columns | None = None,
    labels: Labeling | Sequence[str] = (),
    like: Examples | None = None,
) -> Examples:
    """Convert rows to examples.

    Args:
        rows: the rows of one split.
        kind: the format of the rows.
        problem: the problem type of a classification. By default it is inferred from the labels:
            lists are multi_label, decimal numbers regression, anything else single_label.
        columns: the columns to use; unset ones are found by their usual names.
        labels: the class names in order, or a `Labeling`; by default the sorted names in the rows.
        like: the training examples, if `rows` is another split: its problem, columns and labels are
            used, and unknown labels are refused.

    Raises:
        ConfigError: `kind` or `problem` is unknown.
        DataError: columns are missing or ambiguous, or rows have missing, mistyped, empty or
            unknown fields.
    """
    _check_names(kind, problem)
    requested = columns or (like.columns if like is not None else Columns())
    found = find_columns(rows.columns(), requested, kind, rows.name)
    problems = Problems()
    if kind in _DIALOGS:
        dialogs = _dialogs(rows, found, _DIALOGS[kind], problems)
        problems.raise_if_any()
        return Examples(kind, None, dialogs, None, None, Labeling(), found, rows)
    if kind == "token_classification":
        texts, pairs = _column(rows, found.text, _words, problems), None
    else:
        texts = _column(rows, found.text, read_text, problems)
        pairs = _column(rows, found.text_pair, read_text, problems) if found.text_pair else None
    if kind == "text":
        problems.raise_if_any()
        return Examples(kind, None, texts, None, None, Labeling(), found, rows)
    labeling = _labeling(labels, like)
    if kind == "classification":
        problem = problem or (like.problem if like is not None else None)
        is_set = problem is not None
        problem = problem or labeling.problem_of(_cells(rows, found.label))
        ids, labeling = _labels(
            rows, found.label, problem, labeling, problems, known=like is not None, is_set=is_set
        )
    else:
        ids, labeling = _labels(rows, found.label, None, labeling, problems, known=like is not None)
        _check_lengths(rows, texts, ids, problems)
    problems.raise_if_any()
    return Examples(
        kind,
        problem,
        texts,
        pairs,
        _arrays(ids, problem, len(labeling.names)),
        labeling,
        found,
        rows,
    )


def make_unlabeled(
    rows: Rows, *, kind: Kind, problem: ProblemType | None, columns: Columns, labels: Sequence[str]
) -> Examples:
    """Convert rows without labels to examples, to predict their labels; each has the first label.

    Args:
        rows: the rows.
        kind: `classification` or `token_classification`.
        problem: the problem type of a classification.
        columns: the columns to use; unset ones are found by their usual names.
        labels: the class names in order.

    Raises:
        DataError: columns are missing or ambiguous, or a text is missing or mistyped.
    """
    found = find_text_columns(rows.columns(), columns, kind, rows.name)
    problems = Problems()
    words = kind == "token_classification"
    texts: Any = _column(rows, found.text, _words if words else read_text, problems)
    pairs = _column(rows, found.text_pair, read_text, problems) if found.text_pair else None
    problems.raise_if_any()
    ids: Any = [
        [0] * len(text) if words else [] if problem == "multi_label" else 0 for text in texts
    ]
    labeling = Labeling(tuple(labels), BY_USER)
    arrays = _arrays(ids, problem, len(labels))
    return Examples(kind, problem, texts, pairs, arrays, labeling, found, rows)


def split_at(rows: Rows, separator: str, columns: Columns) -> Rows:
    r"""Split each text at the first separator into `prompt` and `completion`.

    Args:
        rows: rows with a text column.
        separator: the text to split at, such as `"\nA: "`.
        columns: names the text column; unset to find it.

    Raises:
        DataError: a text does not contain the separator.
    """
    column = find_columns(rows.columns(), columns, "text", rows.name).text or ""
    problems, records = Problems(), list[Record]()
    for i, record in enumerate(rows.records):
        prompt, match, completion = str(record.get(column) or "").partition(separator)
        if not match:
            fault = f"field {column!r} does not contain data.separator {separator!r}"
            problems.add(rows.where(i), fault, _show(record), "correct the row or the separator")
        records.append({"prompt": prompt, "completion": completion})
    problems.raise_if_any()
    return rows.derive(column, separator, records=records)


def join(parts: Sequence[Examples]) -> Examples:
    """Concatenate the examples of several sources; mixed dialog formats become `messages`.

    Args:
        parts: one or more, with the same problem and labels.

    Raises:
        DataError: the formats cannot be mixed, or only some sources have a second text.
    """
    if len(parts) == 1:
        return parts[0]
    kinds = {part.kind for part in parts}
    names = ", ".join(f"{part.rows.name} ({part.kind})" for part in parts)
    if len(kinds) > 1 and not kinds <= CHATS:
        raise DataError(
            f"{names}: these formats cannot be mixed in training; remove one source, or set"
            " data.format"
        )
    if len({part.pairs is None for part in parts}) > 1:
        raise DataError(
            f"{names}: only some sources have a second text; name the columns, or remove a source"
        )
    first, labels = parts[0], [part.labels for part in parts]
    joined: Any = labels[0]
    if isinstance(joined, list):
        joined = [tags for of_part in labels for tags in typing.cast(Any, of_part)]
    elif joined is not None:
        joined = np.concatenate(typing.cast(Any, labels))
    rows = Rows.join([part.rows for part in parts], ", ".join(part.rows.name for part in parts))
    return dataclasses.replace(
        first,
        kind=first.kind if len(kinds) == 1 else "messages",
        texts=[text for part in parts for text in part.texts],
        pairs=(
            None if first.pairs is None else [pair for part in parts for pair in part.pairs or ()]
        ),
        labels=joined,
        columns=first.columns if len({part.columns for part in parts}) == 1 else Columns(),
        rows=rows.derive(*(part.sha256 for part in parts)),  # sources may use different columns
    )


def _check_names(kind: str, problem: str | None) -> None:
    problems = [
        f"{field}={value!r} is not one of {', '.join(known)}{nearest(value, known)}"
        for field, value, known in (
            ("kind", kind, get_args(Kind)),
            ("problem", problem, get_args(ProblemType)),
        )
        if value is not None and value not in known
    ]
    if problem is not None and kind != "classification":
        problems.append(
            f"problem={problem!r} is for kind='classification', not {kind!r}; remove it"
        )
    if problems:
        raise ConfigError(problems)


def _column(
    rows: Rows,
    column: str | None,
    read: Callable[[Any], T],
    problems: Problems,
    fix: str = "add it or remove the row",
) -> list[T]:
    """Parse a field of every row; add rows with an invalid field to `problems` and skip them."""
    values = list[T]()
    for i, record in enumerate(rows.records):
        try:
            if record.get(column or "") is None:
                raise RowError("is missing", fix)
            values.append(read(record[column or ""]))
        except RowError as fault:
            problems.add(rows.where(i), f"field {column!r} {fault.fault}", _show(record), fault.fix)
    return values


def _dialogs(
    rows: Rows, columns: Columns, read: Callable[[Record, Columns], Text], problems: Problems
) -> list[Text]:
    values: list[Text] = []
    for i, record in enumerate(rows.records):
        try:
            values.append(read(record, columns))
        except RowError as fault:
            problems.add(rows.where(i), fault.fault, _show(record), fault.fix)
    return values


def _show(record: dict[str, Any]) -> str:
    return excerpt(json.dumps(record, ensure_ascii=False, default=str))


def _words(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise RowError(
            "does not contain a list of words",
            'write it as ["word", ...], such as in JSONL or parquet',
        )
    return [read_text(word) for word in value]


def _labeling(labels: Labeling | Sequence[str], like: Examples | None) -> Labeling:
    if like is not None:
        return like.labeling
    return (
        labels
        if isinstance(labels, Labeling)
        else Labeling(tuple(labels), BY_USER if labels else "")
    )


def _cells(rows: Rows, column: str | None) -> list[Any]:
    return [record.get(column or "") for record in rows.records]


def _labels(
    rows: Rows,
    column: str | None,
    problem: ProblemType | None,
    labeling: Labeling,
    problems: Problems,
    *,
    known: bool,
    is_set: bool = False,
) -> tuple[list[Any], Labeling]:
    """Return the ids or float of every row, and the labeling; for tags (`problem` None), the ids of
    every word.
    """
    if problem == "regression":
        return _column(rows, column, label_float, problems, DROP_UNLABELED), dataclasses.replace(
            labeling, names=()
        )
    if not known and problem == "multi_label":
        try:
            labeling = labeling.with_vectors(_cells(rows, column))
        except RowError as fault:
            raise DataError(f"{rows.name}: column {column!r} {fault.fault}; {fault.fix}") from None
    if not known and not labeling.names:
        # report cells that are not labels at all before checking the set of labels
        _column(
            rows, column, lambda value: labeling.names_of(value, problem), problems, DROP_UNLABELED
        )
        if problems.total:
            return [], labeling
    if not known:
        labeling = find_labels(labeling, rows, column or "", problem, is_set=is_set)
        _check_enough(rows, column, labeling.names, problem)
    return _column(rows, column, labeling.reader(problem), problems, DROP_UNLABELED), labeling


def _check_enough(
    rows: Rows, column: str | None, names: Sequence[str], problem: ProblemType | None
) -> None:
    least = 1 if problem == "multi_label" else 2
    if len(names) < least:
        shown = ", ".join(names) or "none"
        raise DataError(
            f"{rows.name}: column {column!r} has the labels {shown}; a classifier needs at least"
            f" {least}"
        )


def _check_lengths(
    rows: Rows, words: Sequence[Any], tags: Sequence[Any], problems: Problems
) -> None:
    if problems.total:
        return
    for i, (of_words, of_tags) in enumerate(zip(words, tags, strict=True)):
        if len(of_words) != len(of_tags):
            fault = f"{len(of_words)} words but {len(of_tags)} tags"
            problems.add(rows.where(i), fault, _show(rows.records[i]), "give each word one tag")


def _arrays(
    labels: list[Any], problem: ProblemType | None, size: int
) -> np.ndarray | list[np.ndarray]:
    if problem is None:
        return [np.asarray(tags, np.int32) for tags in labels]
    return label_array(labels, problem, size)
