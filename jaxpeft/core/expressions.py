"""Regular expressions of users, and of adapters from whoever made them: tried in limited time before they are relied on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jaxpeft.errors import TargetError, shown

SECONDS = 2
LONGEST = 1000
_MEMORY = 256 << 20
_PROGRAM = f"""
import json, re, resource, sys
for what, most in ((resource.RLIMIT_CPU, {SECONDS}), (resource.RLIMIT_AS, {_MEMORY}), (resource.RLIMIT_CORE, 0)):
    try:
        resource.setrlimit(what, (most, most))
    except (ValueError, OSError):
        pass
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
    print(flush=True)
"""


def broken_expression(text: Any) -> str | None:
    """Says why a text is no regular expression, None where it is one (or no text)."""
    if isinstance(text, str) and len(text) > LONGEST:
        return f"{shown(text)} is a regular expression of {len(text):,} characters; at most {LONGEST:,} are taken"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a set in a set: Python keeps what it compiled, as it reads it today
            re.compile(text if isinstance(text, str) else "")
    except (re.error, RecursionError, OverflowError) as error:
        return f"{shown(text)} is no regular expression ({error})"
    return None


def require_fast(field: str, expressions: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuses an expression that takes too long on one of the names it is to be matched with.

    Python's expressions may take exponential time, in which nothing can interrupt them: those that repeat anything are tried
    in a process of their own, with a limit of time and memory.

    Args:
        field: the option that they come from.
        expressions: what the user wrote, and the expression that it stands for.
        names: what each expression is matched with, as a whole.

    Raises:
        TargetError: naming the expression.
    """
    risky = [text for text in expressions if re.search(r"[*+?{|]", text)]
    slow = _first_slow(tuple(expressions[text] for text in risky), tuple(names)) if risky else None
    if slow is not None:
        raise TargetError(
            f"{field}: the regular expression {risky[slow]!r} takes more than {SECONDS} s on the names of the model's modules; write it "
            "without repetitions inside repetitions"
        )


@lru_cache(maxsize=64)
def _first_slow(patterns: tuple[str, ...], names: tuple[str, ...]) -> int | None:
    done = subprocess.run(  # noqa: S603 - this Python, and the program above
        [sys.executable, "-I", "-S", "-c", _PROGRAM], input=json.dumps([patterns, names]), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return None if done.returncode == 0 else min(len(done.stdout), len(patterns) - 1)
