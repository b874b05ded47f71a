"""Labels: from what a row holds to ids by a sorted list of names, multi-hot rows, or floats."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from jaxpeft.data.problems import RowError
from jaxpeft.errors import nearest

Problem = Literal["single_label", "multi_label", "regression"]

_INTEGER = re.compile(r"-?\d+")


def label_name(value: Any) -> str:
    """Gives the name of one label: a string, a whole number or a truth value, written as a string.

    Raises:
        RowError: it is something else.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and value:
        return value
    raise _wrong(value, "a string or a whole number")


def label_list(value: Any) -> list[str]:
    """Gives the names of a list of labels.

    Raises:
        RowError: it is not a list of labels.
    """
    if not isinstance(value, list):
        raise _wrong(value, "a list of labels")
    return [label_name(item) for item in value]


def label_float(value: Any) -> float:
    """Gives a regression target, from a number or a string that holds one.

    Raises:
        RowError: it is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong(value, "a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _wrong(value, "a number") from None
    if not math.isfinite(number):
        raise RowError(f"holds {value!r}, which is not finite", "give a finite number or leave the row out")
    return number


def guess_problem(values: Iterable[Any]) -> Problem:
    """Tells the problem from the labels of the training split: lists, numbers that are not all whole, or anything else.

    Numbers count as numbers also where a CSV file gives them as strings; whole ones, `1.0` too, are the names of classes.
    """
    given = [value for value in values if value is not None]
    if {type(value) for value in given} == {list}:
        return "multi_label"
    numbers = [_number(value) for value in given]
    whole = all(number is not None and number.is_integer() for number in numbers)
    return "regression" if given and None not in numbers and not whole else "single_label"


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts the distinct names: by value where all are whole numbers, else by code point."""
    distinct = set(names)
    if all(_INTEGER.fullmatch(name) for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def label_id(name: str, ids: dict[str, int]) -> int:
    """Gives the id of a label name.

    Raises:
        RowError: the training split has no such label; names the nearest.
    """
    if name not in ids:
        hint = nearest(name, ids)
        raise RowError(
            f"holds {name!r}, which is not one of the {len(ids)} labels known",
            hint.removeprefix("; ") or "correct it or leave it out",
        )
    return ids[name]


def multi_hot(ids: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """Gives float32 `[n, size]` with 1 at each id of each row."""
    hot = np.zeros((len(ids), size), np.float32)
    for row, of_row in zip(hot, ids, strict=True):
        row[list(of_row)] = 1
    return hot


def _wrong(value: Any, wanted: str) -> RowError:
    kind = "an empty string" if value == "" else f"a {type(value).__name__}"
    return RowError(f"holds {kind}, not {wanted}", "correct it or leave the row out")
