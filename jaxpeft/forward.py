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
    with nn.intercept_methods(_intercept):
        return model.apply({"params": params}, *arguments, rngs=dict(rngs) if rngs else None, **kw)


def _checked_ids(model: nn.Module, input_ids: Any) -> Any:
    if isinstance(input_ids, jax.core.Tracer):
        return input_ids
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"input_ids: must be integers [batch, length], are {ids.dtype} {list(ids.shape)}")
    vocab = getattr(getattr(model, "config", None), "vocab_size", None)
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
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
