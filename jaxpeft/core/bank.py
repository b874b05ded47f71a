"""Adapter stacks: several adapters in one tree, whose adapter leaves have an adapter axis.

The adapter is an argument of `jaxpeft.apply`, one index for the batch or one per row (multi-adapter
batch), so switching adapters does not recompile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.rewriting import adapter_names, trainable_mask
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError


def bank(
    adapters: Sequence[tuple[Method, Mapping[str, Any]]], *, sites: Sequence[Site] | None = None
) -> Tree:
    """Stack adapters of one base into one tree.

    A leaf `[...]` becomes `[n, ...]`, with the new axis after the layer axis if there is one.
    Adapters of lower rank are padded with zeros.

    Args:
        adapters: a `(method, params)` pair for each adapter, all with the same method and base.
        sites: the sites given to `rewrite` for a model that is not jaxpeft's own; they determine
            which leaves have layer axes.

    Returns:
        A tree for `jaxpeft.apply(model, tree, ..., adapter=i)`.

    Raises:
        ConfigError: The methods or their sites differ, or the adapters trained leaves of the base
            to different values.
    """
    if not adapters:
        raise ConfigError("bank: needs at least one adapter")
    first, params = adapters[0]
    kinds = {method.name for method, _ in adapters}
    if len({_kinds(method) for method, _ in adapters}) > 1:
        raise ConfigError(
            f"bank: the adapters are of different methods ({', '.join(sorted(kinds))}); make an"
            " adapter stack of each"
        )
    leaves = [dict(paths.walk(tree)) for _, tree in adapters]
    for i, other in enumerate(leaves):
        odd = sorted(leaves[0].keys() ^ other.keys())
        if odd:
            raise ConfigError(
                f"bank: adapters 0 and {i} have different leaves, such as {paths.text(odd[0])}; use"
                " the same targets and options for all"
            )
    require_same_base(adapters)
    names = adapter_names(first)
    out: list[tuple[Path, Any]] = []
    for path, leaf in paths.walk(params):
        if path[-1] in names:
            found = _pad([other[path] for other in leaves], path, first)
            out.append((path, jnp.stack(found, axis=_layer_axes(path, sites))))
        else:
            out.append((path, leaf))
    return paths.build(out)


def pick(
    method: Method, tree: Mapping[str, Any], i: int, *, sites: Sequence[Site] | None = None
) -> Tree:
    """Return the tree of one adapter of a stack, including its zero padding.

    Args:
        method: method of one of the adapters.
        tree: the adapter stack.
        i: index of the adapter.
        sites: the sites given to `bank`.
    """
    names = adapter_names(method)

    def one(path: Path, leaf: Any) -> Any:
        if path[-1] not in names:
            return leaf
        return leaf[(slice(None),) * _layer_axes(path, sites) + (i,)]

    return paths.map_with_path(one, tree)


def _layer_axes(path: Path, sites: Sequence[Site] | None) -> int:
    """Return the number of layer axes of a leaf."""
    if sites is None:
        return len(paths.stacks(path))
    return next((len(site.layers) for site in sites if site.path == path[:-1]), 0)


def _kinds(method: Method) -> tuple[str, ...]:
    return tuple(
        (part.leaves.site or part.leaves.root or (part.name,))[0] for part in method.parts()
    )


def require_same_base(adapters: Sequence[tuple[Method, Mapping[str, Any]]]) -> None:
    """Raise an error if adapters trained the same leaf of the base to different values.

    Raises:
        ConfigError: They did; it names the leaf.
    """
    first = dict(paths.walk(adapters[0][1]))
    for i, (method, tree) in enumerate(adapters):
        names = adapter_names(method)
        own = dict(paths.walk(tree))
        trained = [
            path
            for path, flag in paths.walk(trainable_mask(method, tree))
            if flag and path[-1] not in names
        ]
        changed = [
            path for path in trained if path not in first or not _equal(first[path], own[path])
        ]
        if changed:
            raise ConfigError(
                f"{paths.text(changed[0])} is a leaf of the base that adapters 0 and {i} trained to"
                " different values; only adapter leaves can be stacked"
            )


def _equal(a: Any, b: Any) -> bool:
    return a is b or np.array_equal(np.asarray(a), np.asarray(b))


def _pad(found: Sequence[Any], path: Path, method: Method) -> list[Any]:
    shapes = {leaf.shape for leaf in found}
    if len(shapes) == 1:
        return list(found)
    if not (method.leaves.rank_pads and hasattr(method, "rank_pattern")):
        raise ConfigError(
            f"bank: {paths.text(path)} has the shapes"
            f" {' and '.join(str(list(s)) for s in sorted(shapes))}, which {method.name} cannot"
            " pad; give all adapters the same options"
        )
    shape = tuple(max(sizes) for sizes in zip(*(leaf.shape for leaf in found), strict=True))
    return [
        jnp.pad(leaf, [(0, n - m) for n, m in zip(shape, leaf.shape, strict=True)])
        for leaf in found
    ]
