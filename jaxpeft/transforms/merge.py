"""`jaxpeft.merge`: fold the adapters of a method into the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jaxpeft import kernels
from jaxpeft.core import paths, targets
from jaxpeft.core.folding import can_fold, fold_site, parts_that_add
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import (
    adapted_modules,
    adapter_names,
    add_leaves,
    chosen_sites,
    require_numbers,
)
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.methods import MARKERS


def merge(
    method: Method,
    params: Mapping[str, Any],
    *,
    sites: Sequence[Site] | None = None,
    tied: bool | None = None,
) -> Tree:
    """Fold the adapter into the base. The result has the structure of the tree before `rewrite`.

    Args:
        method: the method that rewrote `params`. Its options are checked by the leaves that they
            imply; the scaling is read from the tree, so a different `alpha` or `rslora` has no
            effect.
        params: the rewritten tree.
        sites: the sites given to `rewrite` for a model that is not jaxpeft's own.
        tied: whether the embedding is tied to the language-model head; None to detect this for a
            decoder of jaxpeft's own.

    Returns:
        The tree without adapter leaves; sums are computed in float32 and cast once to the base
        leaf's dtype.

    Raises:
        ConfigError: The tree has no leaves of this method (it was never rewritten, or is already
            merged), or leaves that do not match the method's options; or the method cannot be
            merged.
    """
    require_numbers(params)
    tree = paths.build(list(paths.walk(params)))
    adding = parts_that_add(method, MARKERS)
    for part in adding:
        if not can_fold(type(part)):
            raise ConfigError(
                f"{part.name} cannot be merged: its computation cannot be expressed by plain"
                " weights; keep the adapter"
            )
        if not adapted_modules(part, params):
            raise ConfigError(
                f"nothing to merge: no module has {part.name} leaves (already merged, or never"
                " rewritten)"
            )
    _require_made_by(method, params, sites)
    if tied or (tied is None and sites is None and _without_head(params)):
        _require_untied(adding, params)
    roots = {key: tree.pop(key) for part in adding for key in part.leaves.root if key in tree}
    names = adapter_names(method)
    for site in targets.find_sites(params, targets.KINDS) if sites is None else sites:
        node = paths.get(tree, site.path)
        folded = fold_site(adding, site, node, roots)
        for key in names & node.keys():
            del node[key]
        node.update(folded)
    return tree


def _require_made_by(
    method: Method, params: Mapping[str, Any], sites: Sequence[Site] | None
) -> None:
    """Raise an error if the adapter leaves differ in paths or shapes from those of a method.

    Zero-padded leaves, from an adapter stack with several ranks, are accepted.

    Raises:
        ConfigError: A leaf differs; it names the first one.
        TargetError: The method's targets match no sites of this tree.
    """
    names = {
        name
        for kind in (*MARKERS.values(), *map(type, method.parts()))
        for name in (*kind.leaves.names, *kind.leaves.root)
    }
    held = {path: leaf for path, leaf in paths.walk(params) if path[-1] in names}
    base = paths.build([(path, leaf) for path, leaf in paths.walk(params) if path not in held])

    def rewrite_again() -> Tree:
        tree = paths.build(list(paths.walk(base)))
        for part in method.parts():
            add_leaves(part, base, tree, jax.random.key(0), chosen_sites(part, base, sites))
        return tree

    wanted = {
        path: leaf for path, leaf in paths.walk(jax.eval_shape(rewrite_again)) if path[-1] in names
    }
    fix = f"use the {method.name} that rewrote the tree, with the same options and targets"
    for path in sorted(held.keys() | wanted.keys()):
        if path not in wanted:
            raise ConfigError(
                f"{paths.text(path)}: {method.name} with these options does not have this leaf;"
                f" {fix}"
            )
        if path not in held:
            raise ConfigError(
                f"{paths.text(path)}: is missing, but {method.name} with these options has it;"
                f" {fix}"
            )
        shape, own = wanted[path].shape, held[path]
        if shape != own.shape and not (method.leaves.rank_pads and _is_padded(own, shape)):
            raise ConfigError(
                f"{paths.text(path)}: has shape {list(own.shape)}, but {method.name} with these"
                f" options has {list(shape)}; {fix}"
            )


def _is_padded(leaf: Any, shape: tuple[int, ...]) -> bool:
    """Return whether a leaf has the given shape apart from zero padding; True if it is traced."""
    if len(shape) != leaf.ndim or any(n > m for n, m in zip(shape, leaf.shape, strict=True)):
        return False
    if isinstance(leaf, jax.core.Tracer):
        return True
    inside = tuple(slice(n) for n in shape)
    return int(jnp.count_nonzero(leaf)) == int(jnp.count_nonzero(leaf[inside]))


def _without_head(params: Mapping[str, Any]) -> bool:
    """Return whether a tree is a decoder without a head, that is, with a tied one."""
    found = [path for path, _ in paths.walk(params)]
    return any(path[-2:-1] == ("embed_tokens",) for path in found) and not any(
        path[0] == "lm_head" or paths.is_head(path) for path in found
    )


def _require_untied(adding: Sequence[Method], params: Mapping[str, Any]) -> None:
    """Raise an error if an adapter changes a tied embedding for token lookup but not in the head.

    Raises:
        ConfigError: It does; the message names the embedding.
    """
    for path, _ in paths.walk(params):
        for part in adding:
            lookups = (
                part.leaves.site
                and path[-1] == part.leaves.site[0]
                and "attend" not in part.sites.hooks
            )
            if lookups and kernels.form_of(paths.get(params, path[:-1])) == "embedding":
                raise ConfigError(
                    f"{paths.text(path[:-1])} is tied to the language-model head, but {part.name}"
                    " changes it only for token lookup, so one matrix is not enough;"
                    " use `python -m jaxpeft.export --to merged`, which unties the head, or"
                    " tied=False if the model has no such head"
                )
