"""Shuffle rows with a permutation that depends only on the seed."""

from __future__ import annotations

import numpy as np


def order(n: int, *seeds: int) -> np.ndarray:
    """Return a permutation, int64 [n], that depends only on `n` and the seeds.

    It sorts raw random bits, because `Generator.permutation` may change between NumPy versions.
    """
    bits = np.random.Philox(np.random.SeedSequence(seeds))
    return np.argsort(bits.random_raw(n), kind="stable")
