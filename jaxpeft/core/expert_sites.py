r"""Computing linear modules of experts with adapters.

Such a module has one kernel for each expert, and its rows are sorted by expert. An adapter has one
set of leaves for each expert. A low-rank update is computed beside the kernels,

    y_i = x_i W_e + x_i A_e B_e + b_e,

where `e` is the expert of row `i`. If a module has any other adapter, all of its adapters are
folded into its kernels, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import kernels
from jaxpeft.core.method import Method
from jaxpeft.core.specs import Computation
from jaxpeft.errors import ConfigError
from jaxpeft.kernels import grouped

Leaves = Mapping[str, Any]
GROUPED = "grouped"
"""The method of a linear module of experts, with the arguments `x`, `sizes`, `over` of `compute`.
"""
Over = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Lifts `(x [rows, in], sizes [experts], leaves) -> [rows, out]` to `x` and `sizes` of shards."""


def adapts_experts(method: Any) -> bool:
    """Return whether a method can adapt the linear modules of experts."""
    folds = getattr(method, "fold", Method.fold) is not Method.fold
    return folds and "__call__" in method.sites.hooks and "linear" in method.sites.kinds


def compute(
    leaves: Leaves, root: Leaves, methods: Sequence[Computation], x: Any, sizes: Any, over: Over
) -> Any:
    """Compute a linear module of experts with the adapters in its leaves.

    Args:
        leaves: the module's own leaves, with a leading expert axis.
        root: the leaves at the root of the tree.
        methods: the methods of its adapters, in the order in which they compute.
        x: `[shards, rows, in]`, each shard sorted by expert.
        sizes: `[shards, experts]` int32, the number of rows of each expert.
        over: computes the products of all shards.
    """
    form = kernels.form_of(leaves) or "kernel"
    stored = {name: leaves[name] for name in kernels.FORMS[form].leaves}
    factors = [_factors(method, leaves) for method in methods]
    low_rank = [own for own in factors if own is not None]
    bias = {key: leaves[key] for key in ("bias",) if key in leaves}
    if len(low_rank) < len(methods):
        low_rank, original = [], jax.vmap(kernels.FORMS[form].read)(stored).astype(jnp.float32)
        base = {"kernel": original, **{key: leaf.astype(jnp.float32) for key, leaf in bias.items()}}
        for method in methods:
            base = _fold(method, leaves, root, base, original)
        stored = {"kernel": base.pop("kernel")}
        bias = base

    def products(
        x: Any, sizes: Any, stored: Leaves, bias: Leaves, low_rank: Sequence[tuple[Any, Any]]
    ) -> Any:
        y = grouped.stored_product(x, stored, sizes)
        for a, b in low_rank:
            y = y + grouped.product(grouped.product(x, a, sizes), b, sizes)
        return grouped.add(y, bias["bias"], sizes) if bias else y

    return over(products)(x, sizes, stored, bias, low_rank)


def _factors(method: Computation, leaves: Leaves) -> tuple[Any, Any] | None:
    """Return the factors `A [experts, in, r]` and `B [experts, r, out]`; None without them."""
    low_rank = method.sites.low_rank
    if method.leaves.names[-1] in leaves:
        return None
    return jax.vmap(lambda own: low_rank(own, False))(_own(method, leaves))


def _own(method: Computation, leaves: Leaves) -> dict[str, Any]:
    return {name: leaves[name] for name in method.leaves.site if name in leaves}


def _fold(
    method: Any, leaves: Leaves, root: Leaves, before: Leaves, original_kernels: Any
) -> dict[str, Any]:
    """Return the kernels `[experts, in, out]` and biases, float32, with an adapter folded in.

    `original_kernels` are the kernels without adapters, which some methods compute with.
    """
    on = leaves.get(method.leaves.names[-1])
    shared = {name: root[name] for name in method.leaves.root if name in root}
    first = before["kernel"] is original_kernels

    def one(own: Leaves, before: Leaves, original: Any) -> Any:
        base = {**before, **({} if first else {"original": original})}
        folded = {**base, **method.fold({**shared, **own}, base)}
        if folded.keys() - {*before, "original"}:
            raise ConfigError(
                f"{method.name}: the linear modules of experts have no bias; exclude them"
            )
        return {key: folded[key] for key in before}

    after = jax.vmap(one)(_own(method, leaves), before, original_kernels)
    if on is None:
        return after
    return {
        key: jnp.where(on.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, before[key])
        for key, leaf in after.items()
    }
