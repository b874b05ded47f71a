"""Convert cells to label names, numbers and multi-hot arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from jaxpeft.data.problems import RowError

ProblemType = Literal["single_label", "multi_label", "regression"]
NO_LABEL = "-100"
"""Means no label in rows of `datasets`, like -100 in a batch."""

_LARGEST = float(np.finfo(np.float32).max)
_INTEGER = re.compile(r"-?[0-9]+")
# as programs write numbers: 4.5, 1e-05; not 1_0 or 1e3
_WRITTEN = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


def label_name(value: Any) -> str:
    """Return the name of one label, a string, an integer or a boolean, as a string.

    Raises:
        RowError: the cell is empty or has another type.
    """
    _refuse_missing(value, "a string or an integer")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str):
        return value
    raise _type_error(value, "a string or an integer")


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty: null, blank or NaN."""
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and value != value)
    )


def has_label(value: Any, unlabeled: Collection[str]) -> bool:
    """Return whether a cell has a label.

    Args:
        value: the value of the cell.
        unlabeled: values that mean no label, as strings; an empty string for empty cells.
    """
    if is_missing(value):
        return "" not in unlabeled
    if not isinstance(value, str | int | float) or (
        isinstance(value, float) and not value.is_integer()
    ):
        return True
    return label_name(value) not in unlabeled


def label_list(value: Any) -> list[str]:
    """Return the names in a list of distinct labels.

    Raises:
        RowError: the value is not such a list.
    """
    if not isinstance(value, list):
        raise RowError(
            f"contains a {type(value).__name__}, not a list of labels",
            "write it as a list, or set data.label_separator to the separator in the string",
        )
    names = [label_name(item) for item in value]
    no_label = (NO_LABEL, "-1")
    if invalid := [name for name in names if name in no_label or names.count(name) > 1]:
        fault = ", which means no label" if invalid[0] in no_label else " more than once"
        raise RowError(
            f"contains the label {invalid[0]!r}{fault}",
            "write a list of labels, or in every row one number 0 or 1 per label",
        )
    return names


def tag_list(value: Any, unlabeled: Collection[str] = ()) -> list[str]:
    """Return the tag names of a row; `NO_LABEL` for words excluded from the loss.

    Raises:
        RowError: the value is not a list of labels.
    """
    if not isinstance(value, list):
        raise _type_error(value, "a list of labels")
    return [
        label_name(item) if has_label(item, (*unlabeled, NO_LABEL)) else NO_LABEL for item in value
    ]


def label_float(value: Any) -> float:
    """Return a regression target from a number, or from a number in a string.

    Raises:
        RowError: the value is not a finite number, or exceeds float32.
    """
    _refuse_missing(value, "a finite number")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _type_error(value, "a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _type_error(value, "a number") from None
    if not math.isfinite(number):
        raise RowError(
            f"contains {value!r}, which is not finite", "use a finite number or remove the row"
        )
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        raise RowError(
            f"contains {value!r}, not a number", "write it in digits, with a decimal point"
        )
    if abs(number) > _LARGEST:
        raise RowError(
            f"contains {value!r}, which exceeds the range of float32",
            "scale the targets, such as by their logarithm",
        )
    return number


def guess_problem(values: Iterable[Any]) -> ProblemType:
    """Guess the problem type from the labels of the training split.

    Lists are `multi_label`. Numbers that are not all integers are `regression`, also as strings, as
    in CSV files. Anything else is `single_label`; integers (and `1.0`) are class names.
    """
    cells = [value for value in values if not is_missing(value)]
    if {type(value) for value in cells} == {list}:
        return "multi_label"
    numbers = [number(value) for value in cells]
    all_integers = all(number is not None and number.is_integer() for number in numbers)
    return "regression" if cells and None not in numbers and not all_integers else "single_label"


def number(value: Any) -> float | None:
    """Return a cell as a finite number, or None; `1_0` and `1e3` as strings are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _WRITTEN.fullmatch(value):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sort the distinct names, by value if all are integers, else by code point."""
    distinct = set(names)
    if all(_INTEGER.fullmatch(name) for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def multi_hot(ids: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """Return float32 `[n, size]` with 1 at each id of each row."""
    hot = np.zeros((len(ids), size), np.float32)
    for row, of_row in zip(hot, ids, strict=True):
        row[list(of_row)] = 1
    return hot


DROP_UNLABELED = "correct it, or drop such rows with data.unlabeled=('',)"


def _refuse_missing(value: Any, wanted: str) -> None:
    if is_missing(value):
        kind = (
            "nothing" if value is None else "an empty string" if isinstance(value, str) else "NaN"
        )
        raise RowError(f"contains {kind}, not {wanted}", DROP_UNLABELED)


def _type_error(value: Any, wanted: str) -> RowError:
    kind = "an empty string" if value == "" else f"a {type(value).__name__}"
    return RowError(f"contains {kind}, not {wanted}", "correct it or remove the row")


def label_array(ids: Sequence[Any], problem: ProblemType, size: int) -> np.ndarray:
    """Return the labels of rows as an array.

    Args:
        ids: the id, the number or the ids of each row.
        problem: the problem type.
        size: the number of classes.

    Returns:
        single_label: int32 `[n]`; regression: float32 `[n]`; multi_label: float32 `[n, size]`.
    """
    if problem == "multi_label":
        return multi_hot(ids, size)
    return np.asarray(ids, np.float32 if problem == "regression" else np.int32)
