"""`jaxpeft.rewrite`: inject the adapters of a method into a parameter tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import (
    add_adapter,
    require_numbers,
)
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError, show
from jaxpeft.methods import MARKERS


def rewrite(
    method: Method,
    params: Mapping[str, Any],
    rng: jax.Array,
    *,
    sites: Sequence[Site] | None = None,
) -> Tree:
    """Inject adapters: add the method's leaves to a tree, and cast trainable leaves to float32.

    A leaf depends only on `rng` and its site's Hugging Face name, so scanned and unrolled layers
    have the same initial values. If a stacked site is adapted only in some layers, or with
    different shapes, the padding is exactly zero and stays zero in training.

    Args:
        method: the method.
        params: the base; only trainable leaves that are not yet float32 are copied.
        rng: a key.
        sites: sites of a model that is not jaxpeft's own, from `jaxpeft.find_sites`; None to find
            them in the tree.

    Raises:
        TargetError: The targets match no sites of this model.
        ConfigError: The tree is already rewritten, a leaf is not a numeric array, nothing would be
            trained, only some layers of a stacked bias would be trained, or `rng` is not a key.
    """
    require_numbers(params)
    _require_key(rng)
    require_plain(method, params)
    return add_adapter(method, params, rng, sites)


def _require_key(rng: Any) -> None:
    """Raise an error unless `rng` is one key of `jax.random`, typed or raw.

    Raises:
        ConfigError: It is not a key.
    """
    typed = isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    plain = isinstance(rng, jax.Array | np.ndarray) and rng.dtype == np.uint32
    if not ((typed and rng.ndim == 0) or (plain and rng.ndim == 1)):
        raise ConfigError(f"rng: must be one key, such as jax.random.key(0), is {show(rng)}")


def require_plain(method: Method, params: Mapping[str, Any]) -> None:
    """Raise an error if a tree already has adapter leaves of any method.

    Raises:
        ConfigError: It has; the message names a module.
    """
    found = next((path for path, _ in paths.walk(params) if path[-1] in MARKERS), None)
    if found is not None:
        own = any(found[-1] in (*part.leaves.site, *part.leaves.root) for part in method.parts())
        where, name = (
            paths.text(found[:-1]) or "the root of the tree",
            method.name if own else MARKERS[found[-1]].name,
        )
        both = (
            ""
            if own
            else f"; to use both {name} and {method.name}, rewrite the base with jaxpeft.Mixed"
        )
        raise ConfigError(
            f"{where} already has {name} leaves; rewrite the base, or merge first{both}"
        )
