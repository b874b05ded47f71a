"""Adapters of different ranks in the same compiled program.

Parameters are arguments of compiled programs, so that a tree with another adapter runs in the same
program if all of its leaves have the same shapes. The scaling is a leaf, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.rewriting import adapter_names, add_adapter, without_adapter
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError, show


def pad_rank(
    method: Method, params: Mapping[str, Any], rank: int, *, sites: Sequence[Site] | None = None
) -> Tree:
    """Pad an adapter with zeros to a rank, without changing what it computes.

    Adapters of one base that are padded to the same rank run in the same compiled program, as long
    as they have the same targets and kinds of leaves:

        params = jaxpeft.pad_rank(method, params, 64)

    The result is for inference: save, merge or train the tree that was given, whose rank is that of
    the method.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.
        rank: rank of all sites in the result, at least that of each site.
        sites: the sites given to `rewrite` for a model that is not jaxpeft's own.

    Returns:
        The tree with padded adapter leaves; all other leaves are those of `params`.

    Raises:
        ConfigError: The method's leaves cannot be padded, the tree is not the method's, or a site
            has a higher rank.
    """
    wide = _with_rank(method, rank)
    base = without_adapter(method, params)
    key = jax.random.key(0)
    shapes = dict(
        paths.walk(jax.eval_shape(partial(add_adapter, wide, rng=key, sites=sites), base))
    )
    names = adapter_names(method)
    known = {path for path in shapes if path[-1] in names}
    own = {path for path, _ in paths.walk(params) if path[-1] in names}
    odd = sorted(known ^ own)
    if odd:
        raise ConfigError(
            f"pad_rank: {paths.text(odd[0])} is a leaf of"
            f" {'the tree' if odd[0] in own else 'the method'} only; give the method that the tree"
            " was rewritten or loaded with"
        )

    def one(path: Path, leaf: Any) -> Any:
        return _pad(leaf, shapes[path].shape, path, rank) if path in known else leaf

    return paths.map_with_path(one, params)


def _with_rank(method: Method, rank: int) -> Method:
    """Return the method with one rank at all sites.

    Raises:
        ConfigError: The rank is invalid, or two adapters of the method do not differ only in rank.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"pad_rank: rank must be a whole number of at least 1, is {show(rank)}")
    if not (method.leaves.rank_pads and hasattr(method, "rank_pattern")):
        raise ConfigError(
            f"pad_rank: adapters of {method.name} cannot be padded to another rank; give all"
            " adapters the same options instead"
        )
    changes: dict[str, Any] = {"rank": rank, "rank_pattern": {}}
    return dataclasses.replace(method, **changes)


def _pad(leaf: Any, shape: tuple[int, ...], path: Path, rank: int) -> Any:
    if shape == leaf.shape:
        return leaf
    if any(n < m for n, m in zip(shape, leaf.shape, strict=True)):
        raise ConfigError(
            f"pad_rank: {paths.text(path)} has the shape {list(leaf.shape)}, of a rank above"
            f" {rank}; pad to the highest rank of all adapters"
        )
    return jnp.pad(leaf, [(0, n - m) for n, m in zip(shape, leaf.shape, strict=True)])
