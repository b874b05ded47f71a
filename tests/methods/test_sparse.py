"""Entries of a kernel that are drawn: those of torch, and one of each part."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxpeft.methods.sparse import as_torch_draws, draw_one_per_part
from tests.representatives import FULL


@pytest.mark.parametrize(
    ("count", "total"), [(7, 7), (40, 1536), (1000, 768 * 768), (9, 4096 * 11008)]
)
@pytest.mark.parametrize("seed", [0, 777, 2**32 - 1])
@pytest.mark.representatives("0-1000-*", "777-40-*", "4294967295-7-*")
def test_the_draws_are_those_of_torch(count: int, total: int, seed: int) -> None:
    import torch

    wanted = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    np.testing.assert_array_equal(as_torch_draws(count, total, seed), wanted.numpy())


@pytest.mark.parametrize(
    ("count", "total"), [(5, 5), (7, 1536), (2**18, 4096 * 4096), (100, 2**31 + 12)]
)
def test_one_of_each_part_is_ascending_and_within(count: int, total: int) -> None:
    drawn = np.asarray(draw_one_per_part(jax.random.key(3), count, total)).astype(np.int64)
    edges = np.arange(count + 1) * total // count
    assert ((drawn >= edges[:-1]) & (drawn < edges[1:])).all()


def test_another_key_draws_others() -> None:
    first, second = (np.asarray(draw_one_per_part(jax.random.key(i), 100, 10_000)) for i in (0, 1))
    assert (first != second).mean() > 0.9


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="draws 2^32 / 20 numbers: set JAXPEFT_TESTS=full")
def test_the_draws_of_very_large_kernels_are_those_of_torch() -> None:
    """From 2^32 / 20 numbers on torch builds its permutation in another way."""
    import torch

    total = (2**32 - 1) // 20
    wanted = torch.randperm(total, generator=torch.Generator().manual_seed(777))[:1000]
    np.testing.assert_array_equal(as_torch_draws(1000, total, 777), wanted.numpy())
