"""The low-rank updates of an adapter, with one rank and one scale."""

from __future__ import annotations

import numpy as np

from jaxpeft.export.updates import Update, uniform

RNG = np.random.default_rng(0)


def update(rank, scale):
    a, b = RNG.standard_normal((5, rank)), RNG.standard_normal((rank, 3))
    return Update("m", a.astype(np.float32), b.astype(np.float32), scale)


def product(one):
    return one.scale * one.a @ one.b


def test_updates_of_one_rank_and_scale_stay_as_they_are():
    first, second = update(2, 1.5), update(2, 1.5)
    for one, same in zip((first, second), uniform([first, second]), strict=True):
        assert np.array_equal(one.a, same.a) and np.array_equal(one.b, same.b)
        assert same.scale == 1.5


def test_ranks_are_padded_and_scales_go_into_b():
    many = [update(1, 0.25), update(4, 3.0), update(2, 3.0)]
    same = uniform(many)
    assert {one.rank for one in same} == {4} and {one.scale for one in same} == {1.0}
    for before, after in zip(many, same, strict=True):
        np.testing.assert_allclose(product(after), product(before), rtol=1e-6)
