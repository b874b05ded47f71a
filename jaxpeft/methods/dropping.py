"""Dropout of an update or its input in a training call, with rates from leaves of the site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxpeft.core.method import Call
from jaxpeft.lazy import jax, jnp

if TYPE_CHECKING:
    from jax import Array


def leaves(name: str, rank_dropout: float, module_dropout: float) -> dict[str, Array]:
    """Return the leaves of the nonzero rates.

    Args:
        name: name of the method.
        rank_dropout: probability of dropping an output of the update.
        module_dropout: probability of dropping the entire update.
    """
    rates = {f"{name}_rank_dropout": rank_dropout, f"{name}_module_dropout": module_dropout}
    return {key: jnp.asarray(rate, jnp.float32) for key, rate in rates.items() if rate}


def drop_update(call: Call, name: str, update: Array, *, scaled: bool) -> Array:
    """Apply dropout to the update of a site in a training call.

    Args:
        call: call of the site.
        name: name of the method.
        update: `[..., out]`.
        scaled: whether to scale up the remaining outputs.
    """
    module, outputs = rate(call, f"{name}_module_dropout"), rate(call, f"{name}_rank_dropout")
    if outputs is not None:
        stay = jax.random.bernoulli(outputs[0], 1 - outputs[1], update.shape[-1:]).astype(
            jnp.float32
        )
        stay = stay / jnp.maximum(jnp.mean(stay), 1 / stay.size) if scaled else stay
        update = update * stay.astype(update.dtype)
    if module is not None:
        update = jnp.where(
            jax.random.bernoulli(module[0], 1 - module[1]), update, jnp.zeros_like(update)
        )
    return update


def rate(call: Call, leaf: str) -> tuple[Any, Any] | None:
    """Return a key and the rate of a leaf; None without dropout.

    Args:
        call: call of a site.
        leaf: name of the leaf with the rate.
    """
    if leaf not in call.leaves or call.dropout_key is None:
        return None
    return call.dropout_key(), jnp.max(call.leaves[leaf])


def drop_input(call: Call, x: Any, leaf: str) -> Any:
    """Apply dropout to `x` in a training call, at the rate of a leaf if it exists."""
    drawn = rate(call, leaf)
    return x if drawn is None else dropout(*drawn, x)


def dropout(key: Array, rate: Array, x: Array) -> Array:
    """Zero each element with probability `rate`, and scale the rest by 1 / (1 - rate).

    Args:
        key: a key.
        rate: scalar, below 1.
        x: any shape, floating; the result has its shape and dtype.
    """
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), jnp.zeros((), x.dtype))
