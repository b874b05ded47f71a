"""Score given continuations with a language model: their log-probability, and whether greedy
generation would choose them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpeft.forward import run
from jaxpeft.inference.generation import padded_size
from jaxpeft.models.base import Pretrained
from jaxpeft.processes.arrays import replicate
from jaxpeft.sharding.logical_axes import constrain, mesh_under, on_mesh
from jaxpeft.sharding.sizes import row_shards

Array = jax.Array
_MOST_LOGITS = 1 << 26
"""Logits that exist at once: 256 MiB in float32."""
_NO_LABEL = -1


def score(
    model: Pretrained,
    params: Mapping[str, Any],
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 32,
) -> list[tuple[float, bool]]:
    """Score continuations of contexts.

    Args:
        model: a decoder with a language-model head.
        params: its parameters, with or without adapters.
        rows: token ids of each context, at least one, and of its continuation.
        batch_size: maximum number of rows that run together.

    Returns:
        For each row, the log-probability of the continuation in nats, and whether each of its
        tokens is the most likely one.
    """
    mesh = mesh_under(params)
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))
    for start in range(0, len(order), batch_size):
        own = order[start : start + batch_size]
        ids, labels = _batch([rows[i] for i in own], 1 if mesh is None else row_shards(mesh.shape))
        arrays = replicate(mesh, ids), replicate(mesh, labels)
        sums, greedy = _program(mesh)(model.clone(source=None), params, *arrays)
        pairs = zip(np.asarray(sums).tolist(), np.asarray(greedy).tolist(), strict=True)
        found_here = [*pairs][: len(own)]
        for i, result in zip(own, found_here, strict=True):
            found[i] = result
    return found


def _batch(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], over: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the ids and the next tokens to score, int32 `[rows, length]`, padded on the right."""
    count = -(-padded_size(len(rows), 1) // over) * over
    length = padded_size(max(len(a) + len(b) for a, b in rows) - 1, 16)
    ids = np.zeros((count, length), np.int32)
    labels = np.full((count, length), _NO_LABEL, np.int32)
    for i, (context, continuation) in enumerate(rows):
        text = [*context, *continuation]
        ids[i, : len(text) - 1] = text[:-1]
        labels[i, len(context) - 1 : len(text) - 1] = continuation
    return ids, labels


@lru_cache(maxsize=4)
def _program(mesh: Mesh | None) -> Any:
    return jax.jit(on_mesh(mesh, _score), static_argnums=0)


def _score(
    model: Pretrained, params: Mapping[str, Any], ids: Array, labels: Array
) -> tuple[Array, Array]:
    """Return the sum of log-probabilities and whether all are greedy, `[rows]`."""
    # attention is causal, so padding on the right needs no mask; dynamic RoPE depends on the
    # largest position, which is not that of padding
    places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    last = jnp.max(jnp.where(labels == _NO_LABEL, 0, places), axis=1, keepdims=True)
    hidden = run(model, params, ids, hidden=True, position_ids=jnp.minimum(places, last))
    (rows, length), vocab = ids.shape, model.config.vocab_size
    size = min(length, max(1, _MOST_LOGITS // (rows * vocab)))
    count = -(-length // size)

    def split(array: Array, fill: int) -> Array:
        wide = [(0, 0), (0, count * size - length), *((0, 0),) * (array.ndim - 2)]
        parts = jnp.pad(array, wide, constant_values=fill)
        return jnp.moveaxis(parts.reshape(rows, count, size, *array.shape[2:]), 1, 0)

    def chunk(items: tuple[Array, Array]) -> tuple[Array, Array]:
        x, wanted = items
        logits = run(model, params, x, method="head")
        scored = wanted != _NO_LABEL
        picked = jnp.take_along_axis(logits, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        log_probs = jnp.where(scored, picked - jax.nn.logsumexp(logits, axis=-1), 0.0)
        same = ~scored | (jnp.argmax(logits, axis=-1) == wanted)
        return jnp.sum(log_probs, axis=1), jnp.all(same, axis=1)

    sums, greedy = jax.lax.map(chunk, (split(hidden, 0), split(labels, _NO_LABEL)))
    return constrain(sums.sum(0), None), constrain(jnp.all(greedy, axis=0), None)
