"""Running a model on a parameter tree, adapters included: `apply`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.core
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
        input_ids: `[batch, length]`, integer token ids.
        attention_mask: `[batch, length]`, 1 for a token and 0 for padding; None for no padding.
        rngs: `{"dropout": key}` makes this a training call; None computes without dropout.
        **kw: further inputs of the model, such as `token_type_ids`, `position_ids`, `segment_ids`.

    Returns:
        Logits, float32: `[batch, length, vocab]` (causal_lm), `[batch, num_labels]` (sequence_classification),
        `[batch, length, num_labels]` (token_classification); or hidden states `[batch, length, d]` (encoder).

    Raises:
        DataError: concrete token ids lie outside the vocabulary, which an embedding look-up would not notice.
    """
    _check_ids(model, input_ids)
    arguments = (input_ids,) if attention_mask is None else (input_ids, attention_mask)
    with nn.intercept_methods(_intercept):
        return model.apply({"params": params}, *arguments, rngs=dict(rngs) if rngs else None, **kw)


def _check_ids(model: nn.Module, input_ids: Any) -> None:
    vocab = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab is None or isinstance(input_ids, jax.core.Tracer) or np.size(input_ids) == 0:
        return
    ids = np.asarray(input_ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"input_ids: must be integers, are {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise DataError(f"input_ids: {wrong} is outside the vocabulary of {vocab}; is this the model's own tokenizer?")
