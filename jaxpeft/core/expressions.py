r"""Regular expressions of users, and of adapters from whoever made them, matched in limited time.

What an expression is, Python's `re` says, by which PEFT matches; `regex` matches it, since it can
be stopped. Where the two would read an accepted expression differently it is written for `regex` as
`re` reads it; what is left is that `\w` of `regex` takes combining marks. Neither compiling nor the
memory of a match can be stopped: both are bounded by what an expression may hold.
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
# `regex` reads braces that are no repetition as fuzzy matching, and [: as the name of a class
_READ_OTHERWISE = re.compile(r"(\\N\{[^}]*\}|\\.)|\{(?![0-9]*,?[0-9]*\})|(?<=\[):", re.DOTALL)


def find_expression_fault(text: Any) -> str | None:
    """Return why a text is no regular expression or one that is too large, None where it is neither
    (or no text).
    """
    if not isinstance(text, str):
        return None
    if len(text) > LONGEST:
        return (
            f"{show(text)} is a regular expression of {len(text):,} characters; at most"
            f" {LONGEST:,} are taken"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of a set in a set: Python keeps what it compiled, as it reads it today
            re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{show(text)} is not a regular expression ({error})"
    if text.count("(") > MOST_GROUPS:
        return (
            f"{show(text)} is a regular expression of {text.count('(')} groups; at most"
            f" {MOST_GROUPS} are taken"
        )
    repeats = math.prod(
        max(1, *(int(count or 0) for count in counts)) for counts in _REPEAT.findall(text)
    )
    if repeats > MOST_REPEATS:
        return (
            f"{show(text)} is a regular expression whose {{counts}} of repetitions make"
            f" {repeats:,} when multiplied; at most {MOST_REPEATS:,} are taken: write * or + for a"
            " large count"
        )
    return None


def full_match(expression: str, name: str, seconds: float = SECONDS) -> regex.Match[str] | None:
    """Match a name, as a whole, with an expression that is not broken.

    Raises:
        TargetError: it takes longer than `seconds` of this process's time.
    """
    try:
        return _compile(expression).fullmatch(name, timeout=seconds)
    except TimeoutError:
        raise TargetError(
            f"the regular expression {expression!r} takes more than {SECONDS} s on {name}"
        ) from None


def require_fast(field: str, expressions: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse an expression that is broken, or takes too long on the names that it is to be matched
    with.

    Args:
        field: the option that they come from.
        expressions: what the user wrote, and the expression that it stands for.
        names: what each expression is matched with, as a whole.

    Raises:
        TargetError: naming the expression.
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
                f"{field}: the regular expression {text!r} takes more than {SECONDS} s on the names"
                " of the model's modules; write it without repetitions inside repetitions"
            ) from None


@lru_cache(maxsize=1024)
def _compile(expression: str) -> regex.Pattern[str]:
    import regex

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return regex.compile(
            _READ_OTHERWISE.sub(lambda found: found[1] or f"\\{found[0]}", expression)
        )
