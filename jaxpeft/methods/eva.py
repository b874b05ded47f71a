"""EVA: A is initialized to the directions of largest variance of a site's inputs, and ranks are
allocated by explained variance.

For each site the inputs `X [tokens, in]` of the first batches are reduced to their leading right
singular vectors, each batch merged into those before it (incremental SVD). `A` takes the first of
them; `B` stays zero. The total rank, `rank` times the number of sites, is given to the directions
that explain the largest shares of their site's variance, at most `eva_rho * rank` to one site; the
scaling of each site does not change, and a site without rank is not adapted.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance
Adaptation", section 3 and algorithm 1 (arXiv:2410.07170).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpeft.core.method import Leaves, Method
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jnp

if TYPE_CHECKING:
    from jaxpeft.methods.lora import LoRA


def start(method: LoRA, params: Leaves, run: Any) -> tuple[Method, Leaves]:
    """Allocate the ranks and initialize A.

    Args:
        method: LoRA with `init_weights="eva"`.
        params: the base, rewritten with it.
        run: model, base and batches: a `jaxpeft.train.data_start.Start`.

    Returns:
        `(method, params)`: a plain LoRA with these ranks, and the tree with these A.

    Raises:
        ConfigError: There are no batches, or it adapts experts, which see different inputs.
    """
    from jaxpeft.core import paths
    from jaxpeft.core.rewriting import chosen_sites

    experts = next((site.name for site in chosen_sites(method, params) if site.experts), None)
    if experts is not None:
        raise ConfigError(
            "method.init_weights: 'eva' cannot initialize the adapters of experts; exclude them,"
            f" such as {experts}, or choose another initialization"
        )
    most = max(1, round(method.eva_rho * method.rank))

    def update(state: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _merge(state and state[name], x, most) for name, x in inputs.items()}

    found = run.over_inputs(params, method.leaves.site[0], update, method.eva_batches)
    if not found:
        raise ConfigError(
            "method.init_weights: 'eva' needs training batches, but there are none; choose another"
            " initialization"
        )
    ranks = _ranks(
        {name: np.asarray(values) for name, (values, _) in found.items()}, method.rank * len(found)
    )
    ranked = _with_ranks(method, ranks)
    rewritten = run.rewrite(ranked)
    for site, on in chosen_sites(ranked, rewritten).items():
        node = paths.get(rewritten, site.path)
        a = node[method.leaves.site[0]]
        for i, name in enumerate(site.names):
            if on[i]:
                index = (*site.index(i), slice(None), slice(0, ranks[name]))
                a = a.at[index].set(found[name][1][: ranks[name]].T)
        node[method.leaves.site[0]] = a
    return ranked, rewritten


def _merge(before: Any, rows: Any, most: int) -> tuple[Any, Any]:
    """Update the variances `[k]` and directions `[k, in]` with rows `[tokens, in]`."""
    stacked = (
        rows
        if before is None
        else jnp.concatenate([jnp.sqrt(before[0])[:, None] * before[1], rows])
    )
    _, values, directions = jnp.linalg.svd(stacked, full_matrices=False)
    return jnp.square(values[:most]), directions[:most]


def _ranks(variances: Mapping[str, Any], total: int) -> dict[str, int]:
    """Return the rank of each site, from the `total` directions with the largest shares of
    variance.
    """
    shares = [
        (float(value / values.sum()), name)
        for name, values in variances.items()
        for value in values
    ]
    chosen = [name for _, name in sorted(shares, key=lambda pair: -pair[0])[:total]]
    return {name: rank for name in variances if (rank := chosen.count(name))}


def _with_ranks(method: LoRA, ranks: Mapping[str, int]) -> LoRA:
    """Return the plain LoRA with these ranks at these sites, and unchanged scalings."""

    def alpha(name: str, rank: int) -> float:
        return method.site_scale(name) * (math.sqrt(rank) if method.rslora else rank)

    return dataclasses.replace(
        method,
        targets=tuple(ranks),
        exclude=(),
        layers_to_transform=None,
        layers_pattern=(),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        alpha_pattern={re.escape(name): alpha(name, rank) for name, rank in ranks.items()},
        init_weights="default",
        eva_batches=8,
        eva_rho=2.0,
    )
