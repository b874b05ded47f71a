"""Running a model on a parameter tree, adapters included: `apply`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxpeft.core.interception import interceptor
from jaxpeft.errors import DataError
from jaxpeft.methods import COMPUTES

_intercept = interceptor(COMPUTES)


def apply(
    model: nn.Module,
    params: Mapping[str, Any],
    input_ids: Any,
    attention_mask: Any | None = None,
    *,
    rngs: Mapping[str, jax.Array] | None = None,
    **kw: Any,
) -> Any:
    """Runs a model with whatever adapter leaves its tree holds.

    Args:
        model: what `load` gave.
        params: its parameters, rewritten or not.
        input_ids: `[batch, length]`, integer token ids; an array or nested lists.
        attention_mask: `[batch, length]`, 1 for a token and 0 for padding; None for no padding.
        rngs: `{"dropout": key}` makes this a training call; None computes without dropout.
        **kw: further inputs of the model, such as `token_type_ids`, `position_ids`, `segment_ids`.

    Returns:
        Logits, float32: `[batch, length, vocab]` (causal_lm), `[batch, num_labels]` (sequence_classification),
        `[batch, length, num_labels]` (token_classification); or hidden states `[batch, length, d]` (encoder).

    Raises:
        DataError: the shapes are not `[batch, length]`, or concrete token ids lie outside the vocabulary, which an
            embedding look-up would not notice.
    """
    ids = _checked_ids(model, input_ids)
    arguments = (ids,) if attention_mask is None else (ids, _checked_mask(attention_mask, ids))
    kw = {name: _checked_input(model, name, value, ids) for name, value in kw.items()}
    with nn.intercept_methods(_intercept):
        return model.apply({"params": params}, *arguments, rngs=dict(rngs) if rngs else None, **kw)


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
