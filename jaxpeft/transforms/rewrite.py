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
    """Inject adapters: add the method's leaves to a parameter tree, and make every trainable leaf
    float32.

    A leaf depends on `rng` and on its site's Hugging Face name only, so scanned and unrolled layers
    start from the same numbers. Where a stacked site is adapted in some layers only, or with other
    shapes, the other entries are exact zeros, which stay zero in training.

    Args:
        method: what to add.
        params: the base; nothing of it is changed or copied but the trainable leaves that are not
            float32 yet.
        rng: a key.
        sites: of a model that is not jaxpeft's own, as `jaxpeft.find_sites` gives them; None to
            find them in the tree.

    Raises:
        TargetError: the targets do not name sites of this model.
        ConfigError: the tree is already rewritten, by this method or another, a leaf is no array of
            numbers, nothing would be trained, or a stacked bias would be trained for the sake of
            some of its layers; or `rng` is no key.
    """
    require_numbers(params)
    _require_key(rng)
    require_plain(method, params)
    return add_adapter(method, params, rng, sites)


def _require_key(rng: Any) -> None:
    """Refuse what is not one key of `jax.random`, typed or of numbers.

    Raises:
        ConfigError: showing it.
    """
    typed = isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    plain = isinstance(rng, jax.Array | np.ndarray) and rng.dtype == np.uint32
    if not ((typed and rng.ndim == 0) or (plain and rng.ndim == 1)):
        raise ConfigError(f"rng: must be one key, such as jax.random.key(0), is {show(rng)}")


def require_plain(method: Method, params: Mapping[str, Any]) -> None:
    """Refuse a tree that holds the leaves of an adapter, whatever method they are of.

    Raises:
        ConfigError: naming a module that does.
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
            else f"; for {name} and {method.name} at once, rewrite the base with jaxpeft.Mixed"
        )
        raise ConfigError(
            f"{where} already holds {name} leaves; rewrite the base, or merge first{both}"
        )
