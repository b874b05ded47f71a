r"""The gated delta rule: attention to all earlier positions through a state of fixed size.

The state `S [dk, dv]` of a head maps keys to values. Position t lets it decay, replaces a part of
what it holds for the key, and reads it with the query:

    S' = exp(g_t) S,    S = S' + k_t (beta_t (v_t - k_t^T S'))^T,    o_t = S^T q_t

(Yang et al. 2024, "Gated Delta Networks", equation 10, arXiv:2412.06464). `recurrent` computes one
position. `chunked` computes C positions at once by matrix products, from the state `S` before them
(section 3.3): with `G_ij = exp(g_{j+1} + ... + g_i)` for j <= i, and `G_i` the decay from the
chunk's begin,

    T = (I + tril(diag(beta) K K^T * G, -1))^{-1}
    U = T diag(beta) V - T diag(beta G_i) K S
    O = diag(G_i) Q S + tril(Q K^T * G) U,    S <- G_C S + (diag(G_C / G_i) K)^T U

Everything is computed in float32. A state starts anew where a *run* begins: rows of several
documents have one run for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array
CHUNK = 64
"""The largest number of positions of a chunk."""
_dot = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@partial(jax.tree_util.register_dataclass, data_fields=["q", "k", "v", "g", "beta"], meta_fields=[])
@dataclass(frozen=True)
class Steps:
    """What the positions of a row do to the state. A position with `g = beta = 0` leaves it alone.

    Attributes:
        q: `[batch, length, heads, dk]` float32, queries.
        k: `[batch, length, heads, dk]` float32, keys.
        v: `[batch, length, heads, dv]` float32, values.
        g: `[batch, length, heads]` float32, logarithms of the decays, at most 0.
        beta: `[batch, length, heads]` float32, the replaced shares, from 0 to 1.
    """

    q: Array
    k: Array
    v: Array
    g: Array
    beta: Array


def delta_rule(steps: Steps, state: Array, runs: Array | None) -> tuple[Array, Array]:
    """Apply the gated delta rule to the positions of each row.

    Args:
        steps: the positions.
        state: `[batch, heads, dk, dv]` float32, the state before the first of them.
        runs: `[batch, length]` int32, numbers of the runs, which never decrease; the first position
            continues `state`. None if there is only one.

    Returns:
        `[batch, length, heads, dv]` float32, and the state after the last position.
    """
    if steps.g.shape[1] == 1:
        return recurrent(steps, state)
    return chunked(steps, state, runs, CHUNK)


def recurrent(steps: Steps, state: Array) -> tuple[Array, Array]:
    """Apply the rule to rows of one position.

    Args:
        steps: the positions.
        state: see `delta_rule`.

    Returns:
        See `delta_rule`.
    """
    q, k, v, g, beta = (x[:, 0] for x in (steps.q, steps.k, steps.v, steps.g, steps.beta))
    state = state * jnp.exp(g)[..., None, None]
    change = beta[..., None] * (v - _dot("bhkv,bhk->bhv", state, k))
    state = state + k[..., :, None] * change[..., None, :]
    return _dot("bhkv,bhk->bhv", state, q)[:, None], state


def chunked(steps: Steps, state: Array, runs: Array | None, most: int) -> tuple[Array, Array]:
    """Apply the rule chunk by chunk.

    Args:
        steps: the positions.
        state: see `delta_rule`.
        runs: see `delta_rule`.
        most: the largest number of positions of a chunk, a power of two.

    Returns:
        See `delta_rule`.
    """
    batch, length, heads, _ = steps.v.shape
    size = min(most, 1 << (length - 1).bit_length())
    padding = -length % size
    runs = jnp.zeros((batch, length), jnp.int32) if runs is None else runs

    def split(x: Array) -> Array:
        """Return `[chunks, batch, heads, size, ...]`; padding leaves the state alone."""
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), (1, 3), (0, 2))

    runs = jnp.pad(runs, ((0, 0), (0, padding)), mode="edge").reshape(batch, -1, size)
    before = jnp.concatenate([runs[:, :1, :1], runs[:, :-1, -1:]], axis=1)
    numbers = (jnp.moveaxis(x, 1, 0)[:, :, None] for x in (runs, before))
    parts = _within_chunks(jax.tree.map(split, steps), *numbers)

    def step(state: Array, own: _Chunk) -> tuple[Array, Array]:
        u = own.u - _dot("bhik,bhkv->bhiv", own.w, state)
        out = _dot("bhik,bhkv->bhiv", own.q, state) + _dot("bhij,bhjv->bhiv", own.scores, u)
        return state * own.decay + _dot("bhik,bhiv->bhkv", own.k, u), out

    state, out = jax.lax.scan(step, state, parts)
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, -1, heads, out.shape[-1])
    return out[:, :length], state


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["u", "w", "q", "k", "scores", "decay"],
    meta_fields=[],
)
@dataclass(frozen=True)
class _Chunk:
    """What chunks do to the state, each array with leading axes `[chunks, batch, heads]`.

    Attributes:
        u: `T diag(beta) V [size, dv]`.
        w: `T diag(beta G_i) K [size, dk]`.
        q: `diag(G_i) Q [size, dk]`.
        k: `diag(G_C / G_i) K [size, dk]`.
        scores: `tril(Q K^T * G) [size, size]`.
        decay: `G_C [1, 1]`.
    """

    u: Array
    w: Array
    q: Array
    k: Array
    scores: Array
    decay: Array


def _within_chunks(steps: Steps, runs: Array, before: Array) -> _Chunk:
    """Compute what does not depend on the state.

    Args:
        steps: the positions, `[chunks, batch, heads, size, ...]`.
        runs: `[chunks, batch, 1, size]`, their runs.
        before: `[chunks, batch, 1, 1]`, the run before each chunk.
    """
    size = runs.shape[-1]
    total = jnp.cumsum(steps.g, axis=-1)
    earlier = jnp.tril(jnp.ones((size, size), bool)) & (runs[..., :, None] == runs[..., None, :])
    # masked before the exponential: above the diagonal it would overflow
    apart = jnp.exp(jnp.where(earlier, total[..., :, None] - total[..., None, :], -jnp.inf))
    begin = jnp.where(runs == before, jnp.exp(total), 0.0)[..., None]
    end = jnp.where(runs == runs[..., -1:], jnp.exp(total[..., -1:] - total), 0.0)[..., None]
    weighted = steps.k * steps.beta[..., None]
    inverse = _inverse(_dot("...ik,...jk->...ij", weighted, steps.k) * apart)
    return _Chunk(
        u=_dot("...ij,...jv->...iv", inverse, steps.v * steps.beta[..., None]),
        w=_dot("...ij,...jk->...ik", inverse, weighted * begin),
        q=steps.q * begin,
        k=steps.k * end,
        scores=_dot("...ik,...jk->...ij", steps.q, steps.k) * apart,
        decay=begin[..., -1:, :],
    )


@jax.custom_vjp
def _inverse(system: Array) -> Array:
    """Return `T = (I + L)^{-1}` of the part L of a matrix below its diagonal.

    By halves: `[[A, 0], [B, D]]^{-1} = [[A^{-1}, 0], [-D^{-1} B A^{-1}, D^{-1}]]`. These are matrix
    products, which devices compute faster than a substitution row by row, and unlike a power series
    in L they are stable. The gradient is `-T^T dT T^T`.

    Args:
        system: `[..., size, size]`, size is a power of two.
    """
    size = system.shape[-1]
    if size == 1:
        return jnp.ones_like(system)
    half = size // 2
    low = system[..., half:, :half]
    first, second = _inverse(jnp.stack([system[..., :half, :half], system[..., half:, half:]]))
    corner = -_dot("...ij,...jk,...kl->...il", second, low, first)
    top = jnp.concatenate([first, jnp.zeros_like(low)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _inverse_forward(system: Array) -> tuple[Array, Array]:
    inverse = _inverse(system)
    return inverse, inverse


def _inverse_backward(inverse: Array, dt: Array) -> tuple[Array]:
    return (jnp.tril(-_dot("...ji,...jk,...lk->...il", inverse, dt, inverse), -1),)


_inverse.defvjp(_inverse_forward, _inverse_backward)
