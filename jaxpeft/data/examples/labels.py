"""Labels: from what a cell holds to names, numbers and multi-hot rows."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from jaxpeft.data.problems import RowError

ProblemType = Literal["single_label", "multi_label", "regression"]
NO_LABEL = "-100"
"""Stands for no label in the rows of `datasets`, as -100 does in a batch."""

_LARGEST = float(np.finfo(np.float32).max)
_INTEGER = re.compile(r"-?[0-9]+")
_WRITTEN = re.compile(
    r"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?"
)  # as programs write numbers: 4.5, 1e-05; not 1_0 or 1e3
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


def label_name(value: Any) -> str:
    """Return the name of one label: a string, a whole number or a truth value, written as a string.

    Raises:
        RowError: it is something else, or there is none.
    """
    _refuse_missing(value, "a string or a whole number")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str):
        return value
    raise _wrong(value, "a string or a whole number")


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty: null, blank or NaN."""
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and value != value)
    )


def has_label(value: Any, unlabeled: Collection[str]) -> bool:
    """Return whether a cell holds something else than what stands for no label.

    Args:
        value: of the cell.
        unlabeled: what stands for none, written as strings; an empty one for empty cells.
    """
    if is_missing(value):
        return "" not in unlabeled
    if not isinstance(value, str | int | float) or (
        isinstance(value, float) and not value.is_integer()
    ):
        return True
    return label_name(value) not in unlabeled


def label_list(value: Any) -> list[str]:
    """Return the names of a list of labels, each there once.

    Raises:
        RowError: it is not a list of labels.
    """
    if not isinstance(value, list):
        raise RowError(
            f"holds a {type(value).__name__}, not a list of labels",
            "write it as a list, or set data.label_separator to what stands between the labels of a"
            " string",
        )
    names = [label_name(item) for item in value]
    none = (NO_LABEL, "-1")
    if wrong := [name for name in names if name in none or names.count(name) > 1]:
        said = ", which stands for no label" if wrong[0] in none else " more than once"
        raise RowError(
            f"holds the label {wrong[0]!r}{said}",
            "write a list of labels, or in every row as many numbers 0 or 1 as there are labels",
        )
    return names


def tag_list(value: Any, unlabeled: Collection[str] = ()) -> list[str]:
    """Return the names of the tags of a row, `NO_LABEL` where a word is not learned.

    Raises:
        RowError: it is not a list of labels.
    """
    if not isinstance(value, list):
        raise _wrong(value, "a list of labels")
    return [
        label_name(item) if has_label(item, (*unlabeled, NO_LABEL)) else NO_LABEL for item in value
    ]


def label_float(value: Any) -> float:
    """Return a regression target, from a number or a string that holds one.

    Raises:
        RowError: it is not a finite number, or float32 holds none as large.
    """
    _refuse_missing(value, "a finite number")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong(value, "a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _wrong(value, "a number") from None
    if not math.isfinite(number):
        raise RowError(
            f"holds {value!r}, which is not finite", "give a finite number or leave the row out"
        )
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        raise RowError(f"holds {value!r}, not a number", "write it in digits, with a point")
    if abs(number) > _LARGEST:
        raise RowError(
            f"holds {value!r}, beyond what float32 holds",
            "scale the targets, such as by their logarithm",
        )
    return number


def guess_problem(values: Iterable[Any]) -> ProblemType:
    """Tell the problem from the labels of the training split: lists, numbers that are not all
    whole, or anything else.

    Numbers count as numbers also where a CSV file gives them as strings; whole ones, `1.0` too, are
    the names of classes.
    """
    given = [value for value in values if not is_missing(value)]
    if {type(value) for value in given} == {list}:
        return "multi_label"
    numbers = [number(value) for value in given]
    whole = all(number is not None and number.is_integer() for number in numbers)
    return "regression" if given and None not in numbers and not whole else "single_label"


def number(value: Any) -> float | None:
    """Return a cell as a number, None where it is none; strings such as `1_0` or `1e3` only look
    like one.
    """
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
    """Sort the distinct names: by value where all are whole numbers, else by code point."""
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


LEAVE_OUT = "correct it, or leave such rows out with data.unlabeled=('',)"


def _refuse_missing(value: Any, wanted: str) -> None:
    if is_missing(value):
        kind = (
            "nothing" if value is None else "an empty string" if isinstance(value, str) else "NaN"
        )
        raise RowError(f"holds {kind}, not {wanted}", LEAVE_OUT)


def _wrong(value: Any, wanted: str) -> RowError:
    kind = "an empty string" if value == "" else f"a {type(value).__name__}"
    return RowError(f"holds {kind}, not {wanted}", "correct it or leave the row out")


def label_array(ids: Sequence[Any], problem: ProblemType, size: int) -> np.ndarray:
    """Return the labels of rows, `[n]` int32 ids, `[n]` float32 of a regression, or `[n, size]`
    float32 of several a row.

    Args:
        ids: of each row its id, its number, or its ids.
        problem: kind of classification.
        size: number of classes.
    """
    if problem == "multi_label":
        return multi_hot(ids, size)
    return np.asarray(ids, np.float32 if problem == "regression" else np.int32)
