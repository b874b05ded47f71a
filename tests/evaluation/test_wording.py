"""The words for results."""

from __future__ import annotations

import pytest

from jaxpeft.evaluation.wording import (
    CONSTANT,
    model_name,
    p_clause,
    p_value,
    smallest_p,
    verdict,
)


@pytest.mark.parametrize(
    ("name", "low", "high", "said"),
    [
        ("loss", -2.0, -1.0, "better"),
        ("bits_per_byte", 1.0, 2.0, "worse"),
        ("accuracy", 0.1, 0.2, "better"),
        ("accuracy", -0.2, -0.1, "worse"),
        ("accuracy", -0.1, 0.1, "unclear"),
        ("accuracy", 0.0, 0.0, "equal"),
        ("accuracy", 0.0, 0.1, "unclear"),
        ("accuracy", None, None, ""),
    ],
)
def test_a_difference_is_better_or_worse(name, low, high, said):
    assert verdict(name, low, high) == said


def test_a_p_value_is_not_below_what_the_resamples_can_find():
    assert p_value(smallest_p(1000), smallest_p(1000)) == "< 0.002"
    # rounded up: 2 / 801 is 0.0025
    assert p_value(smallest_p(800), smallest_p(800)) == "< 0.003"
    assert p_value(0.0392, smallest_p(1000)) == "0.039"
    assert (p_clause(0.0), p_clause(1.0)) == ("p < 1e-06", "p = 1")


def test_a_column_has_a_short_name():
    assert model_name("base /data/models/tiny/hf") == "base"
    assert model_name(CONSTANT) == "constant answer"
    assert model_name("/data/runs/rank8/adapter") == "rank8/adapter"
