"""Running a model on a parameter tree, adapters included: `apply`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft import inputs
from jaxpeft.core import nnx as nnx_trees
from jaxpeft.core.interception import Hooks, interceptor
from jaxpeft.errors import ConfigError, JaxpeftError
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
    """Run a model with whatever adapter leaves its tree holds.

    Args:
        model: what `load` gave, or any Linen or NNX module.
        params: its parameters, rewritten or not.
        *args: of a model that `load` gave, `input_ids` and `attention_mask`, both `[batch,
            length]`: integer token ids, and 1 for a token and 0 for padding; of another module
            whatever it is called with.
        rngs: `{"dropout": key}` makes this a training call; None computes without dropout.
        adapter: for a tree whose adapter leaves are a bank (`jaxpeft.bank`): the number of the
            adapter to compute with, or `[batch]`, one for each row.
        **kw: further inputs of the model, such as `token_type_ids`, `position_ids`, `segment_ids`;
            `variables`, other collections of another module, such as `batch_stats`; `mutable`, the
            names of collections to give beside the result; and, for another module, what else
            `flax.linen.Module.apply` takes.

    Returns:
        Logits, float32: `[batch, length, vocab]` (causal_lm), `[batch, num_labels]`
            (sequence_classification),
        `[batch, length, num_labels]` (token_classification); or hidden states `[batch, length, d]`
        (encoder).

    Raises:
        DataError: the shapes are not `[batch, length]`, token ids lie outside the vocabulary, which
            an embedding look-up would not notice, or a mask holds anything but 0 and 1. Of traced
            arrays shapes and dtypes alone are checked.
        ConfigError: a leaf of the parameters is not the model's, or no array of floats; or a module
            that holds adapter leaves is of a type that their method cannot adapt.
    """
    asked = {"mutable": kw.pop("mutable")} if "mutable" in kw else {}
    inputs.require_tree(model, params)
    if isinstance(model, Pretrained):
        args, kw = inputs.check_inputs(model, args, kw)
        inputs.require_adapter(params, adapter)
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
    """Run a model as `apply` does, on inputs that are not looked at.

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
        {**sites.MARKERS, **MARKERS},
        {key: leaf for key, leaf in params.items() if not isinstance(leaf, Mapping)},
        rows,
    )
    if isinstance(model, nnx.Module):
        return nnx_trees.run(model, params, hooks, (rngs or {}).get("dropout"), args, kw)
    variables = {"params": params, **kw.pop("variables", {})}
    try:
        with nn.intercept_methods(interceptor(hooks)):
            return model.apply(
                variables, *args, rngs=dict(rngs) if rngs else None, method=method, **asked, **kw
            )
    except JaxpeftError:
        raise
    except inputs.FAILURES as error:
        if why := inputs.find_misfit(model, params, args, kw):
            raise ConfigError(why) from error
        raise
