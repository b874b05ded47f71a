"""Answers that are numbers, as in GSM8K (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re
from decimal import Decimal

# a minus belongs to the number unless it follows one, as in 16-3
_NUMBER = re.compile(r"(?:(?<![\d.)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_MARK = "####"


def find_number(text: str) -> Decimal | None:
    """Return the number that a text answers: the first after the last `####`, else the last one.

    A thousands separator, a dollar sign and trailing zeros do not matter: `$1,200.00` is `1200`.

    Returns:
        The number; None if the text has none.
    """
    _, mark, answer = text.rpartition(_MARK)
    found = _NUMBER.findall(answer if mark else text)
    if not found:
        return None
    return Decimal(re.sub(r"[$,]", "", found[0] if mark else found[-1])).normalize()


def same_number(text: str, reference: str) -> bool:
    """Return whether two texts answer with the same number; False if one has none."""
    number = find_number(reference)
    return number is not None and find_number(text) == number
