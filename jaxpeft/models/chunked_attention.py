"""Attention in plain XLA without materialized scores, block by block over the keys.

With the scores `s = q k^T / sqrt(d)` of one block at a time, a running maximum `m` and sum `l` of
`exp(s - m)` give the softmax over all keys (Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax", section 3, arXiv:1805.02867). The backward pass computes the weights
`p = exp(s - m) / l` of a block, and otherwise needs only `D = sum(dy * y)`: `ds = p * (dy v^T - D)`
(Dao et al. 2022, "FlashAttention", appendix B.2, arXiv:2205.14135), times `1 - (s / cap)^2` for
bounded scores. The sink of a head starts the sum: `m = s`, `l = 1`. The memory is that of one
block: Rabe and Staats 2021 (arXiv:2112.05682).

The queries may be a part of the row that starts at the position `first`, while the keys are the
full row. This supports positions sharded over devices: each device gathers all keys and values
(Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.3.2, arXiv:2407.21783).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft.models.attention_scores import Scoring
from jaxpeft.models.masks import Mask
from jaxpeft.remat import ATTENTION

Array = jax.Array
MOST_SCORES = 2**25
"""The maximum number of scores per block, unless it has only `LEAST_KEYS` keys."""
LEAST_KEYS = 128
_LOWEST = float(jnp.finfo(jnp.float32).min)


def block_of(queries: int, keys: int) -> int:
    """Return the number of keys per block.

    Args:
        queries: rows times heads times queries per row.
        keys: keys per row.
    """
    return min(keys, max(LEAST_KEYS, MOST_SCORES // max(1, queries) // LEAST_KEYS * LEAST_KEYS))


def compute(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    drop: Any = None,
    scoring: Scoring = Scoring(),  # noqa: B008 - frozen
    sinks: Array | None = None,
    *,
    first: Any = 0,
    block: int | None = None,
) -> Array:
    """Scaled dot-product attention, scores and softmax in float32.

    Args:
        q: `[batch, query, heads, d]`.
        k: `[batch, key, kv_heads, d]`, kv_heads divides heads.
        v: `[batch, key, kv_heads, e]`.
        mask: a mask without a dense part.
        drop: unused, since dropout is not supported.
        scoring: how scores become logits.
        sinks: `[heads]`, see `attention_scores.softmax`; or None.
        first: position of the first query, an int32 scalar.
        block: keys per block; None for `block_of`.

    Returns:
        `[batch, query, heads, e]`, of the dtype of `v`.
    """
    del drop
    batch, length, heads, d = q.shape
    kv_heads = k.shape[2]
    size = block or block_of(batch * heads * length, k.shape[1])
    # heads before positions, grouped by key head, so that both products are plain batched matmuls
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q, k, v))
    q = q.reshape(batch, kv_heads, heads // kv_heads * length, d)
    if sinks is not None:  # one for each query
        shared = sinks.astype(jnp.float32).reshape(1, kv_heads, -1)
        sinks = jnp.broadcast_to(jnp.repeat(shared, length, axis=2), q.shape[:3])
    start = jnp.asarray(first, jnp.int32)
    out: Any = _attend(size, length, scoring, q, k, v, mask, start, sinks)
    return jnp.swapaxes(out.reshape(batch, heads, length, -1), 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    size: int,
    length: int,
    scoring: Scoring,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    first: Array,
    sinks: Array | None,
) -> Array:
    return _forward(size, length, scoring, q, k, v, mask, first, sinks)[0]


def _forward(
    size: int,
    length: int,
    scoring: Scoring,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    first: Array,
    sinks: Array | None,
) -> tuple[Array, Any]:
    blocks = _Blocks(size, length, scoring, q, k, v, mask, first)

    def step(
        carry: tuple[Array, Array, Array], start: Array
    ) -> tuple[tuple[Array, Array, Array], None]:
        def add(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            m, total, out = carry
            scores, _ = blocks.scores(start)
            most = jnp.maximum(m, scores.max(-1))
            weights, again = jnp.exp(scores - most[..., None]), jnp.exp(m - most)
            values = jnp.einsum(
                "bhts,bhsd->bhtd",
                weights.astype(v.dtype),
                blocks.values(start),
                preferred_element_type=jnp.float32,
            )
            return most, total * again + weights.sum(-1), out * again[..., None] + values

        return blocks.when_visible(start, add, lambda carry: carry, carry), None

    shape = q.shape[:-1]
    begin = jnp.full(shape, _LOWEST), jnp.zeros(shape)
    begin = begin if sinks is None else (sinks, jnp.ones(shape))
    sums = jnp.zeros((*shape, v.shape[-1]))
    (m, total, out), _ = jax.lax.scan(step, (*begin, sums), blocks.starts)
    out = (out / total[..., None]).astype(v.dtype)
    # the name by which remat saves attention's output instead of recomputing it
    out, m, total = (checkpoint_name(array, ATTENTION) for array in (out, m, total))
    return out, (q, k, v, mask, first, sinks, out, m, total)


def _backward(
    size: int, length: int, scoring: Scoring, kept: Any, dy: Array
) -> tuple[Array, Array, Array, None, None, Array | None]:
    q, k, v, mask, first, sinks, out, m, total = kept
    blocks = _Blocks(size, length, scoring, q, k, v, mask, first)
    scale = scoring.scale_of(q.shape[-1])
    own = jnp.einsum("bhtd,bhtd->bht", dy, out, preferred_element_type=jnp.float32)

    def step(dq: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        def add(dq: Array) -> tuple[Array, tuple[Array, Array]]:
            scores, allowed = blocks.scores(start)
            weights = jnp.exp(scores - m[..., None]) / total[..., None]
            dv = jnp.einsum("bhts,bhtd->bhsd", weights.astype(dy.dtype), dy)
            change = jnp.einsum(
                "bhtd,bhsd->bhts", dy, blocks.values(start), preferred_element_type=jnp.float32
            )
            change = weights * (change - own[..., None]) * scale * scoring.slope(scores)
            change = blocks.where(allowed, change, 0.0).astype(q.dtype)
            dq = dq + jnp.einsum(
                "bhts,bhsd->bhtd", change, blocks.keys(start), preferred_element_type=jnp.float32
            )
            return dq, (jnp.einsum("bhts,bhtd->bhsd", change, q), dv)

        def skip(dq: Array) -> tuple[Array, tuple[Array, Array]]:
            return dq, (jnp.zeros_like(blocks.keys(start)), jnp.zeros_like(blocks.values(start)))

        return blocks.when_visible(start, add, skip, dq)

    dq, (dk, dv) = jax.lax.scan(step, jnp.zeros(q.shape), blocks.starts)

    def join(parts: Array) -> Array:
        whole = jnp.moveaxis(parts, 0, 2).reshape(*k.shape[:2], -1, parts.shape[-1])
        return whole[:, :, : k.shape[2]]

    dsinks = None if sinks is None else -own * jnp.exp(sinks - m) / total
    return dq.astype(q.dtype), join(dk), join(dv), None, None, dsinks


_attend.defvjp(_forward, _backward)


class _Blocks:
    """The blocks of keys `[batch, kv_heads, key, d]` and their values, for queries
    `[batch, kv_heads, heads / kv_heads * query, d]`.
    """

    def __init__(
        self,
        size: int,
        length: int,
        scoring: Scoring,
        q: Array,
        k: Array,
        v: Array,
        mask: Mask,
        first: Array,
    ) -> None:
        # otherwise JAX hoists the masks of all blocks, as large as all scores, out of a scan over
        # layers
        q, first, mask = jax.lax.optimization_barrier((q, first, mask))
        self.size, self.length, self.first, self.mask, self.q = size, length, first, mask, q
        self.all, self.scoring = k.shape[2], scoring
        more = -self.all % size
        self.k, self.v = (jnp.pad(array, ((0, 0), (0, 0), (0, more), (0, 0))) for array in (k, v))
        self.text, self.segments = (
            array if array is None else jnp.pad(array, ((0, 0), (0, more)))
            for array in (mask.text, mask.segments)
        )
        self.starts = jnp.arange(0, self.all + more, size, dtype=jnp.int32)
        self.apart = q.shape[0], -1, length, size

    def keys(self, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(self.k, start, self.size, 2)

    def values(self, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(self.v, start, self.size, 2)

    def when_visible(
        self, start: Array, do: Callable[[Any], Any], skip: Callable[[Any], Any], carry: Any
    ) -> Any:
        """Call `do` if, by its position, a query may attend to a key of the block, else `skip`."""
        if not self.mask.causal:
            return do(carry)
        seen = start < self.first + self.length
        if self.mask.window:
            seen &= start + self.size > self.first - self.mask.window + 1
        return jax.lax.cond(seen, do, skip, carry)

    def where(self, allowed: Array | None, array: Array, other: float) -> Array:
        """Return an array shaped like the scores, with `other` where they are masked."""
        return (
            array
            if allowed is None
            else jnp.where(allowed, array.reshape(self.apart), other).reshape(array.shape)
        )

    def scores(self, start: Array) -> tuple[Array, Array | None]:
        """Return the logits of a block and their mask `[batch or 1, 1, query, key]`, or None."""
        scores = jnp.einsum(
            "bhtd,bhsd->bhts", self.q, self.keys(start), preferred_element_type=jnp.float32
        )
        scores = self.scoring.logits(scores, self.q.shape[-1])
        allowed = self._allowed_pairs(start)
        scores = self.where(allowed, scores, _LOWEST)
        if self.all % self.size:  # exclude the padding of the last block from averages, too
            valid = start + jnp.arange(self.size, dtype=jnp.int32) < self.all
            scores = jnp.where(valid, scores, -jnp.inf)
        return scores, allowed

    def _allowed_pairs(self, start: Array) -> Array | None:
        parts: list[Array] = []
        keys = (start + jnp.arange(self.size, dtype=jnp.int32))[None, None, None, :]
        if self.mask.causal:
            back = (self.first + jnp.arange(self.length, dtype=jnp.int32))[
                None, None, :, None
            ] - keys
            parts.append(back >= 0)
            parts += [back < self.mask.window] if self.mask.window else []
        if self.segments is not None:
            own = jax.lax.dynamic_slice_in_dim(self.segments, self.first, self.length, 1)
            other = jax.lax.dynamic_slice_in_dim(self.segments, start, self.size, 1)
            parts.append((own[:, :, None] == other[:, None, :])[:, None])
        if self.text is not None:
            parts.append(
                jax.lax.dynamic_slice_in_dim(self.text, start, self.size, 1)[:, None, None, :]
            )
        found: Array | None = None
        for part in parts:
            found = part if found is None else found & part
        return found
