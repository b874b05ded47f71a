"""The KV cache: keys and values of earlier calls, so that a call computes only its own tokens.

A decoder reads a cache that is passed to it, and sows the keys, values and positions of its own
tokens into the collection `PAST`. `append` writes them into the cache. A call with an empty cache
and one with a full one are the same program, and every method, which sees only modules, works with
both.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.core.paths import LAYER_CONTAINERS
from jaxpeft.models.base import PAST
from jaxpeft.sharding.logical_axes import BATCH, HEAD_DIM, KV_HEADS, constrain

Array = jax.Array
_KEYS, _VALUES, _POSITIONS = "keys", "values", "positions"
_STACKED = -1
SLOTS = 32
"""The number of slots of a cache is a multiple of it, for kernels that read blocks of slots."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "positions"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens, each row's in slots of any order.

    Attributes:
        keys: rotated keys, `[layers, batch, kv_heads, slots, d]` if the layers are scanned, else a
            list with the `[batch, kv_heads, slots, d]` of each layer.
        values: values, of the same shape, except that d may differ.
        positions: `[batch, slots]` int32, the position of each slot, counted from the first virtual
            token; negative for an empty slot.
    """

    keys: Any
    values: Any
    positions: Array

    @property
    def slots(self) -> int:
        """The number of slots of a row."""
        return self.positions.shape[1]


def sow_keys(module: nn.Module, k: Array, v: Array) -> None:
    """Sow the keys and values `[batch, length, kv_heads, d]` of a layer, if `PAST` is mutable."""
    if module.is_mutable_collection(PAST) and not module.is_initializing():
        module.sow(PAST, _KEYS, k)
        module.sow(PAST, _VALUES, v)


def sow_positions(module: nn.Module, positions: Array) -> None:
    """Sow the positions `[batch, length]` of a call's keys, if `PAST` is mutable."""
    if module.is_mutable_collection(PAST) and not module.is_initializing():
        module.sow(PAST, _POSITIONS, positions)


def read_sown(past: Mapping[str, Any]) -> Cache:
    """Return what a call has sown as a cache with one slot for each of its tokens.

    Args:
        past: the collection `PAST` of the call.
    """
    keys, values = read_keys(past)
    (positions,) = (leaf for path, (leaf,) in paths.walk(past) if path[-1] == _POSITIONS)
    return Cache(keys, values, positions)


def read_keys(past: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the keys and values that a call has sown, as in `Cache`.

    Args:
        past: the collection `PAST` of the call.
    """
    found: dict[str, dict[int, Any]] = {_KEYS: {}, _VALUES: {}}
    for path, (leaf,) in paths.walk(past):
        if path[-1] in found:
            found[path[-1]][_layer(path)] = jnp.swapaxes(leaf, -3, -2)
    keys, values = (
        by_layer[_STACKED] if _STACKED in by_layer else [by_layer[i] for i in sorted(by_layer)]
        for by_layer in (found[_KEYS], found[_VALUES])
    )
    return keys, values


def _layer(path: paths.Path) -> int:
    """Return the number of the layer of a path, `_STACKED` if the layers are stacked."""
    numbers = [
        int(name)
        for container, name in itertools.pairwise(path)
        if container in LAYER_CONTAINERS and name.isdecimal()
    ]
    return numbers[0] if numbers else _STACKED


def allocate(like: Cache, slots: int) -> Cache:
    """Return an empty cache with the shapes and dtypes of another, but at least `slots` slots."""
    slots = -(-slots // SLOTS) * SLOTS

    def zeros(leaf: Array) -> Array:
        return _constrain(jnp.zeros((*leaf.shape[:-2], slots, leaf.shape[-1]), leaf.dtype))

    keys, values = jax.tree.map(zeros, (like.keys, like.values))
    empty = jnp.full((like.positions.shape[0], slots), -1, jnp.int32)
    return Cache(keys, values, empty)


def append(cache: Cache, new: Cache, slot: Array | int) -> Cache:
    """Write the slots of `new` into a cache, from `slot` on."""

    def write(old: Array, own: Array) -> Array:
        at = [jnp.zeros((), jnp.int32)] * old.ndim
        at[-2] = jnp.asarray(slot, jnp.int32)
        return _constrain(jax.lax.dynamic_update_slice(old, own.astype(old.dtype), at))

    keys, values = jax.tree.map(write, (cache.keys, cache.values), (new.keys, new.values))
    at = (jnp.zeros((), jnp.int32), jnp.asarray(slot, jnp.int32))
    return Cache(keys, values, jax.lax.dynamic_update_slice(cache.positions, new.positions, at))


def _constrain(leaf: Array) -> Array:
    lead = (None,) * (leaf.ndim - 4)
    return constrain(leaf, *lead, BATCH, KV_HEADS, None, HEAD_DIM)


def visible(queries: Array, keys: Array) -> Array:
    """Return which keys each query sees, bool `[batch, 1, query, key]`: those at its position and
    before.

    Args:
        queries: `[batch, query]`, positions.
        keys: `[batch, key]`, positions; negative for an empty slot or padding.
    """
    keys = keys[:, None, None, :]
    return (keys >= 0) & (keys <= queries[:, None, :, None])
