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
    """Fold the adapter into the base, which gives plain params: the inverse of `rewrite` in
    structure.

    Args:
        method: the method that rewrote `params`. Its options are compared by the leaves that they
            make; the scaling is that of the tree's own leaf, so another `alpha` or `rslora` than it
            was rewritten with changes nothing.
        params: the rewritten tree.
        sites: of a model that is not jaxpeft's own, as given to `rewrite`.
        tied: whether the embedding is the language-model head as well; None for a decoder of
            jaxpeft's own that has no head.

    Returns:
        The tree without adapter leaves; sums are made in float32 and cast to the base leaf's dtype
        once.

    Raises:
        ConfigError: the tree holds no leaf of this method: it was never rewritten, or is merged
            already; or leaves that the method with these options does not make; or the method
            computes what no plain leaf computes.
    """
    require_numbers(params)
    tree = paths.build(list(paths.walk(params)))
    adding = parts_that_add(method, MARKERS)
    for part in adding:
        if not can_fold(type(part)):
            raise ConfigError(
                f"{part.name} cannot be merged: no plain weights compute what it does; keep the"
                " adapter"
            )
        if not adapted_modules(part, params):
            raise ConfigError(
                f"nothing to merge: no module holds {part.name} leaves (merged already, or never"
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
    """Refuse a tree whose adapter leaves are not those that a method makes, by their paths and
    shapes.

    Larger ones are those of a bank, which holds adapters of several ranks, where what they have
    more is zeros.

    Raises:
        ConfigError: naming the first leaf that is not.
        TargetError: the method's targets do not name sites of this tree.
    """
    names = {
        name
        for kind in (*MARKERS.values(), *map(type, method.parts()))
        for name in (*kind.leaves.names, *kind.leaves.root)
    }
    held = {path: leaf for path, leaf in paths.walk(params) if path[-1] in names}
    base = paths.build([(path, leaf) for path, leaf in paths.walk(params) if path not in held])

    def made() -> Tree:
        tree = paths.build(list(paths.walk(base)))
        for part in method.parts():
            add_leaves(part, base, tree, jax.random.key(0), chosen_sites(part, base, sites))
        return tree

    wanted = {path: leaf for path, leaf in paths.walk(jax.eval_shape(made)) if path[-1] in names}
    fix = f"merge with the {method.name} that rewrote the tree, its options and targets the same"
    for path in sorted(held.keys() | wanted.keys()):
        if path not in wanted:
            raise ConfigError(
                f"{paths.text(path)}: {method.name} with these options does not make this leaf;"
                f" {fix}"
            )
        if path not in held:
            raise ConfigError(
                f"{paths.text(path)}: {method.name} with these options makes this leaf, and it is"
                f" not there; {fix}"
            )
        shape, own = wanted[path].shape, held[path]
        if shape != own.shape and not (method.leaves.rank_pads and _is_padded(own, shape)):
            raise ConfigError(
                f"{paths.text(path)}: has shape {list(own.shape)}, and {method.name} with these"
                f" options makes {list(shape)}; {fix}"
            )


def _is_padded(leaf: Any, shape: tuple[int, ...]) -> bool:
    """Return whether a leaf is one of the given shape and zeros behind it; of a traced one it is
    not known, and so it may.
    """
    if len(shape) != leaf.ndim or any(n > m for n, m in zip(shape, leaf.shape, strict=True)):
        return False
    if isinstance(leaf, jax.core.Tracer):
        return True
    inside = tuple(slice(n) for n in shape)
    return int(jnp.count_nonzero(leaf)) == int(jnp.count_nonzero(leaf[inside]))


def _without_head(params: Mapping[str, Any]) -> bool:
    """Return whether a tree is that of a decoder which has no head but its embedding."""
    found = [path for path, _ in paths.walk(params)]
    return any(path[-2:-1] == ("embed_tokens",) for path in found) and not any(
        path[0] == "lm_head" or paths.is_head(path) for path in found
    )


def _require_untied(adding: Sequence[Method], params: Mapping[str, Any]) -> None:
    """Refuse an adapter that changes an embedding where tokens are looked up, and not where it is
    the head.

    Raises:
        ConfigError: naming the embedding.
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
                    f"{paths.text(path[:-1])} is the language-model head as well, and {part.name}"
                    " changes it where tokens are looked up alone, which no one matrix computes:"
                    " `python -m jaxpeft.export --to merged` gives the head a copy of its own; for"
                    " a model that has no such head, give tied=False"
                )
