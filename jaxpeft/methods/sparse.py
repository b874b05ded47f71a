"""Which entries of a kernel a method takes: drawn once, so that they are all different."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxpeft.lazy import jax, jnp


def as_torch_draws(count: int, total: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Gives the first numbers of `torch.randperm(total)` of a CPU generator with a seed: what files mean that hold a seed alone.

    Both draw 32 bits of the Mersenne Twister a number, and swap.

    Args:
        count: how many, at most `total`.
        total: below 2^32.
        seed: from 0 to 2^32 - 1.

    Returns:
        `[count]` int64, below `total`, each once.
    """
    drawn = np.random.RandomState(seed).randint(0, 2**32, count, dtype=np.uint32)
    moved: dict[int, int] = {}
    found = np.empty(count, np.int64)
    for i in range(count):
        other = i + int(drawn[i]) % (total - i)
        found[i] = moved.get(other, other)
        moved[other] = moved.get(i, i)
    return found


def one_of_each_part(key: jax.Array, count: int, total: int) -> jax.Array:
    """Draws one number of each of `count` parts, as equal as can be, that the numbers below `total` are cut into.

    Args:
        key: a key.
        count: at most `total`.
        total: below 2^32.

    Returns:
        `[count]` uint32, ascending, each once.
    """
    edges = np.arange(count + 1, dtype=np.uint64) * np.uint64(total) // np.uint64(count)
    widths = jnp.asarray(np.diff(edges).astype(np.uint32))
    return jnp.asarray(edges[:-1].astype(np.uint32)) + jax.random.bits(key, (count,), jnp.uint32) % widths
