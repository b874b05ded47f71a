"""Disentangled attention: scores from contents, and from contents with relative positions.

    A_qk = Q_q K_k' + Q_q P^K_(d(q, k))' + K_k P^Q_(d(q, k))',    d(q, k) = bucket(q - k)

`P^K` and `P^Q` are projections of a table of relative positions. The scores are divided by
`sqrt(head size * number of terms)`. He et al. 2020, "DeBERTa: Decoding-enhanced BERT with
Disentangled Attention", equations 2 to 4 (arXiv:2006.03654); buckets and shared projections: v2.

A row of the table is looked up for each of the `2 length - 1` distances, and the product with it is
shifted, instead of looking up a product for each pair: the gradient then adds to small tables only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def rows_of_distances(length: int, span: int, buckets: int, farthest: int) -> np.ndarray:
    """Return the table's row of each distance `q - k`, from `-(length - 1)` to `length - 1`.

    Distances up to half of the buckets have a row each, on both sides. Beyond, the row is
    `mid + ceil(log(|d| / mid) / log((farthest - 1) / mid) * (mid - 1))`, `mid = buckets // 2`.

    Args:
        length: number of positions.
        span: number of rows on each side.
        buckets: `position_buckets`; 0 for a row for each distance.
        farthest: the distance that has the last bucket.

    Returns:
        `[2 length - 1]` int32, in `[0, 2 span)`.
    """
    distance = np.arange(1 - length, length)
    if buckets:
        mid = buckets // 2
        size = np.maximum(np.abs(distance), max(mid, 1)).astype(np.float32)
        scale = np.log(np.float32((farthest - 1) / mid))
        steps = np.ceil(np.log(size / np.float32(mid)) / scale * np.float32(mid - 1))
        far = np.sign(distance) * (steps + mid).astype(np.int64)
        distance = np.where(np.abs(distance) <= mid, distance, far)
    return np.clip(distance + span, 0, 2 * span - 1).astype(np.int32)


def content_to_position(q: Array, keys: Array, rows: np.ndarray) -> Array:
    """Return `Q_q P^K_(d(q, k))'`, float32 `[batch, heads, query, key]`.

    Args:
        q: `[batch, length, heads, d]`.
        keys: `[1 or batch, 2 span, heads, d]`, the projected table.
        rows: from `rows_of_distances`.
    """
    return _shift(_products(q, keys[:, rows[::-1]]))


def position_to_content(k: Array, queries: Array, rows: np.ndarray) -> Array:
    """Return `K_k P^Q_(d(q, k))'`, float32 `[batch, heads, query, key]`.

    Args:
        k: `[batch, length, heads, d]`.
        queries: `[1 or batch, 2 span, heads, d]`, the projected table.
        rows: from `rows_of_distances`.
    """
    return jnp.swapaxes(_shift(_products(k, queries[:, rows])), 2, 3)


def _products(x: Array, table: Array) -> Array:
    """Return `[batch, heads, length, rows]` in float32."""
    table = jnp.broadcast_to(table, (x.shape[0], *table.shape[1:]))
    return jnp.einsum("blhd,brhd->bhlr", x, table, preferred_element_type=jnp.float32)


def _shift(x: Array) -> Array:
    """Return `y[..., i, j] = x[..., i, j + length - 1 - i]`, `[..., length, length]`.

    With a column of padding, row i begins `2 length` after the row before it, and what it needs one
    less: a slice of the flat array, cut into rows one shorter, has them one below the other (Dai et
    al. 2019, "Transformer-XL", appendix B, arXiv:1901.02860).

    Args:
        x: `[..., length, 2 length - 1]`.
    """
    lead, length = x.shape[:-2], x.shape[-2]
    flat = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, 1))).reshape(*lead, -1)
    count = length * (2 * length - 1)
    cut = flat[..., length - 1 : length - 1 + count]
    return cut.reshape(*lead, length, 2 * length - 1)[..., :length]
