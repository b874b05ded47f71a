"""Paired tests on data with known p-values."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpeft.errors import DataError
from jaxpeft.evaluation.paired import McNemar, Wins, count_wins, mcnemar, worst_rows


def test_mcnemar_on_a_table_with_a_known_p_value():
    own = np.array([True] * 20 + [True] * 9 + [False] * 1 + [False] * 5)
    other = np.array([True] * 20 + [False] * 9 + [True] * 1 + [False] * 5)
    # 2 P(X <= 1), X binomial with n = 10 and p = 1/2: 2 (1 + 10) / 1024
    assert mcnemar(own, other) == McNemar(20, 9, 1, 5, pytest.approx(22 / 1024))


def test_mcnemar_of_equal_models_is_one():
    own = np.array([True, False, True])
    assert mcnemar(own, own) == McNemar(2, 0, 0, 1, 1.0)


def test_wins_follow_the_direction_of_the_score():
    own, other = np.array([3.0, 2.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0])
    assert count_wins(own, other) == Wins(3, 0, 1, pytest.approx(0.25))
    assert count_wins(own, other, lower_is_better=True) == Wins(0, 3, 1, pytest.approx(0.25))


def test_worst_rows_come_first_and_ties_in_order():
    scores = np.array([2.0, 5.0, 5.0, 1.0])
    assert worst_rows(scores, 3) == [3, 0, 1]
    assert worst_rows(scores, 3, lower_is_better=True) == [1, 2, 0]


def test_other_numbers_of_rows_are_refused():
    with pytest.raises(DataError, match="the two models have 3 and 2 rows; compare them on"):
        count_wins(np.zeros(3), np.zeros(2))
