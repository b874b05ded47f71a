r"""Attention of one query of each row to a KV cache, on NVIDIA GPUs.

A program for each row and key head reads the keys and values once, up to the last slot that the
query sees, and computes the softmax of all query heads that share them online: Dao et al. 2022,
"FlashAttention", section 3.1 (arXiv:2205.14135). It starts from the key and value of the query's
own position, which are not in the cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.models.attention_scores import Scoring
from jaxpeft.models.kv_cache import SLOTS
from jaxpeft.models.masks import Mask

Array = jax.Array
_BLOCK, _MOST_HEADS = 64, 16
_LEAST = float(jnp.finfo(jnp.float32).min)


def takes(q: Array, k: Array, old_keys: Array, old_values: Array, scoring: Scoring) -> bool:
    """Return whether `compute` can compute a call.

    Args:
        q: `[batch, query, heads, d]`.
        k: `[batch, key, kv_heads, d]`.
        old_keys: `[batch, kv_heads, slots, d]`.
        old_values: `[batch, kv_heads, slots, d]`.
        scoring: how scores become logits.
    """
    kv_heads, slots, d = old_keys.shape[1:]
    return (
        q.shape[1] == k.shape[1] == 1
        and q.shape[2] // kv_heads <= _MOST_HEADS
        and d in (64, 128, 256)
        and not scoring.sinks
        and old_values.shape == old_keys.shape
        and slots % SLOTS == 0
        and {q.dtype, old_keys.dtype, old_values.dtype} in ({jnp.dtype("bfloat16")},)
    )


def compute(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    old_keys: Array,
    old_values: Array,
    scoring: Scoring,
    sinks: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """Attend to the keys of a cache and to that of the query.

    Args:
        q: `[batch, 1, heads, d]`.
        k: `[batch, 1, kv_heads, d]`.
        v: `[batch, 1, kv_heads, d]`.
        mask: the mask of the cache's slots and of the query's own key, which it always sees.
        old_keys: `[batch, kv_heads, slots, d]`.
        old_values: `[batch, kv_heads, slots, d]`.
        scoring: how scores become logits.
        sinks: unused, since they are not supported.
        interpret: whether to interpret the program, on any platform.

    Returns:
        `[batch, 1, heads, d]`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    del sinks
    (batch, _, heads, d), (kv_heads, slots) = q.shape, old_keys.shape[1:3]
    shared = heads // kv_heads
    dense = mask.to_array(1)
    seen = jnp.ones((), bool) if dense is None else dense[:, 0, 0, :slots]
    seen = jnp.broadcast_to(seen, (batch, slots))
    used = jnp.max(jnp.where(seen, jnp.arange(1, slots + 1, dtype=jnp.int32), 0), axis=1)
    block = next(size for size in (_BLOCK, SLOTS) if slots % size == 0)

    program = partial(_attend, scoring, block, shared)

    def of(size: int) -> Any:
        return pl.BlockSpec((None, None, size, d), lambda row, head: (row, head, 0, 0))

    out = pl.pallas_call(
        program,
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, shared, d), q.dtype),
        grid=(batch, kv_heads),
        in_specs=[
            *(of(shared), of(1), of(1), of(slots), of(slots)),
            pl.BlockSpec((None, slots), lambda row, head: (row, 0)),
            pl.BlockSpec((1,), lambda row, head: (row,)),
        ],
        out_specs=of(shared),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(
        q.reshape(batch, kv_heads, shared, d),
        jnp.swapaxes(k, 1, 2),
        jnp.swapaxes(v, 1, 2),
        old_keys,
        old_values,
        seen,
        used,
    )
    return out.reshape(batch, 1, heads, d)


def _attend(scoring: Scoring, block: int, shared: int, *refs: Any) -> None:
    """Attend with the query heads of one key head of a row, inside a program.

    Args:
        scoring: how scores become logits.
        block: number of slots that are read at a time.
        shared: number of query heads.
        *refs: references to the queries `[shared, d]`, the key and value `[1, d]` of their
            position, the keys and values `[slots, d]` of the cache, which slots are seen `[slots]`,
            the number of slots up to the last of them `[1]`, and the result `[shared, d]`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    q, k, v, keys, values, seen, used, out = refs
    d = q.shape[-1]
    heads = pl.ds(0, _MOST_HEADS), slice(None)
    real = jnp.broadcast_to(jnp.arange(_MOST_HEADS)[:, None] < shared, (_MOST_HEADS, d))
    rows = triton.load(q.at[heads], mask=real, other=jnp.zeros((), q.dtype))
    own = jnp.sum(rows.astype(jnp.float32) * k[...].astype(jnp.float32), axis=1)

    def add(i: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        most, total, sums = state
        at = pl.ds(i * block, block)
        scores = scoring.logits(_dot(rows, keys[at, :].T), d)
        scores = jnp.where(seen[at][None], scores, _LEAST)
        higher = jnp.maximum(most, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(most - higher)
        new = _dot(weights.astype(values.dtype), values[at, :])
        total = total * shrink + jnp.sum(weights, axis=1)
        return higher, total, sums * shrink[:, None] + new

    first = jnp.broadcast_to(v[...].astype(jnp.float32), (_MOST_HEADS, d))
    start = scoring.logits(own, d), jnp.ones(_MOST_HEADS, jnp.float32), first
    _, total, sums = jax.lax.fori_loop(0, (used[0] + block - 1) // block, add, start)
    triton.store(out.at[heads], (sums / total[:, None]).astype(out.dtype), mask=real)


def _dot(a: Any, b: Any) -> Any:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
