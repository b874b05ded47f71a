"""The KV cache: keys and values of earlier calls, so that a call computes only its own tokens.

A decoder reads a cache that is passed to it, and sows the keys, values and positions of its own
tokens into the collection `PAST`. `append` writes them into the cache. A call with an empty cache
and one with a full one are the same program, and every method, which sees only modules, works with
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.models.base import PAST
from jaxpeft.sharding.logical_axes import BATCH, HEAD_DIM, KV_HEADS, constrain

Array = jax.Array
_KEYS, _VALUES, _POSITIONS = "keys", "values", "positions"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "positions"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens, each row's in slots of any order.

    Attributes:
        keys: rotated keys by the name of their layers in paths: `[batch, kv_heads, slots, d]` of
            one layer, `[layers, batch, kv_heads, slots, d]` of stacked ones.
        values: values, of the same shapes.
        positions: `[batch, slots]` int32, the position of each slot, counted from the first virtual
            token; negative for an empty slot.
    """

    keys: dict[str, Array]
    values: dict[str, Array]
    positions: Array

    def by_layers(self) -> dict[str, tuple[Array, Array]]:
        """Return the keys and values of layers by their name."""
        return {name: (keys, self.values[name]) for name, keys in self.keys.items()}

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


def read_keys(past: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the keys and values that a call has sown, as in `Cache`.

    Args:
        past: the collection `PAST` of the call.
    """
    found: dict[str, dict[str, Array]] = {_KEYS: {}, _VALUES: {}}
    for path, (leaf,) in paths.walk(past):
        within = paths.within_layer(path)
        if within is not None and path[-1] in found:
            found[path[-1]][within[0]] = jnp.swapaxes(leaf, -3, -2)
    return found[_KEYS], found[_VALUES]


def in_order(by_layers: Mapping[str, Array]) -> Array:
    """Return the arrays of all layers, stacked in their order.

    Args:
        by_layers: arrays by the name of their layers, with a leading axis for stacked layers.
    """
    if paths.ALL_LAYERS in by_layers:
        return by_layers[paths.ALL_LAYERS]
    found: dict[int, Array] = {}
    for name, leaf in by_layers.items():
        layers = paths.named_layers(name) or range(0)
        found |= zip(layers, leaf if len(layers) > 1 else [leaf], strict=True)
    return jnp.stack([found[i] for i in sorted(found)])


def allocate(like: Cache, slots: int) -> Cache:
    """Return an empty cache with the shapes and dtypes of another, but `slots` slots."""

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
