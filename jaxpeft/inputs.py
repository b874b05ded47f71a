"""Check the inputs and parameters of a model, with errors that name the array and position.

Shapes and dtypes are always checked; values only if they are available, which they are not for
traced arrays and for arrays on several hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from jaxpeft import kernels
from jaxpeft.core import paths
from jaxpeft.core.rewriting import require_numbers
from jaxpeft.errors import ConfigError, DataError, nearest, show
from jaxpeft.kernels import QUANTIZED
from jaxpeft.methods import MARKERS, METHODS
from jaxpeft.models.base import Pretrained, abstract_params

FAILURES = (FlaxError, TypeError, ValueError, KeyError, AttributeError)
"""Errors of Flax and JAX if parameters do not fit a module."""
_TABLES = {
    "token_type_ids": "type_vocab_size",
    "position_ids": "max_position_embeddings",
    "segment_ids": None,
}
"""Optional inputs of a model, and the config field with the size of their embedding table."""

_FEW_BITS = frozenset(name for form in QUANTIZED.values() for name in form.leaves)
"""Leaves of a module with a quantized kernel."""
_OF_ANOTHER = "; these are another model's parameters: give the parameters of this model"


def check_inputs(
    model: Pretrained, args: tuple[Any, ...], kw: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the checked inputs of a pretrained model as arrays.

    Args:
        model: the model.
        args: `input_ids` and `attention_mask`, both `[batch, length]`.
        kw: inputs by name, possibly including those two.

    Raises:
        DataError: names the input and the first invalid value.
    """
    named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kw
    if len(args) > 2 or "input_ids" not in named:
        raise DataError(
            "apply: takes input_ids and attention_mask, and other inputs by name; got"
            f" {len(args)} positional inputs"
        )
    ids = _token_ids(model, named.pop("input_ids"))
    mask = named.pop("attention_mask", None)
    first = (ids,) if mask is None else (ids, _mask(mask, ids))
    return first, {name: _further(model, name, value, ids) for name, value in named.items()}


def _array(name: str, value: Any) -> Any:
    if isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise DataError(
            f"{name}: rows differ in length; pad them, and give an attention_mask"
        ) from None


def _numbers(array: Any) -> np.ndarray[Any, Any] | None:
    """Return the values of an array, or None if they are not available."""
    if isinstance(array, jax.core.Tracer) or (
        isinstance(array, jax.Array) and not array.is_fully_addressable
    ):
        return None
    return np.asarray(array)


def _token_ids(model: Pretrained, value: Any) -> Any:
    ids = _array("input_ids", value)
    if ids.ndim != 2 or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise DataError(
            f"input_ids: must be integers [batch, length] and not empty, are {ids.dtype}"
            f" {list(ids.shape)}"
        )
    vocab = getattr(model.config, "vocab_size", None)
    _require_within("input_ids", ids, vocab, f"the vocabulary of {vocab}; check the tokenizer")
    return jnp.asarray(ids, jnp.int32) if isinstance(ids, np.ndarray) else ids


def _mask(value: Any, ids: Any) -> Any:
    mask = _array("attention_mask", value)
    if mask.shape != ids.shape:
        raise DataError(
            f"attention_mask: has shape {list(mask.shape)}, input_ids has {list(ids.shape)}; they"
            " must be equal"
        )
    if not (
        mask.dtype == bool
        or jnp.issubdtype(mask.dtype, jnp.integer)
        or jnp.issubdtype(mask.dtype, jnp.floating)
    ):
        raise DataError(
            f"attention_mask: must be numeric, 1 for a token and 0 for padding, is {mask.dtype}"
        )
    numbers = _numbers(mask)
    if numbers is not None and not np.isin(numbers, (0, 1)).all():
        row, place = map(int, np.argwhere(~np.isin(numbers, (0, 1)))[0])
        raise DataError(
            f"attention_mask: must be 1 for a token and 0 for padding, is {numbers[row, place]} in"
            f" row {row}, position {place}"
        )
    return jnp.asarray(mask)


def _further(model: Pretrained, name: str, value: Any, ids: Any) -> Any:
    """Return an optional input after checking its shape, dtype and range."""
    if name not in _TABLES:
        raise DataError(
            f"apply: {name!r} is not an input of the model{nearest(name, _TABLES)} (known:"
            f" input_ids, attention_mask, {', '.join(_TABLES)})"
        )
    if value is None:
        return None
    array = _array(name, value)
    if array.ndim != 2 or array.shape[1] != ids.shape[1] or array.shape[0] not in (1, ids.shape[0]):
        raise DataError(
            f"{name}: has shape {list(array.shape)}, input_ids has {list(ids.shape)}; they must be"
            " equal"
        )
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise DataError(f"{name}: must be integers, are {array.dtype}")
    # rotary positions have no table
    table = _TABLES[name] if hasattr(model.config, "type_vocab_size") else None
    size = getattr(model.config, table, None) if table else None
    _require_within(name, array, size, f"the model's table of {size or 'none'}")
    return jnp.asarray(array)


def _require_within(name: str, array: Any, size: int | None, what: str) -> None:
    """Reject integers outside of [0, size), for which a look-up would silently use another row."""
    numbers = _numbers(array)
    if numbers is None or not numbers.size:
        return
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or (size and high >= size):
        raise DataError(f"{name}: {low if low < 0 else high} is outside {what}")


def require_tree(model: Any, params: Any) -> None:
    """Reject parameters that a model cannot use, or that a pretrained model would silently ignore.

    Args:
        model: any module.
        params: its tree, rewritten or not; abstract leaves will do.

    Raises:
        ConfigError: names the first such leaf.
    """
    require_numbers(params)
    if not isinstance(model, Pretrained):
        return
    layers = getattr(model.config, "num_hidden_layers", None)
    for path, _ in paths.walk(params):
        for container, key in pairwise(path):
            if (
                layers
                and container in paths.LAYER_CONTAINERS
                and (named := paths.named_layers(key))
                and named[-1] >= layers
            ):
                raise ConfigError(f"{paths.text(path)}: the model has {layers} layers{_OF_ANOTHER}")
    # these options do not affect the leaves
    options = dataclasses.replace(
        model.options, remat="none", attention="xla", offload=False, gathered=()
    )
    plain: Any = model.clone(options=options, source=None)  # pyright does not see that it hashes
    if why := _leaf_misfit(_own_leaves(plain), params):
        raise ConfigError(why)


def require_adapter(params: Mapping[str, Any], adapter: Any | None) -> None:
    """Reject an adapter index outside of the adapter stack, which would silently use another one.

    Args:
        params: parameters of a pretrained model.
        adapter: argument `adapter` of `apply`.

    Raises:
        DataError: names the index.
    """
    numbers = None if adapter is None else _array("adapter", adapter)
    if numbers is None:
        return
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise DataError(
            "adapter: must be the index of an adapter in the stack, or one index per row, is"
            f" {show(adapter)}"
        )
    marked = ((path, leaf) for path, leaf in paths.walk(params) if path[-1] in MARKERS)
    count = next((leaf.shape[len(paths.stacks(path))] for path, leaf in marked), None)
    _require_within("adapter", numbers, count, f"the stack of {count} adapters")


def find_misfit(
    model: Any, params: Mapping[str, Any], args: tuple[Any, ...], kw: Mapping[str, Any]
) -> str | None:
    """Return the first leaf that does not fit the model, after a failed call; None if all fit or
    the model's leaves are unknown.

    Args:
        model: a Linen module.
        params: parameters of the call.
        args: positional arguments of the call.
        kw: keyword arguments of the call.
    """
    key = jax.random.key(0)
    try:
        shapes = jax.eval_shape(lambda: model.init({"params": key, "dropout": key}, *args, **kw))
    except FAILURES:
        return None
    return _leaf_misfit(dict(paths.walk(shapes.get("params", {}))), params)


@lru_cache(maxsize=8)
def _own_leaves(model: Pretrained) -> Mapping[paths.Path, Any]:
    """Return the abstract leaves of a pretrained model by path."""
    return dict(paths.walk(abstract_params(model)))


def _leaf_misfit(expected: Mapping[paths.Path, Any], params: Mapping[str, Any]) -> str | None:
    """Return the first leaf that does not fit the model: wrong shape, missing, or unused.

    Args:
        expected: leaves of the model by path.
        params: parameters of the call.
    """
    leaves = dict(paths.walk(params))
    for path, leaf in expected.items():
        if path in leaves and leaves[path].shape != leaf.shape:
            return (
                f"{paths.text(path)}: has shape {list(leaves[path].shape)}, must have"
                f" {list(leaf.shape)}{_OF_ANOTHER}"
            )
        if path not in leaves and not _is_quantized(params, path):
            fix = "; give the value of 'params'" if set(params) == {"params"} else _OF_ANOTHER
            return f"{paths.text(path)}: is missing, must have shape {list(leaf.shape)}{fix}"
    modules = {path[:n] for path in expected for n in range(len(path))}
    site = {name for method in METHODS.values() for name in method.leaves.names}
    root = {name for method in METHODS.values() for name in method.leaves.root}
    for path in [path for path in leaves if path not in expected]:
        module, name = path[:-1], path[-1]
        quantized = name in _FEW_BITS and (*module, "kernel") in expected
        if not quantized and not (module in modules and name in (site if module else root)):
            return f"{paths.text(path)}: is not a leaf of the model{_OF_ANOTHER}"
    return None


def _is_quantized(params: Mapping[str, Any], path: paths.Path) -> bool:
    """Return whether the leaf is a kernel that is stored quantized."""
    try:
        return path[-1] == "kernel" and kernels.is_quantized(paths.get(params, path[:-1]))
    except (KeyError, TypeError):
        return False
