"""Drawing distinct entries of a kernel for methods with sparse updates."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from jaxpeft.lazy import jax, jnp

_FEW, _CHUNK = (2**32 - 1) // 20, 1 << 22


@functools.lru_cache(maxsize=8)
def as_torch_draws(count: int, total: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the first numbers of `torch.randperm(total)` with a CPU generator and a seed.

    They are needed for files that contain only a seed.

    Both draw from the Mersenne Twister, and swap: of fewer than 2^32 / 20 numbers 32 bits each,
    from the first number on; of more 64 bits each, building the permutation up from one number, so
    that every draw counts.

    Args:
        count: number of values, at most `total`.
        total: length of the permutation.
        seed: from 0 to 2^32 - 1.

    Returns:
        `[count]` int64, distinct and below `total`.
    """
    twister = np.random.RandomState(seed)
    if total >= _FEW:
        return _permutation_by_steps(count, total, twister)
    drawn = twister.randint(0, 2**32, count, dtype=np.uint32)
    moved: dict[int, int] = {}
    found = np.empty(count, np.int64)
    for i in range(count):
        other = i + int(drawn[i]) % (total - i)
        found[i] = moved.get(other, other)
        moved[other] = moved.get(i, i)
    return found


def _permutation_by_steps(
    count: int, total: int, twister: np.random.RandomState
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the first `count` entries of an inside-out shuffle of `total` numbers.

    Number `i` swaps places with a random earlier one; only swaps into the first `count` places are
    kept.
    """
    found = np.zeros(count, np.int64)
    for start in range(0, total, _CHUNK):
        size = min(_CHUNK, total - start)
        halves = twister.randint(0, 2**32, 2 * size, dtype=np.uint32).astype(np.uint64)
        places = ((halves[::2] << np.uint64(32)) | halves[1::2]) % np.arange(
            start + 1, start + size + 1, dtype=np.uint64
        )
        for i in np.flatnonzero(places < count) if start >= count else range(size):
            place, number = int(places[i]), start + int(i)
            if number < count:
                found[number] = found[place]
            if place < count:
                found[place] = number
    return found


def scatter(indices: Any, values: Any, shape: tuple[int, int]) -> Any:
    """Return a sparse float32 matrix `[in, out]`; values at duplicate indices are summed.

    Args:
        indices: `[2, n]`, indices along the outputs and the inputs.
        values: `[n]`, float32.
        shape: `(in, out)`.
    """
    of_out, of_in = indices
    return jnp.zeros(shape, jnp.float32).at[of_in, of_out].add(values)


def draw_one_per_part(key: jax.Array, count: int, total: int) -> jax.Array:
    """Draw one number from each of `count` nearly equal parts of the range below `total`.

    Args:
        key: a key.
        count: at most `total`.
        total: below 2^32.

    Returns:
        `[count]` uint32, strictly ascending.
    """
    edges = np.arange(count + 1, dtype=np.uint64) * np.uint64(total) // np.uint64(count)
    widths = jnp.asarray(np.diff(edges).astype(np.uint32))
    return (
        jnp.asarray(edges[:-1].astype(np.uint32))
        + jax.random.bits(key, (count,), jnp.uint32) % widths
    )
