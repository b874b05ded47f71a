"""How the text of the command line becomes the value of an option."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from jaxpeft.core.options import Reader, convert

_NAMED = {"true": True, "false": False, "none": None}


def read_value(text: str, hint: Any, read: Reader | None = None) -> Any:
    """Return a value as the type of its option asks: `8`, `1e-3`, `true`, `None`, `q_proj,v_proj`,
    or a string.

    Where no reading of the text is of that type, the value is the most literal one, which `convert`
    refuses.

    Args:
        text: as it was written.
        hint: the annotated type of the option.
        read: of the option, as `convert` takes it.
    """
    literal = _literal(text)
    names = (
        tuple(part.strip() for part in text.split(",") if part.strip())
        if "," in text or not text
        else (text,)
    )
    # names with commas between them are a list, also where one string would do: a target list, not
    # an expression
    listed = (names,) if re.fullmatch(r"[\w./:~-]+(,\s*[\w./:~-]+)+", text) else ()
    # a list in brackets is one, also where an item of it is wrong: its pieces are no names
    split = () if literal is not text and text.lstrip()[:1] in ("(", "[", "{") else (names,)
    for candidate in (*listed, literal, text, (literal,), *split):
        if not convert(candidate, hint, "", read)[1]:
            return candidate
    return literal


def _literal(text: str) -> Any:
    """Return the number, string, list or mapping that a text writes as Python does, or the text
    itself.
    """
    if text.lower() in _NAMED:
        return _NAMED[text.lower()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of an escape in a string that Python does not know: it stays as it is
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        # all that literal_eval raises; the last two are of a text that nests too deeply, not of a
        # lack of memory
        return text
