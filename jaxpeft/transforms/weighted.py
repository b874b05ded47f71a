"""Weighted merges of LoRA adapters into one LoRA adapter.

At each site, the updates `s_i A_i B_i` of the adapters are combined with weights `w_i`:

* `linear`: the factors separately, `A = sum sign(w_i s_i) sqrt|w_i s_i| A_i`,
  `B = sum sqrt|w_i s_i| B_i`; an approximation, which needs equal ranks;
* `cat`: `A = [w_1 s_1 A_1 | w_2 s_2 A_2 | ...]`, with all `B` stacked; exact, but the ranks add up;
* `svd`: the best rank-r approximation of `sum w_i s_i A_i B_i`;
* `ties`: only the largest entries of each are kept, a sign is elected for each entry, and the
  entries with that sign are averaged (Yadav et al. 2023, "TIES-Merging", section 4,
  arXiv:2306.01708);
* `dare_linear`, `dare_ties`: entries are first dropped at random and the rest scaled up (Yu et
  al. 2023, "Language Models are Super Mario", section 3, arXiv:2311.03099); `magnitude_prune`: the
  smallest entries are dropped;
* with `_svd`: the same on the full updates instead of the factors, followed by `svd`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.core.bank import require_same_base
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import chosen_sites, layer_of, without_adapter
from jaxpeft.errors import ConfigError
from jaxpeft.methods.lora import LoRA
from jaxpeft.transforms.rewrite import rewrite

How = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
Array = jax.Array


def merge_adapters(
    adapters: Sequence[tuple[LoRA, Mapping[str, Any]]],
    weights: Sequence[float],
    how: How = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    sign: Literal["total", "frequency"] = "total",
    rng: Array | None = None,
) -> tuple[LoRA, Tree]:
    """Merge LoRA adapters of one base into one adapter.

    Args:
        adapters: a `(method, params)` pair for each adapter.
        weights: one weight per adapter; a negative weight subtracts its effect.
        how: how to merge, see the module's docstring.
        rank: rank of the result, with `svd`; None for the largest of the adapters' ranks.
        density: fraction of entries to keep, for merges that drop entries.
        sign: whether to elect signs by the sum of the entries or by their number.
        rng: a key, for merges that drop entries at random.

    Returns:
        `(method, params)`, with scaling 1 at every site.

    Raises:
        ConfigError: An adapter is not LoRA, the ranks do not fit, or an argument is missing or out
            of range.
    """
    _check(adapters, weights, how, density, rng)
    found = [_sites(method, params) for method, params in adapters]
    names = list(dict.fromkeys(name for sites in found for name in sites))
    merged: dict[str, tuple[Array, Array]] = {}
    most = rank or max(a.shape[1] for sites in found for a, _, _ in sites.values())
    for i, name in enumerate(names):
        held = [(sites[name], w) for sites, w in zip(found, weights, strict=True) if name in sites]
        key = None if rng is None else jax.random.fold_in(rng, i)
        merged[name] = _merge(
            [h for h, _ in held], [w for _, w in held], how, most, density or 1.0, sign, key
        )
    top = max(a.shape[1] for a, _ in merged.values())
    ranks = {re.escape(name): a.shape[1] for name, (a, _) in merged.items() if a.shape[1] != top}
    alphas = {name: float(r) for name, r in ranks.items()}
    method = LoRA(
        rank=top, alpha=float(top), targets=tuple(names), rank_pattern=ranks, alpha_pattern=alphas
    )
    first, params = adapters[0]
    tree = rewrite(method, without_adapter(first, params), jax.random.key(0))
    for site, on in chosen_sites(method, tree).items():
        node = paths.get(tree, site.path)
        for i, name in enumerate(site.names):
            if on[i]:
                a, b = merged[name]
                at = site.index(i)
                node["lora_a"] = node["lora_a"].at[(*at, slice(None), slice(0, a.shape[1]))].set(a)
                node["lora_b"] = node["lora_b"].at[(*at, slice(0, b.shape[0]))].set(b)
    return method, tree


def _check(
    adapters: Sequence[tuple[LoRA, Any]],
    weights: Sequence[float],
    how: str,
    density: float | None,
    rng: Array | None,
) -> None:
    problems: list[str] = []
    if how not in get_args(How):
        problems.append(f"how: must be one of {', '.join(get_args(How))}, is {how!r}")
    if not adapters or len(weights) != len(adapters):
        problems.append(f"weights: {len(weights)} for {len(adapters)} adapters; pass one for each")
    others = [method.name for method, _ in adapters if type(method) is not LoRA]
    if others:
        problems.append(f"adapters: only LoRA adapters can be merged with weights, not {others[0]}")
    if any(getattr(method, "lora_bias", False) for method, _ in adapters):
        problems.append(
            "adapters: one of them trains lora_bias, which a weighted merge does not support"
        )
    drops = how.split("_")[0] in ("ties", "dare", "magnitude")
    if drops and (density is None or not 0 < density <= 1):
        problems.append(f"density: must be above 0 and at most 1 for {how}, is {density}")
    if how.startswith("dare") and rng is None:
        problems.append(f"rng: {how} drops entries at random; pass a key")
    if problems:
        raise ConfigError([f"merge_adapters: {problem}" for problem in problems])
    require_same_base(adapters)


def _sites(method: LoRA, params: Mapping[str, Any]) -> dict[str, tuple[Array, Array, float]]:
    """Return `(A [in, r], B [r, out], s)` of each adapted site and layer, including a subtracted
    initialization.
    """
    out: dict[str, tuple[Array, Array, float]] = {}
    for site, on in chosen_sites(method, params).items():
        for i, name in enumerate(site.names):
            if on[i]:
                leaves = layer_of(site, paths.get(params, site.path), i)
                r = method.site_rank(name)
                a, b = leaves["lora_a"][:, :r], leaves["lora_b"][:r]
                if "lora_a0" in leaves:
                    a = jnp.concatenate([a, leaves["lora_a0"][:, :r]], axis=1)
                    b = jnp.concatenate([b, -leaves["lora_b0"][:r]])
                out[name] = a, b, method.site_scale(name)
    return out


def _merge(
    held: Sequence[tuple[Array, Array, float]],
    weights: Sequence[float],
    how: str,
    rank: int,
    density: float,
    sign: str,
    key: Array | None,
) -> tuple[Array, Array]:
    """Merge the updates of one site; return A and B."""
    if how == "cat":
        return (
            jnp.concatenate(
                [w * s * a for (a, _, s), w in zip(held, weights, strict=True)], axis=1
            ),
            jnp.concatenate([b for _, b, _ in held]),
        )
    kind = how.removesuffix("_svd")
    if how == "svd" or how.endswith("_svd"):
        updates = [s * jnp.matmul(a, b, precision="highest") for a, b, s in held]
        total = _combine(updates, weights, "linear" if how == "svd" else kind, density, sign, key)
        u, values, v = jnp.linalg.svd(total, full_matrices=False)
        return u[:, :rank], values[:rank, None] * v[:rank]
    ranks = {a.shape[1] for a, _, _ in held}
    if len(ranks) > 1:
        raise ConfigError(
            f"merge_adapters: {how} needs equal ranks, but they are"
            f" {' and '.join(map(str, sorted(ranks)))}; use svd or cat"
        )
    roots = [math.sqrt(abs(w * s)) for (_, _, s), w in zip(held, weights, strict=True)]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
    keys = (None, None) if key is None else jax.random.split(key)
    return (
        _combine([a for a, _, _ in held], signed, kind, density, sign, keys[0]),
        _combine([b for _, b, _ in held], roots, kind, density, sign, keys[1]),
    )


def _combine(
    tensors: Sequence[Array],
    weights: Sequence[float],
    kind: str,
    density: float,
    sign: str,
    key: Array | None,
) -> Array:
    """Combine tensors of one shape with weights, according to `kind`."""
    stacked = jnp.stack(tensors)
    if kind.startswith("dare") and key is not None:
        stacked = jnp.where(
            jax.random.bernoulli(key, density, stacked.shape), stacked / density, 0.0
        )
    elif kind != "linear":
        stacked = jnp.stack([_keep_largest(tensor, density) for tensor in stacked])
    weighted = stacked * jnp.asarray(weights, jnp.float32).reshape(-1, *(1,) * tensors[0].ndim)
    if not kind.endswith("ties"):
        return weighted.sum(0)
    votes = stacked if sign == "total" else jnp.sign(stacked)
    elected = jnp.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = jnp.sign(stacked) == elected
    return jnp.where(agree, weighted, 0.0).sum(0) / jnp.maximum(agree.sum(0), 1).astype(jnp.float32)


def _keep_largest(tensor: Array, density: float) -> Array:
    """Keep the fraction `density` of the largest entries, and set the rest to zero."""
    kept = int(density * tensor.size)
    flat = tensor.reshape(-1)
    chosen = jnp.argsort(-jnp.abs(flat), stable=True)[:kept]
    return jnp.zeros_like(flat).at[chosen].set(flat[chosen]).reshape(tensor.shape)
