"""Parse command-line text as the value of an option."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from jaxpeft.core.options import Reader, convert

_ESCAPE, _ESCAPES = re.compile(r"\\([ntr\\])"), {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_NAMED = {"true": True, "false": False, "none": None}


def read_value(text: str, hint: Any, read: Reader | None = None) -> Any:
    """Parse text by the type of its option: `8`, `1e-3`, `true`, `None`, `q_proj,v_proj`, or a
    string.

    If the text does not fit the type, return its literal value, which `convert` rejects.

    Args:
        text: text from the command line.
        hint: annotated type of the option.
        read: custom reader of the option, passed to `convert`.
    """
    literal = _literal(text)
    names = (
        tuple(part.strip() for part in text.split(",") if part.strip())
        if "," in text or not text
        else (text,)
    )
    # comma-separated names are a list, even if the option also accepts a string: a list of targets,
    # not an expression
    listed = (names,) if re.fullmatch(r"[\w./:~-]+(,\s*[\w./:~-]+)+", text) else ()
    # text in brackets is one value, even if an item is invalid: do not split it into names
    split = () if literal is not text and text.lstrip()[:1] in ("(", "[", "{") else (names,)
    for candidate in (*listed, literal, text, (literal,), *split):
        if not convert(candidate, hint, "", read)[1]:
            return candidate
    return literal


def unescape(text: str) -> str:
    r"""Return text with `\n`, `\t`, `\r` and `\\` as in Python, for texts from the command line."""
    return _ESCAPE.sub(lambda match: _ESCAPES[match[1]], text)


def _literal(text: str) -> Any:
    """Return the value of a Python literal, or the text itself."""
    if text.lower() in _NAMED:
        return _NAMED[text.lower()]
    try:
        with warnings.catch_warnings():
            # about unknown escapes in strings, which stay as they are
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        # all errors of literal_eval; the last two mean text that is nested too deeply
        return text
