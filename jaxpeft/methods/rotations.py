r"""Rotations of an input, block by block, as their difference from the identity: `x -> x + x D`,
`D = R - I`.

The difference of a fresh rotation is zero, so that `x` is bit-identical, and that of a small one is
not rounded off in bfloat16. `R` is orthogonal if it is the Cayley transform of a
skew-symmetric matrix `S`:

    R = (I - S) (I + S)^-1,    D = -2 S (I + S)^-1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxpeft.core.method import Call
from jaxpeft.lazy import jnp

if TYPE_CHECKING:
    from jax import Array


def cayley(skew: Array) -> Array:
    """Return the difference of the Cayley transform from the identity.

    Args:
        skew: `[..., k, k]`, skew-symmetric, float32; so is the result.
    """
    return -2.0 * jnp.linalg.solve(jnp.eye(skew.shape[-1], dtype=skew.dtype) + skew, skew)


def rotate(x: Array, difference: Array) -> Array:
    """Rotate each block of an input.

    Args:
        x: `[..., blocks * k]`, floating; the result has its shape and dtype.
        difference: `[blocks, k, k]`, or `[1, k, k]` for all blocks.
    """
    blocks = x.reshape(*x.shape[:-1], -1, difference.shape[-1])
    difference = jnp.broadcast_to(difference, (blocks.shape[-2], *difference.shape[1:])).astype(
        x.dtype
    )
    return x + jnp.einsum("...bk,bkc->...bc", blocks, difference).reshape(x.shape)


def rotate_kernel(kernel: Array, difference: Array) -> Array:
    """Return the kernel whose product with `x` is that of `kernel` with the rotated `x`.

    Args:
        kernel: `[blocks * k, out]`, float32.
        difference: as in `rotate`.
    """
    blocks = kernel.reshape(-1, difference.shape[-1], kernel.shape[1])
    difference = jnp.broadcast_to(difference, (blocks.shape[0], *difference.shape[1:]))
    return kernel + jnp.einsum("bkc,bco->bko", difference, blocks, precision="highest").reshape(
        kernel.shape
    )


def nearest_divisor(n: int, wanted: int) -> int:
    """Return the divisor of `n` nearest to `wanted` (the smaller of two), as PEFT adjusts block
    sizes.
    """
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))


def compute_with_input(call: Call, fn: Any) -> Any:
    """Compute a site with its input changed: `base(fn(leaves, x))`."""
    return call.base(call.each(fn, call.x))
