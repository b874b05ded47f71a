"""What a model is called with: refused where it cannot be right, by its name and place.

Shapes and dtypes are checked always, numbers where they are at hand: of a traced array, or one that
lies on other hosts as well, they are not.
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
"""What Flax and JAX raise where parameters are not a module's own."""
_TABLES = {
    "token_type_ids": "type_vocab_size",
    "position_ids": "max_position_embeddings",
    "segment_ids": None,
}
"""The further inputs of a model, and the field of its config that says how many rows the table has
which they look up.
"""

_FEW_BITS = frozenset(name for form in QUANTIZED.values() for name in form.leaves)
"""The leaves of a module whose kernel is quantized."""
_OF_ANOTHER = "; these are another model's parameters: give those that were loaded or made with it"


def check_inputs(
    model: Pretrained, args: tuple[Any, ...], kw: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs of a pretrained model as arrays.

    Args:
        model: it.
        args: `input_ids` and `attention_mask`, both `[batch, length]`.
        kw: further inputs by name; those two may be among them.

    Raises:
        DataError: naming the input, and the first value that is wrong.
    """
    named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kw
    if len(args) > 2 or "input_ids" not in named:
        raise DataError(
            f"apply takes input_ids and an attention_mask, and others by name; {len(args)} were"
            " given"
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
            f"{name}: the rows differ in length; pad them, and give an attention_mask"
        ) from None


def _numbers(array: Any) -> np.ndarray[Any, Any] | None:
    """Return the numbers of an array, None where they are not at hand."""
    if isinstance(array, jax.core.Tracer) or (
        isinstance(array, jax.Array) and not array.is_fully_addressable
    ):
        return None
    return np.asarray(array)


def _token_ids(model: Pretrained, given: Any) -> Any:
    ids = _array("input_ids", given)
    if ids.ndim != 2 or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise DataError(
            f"input_ids: must be integers [batch, length], none of them 0, are {ids.dtype}"
            f" {list(ids.shape)}"
        )
    vocab = getattr(model.config, "vocab_size", None)
    _require_within(
        "input_ids", ids, vocab, f"the vocabulary of {vocab}; is this the model's own tokenizer?"
    )
    return jnp.asarray(ids, jnp.int32) if isinstance(ids, np.ndarray) else ids


def _mask(given: Any, ids: Any) -> Any:
    mask = _array("attention_mask", given)
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
            f"attention_mask: must be numbers, 1 for a token and 0 for padding, is {mask.dtype}"
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
    """Return a further input: its shape and dtype are right, and a look-up in its table would find
    something.
    """
    if name not in _TABLES:
        raise DataError(
            f"apply: {name!r} is no input of the model{nearest(name, _TABLES)} (known: input_ids,"
            f" attention_mask, {', '.join(_TABLES)})"
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
    # rotary positions come from no table
    table = _TABLES[name] if hasattr(model.config, "type_vocab_size") else None
    size = getattr(model.config, table, None) if table else None
    _require_within(name, array, size, f"the model's table of {size or 'none'}")
    return jnp.asarray(array)


def _require_within(name: str, array: Any, size: int | None, what: str) -> None:
    """Refuse whole numbers that are negative, or not below a size: a look-up would take another row
    in silence.
    """
    numbers = _numbers(array)
    if numbers is None or not numbers.size:
        return
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or (size and high >= size):
        raise DataError(f"{name}: {low if low < 0 else high} is outside {what}")


def require_tree(model: Any, params: Any) -> None:
    """Refuse parameters that no model could compute with, or of which a pretrained one would leave
    some out in silence.

    Args:
        model: any module.
        params: its tree, rewritten or not; abstract leaves will do.

    Raises:
        ConfigError: naming the first leaf.
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
                and key.isdecimal()
                and int(key) >= layers
            ):
                raise ConfigError(
                    f"{paths.text(path)}: the model has {layers} layers, and these are another"
                    " model's parameters"
                )
    # how it is computed changes no leaf
    options = dataclasses.replace(
        model.options, remat="none", attention="xla", offload=False, gathered=()
    )
    plain: Any = model.clone(options=options, source=None)  # pyright does not see that it hashes
    if why := _leaf_misfit(_own_leaves(plain), params):
        raise ConfigError(why)


def require_adapter(params: Mapping[str, Any], adapter: Any | None) -> None:
    """Refuse a number of an adapter that a bank has not: another would be taken in silence.

    Args:
        params: the tree of a pretrained model, a bank where there is a number.
        adapter: what `apply` was given.

    Raises:
        DataError: naming the number.
    """
    numbers = None if adapter is None else _array("adapter", adapter)
    if numbers is None:
        return
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise DataError(
            "adapter: must be the number of an adapter of the bank, or one a row, is"
            f" {show(adapter)}"
        )
    marked = ((path, leaf) for path, leaf in paths.walk(params) if path[-1] in MARKERS)
    count = next(
        (leaf.shape[int(paths.layer_axis(path) is not None)] for path, leaf in marked), None
    )
    _require_within("adapter", numbers, count, f"the bank of {count} adapters")


def find_misfit(
    model: Any, params: Mapping[str, Any], args: tuple[Any, ...], kw: Mapping[str, Any]
) -> str | None:
    """Return which leaf of the base is not the model's first, after a call that failed; None where
    all are, or none is known.

    Args:
        model: a Linen module.
        params: the tree that it was called with.
        args: what it was called with.
        kw: the same, by name.
    """
    key = jax.random.key(0)
    try:
        made = jax.eval_shape(lambda: model.init({"params": key, "dropout": key}, *args, **kw))
    except FAILURES:
        return None
    return _leaf_misfit(dict(paths.walk(made.get("params", {}))), params)


@lru_cache(maxsize=8)
def _own_leaves(model: Pretrained) -> Mapping[paths.Path, Any]:
    """Return the leaves that a pretrained model makes, abstract, by their paths."""
    return dict(paths.walk(abstract_params(model)))


def _leaf_misfit(wanted: Mapping[paths.Path, Any], params: Mapping[str, Any]) -> str | None:
    """Return which leaf is not the model's first: of another shape, missing, or one that a call
    would leave out in silence.

    Args:
        wanted: the model's leaves, by their paths.
        params: the tree that it is called with.
    """
    held = dict(paths.walk(params))
    for path, leaf in wanted.items():
        if path in held and held[path].shape != leaf.shape:
            return (
                f"{paths.text(path)}: has shape {list(held[path].shape)}, and the model has"
                f" {list(leaf.shape)} there{_OF_ANOTHER}"
            )
        if path not in held and not _is_stored_otherwise(params, path):
            inner = "; give what lies under 'params'" if set(params) == {"params"} else _OF_ANOTHER
            return (
                f"{paths.text(path)}: is not there, and the model has {list(leaf.shape)}"
                f" there{inner}"
            )
    modules = {path[:n] for path in wanted for n in range(len(path))}
    site = {name for method in METHODS.values() for name in method.leaves.names}
    root = {name for method in METHODS.values() for name in method.leaves.root}
    for path in [path for path in held if path not in wanted]:
        module, name = path[:-1], path[-1]
        stored = name in _FEW_BITS and (*module, "kernel") in wanted
        if not stored and not (module in modules and name in (site if module else root)):
            return (
                f"{paths.text(path)}: is no leaf of the model, which would compute without"
                f" it{_OF_ANOTHER}"
            )
    return None


def _is_stored_otherwise(params: Mapping[str, Any], path: paths.Path) -> bool:
    """Return whether a module holds its kernel quantized."""
    try:
        return path[-1] == "kernel" and kernels.is_quantized(paths.get(params, path[:-1]))
    except (KeyError, TypeError):
        return False
