"""The order of rows: a permutation that depends on the seed alone."""

from __future__ import annotations

import numpy as np


def order(n: int, *seeds: int) -> np.ndarray:
    """Return a permutation, int64 [n], that depends on nothing but `n` and the seeds.

    Sorting raw bits keeps it so over NumPy's versions, which `Generator.permutation` does not
    promise.
    """
    bits = np.random.Philox(np.random.SeedSequence(seeds))
    return np.argsort(bits.random_raw(n), kind="stable")
