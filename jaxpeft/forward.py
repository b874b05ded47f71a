"""Run a model on a parameter tree, including adapters: `apply`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
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
    """Run a model with the adapters in its parameter tree.

    Args:
        model: a model from `load`, or any Linen or NNX module.
        params: its parameters, with or without adapters.
        *args: for a model from `load`, `input_ids` and `attention_mask`, both `[batch, length]`:
            integer token ids, and 1 for a token or 0 for padding; for another module, its
            arguments.
        rngs: `{"dropout": key}` for a training call; None computes without dropout.
        adapter: for an adapter stack (`jaxpeft.bank`), the index of the adapter to use, or
            `[batch]`, one index per row.
        **kw: further inputs of the model, such as `token_type_ids`, `position_ids`, `segment_ids`;
            for another module, `variables`, other collections such as `batch_stats`, `mutable`,
            the collections to return with the result, and other arguments of
            `flax.linen.Module.apply`.

    Returns:
        Logits, float32: `[batch, length, vocab]` (causal_lm), `[batch, num_labels]`
        (sequence_classification), `[batch, length, num_labels]` (token_classification); or hidden
        states `[batch, length, d]` (encoder).

    Raises:
        DataError: the shapes are not `[batch, length]`, token ids are outside the vocabulary (which
            an embedding look-up would not notice), or a mask contains values other than 0 and 1.
            Only shapes and dtypes of traced arrays are checked.
        ConfigError: a leaf of the parameters does not belong to the model, or is not a float array;
            or a module with adapter leaves has a type that their method cannot adapt.
    """
    options = {"mutable": kw.pop("mutable")} if "mutable" in kw else {}
    inputs.require_tree(model, params)
    if isinstance(model, Pretrained):
        args, kw = inputs.check_inputs(model, args, kw)
        inputs.require_adapter(params, adapter)
    return run(model, params, *args, rngs=rngs, adapter=adapter, **options, **kw)


def run(
    model: Any,
    params: Mapping[str, Any],
    *args: Any,
    rngs: Mapping[str, jax.Array] | None = None,
    adapter: Any | None = None,
    method: str | None = None,
    **kw: Any,
) -> Any:
    """Run a model like `apply`, without checking the inputs.

    Args:
        model: see `apply`.
        params: see `apply`.
        *args: see `apply`.
        rngs: see `apply`.
        adapter: see `apply`.
        method: method of a Linen module to call instead of `__call__`.
        **kw: see `apply`.
    """
    options = {"mutable": kw.pop("mutable")} if "mutable" in kw else {}
    rows = None if adapter is None else jnp.asarray(adapter, jnp.int32)
    hooks = Hooks(
        {**sites.MARKERS, **MARKERS},
        {key: leaf for key, leaf in params.items() if not isinstance(leaf, Mapping)},
        rows,
    )
    if isinstance(model, nnx.Module):
        return nnx_trees.run(model, params, hooks, (rngs or {}).get("dropout"), args, kw)
    variables = {"params": params, **kw.pop("variables", {})}

    def compute(hooks: Hooks) -> Any:
        with nn.intercept_methods(interceptor(hooks)):
            return model.apply(
                variables, *args, rngs=dict(rngs) if rngs else None, method=method, **options, **kw
            )

    try:
        return compute(hooks)
    except JaxpeftError:
        raise
    except inputs.FAILURES as error:
        if rows is None and _computes(partial(compute, replace(hooks, rows=jnp.int32(0)))):
            raise ConfigError(
                "adapter: the parameters are an adapter stack (jaxpeft.bank), so the adapter must"
                " be selected; pass adapter=i, or one index for each row"
            ) from error
        if why := inputs.find_misfit(model, params, args, kw):
            raise ConfigError(why) from error
        raise


def _computes(compute: Callable[[], Any]) -> bool:
    """Return whether a function of arrays computes, without running it."""
    try:
        jax.eval_shape(compute)
    except (JaxpeftError, *inputs.FAILURES):
        return False
    return True
