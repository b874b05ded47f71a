"""The plan of an epoch."""

from __future__ import annotations

import numpy as np

from jaxpeft.data.batches.epochs import make_plan
from jaxpeft.data.order import order


def test_the_order_is_a_fixed_function_of_its_seeds():
    # Written down so that a change of NumPy that would change the batches of a resumed run is seen.
    assert order(8, 0, 0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert order(8, 0, 1, 0).tolist() != order(8, 0, 0, 0).tolist()
    assert sorted(order(100, 3, 4, 0).tolist()) == list(range(100))


def test_what_is_left_over_moves_up():
    plan = make_plan(np.array([0, 0, 0, 1, 1, 2]), (8, 16, 32), 2, None)
    assert plan.rows.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert plan.lengths.tolist() == [8, 16, 32]


def test_only_the_last_batch_has_fillers():
    plan = make_plan(np.array([0, 0, 0, 1, 1]), (8, 16), 2, None)
    assert plan.rows.tolist() == [[0, 1], [2, 3], [4, -1]]
    assert plan.lengths.tolist() == [8, 16, 16]
    assert make_plan(np.array([0, 0, 0, 1, 1]), (8, 16), 2, None, drop=True).rows.tolist() == [
        [0, 1],
        [2, 3],
    ]


def test_a_length_without_rows_is_not_used():
    plan = make_plan(np.array([0, 0, 0]), (8, 16), 2, None)
    assert plan.lengths.tolist() == [8, 8]
    assert make_plan(np.array([1, 1, 1]), (8, 16), 2, None).lengths.tolist() == [16, 16]
