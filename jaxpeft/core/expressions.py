r"""Regular expressions from users and untrusted adapters, matched within a time limit.

The syntax is that of Python's `re`, as in PEFT, but `regex` does the matching because it supports
timeouts. Where the two differ, the expression is rewritten so that `regex` reads it like `re`; the
only remaining difference is that `\w` in `regex` matches combining marks. The cost of compilation
and the memory of a match are bounded by limits on the expression.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jaxpeft.errors import TargetError, show

if TYPE_CHECKING:
    import regex

SECONDS = 2
LONGEST, MOST_GROUPS, MOST_REPEATS = 1000, 32, 1000
_REPEAT = re.compile(r"\{([0-9]*),?([0-9]*)\}")
# `regex` interprets braces without counts as fuzzy matching, and [: as a character class name
_READ_OTHERWISE = re.compile(r"(\\N\{[^}]*\}|\\.)|\{(?![0-9]*,?[0-9]*\})|(?<=\[):", re.DOTALL)


def find_expression_fault(text: Any) -> str | None:
    """Return why a string is not a valid regular expression or too large; None if it is valid."""
    if not isinstance(text, str):
        return None
    if len(text) > LONGEST:
        return (
            f"{show(text)} is a regular expression of {len(text):,} characters; the limit is"
            f" {LONGEST:,}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about nested sets, a future change of Python
            re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{show(text)} is not a regular expression ({error})"
    if text.count("(") > MOST_GROUPS:
        return (
            f"{show(text)} is a regular expression with {text.count('(')} groups; the limit is"
            f" {MOST_GROUPS}"
        )
    repeats = math.prod(
        max(1, *(int(count or 0) for count in counts)) for counts in _REPEAT.findall(text)
    )
    if repeats > MOST_REPEATS:
        return (
            f"{show(text)} is a regular expression whose repetition {{counts}} multiply to"
            f" {repeats:,}; the limit is {MOST_REPEATS:,}: use * or + for a large count"
        )
    return None


def full_match(expression: str, name: str, seconds: float = SECONDS) -> regex.Match[str] | None:
    """Match a full name against a valid expression.

    Raises:
        TargetError: It takes longer than `seconds` of this process's time.
    """
    try:
        return _compile(expression).fullmatch(name, timeout=seconds)
    except TimeoutError:
        raise TargetError(
            f"the regular expression {expression!r} takes more than {SECONDS} s to match {name}"
        ) from None


def require_fast(field: str, expressions: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise an error if an expression is invalid or takes too long to match the names.

    Args:
        field: name of the option with the expressions.
        expressions: maps the user's text to the expression that is matched.
        names: the names to match.

    Raises:
        TargetError: An expression is invalid or too slow; it names the expression.
    """
    end = time.process_time() + SECONDS
    for text, expression in expressions.items():
        if (why := find_expression_fault(text)) is not None:
            raise TargetError(f"{field}: {why}")
        try:
            for name in names:
                full_match(expression, name, max(0.0, end - time.process_time()))
        except TargetError:
            raise TargetError(
                f"{field}: the regular expression {text!r} takes more than {SECONDS} s to match the"
                " model's module names; avoid nested repetitions"
            ) from None


@lru_cache(maxsize=1024)
def _compile(expression: str) -> regex.Pattern[str]:
    import regex

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return regex.compile(
            _READ_OTHERWISE.sub(lambda found: found[1] or f"\\{found[0]}", expression)
        )
