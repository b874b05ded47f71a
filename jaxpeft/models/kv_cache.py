"""The cache: what layers keep of earlier calls, so that a call computes only its own tokens.

A layer with attention keeps keys and values, with a slot for each token; one with a recurrence
keeps the window of its convolution and its state, of a fixed size. A decoder reads a cache that is
passed to it, and sows what its own tokens add, and their positions, into the collection `PAST`.
`append` writes it into the cache. A call with an empty cache and one with a full one are the same
program, and every method, which sees only modules, works with both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.models.base import PAST
from jaxpeft.sharding.logical_axes import BATCH, HEAD_DIM, HEADS, KV_HEADS, constrain

Array = jax.Array
KEYS, VALUES, WINDOW, STATE = "keys", "values", "window", "state"
_POSITIONS = "positions"
SLOTS = 32
"""The number of slots of a cache is a multiple of it, for kernels that read blocks of slots."""
_SLOTS = (KEYS, VALUES)
_DIMENSIONS: Mapping[str, tuple[str | None, ...]] = {
    KEYS: (BATCH, KV_HEADS, None, HEAD_DIM),
    VALUES: (BATCH, KV_HEADS, None, HEAD_DIM),
    WINDOW: (BATCH, None, None),
    STATE: (BATCH, HEADS, None, None),
}


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "positions"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """What the layers keep of earlier tokens.

    Attributes:
        layers: arrays by the name of their layers in paths, with a leading axis for stacked layers:
            `keys`, rotated, and `values`, `[batch, kv_heads, slots, d]` with a d of their own, each
            row's in slots of any order; or `window` `[batch, n - 1, channels]`, the inputs of a
            convolution over n positions, and `state` `[batch, heads, dk, dv]` float32.
        positions: `[batch, slots]` int32, the position of each slot, counted from the first virtual
            token; negative for an empty slot.
    """

    layers: dict[str, dict[str, Array]]
    positions: Array

    @property
    def slots(self) -> int:
        """The number of slots of a row."""
        return self.positions.shape[1]


def sow_keys(module: nn.Module, k: Array, v: Array) -> None:
    """Sow the keys and values `[batch, length, kv_heads, d]` of a layer, if `PAST` is mutable."""
    _sow(module, {KEYS: k, VALUES: v})


def sow_state(module: nn.Module, window: Array, state: Array) -> None:
    """Sow the window and the state of a layer after its tokens, see `Cache`, if `PAST` is
    mutable.
    """
    _sow(module, {WINDOW: window, STATE: state})


def sow_positions(module: nn.Module, positions: Array) -> None:
    """Sow the positions `[batch, length]` of a call's keys, if `PAST` is mutable."""
    _sow(module, {_POSITIONS: positions})


def _sow(module: nn.Module, arrays: Mapping[str, Array]) -> None:
    if module.is_mutable_collection(PAST) and not module.is_initializing():
        for name, array in arrays.items():
            module.sow(PAST, name, array)


def read_sown(past: Mapping[str, Any]) -> Cache:
    """Return what a call has sown as a cache with one slot for each of its tokens.

    Args:
        past: the collection `PAST` of the call.
    """
    (positions,) = (leaf for path, (leaf,) in paths.walk(past) if path[-1] == _POSITIONS)
    return Cache(read_layers(past), positions)


def read_layers(past: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """Return what the layers have sown in a call, as in `Cache`.

    Args:
        past: the collection `PAST` of the call.
    """
    found: dict[str, dict[str, Array]] = {}
    for path, (leaf,) in paths.walk(past):
        within = paths.within_layer(path)
        if within is not None and path[-1] in _DIMENSIONS:
            kept = jnp.swapaxes(leaf, -3, -2) if path[-1] in _SLOTS else leaf
            found.setdefault(within[0], {})[path[-1]] = kept
    return found


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
    """Return an empty cache with the shapes and dtypes of another, but at least `slots` slots."""
    slots = -(-slots // SLOTS) * SLOTS

    def zeros(name: str, leaf: Array) -> Array:
        sizes = (slots, leaf.shape[-1]) if name in _SLOTS else leaf.shape[-2:]
        return jnp.zeros((*leaf.shape[:-2], *sizes), leaf.dtype)

    empty = jnp.full((like.positions.shape[0], slots), -1, jnp.int32)
    return Cache(_by_name(zeros, like.layers), empty)


def append(cache: Cache, new: Cache, slot: Array | int) -> Cache:
    """Write the slots of `new` into a cache, from `slot` on, and replace windows and states."""

    def write(name: str, old: Array, own: Array) -> Array:
        own = own.astype(old.dtype)
        if name not in _SLOTS:
            return own
        at = [jnp.zeros((), jnp.int32)] * old.ndim
        at[-2] = jnp.asarray(slot, jnp.int32)
        return jax.lax.dynamic_update_slice(old, own, at)

    at = (jnp.zeros((), jnp.int32), jnp.asarray(slot, jnp.int32))
    positions = jax.lax.dynamic_update_slice(cache.positions, new.positions, at)
    return Cache(_by_name(write, cache.layers, new.layers), positions)


def _by_name(fn: Callable[..., Array], *layers: Any) -> Any:
    """Map the arrays of layers, whose names are the first argument, and constrain the results."""

    def one(path: Any, *leaves: Array) -> Array:
        name, out = path[-1].key, fn(path[-1].key, *leaves)
        dimensions = _DIMENSIONS[name]
        return constrain(out, *(None,) * (out.ndim - len(dimensions)), *dimensions)

    return jax.tree_util.tree_map_with_path(one, *layers)


def visible(queries: Array, keys: Array) -> Array:
    """Return which keys each query sees, bool `[batch, 1, query, key]`: those at its position and
    before.

    Args:
        queries: `[batch, query]`, positions.
        keys: `[batch, key]`, positions; negative for an empty slot or padding.
    """
    keys = keys[:, None, None, :]
    return (keys >= 0) & (keys <= queries[:, None, :, None])
