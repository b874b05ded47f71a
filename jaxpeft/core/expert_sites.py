r"""Computing linear modules of experts with adapters.

Such a module has one kernel for each expert, and its rows are sorted by expert. An adapter has one
set of leaves for each expert. A low-rank update is computed beside the kernels,

    y_i = x_i W_e + x_i A_e B_e,

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
    if len(low_rank) < len(methods):
        low_rank, original = [], jax.vmap(kernels.FORMS[form].read)(stored).astype(jnp.float32)
        kernel = original
        for method in methods:
            kernel = _fold(method, leaves, root, kernel, original)
        stored = {"kernel": kernel}

    def products(x: Any, sizes: Any, stored: Leaves, low_rank: Sequence[tuple[Any, Any]]) -> Any:
        y = grouped.stored_product(x, stored, sizes)
        for a, b in low_rank:
            y = y + grouped.product(grouped.product(x, a, sizes), b, sizes)
        return y

    return over(products)(x, sizes, stored, low_rank)


def _factors(method: Computation, leaves: Leaves) -> tuple[Any, Any] | None:
    """Return the factors `A [experts, in, r]` and `B [experts, r, out]`; None without them."""
    low_rank = method.sites.low_rank
    if method.leaves.names[-1] in leaves:
        return None
    return jax.vmap(lambda own: low_rank(own, False))(_own(method, leaves))


def _own(method: Computation, leaves: Leaves) -> dict[str, Any]:
    return {name: leaves[name] for name in method.leaves.site if name in leaves}


def _fold(method: Any, leaves: Leaves, root: Leaves, before: Any, original_kernels: Any) -> Any:
    """Return the kernels `[experts, in, out]`, float32, with an adapter folded in.

    `original_kernels` are the kernels without adapters, which some methods compute with.
    """
    on = leaves.get(method.leaves.names[-1])
    shared = {name: root[name] for name in method.leaves.root if name in root}

    def one(own: Leaves, kernel: Any, original: Any) -> Any:
        base = (
            {"kernel": kernel}
            if before is original_kernels
            else {"kernel": kernel, "original": original}
        )
        folded = method.fold({**shared, **own}, base)
        if folded.keys() - {"kernel", "original"}:
            raise ConfigError(
                f"{method.name}: the linear modules of experts have no bias; exclude them"
            )
        return folded["kernel"]

    after = jax.vmap(one)(_own(method, leaves), before, original_kernels)
    return after if on is None else jnp.where(on[:, None, None], after, before)
