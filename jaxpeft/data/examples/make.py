"""Rows to examples: checked texts or words, and labels as numbers."""

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
from jaxpeft.data.examples.labels import LEAVE_OUT, ProblemType, label_array, label_float
from jaxpeft.data.problems import Problems, Record, RowError, excerpt
from jaxpeft.data.rows.columns import Columns, Kind, find_columns
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
"""Formats with answers, which can be trained on together."""


@dataclass(frozen=True)
class Examples:
    """Examples of one kind.

    Attributes:
        kind: the format of the rows.
        problem: of a classification, else None.
        texts: one an example: a string, a list of words of a token classification, a dialog or a
            preference pair.
        pairs: the second text of each example, None where there is none.
        labels: single_label int32 [n]; multi_label float32 [n, labels]; regression float32 [n];
            token classification one int32 [words] an example; None for text.
        labeling: the name of each label id, from the training split, and how labels are read.
        columns: the columns that were used.
        rows: where they come from.
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
        """How many outputs the head needs: 1 for regression, 0 for text."""
        return 1 if self.problem == "regression" else len(self.label_names)

    @property
    def sha256(self) -> str:
        """The hash of everything that the examples are made from."""
        made = [
            self.rows.sha256,
            self.kind,
            self.problem,
            self.columns.named_fields(),
            self.labeling.identity,
        ]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def make_examples(
    rows: Rows,
    *,
    kind: Kind,
    problem: ProblemType | None = None,
    columns: Columns | None = None,
    labels: Labeling | Sequence[str] = (),
    like: Examples | None = None,
) -> Examples:
    """Make examples of rows.

    Args:
        rows: the rows of one split.
        kind: the format of the rows.
        problem: of a classification; found from the labels where not given (lists: multi_label,
            numbers with a point: regression, else single_label; numbers that a CSV holds are
            strings, hence single_label).
        columns: the columns to use; those not given are found by their usual names.
        labels: the names of the classes, in their order, or more that is known of them; the names
            are those of the rows, sorted, where not given.
        like: the training split's examples, where these are of another split: its problem, columns
            and labels are used, and a label that it does not have is refused.

    Raises:
        ConfigError: `kind` or `problem` is not one of those above.
        DataError: columns are missing or ambiguous, or rows have missing, mistyped, empty or
            unknown fields.
    """
    _check_names(kind, problem)
    asked = columns or (like.columns if like is not None else Columns())
    found = find_columns(rows.columns(), asked, kind, rows.name)
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
        sure, problem = (
            problem is not None,
            problem or labeling.problem_of(_cells(rows, found.label)),
        )
        ids, labeling = _labels(
            rows, found.label, problem, labeling, problems, known=like is not None, sure=sure
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


def split_at(rows: Rows, separator: str, columns: Columns) -> Rows:
    r"""Cut each text at the first separator into `prompt` and `completion`.

    Args:
        rows: rows of text.
        separator: such as `"\nA: "`.
        columns: the text column, if it is named.

    Raises:
        DataError: a text does not hold the separator.
    """
    column = find_columns(rows.columns(), columns, "text", rows.name).text or ""
    problems, records = Problems(), list[Record]()
    for i, record in enumerate(rows.records):
        prompt, there, completion = str(record.get(column) or "").partition(separator)
        if not there:
            fault = f"field {column!r} does not hold data.separator {separator!r}"
            problems.add(rows.where(i), fault, _show(record), "correct the row, or the separator")
        records.append({"prompt": prompt, "completion": completion})
    problems.raise_if_any()
    return rows.derive(column, separator, records=records)


def join(parts: Sequence[Examples]) -> Examples:
    """Put examples of several sources behind one another; different formats of dialogs become
    chats.

    Args:
        parts: at least one; of one problem and one label list.

    Raises:
        DataError: their formats cannot be trained on together, or only some have a second text.
    """
    if len(parts) == 1:
        return parts[0]
    kinds = {part.kind for part in parts}
    told = ", ".join(f"{part.rows.name} ({part.kind})" for part in parts)
    if len(kinds) > 1 and not kinds <= CHATS:
        raise DataError(
            f"{told}: these formats cannot be trained on together; leave one out, or set"
            " data.format"
        )
    if len({part.pairs is None for part in parts}) > 1:
        raise DataError(
            f"{told}: some have a second text, others none; name the columns, or leave one out"
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
        rows=rows.derive(*(part.sha256 for part in parts)),  # each may have columns of its own
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
    fix: str = "add it or leave the row out",
) -> list[T]:
    """Read a field of every row; a row whose field is wrong is reported and left out."""
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
            "holds no list of words", 'write it as ["word", ...], such as in JSONL or parquet'
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
    sure: bool = False,
) -> tuple[list[Any], Labeling]:
    """Return the ids or the float of every row, and how they were read; of tags (`problem` None)
    the ids of every word.
    """
    if problem == "regression":
        return _column(rows, column, label_float, problems, LEAVE_OUT), dataclasses.replace(
            labeling, names=()
        )
    if not known and problem == "multi_label":
        try:
            labeling = labeling.seen(_cells(rows, column))
        except RowError as fault:
            raise DataError(f"{rows.name}: column {column!r} {fault.fault}; {fault.fix}") from None
    if not known and not labeling.names:
        # what is no label at all is told before what labels there are
        _column(rows, column, lambda value: labeling.names_of(value, problem), problems, LEAVE_OUT)
        if problems.total:
            return [], labeling
    if not known:
        labeling = find_labels(labeling, rows, column or "", problem, sure=sure)
        _check_enough(rows, column, labeling.names, problem)
    return _column(rows, column, labeling.reader(problem), problems, LEAVE_OUT), labeling


def _check_enough(
    rows: Rows, column: str | None, names: Sequence[str], problem: ProblemType | None
) -> None:
    least = 1 if problem == "multi_label" else 2
    if len(names) < least:
        shown = ", ".join(names) or "none"
        raise DataError(
            f"{rows.name}: column {column!r} has the labels {shown}; a classifier needs {least} or"
            " more"
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
