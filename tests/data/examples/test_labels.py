"""What the labels say of the problem."""

from __future__ import annotations

from typing import Any

import pytest

from jaxpeft.data.examples.labels import guess_problem, label_name


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["a", "b"], "single_label"),
        ([0, 1, 2], "single_label"),
        ([0.0, 1.0, None], "single_label"),
        (["0", "1"], "single_label"),
        ([True, False], "single_label"),
        ([0.5, 1], "regression"),
        ([4.88, 3.0], "regression"),
        (["4.88", "3.0"], "regression"),
        (["4.88", "n/a"], "single_label"),
        (["1.5", "nan"], "single_label"),
        ([["a"], []], "multi_label"),
        ([], "single_label"),
    ],
)
def test_numbers_that_are_not_whole_are_scores(values: list[Any], problem: str) -> None:
    assert guess_problem(values) == problem


def test_a_whole_number_is_the_same_name_however_it_is_written() -> None:
    assert label_name(1.0) == label_name(1) == "1"
