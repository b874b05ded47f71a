"""Number answers, as those of GSM8K."""

from __future__ import annotations

from decimal import Decimal

import pytest

from jaxpeft.evaluation.number_answers import find_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18", "18"),
        ("#### $1,234.50 in total, of 7", "1234.5"),
        ("#### 3 #### 4", "4"),
        ("The answer is 1,200.", "1200"),
        ("16-3", "3"),
        ("it falls to -3", "-3"),
        ("-$2.50", "-2.5"),
        ("about .5 of it", "0.5"),
        ("in 1,23 parts", "23"),
        ("18.00", "18"),
        ("#### none", None),
        ("no number", None),
    ],
)
def test_the_number_of_a_text(text, number):
    assert find_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value():
    assert same_number("so it is $18.00.", "... #### 18")
    assert not same_number("17", "#### 18")
    assert not same_number("nothing", "nothing")
