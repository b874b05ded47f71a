"""How results are worded, in the terminal and on pages: names, directions, p-values."""

from __future__ import annotations

import math

from jaxpeft.evaluation.metrics import LOWER_IS_BETTER
from jaxpeft.names import short_path

CONSTANT = "the best constant answer"
"""Title of the comparison for a base without a head."""
_BASE = "base "
_LOWER = LOWER_IS_BETTER | {"bits_per_byte", "ece", "squared_error"}
_SMALLEST = 1e-6


def is_lower_better(name: str) -> bool:
    """Return whether a smaller value of a metric, or of a score of rows, is better."""
    return name in _LOWER


def verdict(name: str, low: float | None, high: float | None) -> str:
    """Return what the interval of a difference says: `better`, `worse`, or `unclear` if it
    includes 0, `equal` if it is only 0; empty without an interval.

    Args:
        name: the metric.
        low: lower end of the interval of the model minus the other one.
        high: its upper end.
    """
    if low is None or high is None:
        return ""
    if low == high == 0:
        return "equal"
    if low <= 0 <= high:
        return "unclear"
    return "better" if (high < 0) == is_lower_better(name) else "worse"


def model_name(title: str) -> str:
    """Return the short name of a model for the head of a column.

    Args:
        title: `base NAME`, the best constant answer, or the folder of an adapter.
    """
    if title == CONSTANT:
        return "constant answer"
    return "base" if title.startswith(_BASE) else short_path(title.rstrip("/"))


def smallest_p(resamples: int) -> float:
    """Return the smallest p-value that a number of resamples can find."""
    return 2 / (resamples + 1)


def p_value(p: float, smallest: float = _SMALLEST) -> str:
    """Return a p-value, such as `0.039`, or as `< 0.002` if it is not above the smallest one."""
    if p > smallest:
        return f"{p:.2g}"
    unit = 10.0 ** math.floor(math.log10(smallest))
    return f"< {math.ceil(smallest / unit - 1e-9) * unit:.1g}"


def p_clause(p: float) -> str:
    """Return a p-value with its sign: `p = 0.039`, `p < 1e-06`."""
    text = p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"
