"""Initializations of A `[in, r]` and B `[r, out]` of a low-rank update, each a function
`(site, kernel, rank, scale, rng) -> (A, B)`.

A new one is one function and one line in `STARTS`. If it starts with a part of the kernel, it is
also in `FROM_KERNEL`, and the initial update is subtracted from the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from jaxpeft.core.method import Kernel
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp

if TYPE_CHECKING:
    from jax import Array

    Pair = tuple[Array, Array]


def default(site: Site, kernel: Kernel, rank: int, scale: float, rng: Array) -> Pair:
    """Draw `A` uniformly within 1/sqrt(in), as PEFT's Kaiming with a = sqrt(5); `B` is zero.

    Of an embedding `B` is normal, and `A` is zero.
    """
    del kernel, scale
    n_in, n_out = site.shape
    if site.kind == "embedding":
        return jnp.zeros((n_in, rank), jnp.float32), jax.random.normal(
            rng, (rank, n_out), jnp.float32
        )
    bound = 1 / math.sqrt(n_in)
    return jax.random.uniform(rng, (n_in, rank), jnp.float32, -bound, bound), jnp.zeros(
        (rank, n_out), jnp.float32
    )


def gaussian(site: Site, kernel: Kernel, rank: int, scale: float, rng: Array) -> Pair:
    """Draw `A ~ N(0, 1/r^2)`; `B` is zero."""
    if site.kind == "embedding":
        return default(site, kernel, rank, scale, rng)
    n_in, n_out = site.shape
    return jax.random.normal(rng, (n_in, rank), jnp.float32) / rank, jnp.zeros(
        (rank, n_out), jnp.float32
    )


def orthogonal(site: Site, kernel: Kernel, rank: int, scale: float, rng: Array) -> Pair:
    """Draw `A = X Q_odd` and `B = Q_even' Y` with an orthogonal `Q` `[r, r]`.

    Neither factor is zero, but `Q_odd Q_even'` is, and so is `A B`.
    """
    del kernel, scale
    n_in, n_out = site.shape
    half = max(1, rank // 2)
    keys = jax.random.split(rng, 3)
    q = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank), jnp.float32))[0]
    odd, even = q[0::2, :][:half], q[1::2, :][:half]
    if rank == 1:  # no two orthogonal directions
        return default(site, lambda: None, rank, 1.0, rng)
    x = jax.random.normal(keys[1], (n_in, half), jnp.float32) / math.sqrt(half)
    y = jax.random.normal(keys[2], (half, n_out), jnp.float32) / math.sqrt(half)
    return x @ odd / 10.0, even.T @ y / 10.0


def pissa(site: Site, kernel: Kernel, rank: int, scale: float, rng: Array) -> Pair:
    """Return the r largest singular triples of the kernel.

    Each factor takes the square root of the singular values.
    """
    del rng
    return largest_triples(kernel(), rank, scale)


def largest_triples(matrix: Array, rank: int, scale: float) -> Pair:
    """Return A and B such that `scale A B` is the part of a matrix `[in, out]` in its `rank`
    largest singular triples, or in all of them if it has fewer.
    """
    u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * v[:rank]


def olora(site: Site, kernel: Kernel, rank: int, scale: float, rng: Array) -> Pair:
    """Return the first r columns of `Q` and rows of `R` of the transposed kernel `W' = Q R`."""
    del rng, scale
    q, r = jnp.linalg.qr(kernel().T)
    return r[:rank].T, q[:, :rank].T


Initializer = Callable[[Site, Kernel, int, float, "Array"], "Pair"]
STARTS: Mapping[str, Initializer] = {
    "default": default,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
    "eva": default,  # replaced in `LoRA.start`
    "loftq": default,  # replaced in `LoRA.start`
}
FROM_KERNEL = frozenset({"pissa", "olora"})
