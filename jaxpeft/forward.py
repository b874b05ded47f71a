"""Running a model on a parameter tree, adapters included: `apply`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpeft.core import nnx as nnx_trees
from jaxpeft.core.interception import Hooks, interceptor
from jaxpeft.errors import DataError
from jaxpeft.methods import MARKERS
from jaxpeft.models.base import Pretrained
from jaxpeft.quant import sites


def apply(
    model: Any,
    params: Mapping[str, Any],
    *args: Any,
    rngs: Mapping[str, jax.Array] | None = None,
    adapter: Any | None = None,
    **kw: Any,
) -> Any:
    """Runs a model with whatever adapter leaves its tree holds.

    Args:
        model: what `load` gave, or any Linen or NNX module.
        params: its parameters, rewritten or not.
        *args: of a model that `load` gave, `input_ids` and `attention_mask`, both `[batch, length]`: integer token ids, and 1
            for a token and 0 for padding; of another module whatever it is called with.
        rngs: `{"dropout": key}` makes this a training call; None computes without dropout.
        adapter: for a tree whose adapter leaves are a bank (`jaxpeft.bank`): the number of the adapter to compute with, or
            `[batch]`, one for each row.
        **kw: further inputs of the model, such as `token_type_ids`, `position_ids`, `segment_ids`; `variables`, other
            collections of another module, such as `batch_stats`; `mutable`, the names of collections to give beside the
            result; and, for another module, what else `flax.linen.Module.apply` takes.

    Returns:
        Logits, float32: `[batch, length, vocab]` (causal_lm), `[batch, num_labels]` (sequence_classification),
        `[batch, length, num_labels]` (token_classification); or hidden states `[batch, length, d]` (encoder).

    Raises:
        DataError: the shapes are not `[batch, length]`, or concrete token ids lie outside the vocabulary, which an
            embedding look-up would not notice.
        ConfigError: a module that holds adapter leaves is of a type that their method cannot adapt.
    """
    asked = {"mutable": kw.pop("mutable")} if "mutable" in kw else {}
    if isinstance(model, Pretrained):
        args, kw = _checked(model, args, kw)
    return run(model, params, *args, rngs=rngs, adapter=adapter, **asked, **kw)


def run(
    model: Any,
    params: Mapping[str, Any],
    *args: Any,
    rngs: Mapping[str, jax.Array] | None = None,
    adapter: Any | None = None,
    method: str | None = None,
    **kw: Any,
) -> Any:
    """Runs a model as `apply` does, on inputs that are not looked at.

    Args:
        model: as for `apply`.
        params: likewise.
        *args: likewise.
        rngs: likewise.
        adapter: likewise.
        method: of a Linen module, in place of `__call__`.
        **kw: likewise.
    """
    asked = {"mutable": kw.pop("mutable")} if "mutable" in kw else {}
    rows = None if adapter is None else jnp.asarray(adapter, jnp.int32)
    hooks = Hooks(
        {**sites.MARKERS, **MARKERS}, {key: leaf for key, leaf in params.items() if not isinstance(leaf, Mapping)}, rows
    )
    if isinstance(model, nnx.Module):
        return nnx_trees.run(model, params, hooks, (rngs or {}).get("dropout"), args, kw)
    with nn.intercept_methods(interceptor(hooks)):
        variables = {"params": params, **kw.pop("variables", {})}
        return model.apply(variables, *args, rngs=dict(rngs) if rngs else None, method=method, **asked, **kw)


def _checked(model: Pretrained, args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Checks the inputs of a pretrained model, and makes them arrays."""
    named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kw
    if len(args) > 2 or "input_ids" not in named:
        raise DataError(f"apply takes input_ids and an attention_mask, and others by name; {len(args)} were given")
    ids = _checked_ids(model, named.pop("input_ids"))
    mask = named.pop("attention_mask", None)
    first = (ids,) if mask is None else (ids, _checked_mask(mask, ids))
    return first, {name: _checked_input(model, name, value, ids) for name, value in named.items()}


def _checked_ids(model: nn.Module, input_ids: Any) -> Any:
    if isinstance(input_ids, jax.core.Tracer):
        return input_ids
    try:
        ids = np.asarray(input_ids)
    except ValueError:
        raise DataError("input_ids: the rows differ in length; pad them, and give an attention_mask") from None
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(
            f"input_ids: must be integers [batch, length], none of them 0, are {ids.dtype} {list(ids.shape)}"
        )
    vocab = getattr(getattr(model, "config", None), "vocab_size", None)
    low, high = int(ids.min()), int(ids.max())
    if vocab is not None and (low < 0 or high >= vocab):
        wrong = low if low < 0 else high
        raise DataError(f"input_ids: {wrong} is outside the vocabulary of {vocab}; is this the model's own tokenizer?")
    return input_ids if isinstance(input_ids, jax.Array) else jnp.asarray(ids, jnp.int32)


def _checked_mask(attention_mask: Any, ids: Any) -> Any:
    mask = attention_mask if isinstance(attention_mask, jax.Array) else jnp.asarray(np.asarray(attention_mask))
    if mask.shape != ids.shape:
        raise DataError(
            f"attention_mask: has shape {list(mask.shape)}, input_ids has {list(ids.shape)}; they must be equal"
        )
    return mask


def _checked_input(model: nn.Module, name: str, value: Any, ids: Any) -> Any:
    """Checks a further input: its shape, and that a look-up in its table would find something."""
    if value is None or isinstance(value, jax.core.Tracer):
        return value
    array = value if isinstance(value, jax.Array) else jnp.asarray(np.asarray(value))
    if array.ndim != 2 or array.shape[1] != ids.shape[1] or array.shape[0] not in (1, ids.shape[0]):
        raise DataError(f"{name}: has shape {list(array.shape)}, input_ids has {list(ids.shape)}; they must be equal")
    config = getattr(model, "config", None)
    # rotary positions come from no table
    sizes = {"token_type_ids": "type_vocab_size", "position_ids": "max_position_embeddings"}
    size = getattr(config, sizes.get(name, ""), None) if hasattr(config, "type_vocab_size") else None
    low, high = (int(array.min()), int(array.max())) if name in sizes and array.size else (0, 0)
    if low < 0 or (size and high >= size):
        raise DataError(f"{name}: {low if low < 0 else high} is outside the model's table of {size or 'none'}")
    return array
